"""Do judges agree? Shares, Cohen's kappa, and the rows on which they differ, to read. Who judged is not known here."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from gapprobe import stats
from gapprobe.errors import DataError


@dataclass(frozen=True)
class Agreement:
    """How far judges agree, by pair.

    Attributes:
        table: one line a pair of judges: `first`, `second`, `n` rows, `agreement` with `ci_low` and `ci_high`, `kappa`
            with `kappa_ci_low` and `kappa_ci_high`, `only_first` and `only_second`, the rows that one of them alone
            takes for right. Kappa is NaN where both judges give one verdict throughout.
        disagreements: the rows on which any two judges differ, with all columns that were given.
    """

    table: pd.DataFrame
    disagreements: pd.DataFrame


def agreement(
    judgements: pd.DataFrame,
    clusters: str | tuple[str, str] | None = None,
    *,
    replicates: int = 1000,
    seed: int = 0,
) -> Agreement:
    """Compare judges pair by pair, with 95 % intervals.

    Args:
        judgements: one line an answer. Each column of truth values is a judge; all others (answer, gold, question) are
            kept for reading, or say which rows belong together. `judge_answers` makes such a table.
        clusters: the column of what rows share, or two that cross (question and image), for the bootstrap; rows are
            their own clusters where left out.
        replicates: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: no rows, fewer than two judges, a judgement that is missing, or no such column of clusters.
    """
    judges = [str(name) for name in judgements.columns if pd.api.types.is_bool_dtype(judgements[name])]
    if len(judges) < 2 or not len(judgements):
        raise DataError(
            f"{len(judgements)} rows and {len(judges)} columns of truth values ({', '.join(judges) or 'none'}): "
            "an agreement needs rows and two judges; object columns are turned by .astype(bool)"
        )
    if absent := [name for name in judges if judgements[name].isna().any()]:
        raise DataError(f"judge {absent[0]} has rows without judgement; leave them out")
    verdicts = {name: judgements[name].to_numpy(dtype=bool) for name in judges}
    weights = stats.crossed_weights(*_groups(judgements, clusters), replicates=replicates, seed=seed)
    lines: list[dict[str, object]] = []
    for first, second in combinations(judges, 2):
        a, b = verdicts[first], verdicts[second]
        same = stats.mean((a == b).astype(np.float64), weights)
        kappa = stats.estimate(lambda w, a=a, b=b: weighted_kappa(a, b, w), weights)
        lines.append(
            {
                "first": first,
                "second": second,
                "n": len(a),
                "agreement": same.value,
                "ci_low": same.low,
                "ci_high": same.high,
                "kappa": kappa.value,
                "kappa_ci_low": kappa.low,
                "kappa_ci_high": kappa.high,
                "only_first": int((a & ~b).sum()),
                "only_second": int((b & ~a).sum()),
            }
        )
    differ = np.ptp(np.stack(list(verdicts.values())).astype(np.int8), axis=0) > 0
    return Agreement(pd.DataFrame(lines), judgements[differ])


def weighted_kappa(
    first: Bool[np.ndarray, " n"], second: Bool[np.ndarray, " n"], weights: Float[np.ndarray, "b n"]
) -> Float[np.ndarray, " b"]:
    """Return Cohen's kappa (1960, doi 10.1177/001316446002000104) of two judges under each replicate's weights.

    kappa = (o - e) / (1 - e): o is the share of rows on which they agree, e the share to be expected of independent
    judges who take as many rows for right. NaN where e is 1, or all weights are zero.
    """
    p, q = (stats.weighted_mean(verdict.astype(np.float64), weights) for verdict in (first, second))
    observed = stats.weighted_mean((first == second).astype(np.float64), weights)
    expected = p * q + (1 - p) * (1 - q)
    room = 1 - expected
    return np.divide(observed - expected, room, out=np.full(len(room), np.nan), where=room > 0)


def _groups(judgements: pd.DataFrame, clusters: str | tuple[str, str] | None) -> tuple[np.ndarray, np.ndarray]:
    names = () if clusters is None else (clusters,) if isinstance(clusters, str) else clusters
    if absent := [name for name in names if name not in judgements]:
        raise DataError(f"there is no column {absent[0]!r} of clusters; columns: {', '.join(map(str, judgements))}")
    n = len(judgements)
    columns = [judgements[name].to_numpy(dtype=str) for name in names] or [np.arange(n)]
    return columns[0], columns[1] if len(columns) > 1 else np.zeros(n, dtype=np.int64)
