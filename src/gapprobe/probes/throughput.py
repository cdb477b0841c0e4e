"""How fast probes are fitted here: on this machine, on a user's own store, beside what the machine could do at most."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from gapprobe.errors import DataError
from gapprobe.kernels import logistic
from gapprobe.probes.base import Probe, find_probe
from gapprobe.probes.labels import binary, target_of
from gapprobe.store.reader import Store

SIDE = 2048  # of the square matrices that the matrix limit is measured with
COPIED = 256 << 20


@dataclass(frozen=True)
class Limits:
    """What this machine does at most, measured here.

    Attributes:
        flops: of float32 matrix products, a second.
        bytes: read and written by a copy that no cache holds, a second.
    """

    flops: float
    bytes: float

    @classmethod
    def measured(cls) -> "Limits":
        """Measure both, the best of five."""
        a, b = torch.ones(SIDE, SIDE), torch.zeros(COPIED // 4)
        out, copy = torch.empty_like(a), torch.zeros_like(b)
        return cls(2 * SIDE**3 / _best(lambda: torch.mm(a, a, out=out)), 2 * COPIED / _best(lambda: copy.copy_(b)))


def bench_probes(
    store: Store | None = None,
    target: pd.Series | str | None = None,
    *,
    probe: str | Probe = "logistic",
    position: str = "last_input",
    layers: Sequence[int] | None = None,
    strengths: Sequence[float] | None = None,
    folds: int = 5,
    rows: int = 2000,
    width: int = 1024,
    against_sklearn: bool = False,
    progress: bool = False,
) -> pd.DataFrame:
    """Time the fits of every layer: all folds and strengths in one call, on one core, as a sweep makes them.

    Args:
        store: activations; random ones with a power-law spectrum, like a residual stream's, where left out.
        target: labels; a random direction's where left out, which no real label is much harder than.
        probe: any registered probe, or an instance.
        position: token whose residual is read.
        layers: of the store; all where left out. Four of random activations.
        strengths: the probe's own where left out.
        folds: random ones.
        rows: of random activations.
        width: of random activations.
        against_sklearn: fit the same problems one by one with scikit-learn's logistic regression (tolerance 1e-8).
        progress: show a progress bar over layers.

    Returns:
        One row a layer: rows, width, fits, read_seconds (store to memory), seconds (of the processor),
        fits_per_second, gb_per_second (X once for every fit), matrix_share and memory_share (the least that all fits
        need, one product with X each and one reading of it for all, over the machine's limits), and sklearn_seconds
        and ratio on request.

    Raises:
        DataError: a layer or column that the store lacks, or labels of one class.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _timed(
            store,
            target,
            find_probe(probe, ("rows",)),
            position,
            layers,
            strengths,
            folds,
            rows,
            width,
            against_sklearn,
            progress,
        )
    finally:
        torch.set_num_threads(threads)


def _timed(
    store: Store | None,
    target: pd.Series | str | None,
    found: Probe,
    position: str,
    layers: Sequence[int] | None,
    strengths: Sequence[float] | None,
    folds: int,
    rows: int,
    width: int,
    against_sklearn: bool,
    progress: bool,
) -> pd.DataFrame:
    limits = Limits.measured()
    swept = tuple(strengths or found.strengths)
    ids: list[str] = []
    given: Bool[np.ndarray, " n"] | None = None
    if store is not None:
        known = store.header.layers
        if absent := sorted(set(layers or ()) - set(known)):
            raise DataError(f"the store holds layers {list(known)}, not {absent}")
        labels_of_rows = None if target is None else target_of(store.rows, target)
        ids = [str(i) for i in (store.ids if labels_of_rows is None else labels_of_rows.index)]
        given = None if labels_of_rows is None else binary(labels_of_rows)
    lines: list[dict[str, float]] = []
    chosen = list(layers or (store.header.layers if store is not None else range(4)))
    for layer in tqdm(chosen, desc="bench", unit="layer", disable=not progress):
        start = time.perf_counter()
        x = random_residuals(rows, width, layer) if store is None else store.layer(layer, position=position, rows=ids)
        x = x.clone()  # a map of the store's files is read now, and not inside the fits
        read = time.perf_counter() - start
        y = torch.from_numpy(given) if given is not None else _direction(x, layer)
        mask = torch.arange(len(x)) % folds != torch.arange(folds)[:, None]
        labels = y.expand(folds, len(x)).repeat_interleave(len(swept), 0)
        weights = logistic.balanced(y.expand(folds, len(x)), mask).repeat_interleave(len(swept), 0)
        each = torch.tensor(swept, dtype=torch.float64).repeat(folds)
        start = time.process_time()
        found.fit(x, labels, weights, each, 0)
        seconds = time.process_time() - start
        fits, (n, d) = len(labels), x.shape
        line: dict[str, float] = {
            "layer": layer,
            "rows": n,
            "width": d,
            "fits": fits,
            "read_seconds": read,
            "seconds": seconds,
            "fits_per_second": fits / seconds,
            "gb_per_second": fits * x.nbytes / seconds / 1e9,
            "matrix_share": 2 * n * d * fits / seconds / limits.flops,
            "memory_share": x.nbytes / seconds / limits.bytes,
        }
        if against_sklearn:
            line["sklearn_seconds"] = _sklearn(x, labels, weights, each)
            line["ratio"] = line["sklearn_seconds"] / seconds
        lines.append(line)
    return pd.DataFrame(lines).astype({name: int for name in ("layer", "rows", "width", "fits")})


def random_residuals(n: int, d: int, seed: int) -> Float[Tensor, "n d"]:
    """Return activations like a residual stream's: eigenvalues i^-1.6, three massive dimensions, an offset.

    The exponent is that of middle layers of SmolLM2-135M (1.6 between eigenvalues 10 and 400).
    """
    g = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, d + 1) ** -0.8
    mix = torch.linalg.qr(torch.randn(d, d, generator=g))[0]
    x = (torch.randn(n, d, generator=g) * scales) @ mix.T
    for dimension in range(min(3, d)):
        x[:, dimension] = 50 * x[:, dimension] + 100 * x.std()
    return x


def _direction(x: Float[Tensor, "n d"], seed: int) -> Bool[Tensor, " n"]:
    """Return labels that a random direction of the standardised features tells, with noise of half its deviation."""
    g = torch.Generator().manual_seed(seed)
    z = torch.nan_to_num((x.float() - x.float().mean(0)) / x.float().std(0))
    along = z @ torch.randn(x.shape[1], generator=g)
    noisy = along + 0.5 * along.std() * torch.randn(len(x), generator=g)
    return noisy > noisy.median()


def _sklearn(x: Tensor, y: Tensor, weights: Tensor, strengths: Tensor) -> float:
    """Return the processor seconds that scikit-learn takes, on one core, for the same problems, one after another."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise DataError("comparing with scikit-learn needs it: pip install scikit-learn") from error
    start = time.process_time()
    for labels, own, c in zip(y.numpy(), weights.numpy(), strengths.tolist(), strict=True):
        used = own > 0
        z = StandardScaler().fit_transform(x.float().numpy()[used])
        fit = LogisticRegression(C=c, tol=1e-8, max_iter=100_000)
        with threadpool_limits(1):
            fit.fit(z, labels[used], sample_weight=own[used].astype(np.float32))
    return time.process_time() - start


def _best(work: Callable[[], object]) -> float:
    seconds = math.inf
    for _ in range(5):
        start = time.perf_counter()
        work()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds
