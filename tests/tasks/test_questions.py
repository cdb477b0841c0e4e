import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gapprobe.errors import ConfigError
from gapprobe.tasks.questions import SLOT, Entity, Question, leaks, load_questions, mentions, reason_to_drop, with_slot

CAN = Entity("can", ("tin",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is a Can made of?", f"What is a {SLOT} made of?"),
        ("Who invented the TIN can?", f"Who invented the {SLOT} {SLOT}?"),
        ("Are cans recycled?", f"Are {SLOT}s recycled?"),
        ("What is the can's lid?", f"What is the {SLOT}'s lid?"),
        ("Is candy sweet, and toucan a bird?", "Is candy sweet, and toucan a bird?"),
    ],
)
def test_the_name_is_replaced_in_any_casing_and_never_inside_another_word(text: str, expected: str) -> None:
    assert with_slot(text, CAN) == expected


def test_a_name_of_several_words_goes_before_its_parts() -> None:
    tower = Entity("Eiffel Tower", ("Tower",))
    assert with_slot("How tall is the eiffel tower?", tower) == f"How tall is the {SLOT}?"


def test_leaks_names_what_still_gives_the_entity_away() -> None:
    assert leaks("What is the object in the image? A TIN.", CAN) == ["tin"]
    assert leaks("What is the object in the candy shop?", CAN) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("butterfly", "What do butterflies eat?"),
        ("waffles", "What is a waffle?"),
        ("wolf", "Where do wolves live?"),
        ("woman", "What do WOMEN wear?"),
        ("mouse", "What do mice eat?"),
        ("creme_brulee", "Who made crème brûlée?"),
        ("crème brûlée", "Who made cre\u0300me bru\u0302le\u0301e?"),
        ("Crème brûlée", "Who made creme-brulee?"),
        ("maple_tree", "How tall are maple trees?"),
        ("ice cream", "Is an ice-cream cold?"),
        ("ice cream", "Is icecream cold?"),
        ("Ben's", "Is Ben’s open?"),
    ],
)
def test_what_gives_a_name_away(name: str, text: str) -> None:
    assert leaks(text, Entity(name)) == [name]


@pytest.mark.parametrize(
    ("name", "text"),
    [("bus", "Is a bush green?"), ("ox", "Is it a fox?"), ("seal", "Is sea salt real?"), ("", "Is it?"), ("-", "A-B?")],
)
def test_what_does_not(name: str, text: str) -> None:
    assert leaks(text, Entity(name)) == []


def test_an_underscore_is_a_space_when_it_is_read() -> None:
    entity = Entity("maple_tree")
    text = with_slot("How tall are Maple-Trees?", entity)
    assert text == f"How tall are {SLOT}s?"
    assert Question("maple_tree", "r", text, "x").naming("maple_tree") == "How tall are maple trees?"


WORD = st.text(st.sampled_from("abAéS"), min_size=1, max_size=3)
NAME = st.lists(WORD, min_size=1, max_size=2).map(" ".join)
TEXT = st.lists(st.one_of(WORD, st.sampled_from(["the", "-", "'s", "s", "?", "’", "_"])), max_size=8)


@given(NAME, NAME, TEXT, st.sampled_from(["", " ", "-", "  "]))
@example("a b", "b a", ["a", "b", "a", "b"], " ")
@example("a", "as", ["as", "’", "s"], "")
def test_whatever_is_replaced_leaves_no_name(name: str, alias: str, parts: list[str], gap: str) -> None:
    entity = Entity(name, (alias,))
    question = Question(name, "r", with_slot(gap.join(parts), entity), "x")
    shown = question.referring("this thing")
    assert [n for n in entity.names if mentions(shown, n)] == []


def test_mentions_are_character_spans() -> None:
    assert [("a can, Cans"[a:b]) for a, b in mentions("a can, Cans", "can")] == ["can", "Can"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"What is a {SLOT} made of?", "What is the object in the image made of?"),
        (f"The {SLOT} is how old?", "the object in the image is how old?"),
        (f"Are {SLOT}s recycled?", "Are the object in the image recycled?"),
        (f"What is {SLOT}'s lid?", "What is the object in the image's lid?"),
        (f"What are {SLOT}s' lids?", "What are the object in the image's lids?"),
        (f"What are '{SLOT}s' made of?", "What are 'the object in the image' made of?"),
    ],
)
def test_a_reference_brings_its_own_article_and_takes_the_plural_with_it(text: str, expected: str) -> None:
    assert Question("can", "r", text, "x").referring("the object in the image") == expected


CSV = "entity,question,answer,relation,aliases\n"


def test_csv_questions_name_the_entity_in_plain_words(tmp_path) -> None:
    file = tmp_path / "q.csv"
    file.write_text(CSV + "Stonehenge,In which country is Stonehenge?,England,country,the Henge\n", encoding="utf-8")
    questions = load_questions(file)
    assert questions.questions[0].text == f"In which country is {SLOT}?"
    assert questions.questions[0].naming(questions.reference) == "In which country is the object in the image?"
    assert questions.entity("Stonehenge").names == ("Stonehenge", "the Henge")


