from typing import Any

import pytest
import torch

from gapprobe.tracing.answers import cut, generate
from tests.models.tiny import KINDS, fresh, loaded, picture, tokenizer

WORDS = tokenizer()
END = frozenset({2})


def tokens(*pieces: str) -> list[int]:
    encode: Any = WORDS
    return [token for piece in pieces for token in encode(piece, add_special_tokens=False)["input_ids"]]


def said(ids: list[int], stop: str | None = "###") -> tuple[str, str]:
    answer = cut(WORDS, ids, END, stop)
    return answer.text, WORDS.decode(answer.token_ids)


def test_the_marker_and_the_white_space_before_it_are_no_part_of_the_answer() -> None:
    assert said(tokens(" Paris", " ", "#", "#", "#", " Question")) == ("Paris", " Paris")
    assert said(tokens(" New", " York", "\n", "#", "#", "#")) == ("New York", " New York")


def test_a_marker_in_one_token_or_in_three_gives_the_same() -> None:
    whole = tokens("###")
    assert len(whole) < 3  # the tokenizer merges it
    split = tokens("#", "#", "#")
    assert len(split) == 3
    assert said([*tokens(" Paris "), *whole]) == said([*tokens(" Paris "), *split]) == ("Paris", " Paris")


def test_no_marker() -> None:
    assert said(tokens(" Paris  ")) == ("Paris", " Paris")
    assert said(tokens(" Paris ##")) == ("Paris ##", " Paris ##")
    assert said(tokens(" a ### b"), stop=None) == ("a ### b", " a ### b")


@pytest.mark.parametrize("pieces", [("###",), (" ", "###", " x"), (" \n ",), ()])
def test_an_empty_answer_has_no_tokens(pieces: tuple[str, ...]) -> None:
    assert cut(WORDS, tokens(*pieces), END, "###").token_ids == ()


def test_an_end_token_ends_the_answer() -> None:
    assert said([*tokens(" Paris"), 2, *tokens(" London ###")]) == ("Paris", " Paris")
    assert said([2, *tokens("x")]) == ("", "")


def test_a_token_that_holds_the_answers_end_and_the_markers_start_belongs_to_the_answer() -> None:
    # With the marker "n ###", " in " and "###" leave "i", whose token is the one of "in" or its first byte.
    ids = tokens(" Paris is ###")
    answer = cut(WORDS, ids, END, "s is")
    assert answer.text == "Pari"
    assert WORDS.decode(answer.token_ids).startswith(" Pari")
    assert not WORDS.decode(answer.token_ids[:-1]).startswith(" Pari")


def test_a_letter_of_several_tokens_is_kept_whole() -> None:
    ids = tokens("é😀 ###")
    assert len(tokens("😀")) == 4
    assert said(ids) == ("é😀", "é😀")


@pytest.mark.parametrize("with_image", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_answered_as_transformers_answers_each_alone(kind: str, with_image: bool) -> None:
    model = loaded(kind)
    texts = ["Question: hi? Answer:", "Question: What is the capital of France? Answer:"]
    pictures = [picture(0), picture(1, 30, 60)]
    found = generate(model, model.encode(texts, pictures if with_image else None), max_new_tokens=8, stop=None)
    for i, answer in enumerate(found):
        prompt = model.render(texts[i], with_image=with_image)
        call: Any = model.processor if with_image else model.tokenizer
        alone = dict(call(**({"images": pictures[i]} if with_image else {}), text=prompt, return_tensors="pt"))
        theirs: Any = model.hf if with_image else model.part(model.family.generator)
        out = theirs.generate(**alone, max_new_tokens=8, do_sample=False, suppress_tokens=[model.image_token_id])
        new = out[0, alone["input_ids"].shape[1] :].tolist()
        assert cut(WORDS, new, END, None) == answer
        assert len(answer.token_ids) > 4


def test_the_models_own_settings_neither_change_the_answer_nor_get_lost() -> None:
    model = fresh("instructblip-llama")
    inputs = model.encode(["Question: hi? Answer:"], [picture(0)])
    plain = generate(model, inputs, max_new_tokens=8, stop=None)
    hf: Any = model.hf
    # Settings in both places, one of them outdated: InstructBLIP answers through its language model.
    for module in (hf, hf.language_model):
        module.generation_config.update(
            do_sample=True,
            temperature=50.0,
            repetition_penalty=9.0,
            min_length=3,
            num_beams=3,
            bad_words_ids=[[i] for i in range(200)],
        )
    assert generate(model, inputs, max_new_tokens=8, stop=None) == plain
    assert hf.language_model.generation_config.num_beams == 3
    assert hf.generation_config.repetition_penalty == 9.0


def test_the_models_own_end_tokens_end_the_answer() -> None:
    model = fresh("llava-llama")
    inputs = model.encode(["Question: hi? Answer:"], [picture(0)])
    plain = generate(model, inputs, max_new_tokens=8, stop=None)[0].token_ids
    hf: Any = model.hf
    third = plain[2]
    hf.generation_config.eos_token_id = [2, third]
    assert generate(model, inputs, max_new_tokens=8, stop=None)[0].token_ids == plain[: plain.index(third)]


def test_the_image_token_is_never_generated() -> None:
    model = fresh("llava-llama")
    hf: Any = model.hf
    with torch.no_grad():
        inputs = model.encode(["Question: hi? Answer:"], [picture(0)])
        best = hf(**inputs).logits[0, -1].argmax()
        hf.lm_head.weight[3] = 2 * hf.lm_head.weight[best]
        assert hf(**inputs).logits[0, -1].argmax() == 3
    answer = generate(model, inputs, max_new_tokens=8, stop=None)[0]
    assert answer.token_ids[0] == best
    assert 3 not in answer.token_ids
