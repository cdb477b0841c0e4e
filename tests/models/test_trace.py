import operator
from typing import Any

import pytest
import torch
from torch import Tensor

from gapprobe.models.model import Model
from gapprobe.models.trace import Traced, trace
from tests.models.kinds import KINDS, WITH_MEDIA, fresh, loaded, media
from tests.models.tiny import LAYERS, WIDTH

TEXTS = ["Question: hi hi? Answer:", "Question: What is the capital of France? Answer:"]
BOTH_WAYS = [(kind, False) for kind in KINDS] + [(kind, True) for kind in WITH_MEDIA]


def encoded(model: Model, with_image: bool) -> dict[str, Tensor]:
    return model.encode(TEXTS, media(model) if with_image else None)


def everywhere(inputs: dict[str, Tensor]) -> Tensor:
    return torch.arange(inputs["attention_mask"].numel())


def prompts(found: Traced, inputs: dict[str, Tensor]) -> Tensor:
    """Return residuals by row, layer, token and width."""
    n, t = inputs["attention_mask"].shape
    return found.prompt.reshape(len(found.prompt), n, t, -1).transpose(0, 1)


def told(model: Model, inputs: dict[str, Tensor], steps: int) -> Any:
    target: Any = model.hf if model.has_media(inputs) else model.part(model.family.generator)
    config = model.greedy(steps, return_dict_in_generate=True, output_hidden_states=True, output_logits=True)
    with model.only_asked(config):
        return target.generate(**inputs, generation_config=config)


@pytest.mark.parametrize(("kind", "with_image"), BOTH_WAYS)
def test_layers_are_the_hidden_states_of_transformers(kind: str, with_image: bool) -> None:
    model = loaded(kind)
    inputs = encoded(model, with_image)
    mask = inputs["attention_mask"].bool()
    assert not mask.all()  # one row is padded
    found = trace(model, inputs, everywhere(inputs), range(LAYERS + 1), steps=4)
    theirs = told(model, inputs, 4)
    encoder = bool(model.family.encoder)
    read = theirs.encoder_hidden_states if encoder else theirs.hidden_states[0]
    assert len(read) == LAYERS + 1
    mine = prompts(found, inputs)
    for layer in range(LAYERS):
        assert torch.equal(mine[:, layer][mask], read[layer][mask])
    # The last hidden state of transformers is behind the final norm; ours is before it.
    norm: Any = model.part(model.family.encoder_norm or model.family.final_norm)
    assert torch.equal(norm(mine[:, LAYERS])[mask], read[LAYERS][mask])
    assert not torch.allclose(mine[:, LAYERS][mask], read[LAYERS][mask], rtol=0.1)
    # What was generated, token by token.
    steps = theirs.decoder_hidden_states if encoder else theirs.hidden_states[1:]
    assert len(found.spoken) == len(steps) == (4 if encoder else 3)
    for step, states in zip(found.spoken, steps, strict=True):
        for layer in range(LAYERS):
            assert torch.equal(step[layer], states[layer][:, 0])


@pytest.mark.parametrize("kind", ["llava-llama", "instructblip-llama", "qwen2_vl-qwen2_vl_text"])
def test_chosen_tokens_and_layers_equal_forward_hooks(kind: str) -> None:
    model = loaded(kind)
    inputs = encoded(model, True)
    seen: list[Tensor] = []
    blocks: Any = operator.attrgetter(model.family.blocks)(model.hf)
    hooks = [blocks[i].register_forward_hook(lambda _m, _i, out: seen.append(out.clone())) for i in (0, 2)]
    told(model, inputs, 1)
    for hook in hooks:
        hook.remove()
    t = inputs["attention_mask"].shape[1]
    found = trace(model, inputs, torch.tensor([2 * t - 3, t - 1]), (1, 3)).prompt
    assert torch.equal(found, torch.stack([torch.stack([block[1, -3], block[0, -1]]) for block in seen]))


@pytest.mark.parametrize(("kind", "with_image"), BOTH_WAYS)
def test_a_batch_gives_what_its_rows_give_alone(kind: str, with_image: bool) -> None:
    model = fresh(kind, dtype=torch.float64)
    # Relative to the stream. Some thousand rounding errors of float64, far below any effect of padding; but eager
    # attention takes its softmax in float32 whatever the dtype.
    bound = 1e-12 if model.attention != "eager" else 1e-6
    inputs = encoded(model, with_image)
    together = trace(model, inputs, everywhere(inputs), range(LAYERS + 1), steps=3)
    for i, text in enumerate(TEXTS):
        alone = model.encode([text], (media(model) or [])[i : i + 1] or None if with_image else None)
        single = trace(model, alone, everywhere(alone), range(LAYERS + 1), steps=3)
        mine = prompts(together, inputs)[i][:, inputs["attention_mask"][i].bool()]
        theirs = prompts(single, alone)[0]
        assert (mine - theirs).abs().max() < bound * theirs.abs().max()
        assert (together.spoken[:, :, i] - single.spoken[:, :, 0]).abs().max() < bound * theirs.abs().max()


def test_what_is_kept_has_the_dtype_asked_for() -> None:
    model = loaded("llava-llama")
    inputs = encoded(model, True)
    full, half = (
        trace(model, inputs, everywhere(inputs), (0, 2), steps=2, dtype=dtype) for dtype in (None, torch.bfloat16)
    )
    assert torch.equal(half.prompt, full.prompt.to(torch.bfloat16))
    assert torch.equal(half.spoken, full.spoken.to(torch.bfloat16))


def test_nothing_kept_and_nothing_said() -> None:
    model = loaded("llava-llama")
    found = trace(model, encoded(model, True), torch.empty(0, dtype=torch.int64), (1,))
    assert found.prompt.shape == (1, 0, WIDTH)
    assert found.spoken.shape == (0, 1, 2, WIDTH)


def test_what_leaves_the_trace_does_not_keep_the_batch_alive() -> None:
    model = loaded("llava-llama")
    inputs = encoded(model, True)
    found = trace(model, inputs, torch.tensor([3, 60]), range(LAYERS + 1)).prompt
    assert found.untyped_storage().nbytes() == found.numel() * found.element_size()
    assert not found.requires_grad
