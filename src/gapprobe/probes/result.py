"""What a sweep returns: its tables, and everything that was computed, cell by cell."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float

from gapprobe import stats
from gapprobe.errors import DataError
from gapprobe.probes.coefficients import Linear, Stored
from gapprobe.probes.plan import Nested, Problems
from gapprobe.probes.splits import NestedFolds
from gapprobe.probes.verdict import Verdict

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Key:
    """What one cell of a sweep is about."""

    position: str
    probe: str
    target: str
    split: str
    seed: int


@dataclass(frozen=True)
class Cell:
    """One probe at all layers and strengths, for one position, target, split and seed.

    Attributes:
        key: which.
        layers: the layers swept.
        strengths: the strengths swept.
        problems: how the rows were cut, labels and shuffled labels.
        scores: out-of-fold scores; log-odds where the probe is calibrated.
        nested: scores of the probe whose layer and strength were chosen on training rows only.
        verdict: the nested probe against its best control.
        controls: out-of-fold scores of the controls besides shuffled labels; where a control has layers and strengths,
            chosen as the probe's are.
        linear: by layer where coefficients are; none where the probe is not linear, or none were kept.
    """

    key: Key
    layers: tuple[int, ...]
    strengths: tuple[float, ...]
    problems: Problems
    scores: Float[np.ndarray, "l s n"]
    nested: Nested
    verdict: Verdict
    controls: Mapping[str, Float[np.ndarray, " n"]]
    linear: Mapping[int, Linear | Stored]

    def coefficients(self, layer: int) -> Linear:
        """Return coef [s f d] and intercept [s f] of a layer, at each strength s and outer fold f, in raw coordinates.

        They are of the fits on the labels that scored the rows which their fold holds out: for such a row x,
        `coef[s, f] @ x + intercept[s, f]` is its number in `scores`. What a sweep keeps in a `folder` is read now.

        Raises:
            DataError: the layer was not swept, the probe is not linear, none were kept, or their file is gone.
        """
        if layer not in self.layers:
            raise DataError(f"the sweep has layers {list(self.layers)}, not {layer}")
        if layer not in self.linear:
            raise DataError(
                f"no coefficients of {self.key.probe} were kept: a sweep keeps those of probes whose fits are linear "
                "(gp.LinearFits), in `folder`, or in memory with coefficients=True"
            )
        return self.linear[layer].load()

    @property
    def folds(self) -> NestedFolds:
        """Return how the rows were cut."""
        return self.problems.cut

    @property
    def p_value(self) -> float:
        """Return the permutation p-value: how often shuffled labels do as well, the labels as they are counted too.

        Source: Ojala & Garriga 2010, eq. 1. With m permutations it cannot fall below 1 / (m + 1); NaN without any.
        """
        folds, shuffled = self.folds.outer, self.problems.shuffled
        if not len(shuffled):
            return math.nan
        runs = zip(self.nested.shuffled, shuffled, strict=True)
        as_good = sum(stats.auc(scores, labels, folds) >= self.verdict.probe.value for scores, labels in runs)
        return (1 + as_good) / (1 + len(shuffled))


@dataclass(frozen=True)
class ProbeSweep:
    """Every number of a sweep. Areas count pairs of rows held out by the same fold; see `stats.weighted_auc`.

    Attributes:
        table: one row for each position, probe, target, split, seed, kind ("probe" or a control) and layer, with auc,
            ci_low, ci_high, n, positives; for probes also strength (chosen most often on training rows), accuracy,
            balanced_accuracy, log_loss and ece (the last two where scores are log-odds). Controls that know no layer
            repeat their number at every layer. The interval of "shuffled" is where one more permutation is expected;
            all others are crossed bootstrap intervals with the fits as they are.
        strengths: area of every probe at every layer and strength, without intervals.
        ids: the rows, in the order of every array here.
        cells: what was computed, by key.
    """

    table: pd.DataFrame
    strengths: pd.DataFrame
    ids: tuple[str, ...]
    cells: Mapping[Key, Cell]

    def cell(self, **which: str | int) -> Cell:
        """Return the one cell that is about this, such as `split="entity"`; what the sweep has one of may be left out.

        Raises:
            DataError: no cell, or several.
        """
        found = [c for k, c in self.cells.items() if all(getattr(k, name) == value for name, value in which.items())]
        if len(found) == 1:
            return found[0]
        said = ", ".join(f"{name}={value!r}" for name, value in which.items()) or "nothing"
        names = ("position", "probe", "target", "split", "seed")
        there = {name: list(dict.fromkeys(getattr(key, name) for key in self.cells)) for name in names}
        told = "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in there.items())
        raise DataError(f"{len(found)} cells of this sweep answer to {said}; it has {told}")

    def verdict(self, split: str) -> Verdict:
        """Return whether the probe beats its best control under `split`; see `cell` for sweeps of several probes."""
        return self.cell(split=split).verdict

    def best(self) -> pd.DataFrame:
        """Return one row a cell: the probe whose layer and strength were chosen on training rows only, and its rival.

        There is no other way to ask for the best: the layer that is best on the rows it is judged on flatters itself.
        """
        return pd.DataFrame(
            [
                {
                    **vars(key),
                    "layers": list(cell.nested.layers),
                    "strengths": list(cell.nested.strengths),
                    "auc": cell.verdict.probe.value,
                    "ci_low": cell.verdict.probe.low,
                    "ci_high": cell.verdict.probe.high,
                    "control": cell.verdict.control,
                    "control_auc": None if cell.verdict.control_auc is None else cell.verdict.control_auc.value,
                    "p_value": cell.p_value,
                    "beats": cell.verdict.beats,
                    "sentence": cell.verdict.sentence,
                }
                for key, cell in self.cells.items()
            ]
        )

    def save(self, path: str | Path) -> Path:
        """Write tables, scores, choices, verdicts and coefficients to a folder; `gp.load_sweep` reads it back.

        `sweep.json` has all that is not an array, `scores.safetensors` the arrays, `coefficients-0.safetensors`, …
        those of a cell each. A sweep that was saved there before is replaced.

        Raises:
            DataError: the folder holds something else, or coefficients cannot be read any more.
            OutputError: it cannot be written, or the disk is full.
        """
        from gapprobe.probes.saved import save_sweep

        return save_sweep(self, Path(path))

    def plot(self) -> "go.Figure":
        """Draw the areas by layer, with intervals, beside the controls; a panel for each split.

        Raises:
            ConfigError: plotly is not installed.
        """
        from gapprobe.probes.plotting import area_by_layer

        return area_by_layer(self.table)
