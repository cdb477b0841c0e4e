"""The logit lens: target, rank, entropy and best words of every layer and token, beside the bare product.

    python -m benchmarks.lens [--quick] [--runs N] [--json FILE] [--only NAME ...]
    python -m benchmarks.lens --table FILE.json [--docs docs]

What each operation and figure means is in `benchmarks/README.md`; the contestants are in `lens_contestants`.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from jaxtyping import Float64, Int64
from torch import Tensor

from benchmarks._measure import machine, timed, versions
from benchmarks._outcome import (
    Runs,
    WrongResult,
    by_operation,
    goals_section,
    judged,
    keep,
    one_thread,
    refuse_unknown,
    write,
)
from benchmarks._render import markdown, section
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
from gapprobe.kernels.logit_lens import Reading, log_softmax_reference

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
        WrongResult: a rank is wrong that no rounding explains, or a number is further off than rounding brings it.
    """
    if found.log_prob.shape[:2] != truth.rank.shape:
        raise WrongResult(f"{name} has shape {tuple(found.log_prob.shape)} at {case.name}")
    rank, slack = found.rank[..., 0], truth.slack[..., None]
    if wrong := int(((rank < truth.least) | (rank > truth.most)).sum()):
        raise WrongResult(f"{name} has {wrong} ranks at {case.name} that no rounding explains")
    told: list[str] = []
    # log p moves by two roundings at most, the entropy by as many times its own size, and so does the sum in float32.
    for what, mine, right, allowed in (
        ("log-probability", found.log_prob, truth.log_prob[..., None], 4 * slack),
        ("entropy", found.entropy[..., None], truth.entropy[..., None], 4 * slack * (1 + truth.entropy[..., None])),
        ("best words", found.top_log_prob, truth.top, 4 * slack),
    ):
        off = (mine - right).abs().nan_to_num(nan=torch.inf)
        if not bool((off <= allowed).all()):
            raise WrongResult(f"{name}: {what} is {float(off.max()):.1e} off at {case.name}")
        told.append(f"{what} at most {float(off.max()):.1e}")
    exact = int((rank == truth.rank).sum())
    ranks = f"{exact:,} of {rank.numel():,} ranks the same, the others within rounding"
    return f"against float64: {', '.join(told)} off; {ranks}"


class Benchmark:
    """All contestants on the same residuals, in turn, round by round."""

    def __init__(self, contestants: Sequence[type[Contestant]], runs: int) -> None:
        self.contestants = contestants
        self.runs = runs
        self.timings = Runs()
        self._order = random.Random(0)

    def case(self, case: Case) -> None:
        """Run everybody on one case.

        Raises:
            WrongResult: a contestant reads something else than is there.
        """
        truth = truth_of(case)
        ready = [contestant(case) for contestant in self.contestants]
        for _ in range(self.runs):
            for each in self._order.sample(ready, len(ready)):
                found, cost = timed(each.read, each.memory)
                timings = self.timings.add(case.name, each.name, cost)
                timings.check = "product alone" if found is None else compared(each.name, case, truth, found)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the results, by operation, then contestant."""
        operations = list(dict.fromkeys(operation for operation, _ in self.timings))
        return self.timings.rows(operations, [each.name for each in self.contestants], lambda _: FLOOR)


def goals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what was aimed at, what came out, and whether it is met; elsewhere than at `AIMED` it is shown only."""
    found: list[dict[str, Any]] = []
    for operation, by_name in by_operation(rows).items():
        cpu = {name: median(row["cpu_seconds"]) for name, row in by_name.items()}
        figures = [(f"processor time over {FLOOR}'s", cpu[OURS] / cpu[FLOOR], "at_most", _FLOOR)]
        if RIVAL in by_name:
            peak = by_name[RIVAL]["peak_bytes"] / max(1, by_name[OURS]["peak_bytes"])
            figures.append((f"processor time of {RIVAL} over ours", cpu[RIVAL] / cpu[OURS], "at_least", _RIVAL))
            figures.append((f"peak memory of {RIVAL} over ours", peak, "at_least", _MEMORY))
        for what, value, bound, limit in figures:
            found.append(judged(operation, what, value, 3, **({bound: limit} if operation == AIMED else {})))
    return found


def benchmark(options: Options, shapes: Sequence[tuple[int, int, int, int, torch.dtype]] = SHAPES) -> dict[str, Any]:
    """Run everything; return the results as in `benchmarks/README.md`.

    Raises:
        WrongResult: a contestant reads something else than is there.
        SystemExit: a name is none.
    """
    refuse_unknown("contestant", options.only, [each.name for each in CONTESTANTS])
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
        "versions": versions([name for each in contestants for name in each.distributions]),
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
    rows = [(f"`{row['operation']}`", results["labels"][row["contestant"]], row["check"]) for row in results["rows"]]
    text += section("What was compared", ("operation", "contestant", "check"), rows)
    write(folder / "lens-benchmark.md", text + goals_section(results["goals"]))


def main(options: Options) -> None:
    """Measure, or render what was measured."""
    if options.table:
        render(options.table, options.docs)
    else:
        keep("lens", options, lambda: benchmark(options))


if __name__ == "__main__":
    main(tyro.cli(Options))
