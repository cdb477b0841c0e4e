import pytest

from gapprobe.study.headline import family_name, headline


def family(
    low: float = 0.2, high: float = 0.4, *, beats: bool = False, control: str | None = "question_only", n: int = 300
) -> dict:
    return {
        "model": {"family": "m"},
        "counted": {"n": n},
        "settings": {"text_only": {"accuracy": 0.98}, "visual": {"accuracy": 0.68}},
        "gap": {"absolute": {"value": (low + high) / 2, "ci": [low, high]}},
        "probe": {
            "why_not": "No probe was fitted: too few.",
            "verdict": {
                "image": {
                    "probe": {"auc": 0.81},
                    "control": control,
                    "control_auc": control and {"auc": 0.79},
                    "beats": beats,
                }
            },
        },
    }


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.2, 0.4, "a gap of 30 points [20, 40]"), (-0.1, 0.3, "no gap beyond chance"), (-0.4, -0.2, "the reverse, -30")],
)
def test_the_gap_is_called_a_gap_only_beyond_its_interval(low: float, high: float, words: str) -> None:
    assert words in headline({"m": family(low, high)})


def test_the_probe_is_said_to_beat_its_control_only_when_it_does() -> None:
    assert "does not beat its best control, a predictor that sees only the question (0.79)" in headline({"m": family()})
    assert "(AUC 0.81) beats its best control" in headline({"m": family(beats=True)})
    assert "no control to compare" in headline({"m": family(control=None)})


@pytest.mark.parametrize(
    ("low", "words"),
    [
        (0.2, "and 50% when no entity is on both sides of the split: 30 points [20, 40] of it are leakage."),
        (-0.1, "foresees 80% of the outcomes; no leakage beyond chance shows in that."),
    ],
)
def test_the_leakage_of_the_published_recipe_is_a_headline(low: float, words: str) -> None:
    def leak(value: float, low: float) -> dict:
        return {
            "published": {"accuracy": 0.8},
            "grouped": {"accuracy": 0.8 - value},
            "difference": {"value": value, "ci": [low, 0.4]},
        }

    told = family() | {"recipe": {"leakage": {"question": leak(0.1, 0.05), "entity": leak(0.3, low)}}}
    assert words in headline({"m": told})
    assert headline({"m": family() | {"recipe": {"leakage": {}}}}) == headline({"m": family()})


def test_a_study_without_numbers_says_so() -> None:
    empty = family(n=0)
    empty["probe"]["verdict"] = {"image": None}
    assert headline({"m": empty}) == (
        "m: no trial counts, so there is no gap to measure. No probe was fitted: too few."
    )


def test_a_study_is_called_by_its_model_where_its_name_says_nothing_more() -> None:
    assert family_name("llava", {"model": {"family": "llava"}}) == "LLaVA"
    assert family_name("digits", {"model": {"family": "instructblip"}}) == "digits (InstructBLIP)"
    assert family_name("new", {"model": {"family": "new"}}) == "new"
