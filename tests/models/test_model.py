from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gapprobe.errors import DataError, ModelError
from gapprobe.kernels.logit_lens import reference
from gapprobe.models.loading import load_model
from gapprobe.models.model import Model
from gapprobe.sound import Sound
from tests.models.kinds import KINDS, WITH_IMAGE, fresh, loaded
from tests.models.tiny import CHAT, QUERIES, WIDTH, build, picture

TEXTS = ["Question: hi? Answer:", "Question: What is the capital of France? Answer:"]
PICTURES = [picture(0), picture(1)]


def without_chat() -> Model:
    hf, processor = build("llava-llama", chat=False)
    return load_model(hf, processor=processor)


@pytest.mark.parametrize("kind", WITH_IMAGE)
def test_every_prompt_ends_in_the_last_column(kind: str) -> None:
    model = loaded(kind)
    inputs = model.encode(TEXTS, PICTURES)
    mask = inputs["attention_mask"]
    for i, text in enumerate(TEXTS):
        alone = model.encode([text], PICTURES[i : i + 1])["input_ids"][0]
        assert torch.equal(inputs["input_ids"][i][mask[i].bool()], alone)
        # All padding stands in front.
        assert torch.equal(inputs["input_ids"][i][-len(alone) :], alone)


def test_the_chat_template_is_used_where_there_is_one() -> None:
    model = loaded("llava-llama")
    assert model.render("hi", with_image=True) == "USER: <image>\nhi ASSISTANT:"
    assert model.render("hi", with_image=False) == "USER: hi ASSISTANT:"


def test_without_chat_template_the_family_says_where_the_image_goes() -> None:
    plain = without_chat()
    assert plain.render("hi", with_image=True) == "<image>\nhi"
    assert plain.render("hi", with_image=False) == "hi"
    # InstructBLIP's processor puts its image tokens itself, in front.
    ids = loaded("instructblip-llama").encode(["hi"], PICTURES[:1])["input_ids"][0]
    assert (ids == 3).nonzero()[:, 0].tolist() == list(range(QUERIES))


def test_a_beginning_that_the_template_wrote_is_not_written_twice() -> None:
    model = fresh("llava-llama")
    assert model.encode(["hi"])["input_ids"][0, :2].tolist().count(1) == 1
    model.processor.chat_template = "<s>" + CHAT
    for images in (None, PICTURES[:1]):
        assert (model.encode(["hi"], images)["input_ids"] == 1).sum() == 1


@pytest.mark.parametrize(
    ("text", "message"), [("What is <image>?", "holds the token <image>"), ("  \n", "empty"), ("", "empty")]
)
def test_texts_that_cannot_be_prompts(text: str, message: str) -> None:
    for model in (loaded("llava-llama"), loaded("instructblip-llama")):
        with pytest.raises(DataError, match=message):
            model.encode([text], PICTURES[:1])


def test_as_many_images_as_texts() -> None:
    with pytest.raises(DataError, match="2 prompts came with 1 images or sounds"):
        loaded("llava-llama").encode(TEXTS, PICTURES[:1])


def test_prompts_longer_than_the_model_reads() -> None:
    model = loaded("llava-llama")
    inputs = model.encode(["hi", "word " * 100])
    longest = int(inputs["attention_mask"].sum(1).max())
    assert model.unfit(inputs, 256 - longest) == [None, None]
    short, long = model.unfit(inputs, 257 - longest)
    assert short is None
    assert long is not None
    assert f"has {longest} tokens and {257 - longest} for the answer, but the model reads 256" in long


def test_prompts_longer_than_the_q_former_reads() -> None:
    model = fresh("instructblip-llama")
    model.hf.config.qformer_config.max_position_embeddings = 12
    short, long = model.unfit(model.encode(["hi", TEXTS[1]], PICTURES), 10)
    assert short is None
    assert long is not None
    assert "Q-Former, which reads 12" in long


