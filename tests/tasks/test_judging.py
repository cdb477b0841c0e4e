import pytest

from gapprobe.tasks.judging import judge_published, judge_sound, majority
from gapprobe.tasks.normal import words


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("12", "1", False),
        ("It is 1.", "one", True),
        ("Twenty - five", "25", True),
        ("twenty five", "twenty-five", True),
        ("the Eiffel tower!", "Eiffel Tower", True),
        ("Eiffel", "Eiffel Tower", False),
        ("towering", "tower", False),
        ("", "England", False),
        ("ZÉRO", "zéro", True),
        ("twenty", "two", False),
        ("IV", "I", False),
    ],
)
def test_the_sound_judge_matches_whole_words(answer: str, gold: str, right: bool) -> None:
    assert judge_sound(answer, [gold]) is right


def test_the_published_rule_has_the_faults_that_the_sound_one_mends() -> None:
    assert judge_published("12", ["1"])
    assert judge_published("", ["England"])
    assert not judge_sound("12", ["1"])
    assert not judge_sound("", ["England"])


def test_an_alias_is_as_good_as_the_gold_answer() -> None:
    assert judge_sound("it is 4", ["four", "4"])


def test_words_keep_a_lone_article_so_that_the_answer_a_is_not_empty() -> None:
    assert words("A") == ["a"]
    assert words("an apple") == ["apple"]


def test_majority_counts_answers_that_mean_the_same_together() -> None:
    assert majority(["five", "four", "4", "Four."]) == "four"


def test_majority_of_a_tie_is_the_earliest() -> None:
    assert majority(["b", "a", "a", "b"]) == "b"
