"""What a norm computes, found out by asking it. Class names say little: Gemma's RMS norm adds one to its weight."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

EPS_NAMES = ("variance_epsilon", "eps", "epsilon")


@dataclass(frozen=True)
class Norm:
    """A norm in the terms of `kernels.logit_lens.Unembedding`."""

    kind: Literal["rms", "layer"]
    gain: Float[Tensor, " d"] | None
    shift: Float[Tensor, " d"] | None
    eps: float


@torch.no_grad()
def read_norm(module: nn.Module, width: int) -> Norm | None:
    """Return the norm that gives what `module` gives on random vectors, or None if no known one does.

    A copy in float64 is asked, at lengths where eps matters and where it does not. The bound is that of float32, in
    which most norms compute whatever they are given.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = next((float(getattr(module, name)) for name in EPS_NAMES if hasattr(module, name)), None)
    if eps is None:
        return None
    # Far from zero mean, so that a norm that centres differs from one that does not.
    x = torch.randn(6, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    x = x * torch.tensor([1e-3, 1e-2, 1.0, 1.0, 30.0, 1e3], dtype=torch.float64)[:, None]
    asked = cast(Any, copy.deepcopy(module)).to("cpu", torch.float64)
    theirs: Tensor = asked(x[None])[0]
    gains = [weight] if weight is None else [weight, 1.0 + weight.float()]
    for gain in gains:
        for kind in ("rms", "layer"):
            if kind == "rms" and bias is not None:
                continue
            norm = Norm(kind, gain, bias, eps)
            ours = _apply(norm, x)
            if bool(((ours - theirs).abs() <= 1e-5 * (1 + ours.abs())).all()):
                return norm
    return None


def _apply(norm: Norm, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    if norm.kind == "layer":
        x = x - x.mean(1, keepdim=True)
    h = x * torch.rsqrt(x.square().mean(1, keepdim=True) + norm.eps)
    if norm.gain is not None:
        h = h * norm.gain.to("cpu", torch.float64)
    return h if norm.shift is None else h + norm.shift.to("cpu", torch.float64)
