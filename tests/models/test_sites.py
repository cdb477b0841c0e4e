from typing import Any

import pytest
import torch

from gapprobe.errors import ConfigError
from gapprobe.models.model import Model
from gapprobe.models.sites import Site, layers_of
from gapprobe.models.trace import Traced, trace
from tests.models.kinds import KINDS, WITH_IMAGE, WITH_MEDIA, loaded, media
from tests.models.tiny import LAYERS, picture

IN_BLOCKS = [kind for kind in KINDS if "t5" not in kind]


def read(model: Model, site: Site, steps: int = 1, images: int = 2) -> Traced:
    texts = ["Question: hi hi? Answer:", "Question: What is the capital of France? Answer:"][:images]
    inputs = model.encode(texts, (media(model) or [])[:images] or None)
    mask = inputs["attention_mask"].flatten().nonzero()[:, 0]
    return trace(model, inputs, mask, layers_of(model, site), site=site, steps=steps)


@pytest.mark.parametrize("kind", IN_BLOCKS)
def test_the_stream_is_the_sum_of_what_is_added_to_it(kind: str) -> None:
    model = loaded(kind)
    stream, attention, mlp = (read(model, site, steps=3) for site in ("residual", "attention", "mlp"))
    for whole, first, second in (
        (stream.prompt, attention.prompt, mlp.prompt),
        (stream.spoken[0], attention.spoken[0], mlp.spoken[0]),
    ):
        added = whole[:-1].double() + first.double() + second.double()
        # Qwen3-VL adds more of the picture behind its first blocks, to the tokens of the picture.
        same = (added - whole[1:]).abs().amax(-1) < 1e-5 * whole.abs().max()
        assert same.float().mean() > (0.5 if kind.startswith("qwen3_vl") else 0.9999)


@pytest.mark.parametrize("kind", [kind for kind in IN_BLOCKS if kind != "gpt_neox-gpt_neox"])
def test_the_middle_lies_between_attention_and_mlp(kind: str) -> None:
    model = loaded(kind)
    middle, stream, mlp = (read(model, site).prompt for site in ("middle", "residual", "mlp"))
    assert torch.equal(middle + mlp, stream[1:])


@pytest.mark.parametrize("kind", WITH_MEDIA)
def test_the_tower_is_read_layer_by_layer(kind: str) -> None:
    model = loaded(kind)
    blocks: Any = model.part(model.family.vision)
    seen: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _a, out: seen.append(out)) for block in blocks]
    hooks.append(
        blocks[0].register_forward_pre_hook(
            lambda _m, args, kwargs: seen.insert(0, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    )
    inputs = model.encode(["Question: hi hi? Answer:"], (media(model) or [])[:1])
    target: Any = model.hf
    with model.only_asked(model.greedy(1)):
        target.generate(**inputs, generation_config=model.greedy(1))
    for hook in hooks:
        hook.remove()
    found = read(model, "vision", images=1).prompt
    theirs = [(out[0] if isinstance(out, tuple) else out).flatten(0, -2) for out in seen]
    assert torch.equal(found, torch.stack(theirs))


@pytest.mark.parametrize("kind", WITH_IMAGE)
def test_the_bridge_gives_what_enters_the_language_model(kind: str) -> None:
    model = loaded(kind)
    inputs = model.encode(["What?"], [picture(1, 30, 60)])
    keep = (inputs["input_ids"][0] == model.media_token_id).nonzero()[:, 0]
    entered = trace(model, inputs, keep, (0,)).prompt[0]
    bridged = trace(model, inputs, keep, (0,), site="bridge").prompt[0]
    if model.family.encoder or "opt" in kind or "gemma" in kind or model.family.layout == "anyres" or "qwen2_5" in kind:
        # OPT adds positions, Gemma scales, LLaVA-NeXT sorts and adds ends of lines, Qwen2.5-VL sorts windows.
        assert bridged.shape[1] == model.width
    else:
        assert torch.equal(bridged, entered)


@pytest.mark.parametrize("kind", ["blip2-opt", "instructblip-llama", "instructblip_t5-t5"])
def test_queries_go_through_the_bridge(kind: str) -> None:
    model = loaded(kind)
    found = read(model, "queries", images=1).prompt
    bridge: Any = model.part(model.family.bridge)
    with torch.no_grad():
        assert torch.equal(bridge(found[0]), read(model, "bridge", images=1).prompt[0])
    assert found.shape[1] == 4


def test_sites_that_a_model_has_not() -> None:
    for kind, site in (
        ("gpt2-gpt2", "vision"),
        ("llava-llama", "queries"),
        ("blip2_t5-t5", "mlp"),
        ("gpt_neox-gpt_neox", "middle"),
    ):
        with pytest.raises(ConfigError, match=f"has no site '{site}'"):
            layers_of(loaded(kind), site)
    with pytest.raises(ConfigError, match="must be one of residual, middle"):
        layers_of(loaded("gpt2-gpt2"), "head")


def test_layers_of_sites() -> None:
    model = loaded("instructblip-llama")
    numbers = {site: list(layers_of(model, site)) for site in ("residual", "mlp", "vision", "bridge", "queries")}
    assert numbers == {
        "residual": list(range(LAYERS + 1)),
        "mlp": list(range(1, LAYERS + 1)),
        "vision": [0, 1, 2],
        "bridge": [0],
        "queries": [0],
    }
