"""Options and their places, and what an answer chooses."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapprobe.demo import FOLDER
from gapprobe.errors import DataError
from gapprobe.tasks.choices import (
    LETTERS,
    Choices,
    chosen_by_log_prob,
    chosen_either,
    chosen_letter,
    chosen_option,
    make_choices,
)
from gapprobe.tasks.normal import find
from gapprobe.tasks.questions import Entity, Question, load_questions

CITIES = ("London", "Paris", "York", "New York")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(b)", "B"),
        ("[B]", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("B) Paris", "B"),
        ("B. A dog", "B"),
        ("B: Paris", "B"),
        ("Answer: B", "B"),
        ("answer is (B).", "B"),
        ("The correct answer is option B", "B"),
        ("The answer is B because it is", "B"),
        ("I choose option D, I think", "D"),
        ("A. A dog", "A"),
        ("B. B", "B"),
        ("A or B", None),
        ("Answer: A or B", None),
        ("Answer: (A) and (B)", None),
        ("A, B", None),
        ("A. Paris B. London", None),
        ("E", None),
        ("(F)", None),
        ("A dog", None),
        ("The answer is a dog", None),
        ("I do", None),
        ("Bee", None),
        ("AB", None),
        ("", None),
        ("?", None),
    ],
)
def test_the_letter_that_an_answer_gives(answer: str, letter: str | None) -> None:
    assert chosen_letter(answer, CITIES) == (None if letter is None else LETTERS.index(letter))


FORMS = ["{}", "({})", "{}.", "{}) Paris", "Answer: {}", "the answer is {}.", "option {}"]


@given(st.sampled_from(FORMS), st.integers(2, 26), st.data())
def test_no_letter_is_favoured(form: str, options: int, data) -> None:
    option = data.draw(st.integers(0, options - 1))
    answer = form.format(LETTERS[option])
    assert chosen_letter(answer, ["x"] * options) == chosen_letter(answer.lower(), ["x"] * options) == option
    for unmarked in ("{} dog", "the answer is {} dog"):
        assert chosen_letter(unmarked.format(LETTERS[option]), ["x"] * options) is None


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("It is Paris.", "Paris"),
        ("new york", "New York"),
        ("York", "York"),
        ("York, not New York", None),
        ("Paris or London", None),
        ("Parisian", None),
        ("", None),
    ],
)
def test_the_option_that_an_answer_names(answer: str, option: str | None) -> None:
    assert chosen_option(answer, CITIES) == (None if option is None else CITIES.index(option))


def test_letter_and_option_must_not_differ() -> None:
    assert chosen_either("B) Paris", CITIES) == 1
    assert chosen_either("Paris", CITIES) == 1
    assert chosen_either("B", CITIES) == 1
    assert chosen_either("A) Paris", CITIES) is None
    assert chosen_either("no idea", CITIES) is None


def test_the_most_probable_option_and_no_other() -> None:
    assert chosen_by_log_prob(np.array([-3.0, -1.0, -2.0])) == 1
    assert chosen_by_log_prob(np.array([-np.inf, -1.0])) == 1
    assert chosen_by_log_prob(np.array([-1.0, -1.0, -2.0])) is None
    with pytest.raises(DataError, match="every option needs a number"):
        chosen_by_log_prob(np.array([-1.0, np.nan]))


@pytest.fixture(scope="module")
def facts() -> list[Question]:
    # Relations with at least four answers.
    relations = ("successor", "predecessor", "double")
    return [q for q in load_questions(FOLDER / "facts.toml").questions if q.relation in relations]


def test_the_gold_answer_stands_at_each_place_equally_often(facts: list[Question]) -> None:
    for options in (2, 3, 4, 5):
        for n in (len(facts), 7, 1, 0):
            made = make_choices(facts, options=options, seed=1)
            assert set(made) == {q.id for q in facts}
            distractors = {q.id: [f"wrong{i}" for i in range(options)] for q in facts}
            counts = Counter(c.right for c in make_choices(facts[:n], distractors, options=options).values())
            times = [counts[place] for place in range(options)]
            assert max(times) - min(times) <= 1


def test_options_are_the_answer_and_others_that_are_not(facts: list[Question]) -> None:
    for id_, choices in make_choices(facts, seed=3).items():
        question = next(q for q in facts if q.id == id_)
        assert choices.options[choices.right] == question.answer
        assert len(choices.options) == 4
        for a in choices.options:
            assert [b for b in choices.options if find(a, b) or find(b, a)] == [a]
        assert chosen_option(question.answer, choices.options) == choices.right
        assert chosen_letter(choices.letter, choices.options) == choices.right


def test_the_seed_decides(facts: list[Question]) -> None:
    assert make_choices(facts, seed=1) == make_choices(facts, seed=1)
    assert make_choices(facts, seed=1) != make_choices(facts, seed=2)


def test_distractors_that_are_right_are_passed_over() -> None:
    question = Question("UK", "capital", "What is the capital of {entity}?", "London", ("the City",))
    wrong = ["london", "City", "Greater London", "Paris", "PARIS", "Rome"]
    choices = make_choices([question], {question.id: wrong}, options=3)[question.id]
    assert sorted(o.casefold() for o in choices.options) == ["london", "paris", "rome"]
    with pytest.raises(DataError, match="capital/UK has 2 distractors .* needs 3"):
        make_choices([question], {question.id: wrong}, options=4)
    with pytest.raises(DataError, match="capital/UK has 0 distractors"):
        make_choices([question])
    with pytest.raises(DataError, match="27 options"):
        make_choices([question], options=27)


def test_a_question_with_its_options() -> None:
    assert Choices(("Rome", "London"), 1).ask("Capital?") == "Capital?\nA. Rome\nB. London"


def test_an_option_that_names_the_entity_would_give_it_away() -> None:
    four, eight = Entity("four"), Entity("eight")
    facts = [
        Question("four", "double", "What is twice {entity}?", "eight"),
        Question("eight", "double", "What is twice {entity}?", "sixteen"),
    ]
    wrong = {"double/four": ["four", "nine"], "double/eight": ["eight", "seven"]}
    found = make_choices(facts, wrong, entities=[four, eight], options=2)
    assert sorted(found["double/four"].options) == ["eight", "nine"]
    assert sorted(found["double/eight"].options) == ["seven", "sixteen"]
    with pytest.raises(DataError, match=r"double/four has 1 distractors .* do not name its entity, and needs 2"):
        make_choices(facts, wrong, entities=[four, eight], options=3)


def test_a_question_that_cannot_be_asked_so_is_left_out_or_refused() -> None:
    entities = [Entity("zero"), Entity("one")]
    french = [Question("zero", "french", "{entity} in French?", "zéro"), Question("one", "french", "{entity}?", "un")]
    wrong = {"french/zero": ["deux"], "french/one": ["deux"]}
    with pytest.raises(DataError, match="french/zero has an answer, 'zéro', that would name its entity"):
        make_choices(french, wrong, entities=entities, options=2)
    assert list(make_choices(french, wrong, entities=entities, options=2, leave_out=True)) == ["french/one"]
    assert make_choices(french, {}, entities=entities, options=2, leave_out=True) == {}
