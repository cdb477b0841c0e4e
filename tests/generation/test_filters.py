"""Each filter on pairs that it must drop and pairs that it must not, a language model's part played by a table.

What a real one makes of it stands in test_generating.
"""

from collections.abc import Iterator, Sequence

import pytest

from gapprobe.chat.base import Reply, Request
from gapprobe.chat.forms import Failed, YesOrNo, read, schema_of, structured
from gapprobe.generation.asking import Distractors, Proposed, ask_whether_unique
from gapprobe.generation.filters import FILTERS, Judge, Pair
from gapprobe.tasks.questions import Entity

TOWER, CAN = Entity("Eiffel Tower", ("iron lady",)), Entity("can")


class Table:
    """Says what is given for the first key that stands in a request; replies come in reverse order."""

    def __init__(self, **said: str | list[str]) -> None:
        self.said = said
        self.asked: list[Request] = []

    def ask(self, requests: Sequence[Request], *, progress: bool = False) -> Iterator[tuple[int, Reply]]:
        assert not progress
        for i, request in reversed(list(enumerate(requests))):
            self.asked.append(request)
            said = next((text for key, text in self.said.items() if key.replace("_", " ") in request.text), "yes")
            said = said.pop(0) if isinstance(said, list) else said
            yield i, Reply(error="HTTP 500") if said == "error" else Reply(said)


def pair(question: str, answer: str, entity: str = "Eiffel Tower") -> Pair:
    return Pair(entity, question, answer, "page", "")


def judge(chat: Table) -> Judge:
    return Judge(chat, {e.name: e for e in (TOWER, CAN)}, "the object in the image", 0, progress=False)


def test_the_first_filter_looks_at_the_form_of_every_pair() -> None:
    pairs = [
        pair("Where is the Eiffel Tower?", "Paris"),
        pair("Where is it?", "Paris"),
        pair("Where is the Eiffel Tower?", "the Eiffel Tower is in Paris"),
        pair("Where is the Eiffel Tower?", "in a city that lies on the river Seine"),
        pair(" ", "Paris"),
        pair("Where is the iron lady?", ""),
        pair("Where is the iron lady?", "Paris."),
        pair("Can a can hold what canned cans can?", "yes", "can"),
    ]
    chat = Table()
    found = FILTERS["form"](pairs, judge(chat))
    assert found == [
        "",
        "question does not name the entity",
        "answer names the entity",
        "answer longer than 7 words",
        "empty question or answer",
        "empty question or answer",
        "",
        "",
    ]
    assert chat.asked == []
    assert pairs[6].as_question(TOWER).answer == "Paris"
    assert pairs[6].as_question(TOWER).text == "Where is the {entity}?"


def test_the_second_filter_asks_whether_the_answer_is_the_only_one() -> None:
    chat = Table(q1="No.", q2='Sure: {"yes": true}.', q3="I do not know", q4="error", q5="yes")
    found = FILTERS["unique"]([pair(q, "a") for q in ("q1", "q2", "q3", "q4", "q5")], judge(chat))
    assert found[:2] == ["", "not unique"]
    assert found[2] == "was not judged: no JSON object in the reply"
    assert found[3] == "was not judged: HTTP 500"
    assert found[4] == "not unique"


def test_the_third_filter_asks_closed_book() -> None:
    chat = Table(q1="It is in Paris", q2="a bridge", q3="", q4="error")
    pairs = [pair("q1", "paris"), pair("q2", "tower"), pair("q3", "1889"), pair("q4", "x")]
    assert FILTERS["known"](pairs, judge(chat)) == [
        "",
        "answered wrong closed-book: a bridge",
        "answered wrong closed-book: (nothing)",
        "was not answered: HTTP 500",
    ]
    assert not any(word in request.text for request in chat.asked for word in ("paris", "tower", "1889"))


def test_the_fourth_filter_drops_what_was_asked_before() -> None:
    pairs = [
        pair("Where is the Eiffel Tower?", "Paris"),
        pair("where is the eiffel tower", "Paris"),
        pair("So where is the Eiffel Tower now?", "Lyon"),
        pair("In which city does the Eiffel Tower stand?", "Paris"),
        pair("Which capital has the Eiffel Tower?", "Paris, France"),
        pair("When was the Eiffel Tower built?", "1889"),
        pair("Where is the Eiffel Tower?", "Paris", "can"),
    ]
    chat = Table(In_which_city='{"yes": true}', Which_capital='{"yes": false}')
    found = FILTERS["duplicate"](pairs, judge(chat))
    assert [bool(why) for why in found] == [False, True, True, True, False, False, False]
    assert found[3] == "asks the same as: Where is the Eiffel Tower?"
    assert len(chat.asked) == 3  # of those with one answer, and no others
    unsure = FILTERS["duplicate"]([pairs[0], pairs[3]], judge(Table(In_which_city="perhaps")))
    assert unsure == ["", ""]


