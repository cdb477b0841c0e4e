"""Logistic probes: folds and strengths of a layer fitted together, and by solvers that fit them one after another.

    python -m benchmarks.probes [--quick] [--runs N] [--json FILE] [--only NAME ...] [--real FILE] [--many]
    python -m benchmarks.probes --table FILE.json [--docs docs]

What each operation and figure means is in `benchmarks/README.md`; the contestants are in `probes_contestants`.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from jaxtyping import Float64
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from benchmarks._measure import machine, tell, timed, versions
from benchmarks._outcome import (
    Runs,
    Timings,
    WrongResult,
    by_operation,
    goals_section,
    judged,
    keep,
    one_thread,
    refuse_unknown,
    restart_in_one_thread,
    write,
)
from benchmarks._render import markdown, section
from benchmarks.probes_contestants import (
    CONTESTANTS,
    TOLERANCE,
    Contestant,
    Gapprobe,
    Matmul,
    SklearnDefault,
    SklearnLbfgsF32,
    Solution,
    TooSlow,
    TorchMatmul,
    fit_layer,
)
from benchmarks.probes_data import FOLDS, Layer, Sweep, load_layers, make_layer
from gapprobe.kernels.logistic import LogisticFits

OURS, FLOOR, RIVAL = Gapprobe.name, Matmul.name, SklearnLbfgsF32.name
STRENGTHS = torch.logspace(-4, 3, 8, dtype=torch.float64)
# Rows and width, and how many times our processor time the rival's is to be.
SIZES = {(2000, 1024): 15.0, (2000, 4096): 25.0, (20_000, 1024): 50.0}
_REAL = 8.0
_QUICK = (Matmul, TorchMatmul, Gapprobe, SklearnLbfgsF32, SklearnDefault)
# Furthest from the optimum, relative to it, that one who promises it may be.
BOUND = 1e-5
# A peer's run that took longer says enough: what it varies by is far below what the ratio tells.
_ONCE = 120.0
_MANY = (33, 2000, 4096)
_MANY_STRENGTHS, _MANY_SECONDS, _WORKERS = 10, 30.0, 2


@dataclass
class Options:
    """Time fitting logistic probes."""

    quick: bool = False
    """The smallest sweep, few contestants, two rounds, in less than three minutes; prints the results."""
    runs: int | None = None
    """Rounds; three, or two with --quick."""
    peer_folds: int = 1
    """Folds of five that peers fit; their times are multiplied accordingly."""
    only: tuple[str, ...] = ()
    """Names of contestants; all by default. gapprobe and the floor, `matmul`, always run."""
    operations: tuple[str, ...] = ()
    """Names of operations; all by default."""
    real: Path | None = None
    """Real residuals too: a file of torch.save, (X [l n d], y bool [n]), or a gapprobe store."""
    real_layers: tuple[int, ...] = ()
    """Layers of it; four spread over the depth by default."""
    label: str = ""
    """Column of a store's table that holds the label, one of two values."""
    many: bool = False
    """1,650 fits at once too, which takes minutes to make."""
    json: Path | None = None
    """Write the results here. A full run writes to benchmarks/results/ by default; a file is never written over."""
    table: Path | None = None
    """Measure nothing: render the table of these results."""
    docs: Path = Path("docs")
    """Where the table goes."""


