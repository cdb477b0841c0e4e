import io
from dataclasses import replace

import numpy as np
import pandas as pd
import PIL.Image
import pytest

from gapprobe.study.gap import mcnemar, measure_gap
from gapprobe.study.outcomes import by_judge, counted, judge_trials, runnable
from gapprobe.tasks.examples import Example
from gapprobe.tasks.images import ImageFile, ImageSet
from gapprobe.tasks.prompts import PromptTemplate
from gapprobe.tasks.questions import Entity, Question, QuestionSet
from gapprobe.tasks.settings import Trial, build_trials

QUESTIONS = QuestionSet(
    (Entity("can", ("tin",)),),
    (Question("can", "made-of", "What is a {entity} made of?", "metal"),),
    reference="the object in the image",
    identify="What is it?",
)
TEMPLATE = PromptTemplate("", (), "", "{question}", "", "#")
RIGHT = {"identification": "a tin", "full_information": "metal", "visual": "metal", "text_only": "metal"}


def build(images: int = 1) -> list[Trial]:
    buffer = io.BytesIO()
    PIL.Image.new("L", (4, 4)).save(buffer, format="PNG")
    files = tuple(ImageFile(f"can{i}", data=buffer.getvalue()) for i in range(images))
    return build_trials(QUESTIONS, ImageSet({"can": files}), TEMPLATE, images_per_question=images)


def name(example: Example) -> str:
    return f"{example.columns['setting']} {example.text} {example.image and example.image.name}"


def judged(trials: list[Trial], answers: dict[str, str], errors: dict[str, str] | None = None) -> pd.DataFrame:
    calls = {name(call): call.columns["setting"] for trial in trials for call in trial.calls}
    rows = pd.DataFrame(
        {
            "answer": [answers.get(setting, "wrong") for setting in calls.values()],
            "error": [(errors or {}).get(setting) for setting in calls.values()],
        },
        index=list(calls),
    )
    return judge_trials(trials, name, rows, by_judge("sound", QUESTIONS))


def test_a_trial_counts_when_it_is_known_seen_and_not_guessed() -> None:
    outcome = judged(build(), RIGHT).iloc[0]
    assert outcome["excluded"] == ""
    assert outcome["visual"]
    assert outcome["text_only"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"identification": "a cat"}, "identification wrong"),
        ({"full_information": "wood"}, "full information wrong"),
        ({"guess_control": "metal"}, "guess control right"),
        ({"identification": "a cat", "guess_control": "metal"}, "identification wrong"),
    ],
)
def test_a_trial_that_does_not_count_says_why(change: dict[str, str], reason: str) -> None:
    outcomes = judged(build(), RIGHT | change)
    assert outcomes["excluded"].tolist() == [reason]
    assert len(counted(outcomes)) == 0
    assert len(runnable(outcomes)) == 1


def test_a_trial_that_could_not_be_run_is_neither_right_nor_counted() -> None:
    outcomes = judged(build(), RIGHT, {"visual": "image can0 is empty"})
    assert outcomes["excluded"].tolist() == ["could not be run"]
    assert not outcomes["visual"].iloc[0]
    assert len(runnable(outcomes)) == 0


def test_an_alias_of_the_answer_is_right() -> None:
    trial = build()[0]
    known = replace(trial.question, aliases=("steel",))
    told = RIGHT | {"visual": "It is steel."}
    assert not judged([trial], told)["visual"].iloc[0]
    assert judged([replace(trial, question=known)], told)["visual"].iloc[0]


def test_the_majority_over_trivial_images_decides_text_only() -> None:
    trial = build()[0]
    answers = ["metal", "wood", "Metal.", "glass"]
    rows = {name(call): "metal" for call in trial.calls}
    rows |= dict(zip([name(call) for call in trial.text_only], answers, strict=True))
    rows[name(trial.identification)] = "can"
    table = pd.DataFrame({"answer": rows, "error": None})
    outcome = judge_trials([trial], name, table, by_judge("sound", QUESTIONS)).iloc[0]
    assert outcome["text_only"]
    assert outcome["text_only_answer"] == "metal"
    assert outcome["text_only_row"] == name(trial.text_only[0])


def test_the_gap_is_text_only_minus_visual_on_the_trials_that_count() -> None:
    table = pd.DataFrame(
        {
            "question": [f"q{i % 5}" for i in range(40)],
            "relation": ["r"] * 40,
            "entity": [f"e{i % 4}" for i in range(40)],
            "image": [f"i{i % 8}" for i in range(40)],
            "identification": [True] * 40,
            "full_information": [True] * 40,
            "guess_control": [False] * 40,
            "text_only": [i % 10 != 0 for i in range(40)],
            "visual": [i % 4 == 0 for i in range(40)],
            "excluded": ["identification wrong"] * 8 + [""] * 32,
        }
    )
    result = measure_gap(table, replicates=200, seed=0)
    told = sum(i % 10 != 0 for i in range(8, 40)) / 32
    assert result["settings"]["text_only"]["accuracy"] == pytest.approx(told)
    assert result["settings"]["visual"]["accuracy"] == pytest.approx(0.25)
    assert result["gap"]["absolute"]["value"] == pytest.approx(told - 0.25)
    assert result["gap"]["relative"]["value"] == pytest.approx((told - 0.25) / told)
    low, high = result["gap"]["absolute"]["ci"]
    assert low < told - 0.25 < high
    by = result["gap"]["ci_by"]
    for start, end in by.values():
        assert start < told - 0.25 < end
    # Whether the visual answer is right hangs on the entity alone here: few entities, a wide interval.
    assert by["entity"][1] - by["entity"][0] > by["image"][1] - by["image"][0]
    shown, named = {i for i in range(8, 40) if i % 4 == 0}, {i for i in range(8, 40) if i % 10}
    assert result["gap"]["mcnemar"]["only_told"] == len(named - shown)
    assert result["gap"]["mcnemar"]["only_shown"] == len(shown - named)
    assert result["counted"] == {
        "n": 32,
        "trials": 40,
        "excluded": {
            "could not be run": 0,
            "identification wrong": 8,
            "full information wrong": 0,
            "guess control right": 0,
        },
    }


def test_mcnemars_test_is_the_binomial_of_the_trials_that_differ() -> None:
    told, shown = np.array([1.0] * 9 + [0.0] * 11), np.array([0.0] * 8 + [1.0] * 3 + [0.0] * 9)
    found = mcnemar(told, shown)
    assert (found["only_told"], found["only_shown"]) == (8, 2)
    # Two-sided: 2 · P(Bin(10, ½) <= 2) = 2 · (1 + 10 + 45) / 1024.
    assert found["p"] == pytest.approx(2 * 56 / 1024)
    assert mcnemar(told, told)["p"] is None