@pytest.mark.parametrize("kind", KINDS)
def test_the_unembedding_gives_the_models_logits(kind: str) -> None:
    model = fresh(kind, dtype=torch.float64)
    hf: Any = model.hf
    x = torch.randn(5, model.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm, head = model.part(model.family.final_norm), model.part(model.family.unembedding)
    assert head is hf.get_output_embeddings()
    with torch.no_grad():
        logits = head(norm(x))
    cap = getattr(model.text_config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    found = reference(x, model.unembedding(), logits.argmax(1))
    # transformers norms in float32 whatever the dtype, so the two differ by its rounding.
    assert torch.allclose(found.log_prob, logits.log_softmax(1).amax(1), rtol=0, atol=1e-5)
    assert found.rank.tolist() == [1] * 5


def test_layer_norms_are_known_and_others_refused() -> None:
    model = fresh("llava-llama")
    hf: Any = model.hf
    hf.model.language_model.norm = nn.LayerNorm(WIDTH, eps=1e-3)
    assert (model.unembedding().norm, model.unembedding().eps) == ("layer", 1e-3)
    assert model.unembedding().shift is not None
    hf.model.language_model.norm = nn.Identity()
    with pytest.raises(ModelError, match="final norm Identity is neither"):
        model.unembedding()


def test_the_first_token_of_an_answer_is_the_one_after_the_cue_and_a_space() -> None:
    model = loaded("llava-llama")
    encode: Any = model.tokenizer
    before = encode("USER: Answer: ASSISTANT:")["input_ids"]
    after = encode("USER: Answer: ASSISTANT: Paris")["input_ids"][len(before)]
    assert model.first_token("Paris") == model.first_token(" Paris ") == after
    assert model.first_token("Paris", prompt="x") == model.first_token("Paris")
    with pytest.raises(DataError, match="empty answer"):
        model.first_token(" ")


def test_fingerprints_know_weights_configuration_and_processor() -> None:
    one, same = fresh("llava-llama"), fresh("llava-llama")
    before = one.processor_fingerprint
    assert one.describe() == same.describe()
    same.encode(TEXTS)  # padding leaves traces in the tokenizer
    assert same.processor_fingerprint == before
    other = fresh("llava-llama")
    with torch.no_grad():
        next(other.hf.parameters()).view(-1)[0] += 1
    other.hf.config.text_config.rope_theta = 1.0
    other.processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    assert other.describe()["weights"] != one.describe()["weights"]
    assert other.describe()["config"] != one.describe()["config"]
    assert other.processor_fingerprint != before
    template = without_chat()
    assert template.processor_fingerprint != before


def test_a_model_does_not_print_its_weights() -> None:
    assert len(repr(loaded("llava-llama"))) < 1000


def test_media_that_a_model_does_not_read() -> None:
    sound = Sound(np.zeros(8000, np.float32), 16000)
    for kind, medium, words in (
        ("gpt2-gpt2", picture(0), "reads no image"),
        ("llava-llama", sound, "reads no audio"),
        ("qwen2_audio-qwen2", picture(0), "reads no image"),
        ("qwen2_audio-qwen2", Sound(np.zeros(16001, np.float32), 16000), "1.000 s long; the model reads 0.03 to 1 s"),
        ("qwen2_audio-qwen2", Sound(np.zeros(100, np.float32), 16000), "0.006 s long"),
    ):
        with pytest.raises(DataError, match=words):
            loaded(kind).encode(["What?"], [medium])


def test_sounds_are_heard_at_the_models_rate() -> None:
    model = loaded("qwen2_audio-qwen2")
    t = np.arange(24_000) / 48_000
    tone = np.sin(2 * np.pi * 440 * t).astype(np.float32)
    fast, slow = (model.encode(["What?"], [Sound(tone[::step].copy(), 48_000 // step)]) for step in (1, 3))
    assert torch.equal(fast["input_ids"], slow["input_ids"])
    # A pure tone far below both limits is the same tone; the ends differ by the filter.
    assert (fast["input_features"] - slow["input_features"])[..., 5:40].abs().median() < 0.05


def test_a_prompt_without_all_of_its_image_tokens_is_told() -> None:
    # With too few, InstructBLIP reads another row's picture or none; LLaVA's processor refuses by itself.
    queries = fresh("instructblip-llama")
    queries.processor.num_query_tokens = 3
    assert "has 3 tokens <image>" in str(queries.unfit(queries.encode(["hi"], PICTURES[:1]), 1))
    assert loaded("instructblip-llama").unfit(loaded("instructblip-llama").encode(["hi"], PICTURES[:1]), 1) == [None]