class Benchmark:
    """All contestants on the same residuals, in turn, round by round."""

    def __init__(self, contestants: Sequence[type[Contestant]], runs: int, peer_folds: int = 1) -> None:
        self.contestants = contestants
        self.runs = runs
        self.peer_folds = peer_folds
        self.timings = Runs()
        self.left_out: dict[str, str] = {}
        self._order = random.Random(0)

    def sweep(self, sweep: Sweep) -> None:
        """Run everybody on one sweep.

        Raises:
            WrongResult: a contestant that promises the optimum has missed it.
        """
        everything = range(FOLDS)
        # Also warms up; what it certifies is what all are compared with.
        certified = [fit_layer(layer, sweep.strengths, everything) for layer in sweep.layers]
        ready = [contestant(sweep, certified) for contestant in self.contestants]
        for _ in range(self.runs):
            for each in self._order.sample(ready, len(ready)):
                known = self.timings.get((sweep.name, each.name))
                if f"{each.name}, {sweep.name}" in self.left_out or each.peer and known and self._is_enough(known):
                    continue
                self._run(each, sweep, certified, range(self.peer_folds) if each.peer else everything)

    def many(self, layers: int, n: int, d: int, strengths: int, workers: int) -> str:
        """Fit so many layers, each in a thread of its own; return the operation's name.

        Raises:
            WrongResult: a fit is not where its certificate says.
        """
        name = f"many-{layers}x{n}x{d}"
        c = torch.logspace(-4, 3, strengths, dtype=torch.float64)
        with ThreadPoolExecutor(workers) as pool:
            made = list(pool.map(lambda seed: make_layer(n, d, seed), range(layers)))
            fit_layer(made[0], c, range(FOLDS))
            for _ in range(self.runs):
                fitted, cost = timed(lambda: list(pool.map(lambda layer: fit_layer(layer, c, range(FOLDS)), made)))
                timings = self.timings.add(name, OURS, cost)
                ours = Gapprobe(Sweep(name, "", tuple(made), c), fitted)
                count, furthest = compared(OURS, ours.sweep, fitted, ours.solutions(fitted), BOUND)
                timings.more["furthest"] = max(timings.more.get("furthest", 0.0), furthest)
                timings.check = f"{workers} threads; {_said(count, furthest, True)}"
        return name

    def rows(self, sweeps: Sequence[str]) -> list[dict[str, Any]]:
        """Return the rows of the results, by operation, then contestant."""
        names = [each.name for each in self.contestants]
        return self.timings.rows(sweeps, names, lambda operation: None if operation.startswith("many") else FLOOR)

    def _run(self, each: Contestant, sweep: Sweep, certified: Sequence[LogisticFits], folds: Sequence[int]) -> None:
        try:
            fitted, cost = timed(lambda: each.fit(folds), max(256 << 20, 4 * sweep.bytes))
        except TooSlow as error:
            self.left_out[f"{each.name}, {sweep.name}"] = str(error)
            self.timings.pop((sweep.name, each.name), None)
            tell(f"{each.name} is left out of {sweep.name}: {error}")
            return
        timings = self.timings.add(sweep.name, each.name, cost, len(folds) / FOLDS)
        solutions = each.solutions(fitted)
        if not solutions:
            timings.more["furthest"], timings.check = 0.0, "products alone: nothing is fitted"
            return
        bound = BOUND if each.must_converge else None
        count, furthest = compared(each.name, sweep, certified, solutions, bound)
        furthest = timings.more["furthest"] = max(timings.more.get("furthest", 0.0), furthest)
        part = f"{len(folds)} of {FOLDS} folds, times multiplied by {FOLDS / len(folds):g}; "
        timings.check = (part if len(folds) < FOLDS else "") + _said(count, furthest, each.must_converge)
        if each.name == OURS:
            steps = torch.cat([fits.steps for fits in certified])
            timings.check += (
                f"; {int(steps.min())} to {int(steps.max())} steps, mean {float(steps.double().mean()):.0f}"
            )

    def _is_enough(self, timings: Timings) -> bool:
        return max(timings.seconds) * self.peer_folds / FOLDS > _ONCE


