"""The logit lens: target, rank, entropy and best words of every layer and token, beside the bare product.

    python -m benchmarks.lens [--quick] [--runs N] [--json FILE] [--only NAME ...]
    python -m benchmarks.lens --table FILE.json [--docs docs]

What each operation and figure means is in `benchmarks/README.md`; the contestants are in `lens_contestants`.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from jaxtyping import Float64, Int64
from torch import Tensor

from benchmarks._measure import machine, tell, timed, unused, versions
from benchmarks._render import markdown
from benchmarks.lens_contestants import (
    CONTESTANTS,
    LEFT_OUT,
    TOP,
    Case,
    Contestant,
    Gapprobe,
    Matmul,
    Naive,
    make_case,
)
from benchmarks.probes import one_thread
from gapprobe.kernels.logit_lens import Reading, log_softmax_reference

RESULTS = Path(__file__).parent / "results"
OURS, FLOOR, RIVAL = Gapprobe.name, Matmul.name, Naive.name
# Layers, tokens, words, width, and of what the words are.
SHAPES: tuple[tuple[int, int, int, int, torch.dtype], ...] = (
    (33, 64, 49_152, 576, torch.float32),
    (33, 64, 49_152, 576, torch.bfloat16),
    (33, 16, 32_000, 4096, torch.float32),
)
# Where the goals are meant: processor time over the floor's, the rival's over ours, the rival's memory over ours.
AIMED = "lens-33x64x49152x576"
_FLOOR, _RIVAL, _MEMORY = 1.15, 1.8, 50.0
_EPS = torch.finfo(torch.float32).eps


@dataclass
class Options:
    """Time the logit lens."""

    quick: bool = False
    """The first operation, three rounds, in less than three minutes; prints the results."""
    runs: int | None = None
    """Rounds; seven, or three with --quick."""
    only: tuple[str, ...] = ()
    """Names of contestants; all by default. gapprobe and the floor, `matmul`, always run."""
    json: Path | None = None
    """Write the results here. A full run writes to benchmarks/results/ by default; a file is never written over."""
    table: Path | None = None
    """Measure nothing: render the table of these results."""
    docs: Path = Path("docs")
    """Where the table goes."""


class WrongReading(Exception):
    """A contestant reads something else than is there; it is none, and its timings mean nothing."""


@dataclass
class Timings:
    """What was measured for one operation of one contestant."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    check: str = ""


@dataclass(frozen=True)
class Truth:
    """What is there, in float64, and how far float32 logits may be from it.

    Attributes:
        rank: of the target.
        least, most: its rank where every word within two roundings goes after it, or before it.
        top: log-probabilities of the best words.
        slack: one rounding, relative to the sum of absolute terms of the largest logit.
    """

    log_prob: Float64[Tensor, "l n"]
    rank: Int64[Tensor, "l n"]
    least: Int64[Tensor, "l n"]
    most: Int64[Tensor, "l n"]
    entropy: Float64[Tensor, "l n"]
    top: Float64[Tensor, "l n k"]
    slack: Float64[Tensor, "l n"]


def truth_of(case: Case) -> Truth:
    """Compute what is there, a layer at a time."""
    layers: list[tuple[Tensor, ...]] = []
    end, targets = case.unembedding, case.targets[None]
    for x in case.x:
        log_p = log_softmax_reference(x[None], end)
        own = log_p.gather(2, targets)
        gain = None if end.gain is None else end.gain.double()
        h = torch.nn.functional.rms_norm(x[None].double(), x.shape[-1:], gain, end.eps)
        slack = _EPS * h.norm(dim=2) * end.weight.double().norm(dim=1).max()
        rank, least, most = (1 + (log_p > own + off[..., None]).sum(2) for off in (0 * slack, 2 * slack, -2 * slack))
        most -= 1  # the target itself
        entropy = -(log_p.exp() * log_p).sum(2)
        layers.append((own[..., 0], rank, least, most, entropy, log_p.topk(TOP, dim=2).values, slack))
    return Truth(*(torch.cat(pieces) for pieces in zip(*layers, strict=True)))


