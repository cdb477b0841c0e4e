"""Cosine similarity of paired rows, raw and after a common centre is taken off. Pairing rows is the caller's work.

Raw residual streams share a few huge dimensions that push every cosine towards one; a centred cosine compares what
differs between rows. A row that is nothing but rounding after centring has no direction: its cosine is NaN.
"""

import torch
from einops import einsum
from jaxtyping import Float, Float32, Float64
from torch import Tensor

ROW_BLOCK = 4096
ROUNDING = 1e-6  # of a float32 row's own length: below it, what is left after centring is not signal


def reference(
    left: Float[Tensor, "n d"], right: Float[Tensor, "n d"], centre: Float[Tensor, " d"] | None = None
) -> Float64[Tensor, " n"]:
    """Compute the cosines in float64, all at once: the definition, for reading and for tests."""
    shift = torch.zeros(left.shape[1], dtype=torch.float64) if centre is None else centre.double()
    a, b = left.double() - shift, right.double() - shift
    cosine = einsum(a, b, "n d, n d -> n") / (a.norm(dim=1) * b.norm(dim=1))
    kept = (a.norm(dim=1) > ROUNDING * left.double().norm(dim=1)) & (
        b.norm(dim=1) > ROUNDING * right.double().norm(dim=1)
    )
    return torch.where(kept, cosine, torch.nan)


def common_centre(left: Float[Tensor, "n d"], right: Float[Tensor, "n d"]) -> Float64[Tensor, " d"]:
    """Return the mean of all rows of both sides, summed in float64."""
    return (left.sum(0, dtype=torch.float64) + right.sum(0, dtype=torch.float64)) / (2 * left.shape[0])


def paired(
    left: Float[Tensor, "n d"], right: Float[Tensor, "n d"], centre: Float[Tensor, " d"] | None = None
) -> Float32[Tensor, " n"]:
    """Return the cosine of each row of `left` with the same row of `right`, less `centre` where one is given.

    Raises:
        ValueError: the two sides differ in shape, or the centre in width.
    """
    if left.shape != right.shape:
        raise ValueError(f"paired rows want equal shapes, got {tuple(left.shape)} and {tuple(right.shape)}")
    if centre is not None and centre.shape[0] != left.shape[1]:
        raise ValueError(f"the centre is {centre.shape[0]} wide, the rows are {left.shape[1]} wide")
    out = torch.empty(left.shape[0], dtype=torch.float32, device=left.device)
    for start in range(0, left.shape[0], ROW_BLOCK):
        rows = slice(start, start + ROW_BLOCK)
        a, b = left[rows].float(), right[rows].float()
        bound = ROUNDING**2 * torch.stack([(a * a).sum(1), (b * b).sum(1)])
        if centre is not None:
            # The subtraction is float64: the centre of nearly equal rows must not cost the digits that differ.
            a, b = (a.double() - centre).float(), (b.double() - centre).float()
        squares = torch.stack([(a * a).sum(1), (b * b).sum(1)])
        cosine = (a * b).sum(1) / squares.prod(0).sqrt()
        out[rows] = torch.where((squares > bound).all(0), cosine, torch.nan)
    return out