def compared(
    name: str,
    sweep: Sweep,
    certified: Sequence[LogisticFits],
    solutions: Sequence[Solution],
    bound: float | None,
) -> tuple[int, float]:
    """Return how many fits there are and how far the worst is from the optimum, relative to it.

    The optimum is taken to be the least that it can be by gapprobe's certificates, so that no distance is understated.

    Raises:
        WrongResult: one is further than `bound`, or below what gapprobe certifies to be the least.
    """
    count, furthest, strengths = 0, 0.0, sweep.strengths
    for solution in solutions:
        fits = certified[solution.layer]
        part = slice(solution.fold * len(strengths), (solution.fold + 1) * len(strengths))
        least = fits.objective[part] * (1.0 - fits.gap[part])
        found = objectives(sweep.layers[solution.layer], strengths, solution)
        # What is not a number is as far away as can be.
        away = (found / least - 1.0).nan_to_num(nan=torch.inf)
        count += len(away)
        furthest = max(furthest, float(away.max()))
        where = f"{sweep.name}, layer {solution.layer} of the sweep, fold {solution.fold}"
        if float(away.min()) < -1e-9:
            c = float(strengths[away.argmin()])
            raise WrongResult(
                f"{name} is below what {OURS} certified as the least at {where}, C={c:g}: {away.min():.1e}"
            )
        if bound is not None and float(away.max()) > bound:
            c = float(strengths[away.argmax()])
            raise WrongResult(f"{name} is {away.max():.1e} of the optimum off it at {where}, C={c:g}: over {bound:g}")
    return count, furthest


def objectives(layer: Layer, strengths: Float64[Tensor, " s"], solution: Solution) -> Float64[Tensor, " s"]:
    """Return C sum log(1 + exp(-y f)) + |w|^2 / 2 in float64, on features as StandardScaler gives them."""
    rows = layer.fold != solution.fold
    scaler = StandardScaler()
    z = torch.from_numpy(scaler.fit_transform(layer.x[rows].double().numpy()))
    weights, free = solution.weights, solution.free
    if solution.raw:
        free = free + weights @ torch.from_numpy(scaler.mean_)
        weights = weights * torch.from_numpy(scaler.scale_)
    margins = (weights @ z.T + free[:, None]) * torch.where(layer.y[rows], 1.0, -1.0)
    losses = -torch.nn.functional.logsigmoid(margins).sum(1)
    return strengths * losses + weights.square().sum(1) / 2