def compared(name: str, case: Case, truth: Truth, found: Reading) -> str:
    """Return in words how far a reading is from the truth.

    Raises:
        WrongReading: a rank is wrong that no rounding explains, or a number is further off than rounding brings it.
    """
    if found.log_prob.shape[:2] != truth.rank.shape:
        raise WrongReading(f"{name} has shape {tuple(found.log_prob.shape)} at {case.name}")
    rank, slack = found.rank[..., 0], truth.slack[..., None]
    if wrong := int(((rank < truth.least) | (rank > truth.most)).sum()):
        raise WrongReading(f"{name} has {wrong} ranks at {case.name} that no rounding explains")
    told: list[str] = []
    # log p moves by two roundings at most, the entropy by as many times its own size, and so does the sum in float32.
    for what, mine, right, allowed in (
        ("log-probability", found.log_prob, truth.log_prob[..., None], 4 * slack),
        ("entropy", found.entropy[..., None], truth.entropy[..., None], 4 * slack * (1 + truth.entropy[..., None])),
        ("best words", found.top_log_prob, truth.top, 4 * slack),
    ):
        off = (mine - right).abs().nan_to_num(nan=torch.inf)
        if not bool((off <= allowed).all()):
            raise WrongReading(f"{name}: {what} is {float(off.max()):.1e} off at {case.name}")
        told.append(f"{what} at most {float(off.max()):.1e}")
    exact = int((rank == truth.rank).sum())
    ranks = f"{exact:,} of {rank.numel():,} ranks the same, the others within rounding"
    return f"against float64: {', '.join(told)} off; {ranks}"


class Benchmark:
    """All contestants on the same residuals, in turn, round by round."""

    def __init__(self, contestants: Sequence[type[Contestant]], runs: int) -> None:
        self.contestants = contestants
        self.runs = runs
        self.timings: dict[tuple[str, str], Timings] = {}
        self._order = random.Random(0)

    def case(self, case: Case) -> None:
        """Run everybody on one case.

        Raises:
            WrongReading: a contestant reads something else than is there.
        """
        truth = truth_of(case)
        ready = [contestant(case) for contestant in self.contestants]
        for _ in range(self.runs):
            for each in self._order.sample(ready, len(ready)):
                found, cost = timed(each.read, each.memory)
                timings = self.timings.setdefault((case.name, each.name), Timings())
                timings.seconds.append(round(cost.seconds, 4))
                timings.cpu_seconds.append(round(cost.cpu_seconds, 4))
                timings.peak_bytes = max(timings.peak_bytes, cost.peak_bytes)
                told = f"{cost.seconds:8.3f} s {cost.cpu_seconds:8.3f} s of processor {cost.peak_bytes / 1e6:8.1f} MB"
                tell(f"{case.name:<30} {each.name:<12} {told}")
                timings.check = "product alone" if found is None else compared(each.name, case, truth, found)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the results, by operation, then contestant."""
        return [
            {"operation": operation, "contestant": name, **vars(timings), "floor": FLOOR}
            for operation in dict.fromkeys(operation for operation, _ in self.timings)
            for name in (each.name for each in self.contestants)
            if (timings := self.timings.get((operation, name)))
        ]


def goals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what was aimed at, what came out, and whether it is met; elsewhere than at `AIMED` it is shown only."""
    found: list[dict[str, Any]] = []
    for operation in dict.fromkeys(row["operation"] for row in rows):
        by_name = {row["contestant"]: row for row in rows if row["operation"] == operation}
        cpu = {name: median(row["cpu_seconds"]) for name, row in by_name.items()}
        figures = [(f"processor time over {FLOOR}'s", cpu[OURS] / cpu[FLOOR], "at_most", _FLOOR)]
        if RIVAL in by_name:
            peak = by_name[RIVAL]["peak_bytes"] / max(1, by_name[OURS]["peak_bytes"])
            figures.append((f"processor time of {RIVAL} over ours", cpu[RIVAL] / cpu[OURS], "at_least", _RIVAL))
            figures.append((f"peak memory of {RIVAL} over ours", peak, "at_least", _MEMORY))
        for what, value, bound, limit in figures:
            met = None if operation != AIMED else value <= limit if bound == "at_most" else value >= limit
            wanted = {} if operation != AIMED else {bound: limit}
            found.append({"operation": operation, "goal": what, "value": round(value, 3), "met": met, **wanted})
    return found


