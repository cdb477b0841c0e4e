"""Shared coordinates for residual streams of different models, from rows that show all of them the same input.

Source: the MAXVAR form of canonical correlation for several sets (Kettenring 1971, doi 10.1093/biomet/58.3.433), on the
leading principal components of each, so that directions of hardly any variance cannot make up a likeness. No label of
any row enters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gapprobe.errors import DataError

KEPT = 0.99  # of the variance of each model's anchors
ROWS_A_COMPONENT = 4  # fewer, and any two models have something in common by chance


@dataclass(frozen=True)
class Alignment:
    """Rows that show several models the same input.

    Attributes:
        anchors: ids by set, in one order: the i-th rows of all sets are one input. None of them may be learnt from or
            judged; at least four rows for each coordinate are needed.
        rank: of the shared coordinates, at most.
    """

    anchors: Mapping[str, Sequence[str]]
    rank: int = 32


@dataclass(frozen=True)
class Map:
    """From one model's residuals to the shared coordinates.

    Attributes:
        mean: of the anchors.
        weight: of the linear map.
    """

    mean: Float[Tensor, " d"]
    weight: Float[Tensor, "d r"]

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n r"]:
        """Return residuals in the shared coordinates, in float32."""
        return ((x.double() - self.mean) @ self.weight).float()


def shared_maps(anchors: Sequence[Float[Tensor, "m _"]], rank: int) -> tuple[list[Map], Float[Tensor, " r"]]:
    """Return the maps of all sets to coordinates in which their anchors agree best, and how well they do.

    Args:
        anchors: residuals of the same inputs, a tensor a set; they may be of any widths.
        rank: of the shared coordinates, at most; fewer where the rows do not suffice.

    Returns:
        One map a set, and for each coordinate the mean over sets of the share of it that lies in the set's components:
        1 where all have it, 1 over the number of sets where only one does.

    Raises:
        DataError: too few anchors, or ones that do not vary.
    """
    m = len(anchors[0])
    most = m // ROWS_A_COMPONENT
    if most < 1 or rank < 1:
        raise DataError(f"{m} anchors cannot hold {rank} coordinates: each wants {ROWS_A_COMPONENT} rows at least")
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for x in anchors:
        mean = x.double().mean(0)
        u, s, vh = torch.linalg.svd(x.double() - mean, full_matrices=False)
        share = s.square().cumsum(0) / s.square().sum()
        if not bool(s[0] > 0):
            raise DataError("the anchors of a set are all alike: no direction tells one from another")
        k = min(int((share < KEPT).sum()) + 1, most)
        parts.append((mean, u[:, :k], vh[:k].T / s[:k]))
    rank = min(rank, *(u.shape[1] for _, u, _ in parts))
    left, found, _ = torch.linalg.svd(torch.cat([u for _, u, _ in parts], 1), full_matrices=False)
    # Scale and sign of a coordinate are no matter: probes standardise what they read.
    maps = [Map(mean, white @ (u.T @ left[:, :rank])) for mean, u, white in parts]
    return maps, found[:rank].square() / len(parts)