def goals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what was aimed at, what came out, and whether it is met."""
    wanted = {f"sweep-{n}x{d}": ratio for (n, d), ratio in SIZES.items()}
    found: list[dict[str, Any]] = []
    for operation, by_name in by_operation(rows).items():
        if operation.startswith("many"):
            value = median(by_name[OURS]["seconds"])
            found.append(judged(operation, "seconds of the wall clock", value, 2, at_most=_MANY_SECONDS))
            continue
        for contestant in CONTESTANTS:
            if contestant.peer and contestant.name in by_name:
                row = by_name[contestant.name]
                value = median(row["cpu_seconds"]) / median(by_name[OURS]["cpu_seconds"])
                what = f"processor time of {contestant.name} over ours"
                least = wanted.get(operation, _REAL) if contestant.name == RIVAL else None
                found.append(judged(operation, what, value, 2, at_least=least) | {"furthest": row["furthest"]})
    return found


def make_sweep(n: int, d: int) -> Sweep:
    """Return a layer made from a seed."""
    title = f"One layer of {n:,} rows, width {d:,}: {FOLDS} folds, {len(STRENGTHS)} strengths"
    return Sweep(f"sweep-{n}x{d}", title, (make_layer(n, d),), STRENGTHS)


def real_sweep(path: Path, chosen: Sequence[int] = (), label: str = "") -> Sweep:
    """Return layers from a file."""
    layers = load_layers(path, chosen, label)
    n, d = layers[0].x.shape
    title = f"{len(layers)} real layers of {n:,} rows, width {d:,}: {FOLDS} folds, {len(STRENGTHS)} strengths"
    return Sweep(f"sweep-real-{len(layers)}x{n}x{d}", title, layers, STRENGTHS)


def benchmark(options: Options, sizes: Sequence[tuple[int, int]] = tuple(SIZES)) -> dict[str, Any]:
    """Run everything; return the results as in `benchmarks/README.md`.

    Raises:
        WrongResult: a contestant that promises the optimum has missed it.
        SystemExit: a name is none, or there are not so many folds.
    """
    refuse_unknown("contestant", options.only, [each.name for each in CONTESTANTS])
    if not 1 <= options.peer_folds <= FOLDS:
        sys.exit(f"--peer-folds is 1 to {FOLDS}, not {options.peer_folds}")
    offered = [each for each in CONTESTANTS if not options.quick or each in _QUICK or each.name in options.only]
    contestants = [each for each in offered if not options.only or each.name in {*options.only, OURS, FLOOR}]
    makers: dict[str, Callable[[], Sweep]] = {
        f"sweep-{n}x{d}": lambda n=n, d=d: make_sweep(n, d) for n, d in (sizes[:1] if options.quick else sizes)
    }
    if options.real:
        real = real_sweep(options.real, options.real_layers, options.label)
        makers[real.name] = lambda: real
    many = f"many-{'x'.join(map(str, _MANY))}"
    refuse_unknown("operation", options.operations, [*makers, *([many] if options.many else [])])
    described, begun = machine(Path()), time.perf_counter()
    run = Benchmark(contestants, options.runs or (2 if options.quick else 3), options.peer_folds)
    titles: dict[str, str] = {}
    with one_thread():
        for name, make in makers.items():
            if not options.operations or name in options.operations:
                sweep = make()
                titles[name] = sweep.title
                run.sweep(sweep)
        if options.many and (not options.operations or many in options.operations):
            titles[many] = (
                f"{_MANY[0]} layers of {_MANY[1]:,} rows, width {_MANY[2]:,}: {FOLDS} folds, {_MANY_STRENGTHS} "
                f"strengths, {_MANY[0] * FOLDS * _MANY_STRENGTHS:,} fits in {_WORKERS} threads"
            )
            run.many(*_MANY, _MANY_STRENGTHS, _WORKERS)
    rows = run.rows(list(titles))
    return {
        "machine": described,
        "versions": versions([name for each in contestants for name in each.distributions]),
        "data": {
            "folds": FOLDS,
            "strengths": STRENGTHS.tolist(),
            "peer_folds": options.peer_folds,
            "tolerance": TOLERANCE,
            "real": str(options.real) if options.real else None,
            "real_layers": list(options.real_layers),
        },
        "threads": 1,
        "minutes": round((time.perf_counter() - begun) / 60, 1),
        "titles": titles,
        "labels": {each.name: each.label for each in contestants},
        "left_out": run.left_out,
        "goals": goals(rows),
        "rows": rows,
    }


def render(source: Path, folder: Path) -> None:
    """Write the table of results into a folder."""
    results = json.loads(source.read_text(encoding="utf-8"))
    about = "L2 logistic regression, intercept free, one thread unless the heading says otherwise."
    text = markdown(results, results["titles"], OURS, f"Probes benchmark ({source.stem})", about)
    rows = [
        (f"`{row['operation']}`", results["labels"][row["contestant"]], f"{row['furthest']:.1e}")
        for row in results["rows"]
        if row["contestant"] != FLOOR
    ]
    about = "Of the worst fit, by the objective in float64, relative to the least that gapprobe certifies."
    text += section("Distance from the optimum", ("operation", "contestant", "distance"), rows, about)
    write(folder / "probes-benchmark.md", text + goals_section(results["goals"]))


def main(options: Options) -> None:
    """Measure, or render what was measured."""
    if options.table:
        render(options.table, options.docs)
    else:
        keep("probes", options, lambda: benchmark(options))


def _said(count: int, furthest: float, promised: bool) -> str:
    allowed = f"bound {BOUND:g}" if promised else "shown only"
    least = "objective in float64 compared with the least that gapprobe certifies"
    return f"{count:,} fits, {least}: at most {furthest:.1e} of it away ({allowed})"


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    if not chosen.table:
        restart_in_one_thread("benchmarks.probes")
    main(chosen)
