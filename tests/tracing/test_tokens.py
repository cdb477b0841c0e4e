from itertools import groupby

import numpy as np
import pytest

from gapprobe.models.model import Model
from gapprobe.store.format import ROLES
from gapprobe.tasks.examples import Example, Span, mentions
from gapprobe.tracing import tokens as tokens_module
from gapprobe.tracing.tokens import ROLE_NAMES, TokenTable, token_tables
from tests.models.kinds import KINDS, WITH_MEDIA, fresh, loaded, media

TEXT = "Look well. Question: Where is Big Ben, or is big ben a Bigbend? Answer:"
SPANS: dict[str, list[Span] | tuple[Span, ...]] = {
    "system": [(0, 10)],
    "answer_cue": [(len(TEXT) - 7, len(TEXT))],
    "entity": mentions(TEXT, "BIG Ben"),
}


def table(model: Model, with_image: bool, text: str = TEXT, spans: dict[str, list[Span]] | None = None) -> TokenTable:
    one = (media(model) or [])[:1] if with_image else None
    inputs = model.encode([text], one)
    boxes = model.boxes(inputs, 0, one[0]) if one else None
    example = Example(text, spans=SPANS if spans is None else spans)
    return token_tables(model, [example], [inputs["input_ids"][0].numpy()], [boxes])[0]


def said(model: Model, found: TokenTable) -> list[tuple[str, str]]:
    """Return stretches of one role, and the text of their tokens."""
    stretches = groupby(range(len(found)), key=lambda i: ROLE_NAMES[found.roles[i]])
    return [(role, model.tokenizer.decode(found.ids[list(run)])) for role, run in stretches]


def only(text: str) -> str:
    """Return the letters, the one thing about white space on which tokenizers agree."""
    return "".join(text.split())


@pytest.mark.parametrize(("kind", "with_image"), [(k, False) for k in KINDS] + [(k, True) for k in WITH_MEDIA])
def test_roles_in_every_family(kind: str, with_image: bool) -> None:
    model = loaded(kind)
    found = table(model, with_image)
    stretches = said(model, found)
    by_role = {role: [only(text) for name, text in stretches if name == role] for role, _ in stretches}
    assert by_role["entity"] == ["BigBen", "bigben"]
    assert by_role["question"] == ["Question:Whereis", ",oris", "aBigbend?"]
    assert "".join(by_role["system"]).endswith("Lookwell.")
    assert "".join(by_role["answer_cue"]).startswith("Answer:")
    assert ROLE_NAMES[found.roles[-1]] == "answer_cue"
    media = found.ids == model.media_token_id
    role = "query" if model.family.queries else model.family.modality
    role = "image" if role == "text" else role
    assert np.array_equal(found.roles == ROLES[role], media)
    assert media.any() == with_image
    boxed = (found.boxes[:, 2] > found.boxes[:, 0]) & (found.boxes[:, 3] > found.boxes[:, 1])
    assert boxed.any() == (with_image and bool(model.family.layout))
    assert not boxed[~media].any()


@pytest.mark.parametrize("kind", ["llama-llama", "gemma-gemma", "gpt2-gpt2", "qwen2-qwen2"])
def test_a_prompt_of_words_alone_is_told_token_for_token(kind: str) -> None:
    # Those of a template that begins with the token of the beginning, and those that the tokenizer puts it before.
    model = loaded(kind)
    texts = ["Is it?", TEXT]
    told = tokens_module._told(model, [model.render(text, with_image=False) for text in texts])
    for text, (tokens, offsets) in zip(texts, told, strict=True):
        assert tokens.tolist() == model.encode([text])["input_ids"][0].tolist()
        assert len(offsets) == len(tokens)


def test_a_text_that_the_template_strips() -> None:
    for kind in ("gemma-gemma", "llava-llama"):
        model = loaded(kind)
        text = "  Is the cat here?  "
        found = table(model, False, text, {"entity": [(9, 12)]})
        assert [only(t) for role, t in said(model, found) if role == "entity"] == ["cat"]


def test_a_text_that_the_template_holds_too() -> None:
    # "USER" and "ASSISTANT" stand around it.
    found = table(loaded("llava-llama"), True, "S", {})
    assert [only(t) for role, t in said(loaded("llava-llama"), found) if role == "question"] == ["S"]


def test_letters_of_several_bytes_and_tokens() -> None:
    model = loaded("llava-llama")
    text = "Où est 😀, İstanbul ou Zürich?"
    for word in ("😀", "İstanbul", "Zürich"):
        found = table(model, True, text, {"entity": list(mentions(text, word))})
        assert [only(t) for role, t in said(model, found) if role == "entity"] == [word]


def test_where_stretches_overlap_the_later_counts() -> None:
    model = loaded("llava-llama")
    text = "the object in the image"
    found = table(model, False, text, {"reference": [(0, len(text))], "entity": [(4, 10)]})
    assert [only(t) for role, t in said(model, found) if role == "entity"] == ["object"]
    assert [only(t) for role, t in said(model, found) if role == "reference"] == ["the", "intheimage"]


def test_tokens_that_are_not_those_of_the_text_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llava-llama")
    inputs = model.encode([TEXT])["input_ids"][0].numpy()
    monkeypatch.setattr(type(model), "render", lambda *_, **__: "zzz qqq jjj kkk www")
    with pytest.warns(UserWarning, match="not those of its text"):
        (found,) = token_tables(model, [Example(TEXT)], [inputs], [None])
    # A letter here and there is the same by chance.
    assert (found.roles == ROLES["other"]).mean() > 0.9


@pytest.mark.parametrize(
    ("text", "phrase", "expected"),
    [
        ("A can can hold; Canada CAN", "can", ["can", "can", "CAN"]),
        ("man, Man's human woman", "man", ["man", "Man"]),
        ("C++ and c++.", "C++", ["C++", "c++"]),
        ("Straße STRASSE", "straße", ["Straße"]),
        ("nothing here", "x", []),
        ("nothing here", " ", []),
        ("the Big  Ben", "Big Ben", []),
        ("été Été", "été", ["été", "Été"]),
    ],
)
def test_mentions(text: str, phrase: str, expected: list[str]) -> None:
    assert [text[a:b] for a, b in mentions(text, phrase)] == expected