def benchmark(options: Options, shapes: Sequence[tuple[int, int, int, int, torch.dtype]] = SHAPES) -> dict[str, Any]:
    """Run everything; return the results as in `benchmarks/README.md`.

    Raises:
        WrongReading: a contestant reads something else than is there.
        SystemExit: a name is none.
    """
    known = [each.name for each in CONTESTANTS]
    if unknown := sorted(set(options.only) - set(known)):
        sys.exit(f"no contestant {unknown[0]!r}; there are {', '.join(known)}")
    contestants = [each for each in CONTESTANTS if not options.only or each.name in {*options.only, OURS, FLOOR}]
    described, begun = machine(Path()), time.perf_counter()
    run = Benchmark(contestants, options.runs or (3 if options.quick else 7))
    titles: dict[str, str] = {}
    with one_thread():
        for shape in shapes[:1] if options.quick else shapes:
            case = make_case(*shape)
            titles[case.name] = case.title
            run.case(case)
    rows = run.rows()
    return {
        "machine": described,
        "versions": versions(list(dict.fromkeys(name for each in contestants for name in each.distributions))),
        "data": {"top_k": TOP, "targets": 1},
        "threads": 1,
        "minutes": round((time.perf_counter() - begun) / 60, 1),
        "titles": titles,
        "labels": {each.name: each.label for each in contestants},
        "left_out": LEFT_OUT,
        "goals": goals(rows),
        "rows": rows,
    }


def render(source: Path, folder: Path) -> None:
    """Write the table of results into a folder."""
    results = json.loads(source.read_text(encoding="utf-8"))
    about = f"One target, entropy and the {results['data']['top_k']} best words of every layer and token; one thread."
    text = markdown(results, results["titles"], OURS, f"Lens benchmark ({source.stem})", about)
    lines = ["", "## What was compared", "", "| operation | contestant | check |", "|---|---|---|"]
    for row in results["rows"]:
        lines.append(f"| `{row['operation']}` | {results['labels'][row['contestant']]} | {row['check']} |")
    lines += ["", "## Goals", "", "| operation | goal | value | wanted | met |", "|---|---|---|---|---|"]
    for goal in results["goals"]:
        lines.append(f"| `{goal['operation']}` | {goal['goal']} | {goal['value']} | {_wanted(goal)} | {_met(goal)} |")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lens-benchmark.md"
    path.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
    tell(f"{path}")


def main(options: Options) -> None:
    """Measure, or render what was measured."""
    if options.table:
        render(options.table, options.docs)
        return
    target = options.json or (None if options.quick else unused(RESULTS, "lens"))
    if target and target.exists():
        sys.exit(f"{target} exists; results are never written over")
    try:
        results = benchmark(options)
    except WrongReading as error:
        sys.exit(f"stopped: {error}")
    for goal in results["goals"]:
        tell(f"{goal['operation']:<30} {goal['goal']:<36} {goal['value']:8.3f} {_wanted(goal):<14} {_met(goal)}")
    text = json.dumps(results, indent=1)
    if target:
        target.write_text(text + "\n", encoding="utf-8")
        tell(f"{target}")
    else:
        print(text)


def _wanted(goal: Mapping[str, Any]) -> str:
    return next((f"{name.replace('_', ' ')} {goal[name]:g}" for name in ("at_least", "at_most") if name in goal), "")


def _met(goal: Mapping[str, Any]) -> str:
    return {True: "yes", False: "**no**", None: "shown only"}[goal["met"]]


if __name__ == "__main__":
    main(tyro.cli(Options))
