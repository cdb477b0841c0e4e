"""What rows on both sides of a split share: groups, whole residuals, almost whole ones. Nothing is fitted here."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from gapprobe.errors import DataError

NEAR = 0.999
BLOCK = 1024


def leakage_report(
    folds: Int[np.ndarray, " n"],
    groups: Mapping[str, Shaped[np.ndarray, " n"]] | pd.DataFrame | None = None,
    x: Float[Tensor, "n d"] | None = None,
    *,
    near: float = NEAR,
) -> pd.DataFrame:
    """Say how many held-out rows have something in training that gives them away.

    Args:
        folds: the fold that holds each row out, such as `sweep.cell(split="random").folds.outer`.
        groups: columns that rows may share (entity, question, image, …), in the order of the rows.
        x: residuals in the order of the rows, to look for duplicates: equal bytes, and a cosine of at least `near` once
            the mean of all rows is taken off (raw residuals share a few huge dimensions, so all of them look alike).
        near: from which cosine on two rows count as near duplicates.

    Returns:
        One row for each group column, and for "duplicate" and "near duplicate": `rows` held out with a match in
        training, their `share` of all rows, and `largest`, the most training rows that one of them matches.

    Raises:
        DataError: columns or residuals of another length.
    """
    columns = {} if groups is None else {str(name): np.asarray(values).astype(str) for name, values in groups.items()}
    for name, values in {**columns, **({} if x is None else {"x": x})}.items():
        if len(values) != len(folds):
            raise DataError(f"{name} has {len(values)} rows, the folds have {len(folds)}")
    found = {name: _shared(folds, values) for name, values in columns.items()}
    if x is not None:
        hashed = np.array([row.tobytes() for row in x.contiguous().view(torch.uint8).numpy()], dtype=object)
        found["duplicate"] = _shared(folds, np.unique(hashed, return_inverse=True)[1])
        found["near duplicate"] = _near(folds, x, near)
    return pd.DataFrame(
        [(name, int((n > 0).sum()), float((n > 0).mean()), int(n.max(initial=0))) for name, n in found.items()],
        columns=["shared", "rows", "share", "largest"],
    )


def _shared(folds: Int[np.ndarray, " n"], values: Shaped[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return for each row how many rows of other folds have its value."""
    codes = np.unique(values, return_inverse=True)[1]
    own = np.unique(np.stack([codes, folds]), axis=1, return_inverse=True)[1]
    return np.bincount(codes)[codes] - np.bincount(own)[own]


def _near(folds: Int[np.ndarray, " n"], x: Float[Tensor, "n d"], near: float) -> Int[np.ndarray, " n"]:
    centred = x.double() - x.double().mean(0)
    length = centred.norm(dim=1, keepdim=True)
    # A row that is the mean has no direction; it is near nothing.
    unit = torch.where(length > 0, centred / length, 0.0).float()
    fold = torch.from_numpy(folds)
    counts: list[Tensor] = []
    for start in range(0, len(x), BLOCK):
        rows = slice(start, start + BLOCK)
        close: Bool[Tensor, "b n"] = (unit[rows] @ unit.T >= near) & (fold[rows, None] != fold)
        counts.append(close.sum(1))
    return torch.cat(counts).numpy() if counts else np.zeros(0, dtype=np.int64)
