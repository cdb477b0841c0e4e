import operator
from typing import Any

import pytest
import torch
from torch import Tensor

from gapprobe.models.model import Model
from gapprobe.models.trace import trace
from tests.models.tiny import KINDS, LAYERS, fresh, loaded, picture

TEXTS = ["Question: hi? Answer:", "Question: What is the capital of France? Answer:"]


def encoded(model: Model, with_image: bool) -> dict[str, Tensor]:
    return model.encode(TEXTS, [picture(0), picture(1, 30, 60)] if with_image else None)


def everywhere(inputs: dict[str, Tensor]) -> Tensor:
    n, t = inputs["input_ids"].shape
    return torch.arange(t).expand(n, t)


def hidden_states(model: Model, inputs: dict[str, Tensor]) -> Any:
    target: Any = model.hf if "pixel_values" in inputs else model.part(model.family.generator)
    with torch.no_grad():
        output = target(**inputs, output_hidden_states=True, use_cache=False)
    return (getattr(output, "language_model_outputs", None) or output).hidden_states, output.logits


@pytest.mark.parametrize("with_image", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_the_hidden_states_of_transformers(kind: str, with_image: bool) -> None:
    model = loaded(kind)
    inputs = encoded(model, with_image)
    mask = inputs["attention_mask"].bool()
    assert not mask.all()  # one row is padded
    traced = trace(model, inputs, everywhere(inputs), range(LAYERS + 1), last=3)
    theirs, logits = hidden_states(model, inputs)
    assert len(theirs) == LAYERS + 1
    for layer in range(LAYERS):
        assert torch.equal(traced.residual[:, layer][mask], theirs[layer][mask])
    # The last hidden state of transformers is behind the final norm; ours is before it.
    norm: Any = model.part(model.family.final_norm)
    assert torch.equal(norm(traced.residual[:, LAYERS])[mask], theirs[LAYERS][mask])
    assert not torch.allclose(traced.residual[:, LAYERS][mask], theirs[LAYERS][mask], rtol=0.1)
    # Another product over fewer rows: the same up to float32's rounding of logits near one.
    assert (traced.logits - logits[:, -3:]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["llava-llama", "instructblip-llama"])
def test_chosen_columns_and_layers_equal_forward_hooks(kind: str) -> None:
    model = loaded(kind)
    inputs = encoded(model, True)
    seen: list[Tensor] = []
    blocks: Any = operator.attrgetter(model.family.blocks)(model.hf)
    hooks = [blocks[i].register_forward_hook(lambda _m, _i, out: seen.append(out.clone())) for i in (0, 2)]
    with torch.no_grad():
        model.hf(**inputs)
    for hook in hooks:
        hook.remove()
    columns = torch.tensor([[-1, -4], [-2, -3]])
    found = trace(model, inputs, columns, (1, 3)).residual
    rows = torch.arange(2)[:, None]
    assert torch.equal(found, torch.stack([block[rows, columns] for block in seen], dim=1))


@pytest.mark.parametrize("with_image", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_its_rows_give_alone(kind: str, with_image: bool) -> None:
    model = fresh(kind, dtype=torch.float64)
    inputs = encoded(model, with_image)
    together = trace(model, inputs, everywhere(inputs), range(LAYERS + 1))
    for i, text in enumerate(TEXTS):
        alone = model.encode([text], [picture(0), picture(1, 30, 60)][i : i + 1] if with_image else None)
        found = trace(model, alone, everywhere(alone), range(LAYERS + 1))
        mine = together.residual[i][:, inputs["attention_mask"][i].bool()]
        # float64: 1e-12 is some thousand rounding errors of values around one, far below any effect of padding.
        assert (mine - found.residual[0]).abs().max() < 1e-12
        assert (together.logits[i] - found.logits[0]).abs().max() < 1e-12


def test_what_leaves_the_trace_does_not_keep_the_batch_alive() -> None:
    model = loaded("llava-llama")
    inputs = encoded(model, True)
    found = trace(model, inputs, torch.tensor([[-1], [-1]]), range(LAYERS + 1)).residual
    assert found.untyped_storage().nbytes() == found.numel() * found.element_size()
    assert not found.requires_grad
