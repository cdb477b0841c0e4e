import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module

import pytest
import torch

from gapprobe.errors import ConfigError, ModelError
from gapprobe.models.bridge import to_transformer_lens
from gapprobe.models.loading import load_model
from gapprobe.models.trace import trace
from tests.models.kinds import BUILDERS, WITH_IMAGE, fresh
from tests.models.tiny import LAYERS, picture

TEXTS = ["Question: hi hi? Answer:", "Question: What is the capital of France? Answer:"]
# What TransformerLens 4.3 boots; see test_what_transformer_lens_does_not_know.
KNOWN = (
    "llava-llama",
    "llava-mistral",
    "llava_next-llama",
    "idefics3-llama",
    "gpt2-gpt2",
    "llama-llama",
    "qwen2-qwen2",
)


@pytest.fixture(autouse=True)
def sealed_off(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, and no program (an installer, say) is started. Who tries is told, even if it hides the error."""
    import_module("transformer_lens.model_bridge")
    tried: list[object] = []

    def never(*args: object, **_: object) -> None:
        tried.append(args[1:])
        raise AssertionError(f"left the machine or started a program: {args}")

    monkeypatch.setattr(socket.socket, "connect", never)
    monkeypatch.setattr(socket, "getaddrinfo", never)
    monkeypatch.setattr(subprocess.Popen, "__init__", never)
    yield
    assert tried == []


@pytest.mark.parametrize("kind", KNOWN)
def test_our_trace_is_transformer_lens_cache_bit_for_bit(kind: str) -> None:
    hf, processor = BUILDERS[kind]()
    hf.set_attn_implementation("eager")
    model = load_model(hf, processor=processor)
    inputs = model.encode(TEXTS, [picture(0), picture(1, 30, 60)] if kind in WITH_IMAGE else None)
    n, t = inputs["input_ids"].shape
    mask = inputs["attention_mask"].bool()
    bridge = to_transformer_lens(model)
    rest = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
    with torch.no_grad():
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        _, cache = bridge.run_with_cache(inputs["input_ids"], position_ids=positions, **rest)
    mine = trace(model, inputs, torch.arange(n * t), range(LAYERS + 1)).prompt.reshape(LAYERS + 1, n, t, -1)
    theirs = [cache["blocks.0.hook_resid_pre"], *(cache[f"blocks.{i}.hook_resid_post"] for i in range(LAYERS))]
    for layer in range(LAYERS + 1):
        one, other = mine[layer][mask], theirs[layer][mask]
        # TransformerLens takes GPT-2's fused queries, keys and values apart and multiplies each by itself.
        same = torch.allclose(one, other, rtol=1e-5, atol=1e-5) if kind == "gpt2-gpt2" else torch.equal(one, other)
        assert same
    assert bridge.processor is model.processor


def test_booting_leaves_the_model_as_it_was() -> None:
    model = fresh("llava-llama")
    attention = model.attention
    to_transformer_lens(model)
    assert model.attention == attention == "sdpa"


@pytest.mark.parametrize("kind", ["instructblip-llama", "paligemma-gemma"])
def test_what_transformer_lens_does_not_know(kind: str) -> None:
    with pytest.raises(ModelError, match="TransformerLens cannot load"):
        to_transformer_lens(fresh(kind))


def test_without_transformer_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge", None)
    with pytest.raises(ConfigError, match=r"pip install 'gapprobe\[export\]'"):
        to_transformer_lens(fresh("gpt2-gpt2"))
