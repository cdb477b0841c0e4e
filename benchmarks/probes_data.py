"""What probes are fitted to: residuals as language models have them, made from seeds, or real ones from a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from gapprobe.store.reader import open_store

FOLDS = 5
# Of the covariance's eigenvalues: layers of SmolLM2-135M have 1.55 to 2.5 between the 10th and the 400th.
POWER = 1.6
MASSIVE = (5, 77, 300)
_NOISE = 0.5


@dataclass(frozen=True, eq=False)
class Layer:
    """Residuals of one layer with a label a row, and the fold that each row is held out in."""

    x: Float[Tensor, "n d"]
    y: Bool[Tensor, " n"]
    fold: Int64[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class Sweep:
    """What one operation fits: every layer, fold and strength."""

    name: str
    title: str
    layers: tuple[Layer, ...]
    strengths: Float64[Tensor, " s"]

    @property
    def bytes(self) -> int:
        """Return the size of the residuals."""
        return sum(layer.x.nbytes for layer in self.layers)


def make_layer(n: int, d: int, seed: int = 0) -> Layer:
    """Return residuals with a power-law spectrum and three massive dimensions; labels depend on all of them, and noise.

    A label is the sign of a random direction of the standardised features plus half as much noise.
    """
    g = torch.Generator().manual_seed(seed)
    deviations = (torch.arange(1, d + 1, dtype=torch.float32) ** -POWER).sqrt()
    turn, _ = torch.linalg.qr(torch.randn(d, d, generator=g))
    x = torch.randn(n, d, generator=g) * deviations @ turn.T
    for j in MASSIVE:
        if j < d:
            x[:, j] = x[:, j] * 50 + 100 * float(x.std())
    signal = ((x - x.mean(0)) / x.std(0, correction=0)) @ torch.randn(d, generator=g)
    y = signal / signal.std() + _NOISE * torch.randn(n, generator=g) > 0
    return Layer(x, y, _folds(n))


def load_layers(path: Path, chosen: Sequence[int] = (), label: str = "") -> tuple[Layer, ...]:
    """Return real layers, four spread over the depth by default.

    Args:
        path: a file that `torch.save` wrote, (X [l n d], y bool [n]), or a gapprobe store.
        chosen: numbers of layers.
        label: the column of a store's table that holds the label, one of two values.

    Raises:
        SystemExit: a layer is not there, or there is no such column.
    """
    if path.is_dir():
        store = open_store(path)
        columns = store.rows
        if label not in columns or columns[label].nunique() != 2:
            names = [name for name in columns if columns[name].nunique() == 2]
            sys.exit(f"--label must name a column of {path} with two values; such are: {', '.join(names) or 'none'}")
        y = torch.from_numpy((columns[label] == columns[label].max()).to_numpy(bool).copy())
        numbers = store.header.layers
        chosen = _refuse_unknown(chosen, numbers) or _spread(numbers)
        xs = [store.layer(number, store.header.positions[0]) for number in chosen]
    else:
        x, y = torch.load(path, mmap=True)
        numbers = range(len(x))
        xs = [x[number] for number in _refuse_unknown(chosen, numbers) or _spread(numbers)]
    return tuple(Layer(x.float().contiguous().clone(), y, _folds(len(y))) for x in xs)


def _folds(n: int, seed: int = 0) -> Int64[Tensor, " n"]:
    return torch.from_numpy(np.random.default_rng(seed).permutation(n) % FOLDS)


def _spread(numbers: Sequence[int]) -> list[int]:
    # Not the first: embeddings of the last tokens of prompts are few.
    later = numbers[1:] or numbers
    return [later[round(at)] for at in np.linspace(0, len(later) - 1, min(4, len(later)))]


def _refuse_unknown(chosen: Sequence[int], known: Sequence[int]) -> list[int]:
    if missing := sorted(set(chosen) - set(known)):
        sys.exit(f"no layer {missing[0]}; there are {known[0]} to {known[-1]}")
    return list(chosen)
