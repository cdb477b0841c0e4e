"""Is what gapprobe would capture really this model's residual stream? Asked once a run, on a small real batch.

The batch has two prompts of different length and two images of different shape, so that padding, image tokens and
positions all differ between its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import PIL.Image
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from gapprobe.errors import ModelError
from gapprobe.kernels.logit_lens import reference
from gapprobe.models.families.base import Modality
from gapprobe.models.model import Medium, Model
from gapprobe.models.trace import trace
from gapprobe.sound import Sound

PROMPTS = ("Question: What is this? Answer:", "Look at the image. Question: What is the capital of France? Answer:")
SIZES = ((48, 40), (36, 56))


@dataclass(frozen=True)
class Check:
    """One comparison: the error that was measured, and the most it may be."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Return whether the error is within its bound; a NaN is not."""
        return self.error <= self.bound

    def __str__(self) -> str:
        """Return a line to print."""
        return f"{'ok  ' if self.passed else 'FAIL'}  {self.name}: error {self.error:.2g}, bound {self.bound:.2g}"


@dataclass(frozen=True)
class ModelCheck:
    """All comparisons of one model."""

    model: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Return whether all comparisons passed."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        """Return the comparisons, one a line."""
        return "\n".join([self.model, *(f"  {check}" for check in self.checks)])

    def require(self) -> None:
        """Raise ModelError when a comparison failed."""
        if not self.passed:
            raise ModelError(
                f"{self.model}: what gapprobe would capture is not this model's residual stream; it needs a family row "
                f"of its own.\n{self}"
            )


@torch.no_grad()
def check_model(model: Model) -> ModelCheck:
    """Compare the traced stream with transformers' own, a batch with its rows, and the logits with the last layer.

    But for the bit-equal layers, errors are relative. Between streams: the largest distance of two tokens' vectors over
    the root mean square length of a vector in that layer. Between logits: the difference in log-probability of the most
    and the least likely word over the standard deviation of the logits. The bound is 16 · eps · sqrt(L + 1), at most
    0.2: rounding errors of a few eps in every block that add up like a random walk, eps being that of the model's
    dtype. A wrong position, layer or norm gives errors of 0.03 to 1, so check in float32 where you can: bfloat16 hides
    the smaller ones.
    """
    media = some_media(model.family.modality)
    inputs = model.encode(PROMPTS, media)
    top = model.n_layers
    bound = min(16 * torch.finfo(model.dtype).eps * (top + 1) ** 0.5, 0.2)
    ours, theirs, logits = _traced(model, inputs), *_told(model, inputs)
    norms = [path for path in (model.family.encoder_norm, model.family.final_norm) if path]
    mask = inputs["attention_mask"].bool().cpu()
    # An encoder-decoder's prompt stands in its encoder; its decoder reads one start token a row.
    masks = [mask, torch.ones(len(mask), 1, dtype=torch.bool)][: len(norms)]

    unequal, normed = 0.0, 0.0
    for stream, states, path, real in zip(ours, theirs, norms, masks, strict=True):
        if len(states) != top + 1:
            raise ModelError(f"{model.source}: {top} blocks were found, but transformers returns {len(states) - 1}")
        unequal = max(unequal, *(_difference(stream[i][real], states[i][real]) for i in range(top)))
        norm = cast(Any, model.part(path))
        last = norm(stream[top].to(next(norm.parameters()).device)).cpu()
        normed = max(normed, _distance(last[real], states[top][real]))
    apart: list[float] = []
    for i, prompt in enumerate(PROMPTS):
        alone = _traced(model, model.encode([prompt], media and [media[i]]))
        for stream, single, real in zip(ours, alone, masks, strict=True):
            apart += [_distance(stream[layer, i][real[i]], single[layer, 0]) for layer in range(top + 1)]
    return ModelCheck(
        f"{model.source} ({model.family.name}, {top} blocks, {str(model.dtype).removeprefix('torch.')})",
        (
            Check(f"layers 0 to {top - 1} are output_hidden_states, bit for bit", unequal, 0.0),
            Check(f"layer {top} through the final norm is the last of them", normed, bound),
            Check("a batch gives what its rows give alone", max(apart), bound),
            Check(f"the logits follow from layer {top}", _lens_error(model, ours[-1][top, :, -1], logits), bound),
        ),
    )


def _traced(model: Model, inputs: dict[str, Tensor]) -> list[Float[Tensor, "l n t d"]]:
    """Return all layers of all tokens of the prompts and, of an encoder-decoder, of the decoder's start token."""
    n, t = inputs["attention_mask"].shape
    found = trace(model, inputs, torch.arange(n * t), range(model.n_layers + 1))
    prompt = rearrange(found.prompt, "l (n t) d -> l n t d", n=n)
    return [prompt, rearrange(found.spoken, "1 l n d -> l n 1 d")] if model.family.encoder else [prompt]


def _told(model: Model, inputs: dict[str, Tensor]) -> tuple[list[list[Float[Tensor, "n t d"]]], Float[Tensor, "n v"]]:
    """Return what transformers itself tells of the same: hidden states, and the logits of the first new token."""
    generator = cast(Any, model.part("" if model.has_media(inputs) else model.family.generator))
    config = model.greedy(1, return_dict_in_generate=True, output_hidden_states=True, output_logits=True)
    with model.only_asked(config):
        told = generator.generate(**inputs, generation_config=config)
    both = model.family.encoder
    stacks = [told.encoder_hidden_states, told.decoder_hidden_states[0]] if both else [told.hidden_states[0]]
    return [[states.cpu() for states in stack] for stack in stacks], told.logits[0].cpu()


def _lens_error(model: Model, last: Float[Tensor, "n d"], logits: Float[Tensor, "n v"]) -> float:
    """Compare the log-probabilities of the first new token with those that the lens finds from the last layer."""
    logits, unembedding = logits.double(), model.unembedding().to("cpu")
    errors: list[Tensor] = []
    for targets in (logits.argmax(1), logits.argmin(1)):
        found = reference(last, unembedding, targets).log_prob
        errors.append((found - logits.log_softmax(1).gather(1, targets[:, None])[:, 0]).abs())
    return (torch.stack(errors).max() / logits.std()).nan_to_num(nan=torch.inf).item()


def _difference(a: Float[Tensor, "t d"], b: Float[Tensor, "t d"]) -> float:
    """Return the largest difference; a NaN on either side is infinitely wrong."""
    return (a - b).abs().nan_to_num(nan=torch.inf).max().item()


def _distance(a: Float[Tensor, "t d"], b: Float[Tensor, "t d"]) -> float:
    a, b = a.double(), b.double()
    scale = b.square().sum(-1).mean().sqrt()
    return ((a - b).norm(dim=-1).max() / scale).nan_to_num(nan=torch.inf).item()


def some_media(modality: Modality) -> list[Medium] | None:
    """Return noise to look at or to listen to, no two alike in size."""
    if modality == "text":
        return None
    random = np.random.default_rng(0)
    if modality == "audio":
        return [Sound(random.uniform(-0.5, 0.5, size).astype(np.float32), 16000) for size in (8000, 5000)]
    return [PIL.Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]
