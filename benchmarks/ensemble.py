"""Module probes: all folds and strengths of a layer as one ensemble, and one torch module after another.

    python -m benchmarks.ensemble [--quick] [--runs N] [--steps N] [--json FILE]

What each operation and figure means is in `benchmarks/README.md`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from benchmarks._measure import machine, timed, versions
from benchmarks._outcome import Runs, WrongResult, by_operation, judged, keep, one_thread
from benchmarks.probes_data import FOLDS, Layer, make_layer
from gapprobe.probes.modules import ModuleProbe
from gapprobe.stats import auc

HIDDEN = 64
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
SIZES = ((2000, 1024), (2000, 64), (200, 64))
OURS, LOOP, FLOOR = "gapprobe", "torch-loop", "matmul"
LABELS = {
    OURS: "gapprobe",
    LOOP: "one torch module after another",
    FLOOR: "the bare products of the loop's steps",
}
WANTED = 10.0  # times our processor time that the loop is to take
# Difference of log-odds, as a share of their root mean square. In float64 the two are one: only sums run in another
# order. In float32 most members are 1e-7 apart, but in a few rounding puts a unit on the other side of its kink for a
# row, of the loop's as of ours, and Adam makes much of it: ours must be this near to the loop, or to its float64 twin.
EXACT, USUAL, BOUND = 1e-9, 1e-5, 0.1


@dataclass
class Options:
    """Time training an ensemble of small modules."""

    quick: bool = False
    """The smallest operation alone, two rounds; prints the results."""
    runs: int = 3
    """Rounds."""
    steps: int = 300
    """Of Adam, at most."""
    json: Path | None = None
    """Write the results here. A full run writes to benchmarks/results/ by default; a file is never written over."""


@dataclass(frozen=True, eq=False)
class Work:
    """All folds and strengths of a layer; members are strengths of a fold, fold by fold."""

    layer: Layer
    probe: ModuleProbe

    @property
    def weights(self) -> Float64[Tensor, "p n"]:
        """Return 1 for the rows that a member may see."""
        used = self.layer.fold != torch.arange(FOLDS)[:, None]
        return used.repeat_interleave(len(STRENGTHS), 0).double()

    @property
    def strengths(self) -> Float64[Tensor, " p"]:
        """Return every member's."""
        return torch.tensor(STRENGTHS, dtype=torch.float64).repeat(FOLDS)


def make(d: int) -> nn.Module:
    """Return a module of one hidden layer."""
    return nn.Sequential(nn.Linear(d, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1), nn.Flatten(0))


def ensemble(work: Work) -> Float64[Tensor, "p n"]:
    """Train all members at once; return their log-odds of all rows."""
    x, weights = work.layer.x, work.weights
    fits = work.probe.fit(x, work.layer.y.expand(len(weights), -1), weights, work.strengths, 0)
    return fits.scores(x)


def loop(work: Work) -> Float64[Tensor, "p n"]:
    """Train one member after another, as one would by hand; return their log-odds of all rows.

    The start, the rows held out, the order of the batches and the rule to stop are those of `ModuleProbe`; a batch
    holds the member's own rows only, standardised once a fold.
    """
    x, y, probe = work.layer.x, work.layer.y, work.probe
    sign, scores = 2.0 * y.to(probe.dtype) - 1.0, []
    for fold in range(FOLDS):
        used = work.layer.fold != fold
        own = x[used].double()
        z = ((x - own.mean(0)) / own.std(0, correction=0)).to(probe.dtype)
        for strength in STRENGTHS:
            draw = torch.Generator().manual_seed(0)
            held = _held(y, used, probe.held_out, draw)
            scores.append(_train(probe, z, sign, used & ~held, held, strength, draw)(z).double())
    return torch.stack(scores)


def _train(
    probe: ModuleProbe,
    z: Float[Tensor, "n d"],
    sign: Float[Tensor, " n"],
    taught: Bool[Tensor, " n"],
    held: Bool[Tensor, " n"],
    strength: float,
    draw: torch.Generator,
) -> Callable[[Tensor], Tensor]:
    torch.manual_seed(0)
    module = make(z.shape[1]).to(z.dtype)
    optimiser = torch.optim.Adam(module.parameters(), lr=probe.lr)
    n, total = len(z), float(taught.sum())
    size, order = min(probe.batch, n), torch.arange(n)
    best, lowest, since = {key: value.clone() for key, value in module.state_dict().items()}, float("inf"), 0
    for step in range(probe.steps):
        at = step * size % max(size, n - n % size)
        if size < n and at == 0:
            order = torch.randperm(n, generator=draw)
        rows = order[at : at + size]
        rows = rows[taught[rows]]
        optimiser.zero_grad()
        loss = nn.functional.softplus(-sign[rows] * module(z[rows])).sum() * (n / size / total)
        penalty = sum(value.square().sum() for value in module.parameters() if value.ndim > 1)
        (loss + penalty / (2 * strength * total)).backward()
        optimiser.step()
        if (step + 1) % probe.every == 0 or step == probe.steps - 1:
            with torch.no_grad():
                now = float(nn.functional.softplus(-sign[held] * module(z[held])).mean())
            if now < lowest:
                best, lowest, since = {key: value.clone() for key, value in module.state_dict().items()}, now, 0
            else:
                since += 1
                if since >= probe.patience:
                    break
    module.load_state_dict(best)
    return torch.no_grad()(module.eval().forward)


