"""The published recipe and the sound one on studies whose truth is known."""

from pathlib import Path

import pytest
from scipy.stats import norm

from gapprobe.study import analysis
from gapprobe.study.recipe import published_recipe
from tests.study.planted import config, excluding_chance, planted


def test_what_only_the_question_tells_inflates_the_published_recipe(tmp_path: Path) -> None:
    """Nothing in the residuals is of the outcome: a question's own vector is remembered, with the rate of its answers.

    Questions are answered right with probability 0.9 or 0.1, so who remembers them all reaches 0.9.
    """
    store, table = planted(tmp_path / "s", questions=200, images=10, width=256, identity=3.0, rate=0.9)
    found = published_recipe(store, table, config())
    assert found["layers"] == [1]
    leak = found["leakage"]["question"]
    assert leak["published"]["ci"][0] > 0.5
    assert leak["grouped"]["ci"][0] < 0.5 < leak["grouped"]["ci"][1]
    assert leak["difference"]["ci"][0] > 0
    # One fifth of the rows, as published, lies where all rows held out in turn lie.
    assert leak["published"]["ci"][0] - 0.05 < found["accuracy"][0] < leak["published"]["ci"][1] + 0.05
    assert leak["difference"]["value"] == pytest.approx(leak["published"]["accuracy"] - leak["grouped"]["accuracy"])
    verdict = analysis.probe(store, table, config(), progress=False)["verdict"]
    assert verdict["random"]["probe"]["ci"][0] > 0.5
    assert verdict["question"]["probe"]["ci"][0] < 0.5 < verdict["question"]["probe"]["ci"][1]


@pytest.mark.parametrize("strength", [0.75, 1.5])
def test_a_planted_direction_is_recovered_at_its_strength(tmp_path: Path, strength: float) -> None:
    store, table = planted(tmp_path / "s", questions=100, images=20, width=8, strength=strength)
    found = analysis.probe(store, table, config(), progress=False)
    best = norm.cdf(strength / 2**0.5)  # of any probe, in the population
    for split in ("image", "entity", "question", "random"):
        low, high = found["verdict"][split]["probe"]["ci"]
        assert low < best < high
        assert high - low < 0.1
        assert set(found["verdict"][split]["layers"]) == {2}
    leak = published_recipe(store, table, config())["leakage"]
    # At the layers that the published code keeps there is nothing, and nothing leaks.
    assert leak["question"]["difference"]["ci"][0] < 0 < leak["question"]["difference"]["ci"][1]


def test_studies_with_nothing_in_them_seldom_find_something() -> None:
    """40 of the 200 that `python -m tests.study.planted` runs; docs/study.md has its figures for every split."""
    # P(Bin(40, 0.05) > 6) = 0.003.
    assert excluding_chance(40, "question") <= 6


def test_groups_that_are_too_few_leave_the_others(tmp_path: Path) -> None:
    store, table = planted(tmp_path / "s", questions=12, images=10, width=4)
    found = published_recipe(store, table.assign(entity=["a", "b"] * 60), config())
    assert list(found["by"]) == ["random", "question"]
    assert list(found["leakage"]) == ["question"]


def test_what_cannot_be_fitted_says_why(tmp_path: Path) -> None:
    store, table = planted(tmp_path / "s", questions=4, images=2, width=4)
    none = published_recipe(store, table.assign(full_information=False), config())
    assert none["why_not"] == "no trial has a right full-information answer"
    few = published_recipe(store, table, config())
    assert few["accuracy"] is None
    assert few["why_not"]
