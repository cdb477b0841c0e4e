from typing import Any

import pytest
import torch

from gapprobe.errors import ConfigError
from gapprobe.models.model import Model
from gapprobe.models.trace import trace
from gapprobe.tracing.answers import Answer, Decoding, Ending, Picker, answers, cut
from tests.models.kinds import KINDS, WITH_MEDIA, fresh, loaded, media
from tests.models.tiny import picture, tokenizer

WORDS = tokenizer()
END = frozenset({2})


def tokens(*pieces: str) -> list[int]:
    encode: Any = WORDS
    return [token for piece in pieces for token in encode(piece, add_special_tokens=False)["input_ids"]]


def said(ids: list[int], *stop: str) -> tuple[str, str]:
    answer = cut(WORDS, ids, END, stop or ("###",))
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
    assert cut(WORDS, tokens(" a ### b"), END, ()).text == "a ### b"


@pytest.mark.parametrize("pieces", [("###",), (" ", "###", " x"), (" \n ",), ()])
def test_an_empty_answer_has_no_tokens(pieces: tuple[str, ...]) -> None:
    assert cut(WORDS, tokens(*pieces), END, ("###",)).token_ids == ()


def test_an_end_token_ends_the_answer() -> None:
    assert said([*tokens(" Paris"), 2, *tokens(" London ###")]) == ("Paris", " Paris")
    assert said([2, *tokens("x")]) == ("", "")


def test_a_token_that_holds_the_answers_end_and_the_markers_start_belongs_to_the_answer() -> None:
    # With the marker "n ###", " in " and "###" leave "i", whose token is the one of "in" or its first byte.
    ids = tokens(" Paris is ###")
    answer = cut(WORDS, ids, END, ("s is",))
    assert answer.text == "Pari"
    assert WORDS.decode(answer.token_ids).startswith(" Pari")
    assert not WORDS.decode(answer.token_ids[:-1]).startswith(" Pari")


def test_a_letter_of_several_tokens_is_kept_whole() -> None:
    ids = tokens("é😀 ###")
    assert len(tokens("😀")) == 4
    assert said(ids) == ("é😀", "é😀")


def test_the_first_of_several_stop_texts_counts() -> None:
    assert said(tokens(" a. b\n c ###"), "###", "\n", ".") == ("a", " a")
    assert said(tokens(" a b\n c ###"), "###", "\n", ".") == ("a b", " a b")


def answered(
    model: Model,
    inputs: dict[str, torch.Tensor],
    *,
    reads_back: bool = False,
    seeds: tuple[str, ...] = (),
    **decoding: Any,
) -> list[Answer]:
    decoding = {"max_new_tokens": 8, "stop": ()} | decoding
    picker = Picker(
        Decoding(**decoding), model.media_token_id, seeds or [str(i) for i in range(len(inputs["input_ids"]))]
    )
    ending = Ending(model, picker, reads_back)
    trace(model, inputs, torch.empty(0, dtype=torch.int64), (0,), picker=picker, ending=ending, steps=ending.steps)
    return answers(model, picker)


@pytest.mark.parametrize(("kind", "with_image"), [(k, False) for k in KINDS] + [(k, True) for k in WITH_MEDIA])
def test_a_batch_is_answered_as_transformers_answers_each_alone(kind: str, with_image: bool) -> None:
    model = loaded(kind)
    texts = ["Question: hi? Answer:", "Question: What is the capital of France? Answer:"]
    both = media(model) if with_image else None
    found = answered(model, model.encode(texts, both))
    for i, answer in enumerate(found):
        alone = model.encode(texts[i : i + 1], both and both[i : i + 1])
        theirs: Any = model.hf if with_image else model.part(model.family.generator)
        never = [] if model.media_token_id is None else [model.media_token_id]
        ends = sorted(model.end_tokens)
        config = model.greedy(
            8, suppress_tokens=never, eos_token_id=ends, output_logits=True, return_dict_in_generate=True
        )
        with model.only_asked(config):
            out = theirs.generate(**alone, generation_config=config)
        new = out.sequences[0, -len(out.logits) :].tolist()
        expected = cut(model.tokenizer, new, model.end_tokens, ())
        assert (answer.text, answer.token_ids) == (expected.text, expected.token_ids)
        scores = torch.stack(out.logits)[: len(answer.token_ids), 0].float().log_softmax(-1)
        theirs_too = scores.gather(1, torch.tensor(answer.token_ids, dtype=torch.int64)[:, None])[:, 0]
        # Padded against not: float32's rounding, in logits of up to a few hundred.
        scale = max(float(torch.stack(out.logits).abs().max()), 1.0)
        assert torch.allclose(torch.tensor(answer.log_probs), theirs_too, rtol=0, atol=1e-6 * scale)


def test_the_models_own_settings_neither_change_the_answer_nor_get_lost() -> None:
    model = fresh("instructblip-llama")
    inputs = model.encode(["Question: hi? Answer:"], [picture(0)])
    plain = answered(model, inputs)
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
    assert answered(model, inputs) == plain
    assert hf.language_model.generation_config.num_beams == 3
    assert hf.generation_config.repetition_penalty == 9.0