def _held(y: Bool[Tensor, " n"], used: Bool[Tensor, " n"], share: float, draw: torch.Generator) -> Bool[Tensor, " n"]:
    lot, held = torch.rand(len(y), generator=draw), torch.zeros_like(used)
    for label in (True, False):
        rows = torch.nonzero(used & (y == label))[:, 0]
        held[rows[lot[rows].argsort()][: int(len(rows) * share)]] = True
    return held


def products(work: Work) -> float:
    """Multiply as often as the loop does if no member stops: the first layer, forwards and its gradient."""
    n, d = work.layer.x.shape
    rows = round(min(work.probe.batch, n) * (1 - 1 / FOLDS) * (1 - work.probe.held_out))
    z, w, slope = torch.randn(rows, d), torch.randn(HIDDEN, d), torch.randn(rows, HIDDEN)
    forwards, backwards = torch.empty(rows, HIDDEN), torch.empty(HIDDEN, d)
    for _ in range(work.probe.steps * FOLDS * len(STRENGTHS)):
        torch.mm(z, w.T, out=forwards)
        torch.mm(slope.T, z, out=backwards)
    return float(backwards[0, 0])


def compared(
    work: Work,
    ours: Float64[Tensor, "p n"],
    theirs: Float64[Tensor, "p n"],
    exact: tuple[Float64[Tensor, "p n"], Float64[Tensor, "p n"]],
) -> str:
    """Say how far scores and held-out areas are apart.

    Args:
        work: what was done.
        ours: log-odds of the ensemble.
        theirs: of the loop.
        exact: both again, trained in float64.

    Raises:
        WrongResult: further than rounding takes them.
    """
    away, twins = _away(ours, theirs), _away(*exact)
    own, rounding = _away(ours, exact[0]), _away(theirs, exact[1])
    out = (work.layer.fold == torch.arange(FOLDS)[:, None]).repeat_interleave(len(STRENGTHS), 0)
    y = work.layer.y
    areas = [
        abs(auc(a[rows].numpy(), y[rows].numpy()) - auc(b[rows].numpy(), y[rows].numpy()))
        for a, b, rows in zip(ours, theirs, out, strict=True)
    ]
    if not float(twins.max()) <= EXACT:
        raise WrongResult(f"log-odds of member {int(twins.argmax())} in float64 are {twins.max():.1e} apart")
    nearest = torch.minimum(away, own)
    if not (float(nearest.max()) <= BOUND and float(away.median()) <= USUAL):
        raise WrongResult(
            f"log-odds of member {int(nearest.argmax())} are {nearest.max():.1e} apart, of half {away.median():.1e}"
        )
    return (
        f"log-odds of {len(ours)} members against {LOOP}'s: in float64 {twins.max():.1e} apart at most "
        f"(bound {EXACT:g}); in float32 {away.median():.1e} in the middle (bound {USUAL:g}), {away.max():.1e} at most, "
        f"{nearest.max():.1e} from it or from their float64 twin (bound {BOUND:g}), where the loop is up to "
        f"{rounding.max():.1e} from its own; "
        f"held-out areas {max(areas):.1e} at most"
    )


def _away(a: Float64[Tensor, "p n"], b: Float64[Tensor, "p n"]) -> Float64[Tensor, " p"]:
    return (a - b).square().mean(1).sqrt() / b.square().mean(1).sqrt()


def benchmark(
    options: Options, sizes: tuple[tuple[int, int], ...] = SIZES, probe: ModuleProbe | None = None
) -> dict[str, Any]:
    """Run everybody on every size in turn; return the results as in `benchmarks/README.md`.

    Raises:
        WrongResult: the two have not done the same work.
    """
    probe = probe or ModuleProbe(make, "mlp", STRENGTHS, steps=options.steps)
    described, timings, order = machine(Path()), Runs(), random.Random(0)
    contestants: dict[str, Callable[[Work], Any]] = {OURS: ensemble, LOOP: loop, FLOOR: products}
    with one_thread():
        for n, d in sizes[-1:] if options.quick else sizes:
            work = Work(make_layer(n, d), probe)
            found = {name: run(work) for name, run in contestants.items()}  # warms up, and is compared
            exact = Work(work.layer, replace(probe, dtype=torch.float64))
            check = compared(work, found[OURS], found[LOOP], (ensemble(exact), loop(exact)))
            for _ in range(min(2, options.runs) if options.quick else options.runs):
                for name in order.sample(list(contestants), len(contestants)):
                    _, cost = timed(lambda name=name, work=work: contestants[name](work))
                    own = timings.add(f"ensemble-{n}x{d}", name, cost)
                    own.check = "products alone: nothing is trained" if name == FLOOR else check
    rows = timings.rows(list(dict.fromkeys(operation for operation, _ in timings)), list(contestants), lambda _: FLOOR)
    data = {"folds": FOLDS, "strengths": list(STRENGTHS), "hidden": HIDDEN, "steps": probe.steps, "batch": probe.batch}
    return {
        "machine": described,
        "versions": versions(("torch", "numpy", "gapprobe")),
        "data": data,
        "threads": 1,
        "labels": LABELS,
        "goals": goals(rows),
        "rows": rows,
    }


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how many times our processor time the loop takes, and whether that is what was aimed at."""
    found: list[dict[str, Any]] = []
    for operation, by_name in by_operation(rows).items():
        over = median(by_name[LOOP]["cpu_seconds"]) / median(by_name[OURS]["cpu_seconds"])
        found.append(judged(operation, f"processor time of {LOOP} over ours", over, 2, at_least=WANTED))
    return found


def main(options: Options) -> None:
    """Measure."""
    keep("ensemble", options, lambda: benchmark(options))


if __name__ == "__main__":
    main(tyro.cli(Options))
