"""What a study makes of a store, on residuals that are planted."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from gapprobe.demo import FOLDER
from gapprobe.study import analysis
from gapprobe.study.config import ProbeConfig, StudyConfig, load_config
from gapprobe.study.selecting import measure_selective

LAYERS = 3


def outcomes(n: int, *, entities: int = 6, right: Callable[[int], bool] = lambda i: i % 2 == 0) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "visual_row": [f"row{i}" for i in range(n)],
            "visual": [right(i) for i in range(n)],
            "full_information": [True] * n,
            "excluded": [""] * n,
            "relation": [f"r{i // 2 % 5}" for i in range(n)],
            "entity": [f"e{i // 2 % entities}" for i in range(n)],
            "question": [f"r{i // 2 % 5}/e{i // 2 % entities}" for i in range(n)],
            "image": [f"image{i // 4}" for i in range(n)],
        },
        index=[f"trial{i}" for i in range(n)],
    )


def config(**probe: object) -> StudyConfig:
    settings = ProbeConfig(**({"replicates": 100, "folds": 3} | probe))
    return load_config(FOLDER / "llava.toml").model_copy(update={"probe": settings})


def planted(store_of: Callable, table: pd.DataFrame, strength: float) -> object:
    """Return a store whose last layer tells right from wrong with `strength` standard deviations."""
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((LAYERS, len(table), 4))).float()
    noise[-1, :, 0] += strength * torch.from_numpy(table["visual"].to_numpy(dtype=np.float32))
    return store_of(noise, table["visual_row"].tolist())


def test_a_planted_direction_is_found_at_its_layer_and_beats_the_controls(store_of: Callable) -> None:
    table = outcomes(240)
    result = analysis.probe(planted(store_of, table, 3.0), table, config(), progress=False)
    assert result["image"]["auc"][-1] > 0.95
    assert max(result["image"]["auc"][:-1]) < 0.7
    for split in ("image", "entity", "question", "random"):
        assert result["verdict"][split]["beats"]
        assert set(result["verdict"][split]["layers"]) == {2}


def test_without_a_direction_the_probe_does_not_beat_its_controls(store_of: Callable) -> None:
    table = outcomes(240)
    result = analysis.probe(planted(store_of, table, 0.0), table, config(), progress=False)
    assert not any(verdict["beats"] for verdict in result["verdict"].values())


def test_a_split_that_cannot_be_cut_leaves_the_others(store_of: Callable) -> None:
    table = outcomes(120, entities=2)
    result = analysis.probe(planted(store_of, table, 3.0), table, config(), progress=False)
    assert result["verdict"]["entity"] is None
    assert "2 groups cannot fill 3 folds" in result["entity"]["why_not"]
    assert result["entity"]["auc"] == [None] * LAYERS
    assert result["verdict"]["image"]["beats"]
    assert list(result["controls_by_split"]) == ["image", "question", "random"]


@pytest.mark.parametrize(
    ("n", "right", "words"), [(60, True, "all 60 visual answers are right"), (0, False, "no trial counts")]
)
def test_a_study_without_two_outcomes_says_why_there_is_no_probe(
    store_of: Callable, n: int, right: bool, words: str
) -> None:
    everything = outcomes(60)
    store = planted(store_of, everything, 0.0)
    table = outcomes(60, right=lambda _: right).head(n)
    result = analysis.probe(store, table, config(), progress=False)
    assert words in result["why_not"]
    assert result["image"]["auc"] == [None] * LAYERS
    assert result["scores"] is None
    left_out = measure_selective(store, table, None, None, config())
    assert left_out["why_not"]
    assert left_out["probe"]["risk"] is None


def test_a_residual_that_is_no_number_costs_the_probe_and_not_the_study(store_of: Callable) -> None:
    table = outcomes(120)
    residuals = torch.randn(LAYERS, 120, 4, generator=torch.Generator().manual_seed(0))
    residuals[1, 7] = torch.nan
    result = analysis.probe(store_of(residuals, table["visual_row"].tolist()), table, config(), progress=False)
    assert "layer 1: 1 rows hold NaN or infinity at last_input, such as row7" in result["why_not"]
    assert result["verdict"] == dict.fromkeys(("image", "entity", "question", "random"))