@pytest.mark.parametrize("place", ["", "language_model"])
def test_the_models_own_end_tokens_end_the_answer(place: str) -> None:
    model = fresh("instructblip-llama")
    inputs = model.encode(["Question: hi? Answer:"], [picture(0)])
    plain = answered(model, inputs)[0].token_ids
    part: Any = model.part(place)
    third = plain[2]
    # InstructBLIP's language model does not see what the folder says.
    part.generation_config = model.greedy(1, eos_token_id=[2, third])
    assert answered(model, inputs)[0].token_ids == plain[: plain.index(third)]


def test_the_image_token_is_never_generated() -> None:
    model = fresh("llava-llama")
    hf: Any = model.hf
    with torch.no_grad():
        inputs = model.encode(["Question: hi? Answer:"], [picture(0)])
        best = hf(**inputs).logits[0, -1].argmax()
        hf.lm_head.weight[3] = 2 * hf.lm_head.weight[best]
        assert hf(**inputs).logits[0, -1].argmax() == 3
    answer = answered(model, inputs)[0]
    assert answer.token_ids[0] == best
    assert 3 not in answer.token_ids


@pytest.mark.parametrize("reads_back", [False, True])
def test_no_step_is_made_that_nobody_needs(reads_back: bool) -> None:
    model = loaded("llava-llama")
    inputs = model.encode(["Question: hi? Answer:"], [picture(0)])
    free = answered(model, inputs)[0]
    stop = model.tokenizer.decode(free.token_ids[3])
    picker = Picker(Decoding(8, (stop,)), model.media_token_id)
    ending = Ending(model, picker, reads_back)
    found = trace(
        model, inputs, torch.empty(0, dtype=torch.int64), (0,), picker=picker, ending=ending, steps=ending.steps
    )
    size = len(answers(model, picker)[0].token_ids)
    # The answer ends before the stop text's token, which has been picked, so the last token of the answer was read.
    assert len(picker.tokens[0]) == size + 1
    assert len(found.spoken) == size


def test_the_last_token_of_the_longest_answer_is_read_back_if_asked() -> None:
    model = loaded("llava-llama")
    inputs = model.encode(["Question: hi? Answer:"], [picture(0)])
    for reads_back in (False, True):
        picker = Picker(Decoding(4, ()), model.media_token_id)
        ending = Ending(model, picker, reads_back)
        none = torch.empty(0, dtype=torch.int64)
        found = trace(model, inputs, none, (0,), picker=picker, ending=ending, steps=ending.steps)
        assert len(answers(model, picker)[0].token_ids) == 4
        assert len(found.spoken) == 3 + reads_back


def test_draws_depend_on_the_rows_own_seed_alone() -> None:
    model = loaded("llava-llama")
    texts = ["Question: hi? Answer:", "Question: What is the capital of France? Answer:"]
    pictures = [picture(0), picture(1)]
    hot = {"temperature": 30.0}
    both = answered(model, model.encode(texts, pictures), seeds=("a", "b"), **hot)
    alone = answered(model, model.encode(texts[1:], pictures[1:]), seeds=("b",), **hot)
    assert both[1].token_ids == alone[0].token_ids
    other = answered(model, model.encode(texts[1:], pictures[1:]), seeds=("c",), **hot)
    again = answered(model, model.encode(texts[1:], pictures[1:]), seeds=("b",), seed=1, **hot)
    assert len({alone[0].token_ids, other[0].token_ids, again[0].token_ids}) == 3


def drawn(logits: torch.Tensor, n: int, **decoding: Any) -> torch.Tensor:
    """Return how often each word was drawn from the same logits, as shares."""
    picker = Picker(
        Decoding(temperature=1.0, **decoding) if "temperature" not in decoding else Decoding(**decoding),
        None,
        [str(i) for i in range(n)],
    )
    picker(torch.empty(n, 0, dtype=torch.int64), logits.expand(n, -1))
    words = torch.tensor([row[0] for row in picker.tokens])
    return torch.bincount(words, minlength=len(logits)) / n


def test_words_are_drawn_as_often_as_their_probability_says() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    n = 20_000
    for temperature in (0.5, 1.0, 3.0):
        expected = (logits / temperature).softmax(0)
        # Four standard deviations of a share of n draws.
        bound = 4 * (expected * (1 - expected) / n).sqrt() + 1e-9
        assert ((drawn(logits, n, temperature=temperature) - expected).abs() <= bound).all()


def test_unlikely_words_are_left_out_if_asked() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert (drawn(logits, 2000, top_k=2) > 0).tolist() == [True, True, False, False]
    assert (drawn(logits, 2000, top_p=0.6) > 0).tolist() == [True, True, False, False]
    assert (drawn(logits, 2000, top_p=0.75) > 0).tolist() == [True, True, True, False]
    assert (drawn(logits, 2000, top_p=0.01) > 0).tolist() == [True, False, False, False]
    assert abs(float(drawn(logits, 20_000, top_k=2)[0]) - 4 / 7) < 4 * (4 / 7 * 3 / 7 / 20_000) ** 0.5


def test_log_probabilities_are_the_models_whatever_was_drawn() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    picker = Picker(Decoding(temperature=5.0, top_k=2), never=0, seeds=["x"])
    picker(torch.empty(1, 0, dtype=torch.int64), logits)
    token = picker.tokens[0][0]
    assert token in (1, 2)
    assert picker.log_probs[0][0] == pytest.approx(float(logits[0, token]), abs=1e-6)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": -1},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"stop": ("",)},
    ],
)
def test_settings_that_make_no_sense(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Decoding(**bad)
