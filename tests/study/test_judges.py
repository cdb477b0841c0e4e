import numpy as np
import pandas as pd
import pytest

from gapprobe.study.judges import DISAGREEMENTS, compare_judges
from gapprobe.tasks.settings import SETTINGS


def table(visual: list[bool]) -> pd.DataFrame:
    n = len(visual)
    columns: dict[str, object] = {
        "question": [f"q{i % 4}" for i in range(n)],
        "relation": ["r"] * n,
        "entity": [f"e{i % 4}" for i in range(n)],
        "image": [f"i{i}" for i in range(n)],
        "gold": ["12"] * n,
        "excluded": [""] * n,
    }
    for setting in SETTINGS:
        columns[setting] = visual if setting == "visual" else [setting != "guess_control"] * n
        columns[f"{setting}_answer"] = "1" if setting == "visual" else "12"
        # Told, all images share one call a question.
        told = setting in ("text_only", "guess_control")
        columns[f"{setting}_row"] = [f"{setting}{i % 4 if told else i}" for i in range(n)]
    return pd.DataFrame(columns)


def test_both_judges_stand_side_by_side_and_their_differences_can_be_read() -> None:
    strict, kind = table([False] * 40), table([True] * 30 + [False] * 10)
    found = compare_judges({"sound": strict, "published": kind}, replicates=100, seed=0)
    assert found["by_judge"]["sound"]["gap"]["value"] == pytest.approx(1.0)
    assert found["by_judge"]["published"]["gap"]["value"] == pytest.approx(0.25)
    # 40 visual and 40 full-information answers, and one of each question for the two trivial settings.
    assert found["answers"] == 88
    assert found["differ"] == 30
    assert found["agreement"][0]["agreement"] == pytest.approx(58 / 88)
    assert found["agreement"][0]["only_second"] == 30
    assert len(found["disagreements"]) == DISAGREEMENTS
    for row in found["disagreements"]:
        assert row["setting"] == "visual"
        assert (row["answer"], row["gold"], row["sound"], row["published"]) == ("1", "12", False, True)


def test_which_disagreements_are_given_is_the_seeds_to_say() -> None:
    tables = {"a": table([False] * 40), "b": table([True] * 40)}
    once, again, other = (compare_judges(tables, replicates=100, seed=s)["disagreements"] for s in (0, 0, 1))
    assert once == again != other


def test_no_trial_that_ran_leaves_nothing_to_compare() -> None:
    nothing = table([True] * 4).assign(excluded="could not be run")
    found = compare_judges({"a": nothing, "b": nothing}, replicates=100, seed=0)
    assert found["agreement"] == []
    assert found["by_judge"]["a"]["gap"]["value"] is None
    assert np.isfinite(found["answers"])