def test_no_pair_stops_the_others() -> None:
    """The published code leaves a filter at the first pair that fails it."""
    good, bad = pair("Where is the Eiffel Tower?", "Paris"), pair("Where is it?", "Paris")
    assert FILTERS["form"]([bad, good, bad, good], judge(Table()))[1::2] == ["", ""]


def test_replies_are_read_as_json_or_in_plain_words() -> None:
    fenced = '```json\n{"pairs": [{"question": " a? ", "answer": "b", "more": 1}]}\n```'
    assert isinstance(found := read(fenced, Proposed), Proposed)
    assert [(p.question, p.answer) for p in found.pairs] == [("a?", "b")]
    assert read('{"x": 1} {"yes": false}', YesOrNo) == YesOrNo(yes=False)
    words = "Question: Where?\n\nAnswer: Paris\n\n**Question 2:** When?\n**Answer:** 1889\nQuestion: Cut?\nAnswer: of"
    for text, pairs in (
        (words, [("Where?", "Paris"), ("When?", "1889"), ("Cut?", "of")]),
        ("1. Where is it?\n\nThe answer is Paris.", [("Where is it?", "Paris.")]),
    ):
        assert isinstance(found := read(text, Proposed), Proposed)
        assert [(p.question, p.answer) for p in found.pairs] == pairs
    assert isinstance(found := read(words, Proposed, cut=True), Proposed)
    assert [p.question for p in found.pairs] == ["Where?", "When?"]
    assert isinstance(read("Yes", YesOrNo, cut=True), Failed)
    assert read("Yes, it is.", YesOrNo) == YesOrNo(yes=True)
    assert read("**No**", YesOrNo) == YesOrNo(yes=False)
    assert read("1. Lyon\n2) Madrid\n- Berlin", Distractors) == Distractors(distractors=["Lyon", "Madrid", "Berlin"])
    for text, form in (
        ("", Proposed),
        ("nothing of the kind", Proposed),
        ('{"pairs": 3}', Proposed),
        ('{"yes": "perhaps"}', YesOrNo),
        ("Notable", YesOrNo),
        ("{" * 5000, YesOrNo),
        ('{"a":' * 5000, YesOrNo),
    ):
        assert isinstance(failed := read(text, form), Failed)
        assert failed.why
        assert failed.said


def test_a_malformed_reply_is_asked_for_again_with_another_seed_then_recorded() -> None:
    chat = Table(first=["hm", "well", '{"yes": true}'], second=["hm", "hm", "hm", "never"], third="error")
    requests = [ask_whether_unique(name, "a", 5) for name in ("first", "second", "third")]
    found = structured(chat, requests, YesOrNo)
    assert found[0] == YesOrNo(yes=True)
    assert found[1] == Failed("no JSON object in the reply", "hm")
    assert found[2] == Failed("HTTP 500")
    assert [r.seed for r in chat.asked if "third" in r.text] == [5]  # the client tries such again by itself
    first = [r for r in chat.asked if "first" in r.text]
    assert [r.seed for r in first] == [5, 6, 7]
    assert [r.temperature for r in first] == [0.0, 0.7, 0.7]
    assert first[0].schema == schema_of(YesOrNo)
    assert structured(chat, [], YesOrNo) == []


@pytest.mark.parametrize("name", list(FILTERS))
def test_no_pairs_no_reasons(name) -> None:
    assert FILTERS[name]([], judge(Table())) == []


@pytest.mark.parametrize("form", [Proposed, Distractors, YesOrNo])
def test_a_schema_is_one_that_strict_servers_take(form) -> None:
    """OpenAI's strict mode wants every field required and no others; grammars of other servers know few keywords."""

    def objects(part: object) -> Iterator[dict]:
        if isinstance(part, dict):
            if part.get("type") == "object":
                yield part
            for value in part.values():
                yield from objects(value)
        elif isinstance(part, list):
            for value in part:
                yield from objects(value)

    schema = schema_of(form)
    found = list(objects(schema))
    assert found
    for each in found:
        assert each["additionalProperties"] is False
        assert each["required"] == list(each["properties"])
    assert not {"pattern", "maxLength", "maxItems"} & set(str(schema).replace("'", " ").split())