def test_filters_drop_a_pair_with_its_reason_and_go_on_with_the_next(tmp_path) -> None:
    file = tmp_path / "q.csv"
    rows = [
        "can,What holds beer?,a glass,r1,",
        "can,What is another word for a can?,a beer can,r2,",
        "can,What is a can?,one two three four five six seven eight,r3,",
        "can,What is a can made of?,,r4,",
        "can,What is a can made of?,aluminium,r5,",
    ]
    file.write_text(CSV + "\n".join(rows), encoding="utf-8")
    questions = load_questions(file)
    assert [q.relation for q in questions.questions] == ["r5"]
    assert [reason for _, reason in questions.dropped] == [
        "question does not name the entity",
        "answer names the entity",
        "answer longer than 7 words",
        "empty question or answer",
    ]


def test_an_alias_that_stands_outside_the_slot_is_masked_too(tmp_path) -> None:
    file = tmp_path / "q.csv"
    file.write_text(CSV + "can,Is a can also called a tin?,yes,r1,tin\n", encoding="utf-8")
    question = load_questions(file).questions[0]
    assert leaks(question.referring("the object"), CAN) == []


def test_several_answers_may_be_right(tmp_path) -> None:
    file = tmp_path / "q.csv"
    head = "entity,question,answer,answer_aliases\n"
    file.write_text(head + "can,What is a can made of?,tin,steel | aluminium\n", encoding="utf-8")
    assert load_questions(file).questions[0].answers == ("tin", "steel", "aluminium")
    file.write_text(head + "can,What is a can made of?,tin,a can\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="answer names the entity"):
        load_questions(file)
    file = tmp_path / "q.toml"
    file.write_text(
        'reference = "it"\nidentify = "What?"\nentities = [{ name = "can" }, { name = "cup" }]\n[[relations]]\n'
        'name = "r"\nquestions = ["What is {entity}?"]\nanswers = { can = ["tin", "steel"], cup = "clay" }\n',
        encoding="utf-8",
    )
    assert [q.answers for q in load_questions(file).questions] == [("tin", "steel"), ("clay",)]


def test_accents_count_in_answers_and_not_in_questions() -> None:
    zero = Entity("zero")
    assert reason_to_drop(Question("zero", "french", f"What is {SLOT} in French?", "zéro"), zero) is None
    assert reason_to_drop(Question("zero", "r", f"What is {SLOT}?", "Zero"), zero) == "answer names the entity"
    assert leaks("What is zéro?", zero) == ["zero"]


def test_a_plural_that_cannot_be_replaced_says_so(tmp_path) -> None:
    file = tmp_path / "q.csv"
    rows = [
        "wolf,Where do wolves live?,woods,r1,",
        "wolf,Is a wolf one of the wolves?,yes,r2,",
        "wolf,Is a wolf wild?,yes,,",
    ]
    file.write_text(CSV + "\n".join(rows), encoding="utf-8")
    assert [reason for _, reason in load_questions(file).dropped] == [
        "question does not name the entity in a form that can be replaced",
        "the question names the entity outside its slot",
    ]


def test_a_reference_that_names_the_entity_is_no_reference(tmp_path) -> None:
    file = tmp_path / "q.csv"
    file.write_text(CSV + "can,What is a can made of?,aluminium,r1,\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no question is left"):
        load_questions(file, reference="the can in the image")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.txt", "", "must end in .toml or .csv"),
        ("q.toml", "entities = [", "cannot be read"),
        ("q.toml", "entities = []\nrelations = []", "lacks the field 'reference'"),
        (
            "q.toml",
            'reference = "it"\nidentify = "?"\nentities = [{ name = "can" }]\n[[relations]]\nname = "r"\n'
            'questions = ["What is {entity}?"]\nanswers = { can = ["tin", 4] }\n',
            "q.toml lacks the field .*'int'",
        ),
        ("q.csv", "entity,question\nx,y\n", "lacks the field 'answer'"),
        ("q.csv", CSV + "can,What is a can?,metal,r,\ncan,What else is a can?,tin,r,\n", "share relation and entity"),
    ],
)
def test_a_bad_question_file_is_named_with_what_is_wrong(tmp_path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_questions(file)


def test_a_missing_question_file_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match="nowhere.toml does not exist"):
        load_questions(tmp_path / "nowhere.toml")


def test_the_shipped_facts_are_asked_without_their_answers_in_the_question() -> None:
    from gapprobe.demo import FOLDER

    questions = load_questions(FOLDER / "facts.toml")
    assert len(questions.questions) == 150
    for question in questions.questions:
        entity = questions.entity(question.entity)
        assert reason_to_drop(question, entity) is None
        assert leaks(question.naming(questions.reference), entity) == []
