"""Selective prediction as a study reports it, from planted confidences and drawn answers."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest

from gapprobe.demo import FOLDER
from gapprobe.selective import selective_report, selective_scores
from gapprobe.study.config import ProbeConfig, StudyConfig, load_config
from gapprobe.study.selecting import DELTA, RISKS, independent_rows, measure_selective

N = 200


def config() -> StudyConfig:
    return load_config(FOLDER / "llava.toml").model_copy(update={"probe": ProbeConfig(replicates=100)})


def planted() -> tuple[Any, pd.DataFrame, dict[str, Any]]:
    rng = np.random.default_rng(0)
    right = rng.random(N) < 0.7
    rows = [f"row{i}" for i in range(N)]
    outcomes = pd.DataFrame(
        {
            "visual_row": rows,
            "visual": right,
            "visual_answer": "yes",
            "excluded": "",
            "question": [f"q{i % 40}" for i in range(N)],
            "image": [f"i{i % 50}" for i in range(N)],
        }
    )
    log_probs = [list(rng.normal(1.5 * r - 2, 0.7, 3)) for r in right]
    store = SimpleNamespace(rows=pd.DataFrame({"answer_logprobs": log_probs}, index=rows))
    scores = {"split": "image", "probability": list(rng.beta(2 + 2 * right, 3)), "fold": [i % 5 for i in range(N)]}
    return store, outcomes, scores


def test_what_stands_in_the_results_is_what_the_report_of_selective_says() -> None:
    store, outcomes, scores = planted()
    found = measure_selective(cast(Any, store), outcomes, scores, None, config())
    right = outcomes["visual"].to_numpy()
    mean = np.array([np.mean(v) for v in store.rows["answer_logprobs"]])
    own = selective_scores(mean, np.array(scores["probability"]), right, np.array(scores["fold"]))
    alone = selective_report(own, right, replicates=100).table.set_index(["method", "measure"])["value"]
    told = {(m["method"], m["measure"]): m["value"] for m in found["measures"]}
    for key, value in alone.items():
        if not str(key[1]).startswith("phi"):  # its folds keep questions together, and there are none here
            assert told[key] == pytest.approx(value, nan_ok=True)
    assert {m["method"] for m in found["measures"]} == {"perplexity", "probe", "ensemble", "stacked"}
    assert found["stacked"]["aurc"] < found["probe"]["aurc"]
    assert all(len(m["ci"]) == 2 for m in found["differences"])
    assert "self_consistency" not in found


def test_drawn_answers_add_self_consistency_and_rows_without_any_are_left_out() -> None:
    store, outcomes, scores = planted()
    samples = {row: ["yes", "no", "Yes"] for row in outcomes["visual_row"]} | {"row3": [], "row5": ["no"]}
    found = measure_selective(cast(Any, store), outcomes, scores, samples, config())
    assert found["n"] == N - 1
    assert found["left_out"] == 1
    # All others agree twice in three; row 5 never.
    assert found["self_consistency"]["coverage"] == pytest.approx((N - 2) / (N - 1))


def test_guarantees_stand_on_rows_that_share_neither_question_nor_image() -> None:
    store, outcomes, scores = planted()
    apart = independent_rows(outcomes["question"], outcomes["image"], 0)
    chosen = outcomes[apart]
    assert chosen["question"].is_unique
    assert chosen["image"].is_unique
    # No other row could be added.
    for _, row in outcomes[~apart].iterrows():
        assert row["question"] in set(chosen["question"]) or row["image"] in set(chosen["image"])
    promises = measure_selective(cast(Any, store), outcomes, scores, None, config())["guarantees"]
    assert [(p["by"], p["risk"]) for p in promises] == [(by, risk) for risk in RISKS for by in ("sgr", "ltt")]
    for promise in promises:
        assert promise["n"] == apart.sum()
        assert promise["delta"] == DELTA
        assert promise["bound"] is None or promise["bound"] <= promise["risk"]
