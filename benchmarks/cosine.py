"""Cosines of paired rows: ours, torch, scikit-learn and numpy, against reading the same bytes once.

    python -m benchmarks.cosine [--quick] [--runs N] [--json FILE] [--only NAME ...]
    python -m benchmarks.cosine --table FILE.json [--docs docs]

What each operation and figure means is in `benchmarks/README.md`.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from sklearn.metrics.pairwise import paired_cosine_distances
from torch import Tensor

import gapprobe as gp
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
    restart_in_one_thread,
    write,
)
from benchmarks._render import markdown, section
from gapprobe.kernels import cosine
from gapprobe.store.reader import Store

OURS, FLOOR = "gapprobe", "bandwidth"
GOAL = 0.8  # of the streaming bandwidth
BOUND = 1e-5  # a contestant may differ from float64 by this much
WIDTH, LAYERS = 4096, 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BLOCK = 1024  # rows at once, for those who do not take the whole matrix
_DISTRIBUTIONS = ("gapprobe", "numba", "torch", "numpy", "scikit-learn")

MAPPED = "cosine-mapped-bfloat16"

Work = Callable[[], np.ndarray | None]
Peer = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Options:
    """Time cosines of paired rows, one thread."""

    quick: bool = False
    """Fewer rows, fewer peers, three rounds, in less than three minutes; prints the results."""
    runs: int | None = None
    """Rounds; seven, or three with --quick."""
    rows: int | None = None
    """Pairs of a layer; 16,384, or 4,096 with --quick."""
    only: tuple[str, ...] = ()
    """Names of operations; all by default."""
    folder: Path | None = None
    """Where the store is written; the system's folder for such things by default."""
    json: Path | None = None
    """Write the results here. A full run writes to benchmarks/results/ by default; a file is never written over."""
    table: Path | None = None
    """Measure nothing: render the table of these results."""
    docs: Path = Path("docs")
    """Where the table goes."""


@dataclass
class Operation:
    """Something that all contestants do, and what is right: [v n], or [v l n] of a store."""

    name: str
    title: str
    bytes: int
    truth: np.ndarray
    contestants: dict[str, Work]
    timings: Runs = field(default_factory=Runs)
    errors: dict[str, float] = field(default_factory=dict[str, float])

    def run(self, order: Sequence[str]) -> None:
        """Run everybody once; compare, outside the clock, what each gives.

        Raises:
            WrongResult: it is not right.
        """
        for name in order:
            found, cost = timed(self.contestants[name])
            rate = f" {self.bytes / cost.cpu_seconds / 1e9:6.1f} GB/s"
            timings = self.timings.add(self.name, name, cost, digits=5, said=rate)
            timings.more["bytes"], timings.check = self.bytes, "bytes alone: nothing is compared"
            if found is not None:
                off = float(np.nan_to_num(np.abs(found - self.truth), nan=np.inf).max())
                self.errors[name] = max(self.errors.get(name, 0.0), off)
                if off > BOUND:
                    raise WrongResult(f"{name} is off by {off:.1e} in {self.name}: over {BOUND:g}")
                timings.check = f"off from float64 by {self.errors[name]:.1e} at most (bound {BOUND:g})"

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the results."""
        return self.timings.rows([self.name], [name for _, name in self.timings], lambda _: FLOOR)


def residuals(n: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Make residuals with a mean and a few massive dimensions, as language models have them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, WIDTH, generator=g).add_(torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)))
    x[:, (5, 77, 300)] *= 50
    x[:, 77] += 300
    return x.to(dtype)


def streamed(*tensors: Tensor) -> None:
    """Read every byte once, as fast as torch adds up whole numbers: nothing that reads it all can be much faster."""
    for x in tensors:
        x.view(-1).view(torch.int64).sum()


def by_torch(a: Tensor, b: Tensor) -> Tensor:
    """Return what is written most often."""
    return torch.cosine_similarity(a.float(), b.float())


def by_torch_blocks(a: Tensor, b: Tensor) -> Tensor:
    """Return the same, some rows at a time, so that copies stay small."""
    return torch.cat([by_torch(*both) for both in zip(a.split(BLOCK), b.split(BLOCK), strict=True)])


def by_numpy(a: Tensor, b: Tensor) -> Tensor:
    """Return dot products by einsum, over lengths."""
    x, y = a.float().numpy(), b.float().numpy()
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return torch.from_numpy(np.einsum("nd,nd->n", x, y) / lengths)


def by_sklearn(a: Tensor, b: Tensor) -> Tensor:
    """Return scikit-learn's, which takes float32 and not bfloat16."""
    return torch.from_numpy(1 - paired_cosine_distances(a.float().numpy(), b.float().numpy()))


PEERS = {"torch": by_torch, "torch-blocks": by_torch_blocks, "numpy": by_numpy, "scikit-learn": by_sklearn}
QUICK = {"torch-blocks": by_torch_blocks, "numpy": by_numpy}
LABELS = {
    FLOOR: "the same bytes read once",
    OURS: OURS,
    "torch": "torch.cosine_similarity",
    "torch-blocks": f"torch.cosine_similarity, {BLOCK:,} rows at a time",
    "numpy": "numpy: einsum over norms",
    "scikit-learn": "scikit-learn: paired_cosine_distances",
}


def in_memory(n: int, name: str, dtype: torch.dtype, peers: Mapping[str, Peer]) -> list[Operation]:
    """Return both operations on pairs that lie in memory: raw cosines alone, and all three variants."""
    a, b = residuals(n, 2, dtype), residuals(n, 3, dtype)
    both = torch.cat([a, b]).double()
    mean, std = both.mean(0), both.std(0, correction=0)
    settings = ((), (mean,), (mean, std))
    truth = np.stack([cosine.reference(a, b, *setting).numpy() for setting in settings])
    size = 2 * a.numel() * a.element_size()

    def every(theirs: Peer) -> Work:
        def work() -> np.ndarray:
            x, y = (each.float() - mean.float() for each in (a, b))
            found = [theirs(a, b), theirs(x, y), theirs(x / std.float(), y / std.float())]
            return np.stack([each.numpy() for each in found])

        return work

    raw: dict[str, Work] = {FLOOR: lambda: streamed(a, b), OURS: lambda: cosine.paired(a, b).raw.numpy()[None]}
    raw |= {peer: lambda theirs=theirs: theirs(a, b).numpy()[None] for peer, theirs in peers.items()}
    ours = {
        FLOOR: raw[FLOOR],
        OURS: lambda: np.stack([v.numpy() for v in vars(cosine.paired(a, b, mean, std)).values()]),
    }
    for setting in settings:  # what is compiled once a machine is not timed
        cosine.paired(a[:2], b[:2], *setting)
    told = f"{n:,} pairs in memory, width {WIDTH:,}, {name}"
    return [
        Operation(f"cosine-raw-{name}", f"Raw cosines of {told}", size, truth[:1], raw),
        Operation(
            f"cosine-all-{name}",
            f"Raw, centred and standardised cosines of {told}",
            size,
            truth,
            ours | {peer: every(theirs) for peer, theirs in peers.items()},
        ),
    ]


def mapped(n: int, folder: Path, peers: Mapping[str, Peer]) -> Operation:
    """Return raw cosines of files in the page cache, mapped anew each time: their pages count, as the floor's do."""
    sides = [residuals(n, seed, torch.bfloat16) for seed in (5, 6)]
    paths = [folder / name for name in ("left", "right")]
    for path, x in zip(paths, sides, strict=True):
        path.write_bytes(x.view(torch.uint8).numpy().tobytes())

    def opened() -> list[Tensor]:
        return [torch.from_file(str(path), size=n * WIDTH, dtype=torch.bfloat16).view(n, WIDTH) for path in paths]

    contestants: dict[str, Work] = {
        FLOOR: lambda: streamed(*opened()),
        OURS: lambda: cosine.paired(*opened()).raw.numpy()[None],
        **{peer: lambda theirs=theirs: theirs(*opened()).numpy()[None] for peer, theirs in peers.items()},
    }
    title = f"Raw cosines of {n:,} pairs in two mapped files in the page cache, width {WIDTH:,}, bfloat16"
    size = 2 * n * WIDTH * 2
    return Operation(MAPPED, title, size, cosine.reference(*sides).numpy()[None], contestants)


def in_store(n: int, folder: Path) -> Operation:
    """Return the operation on a store in the page cache: the rows of a pair lie side by side, layers are bfloat16."""
    ids = [f"{setting} {i}" for i in range(n) for setting in ("visual", "full")]
    table = pd.DataFrame({"setting": ["visual", "full"] * n, "trial": np.repeat(np.arange(n), 2)}, index=ids)
    x = {layer: residuals(2 * n, 4 + layer, torch.bfloat16) for layer in range(LAYERS)}
    truth = np.empty((3, LAYERS, n))
    for layer, rows in x.items():
        mean, std = rows.double().mean(0), rows.double().std(0, correction=0)
        for v, setting in enumerate(((), (mean,), (mean, std))):
            truth[v, layer] = cosine.reference(rows[0::2], rows[1::2], *setting)
    store = gp.import_activations(folder / "store", x, table)
    left, right = ids[0::2], ids[1::2]

    def ours() -> np.ndarray:
        found = gp.cosine(store, pair=("visual", "full"), jobs=1, replicates=1)
        return np.stack([found.raw, found.centred, found.standardised])

    def theirs() -> np.ndarray:
        found = np.empty_like(truth)
        for layer in range(LAYERS):
            a, b = (store.layer(layer, "last_input", rows).float() for rows in (left, right))
            both = torch.cat([a, b])
            mean, std = both.mean(0), both.std(0, correction=0)
            for v, (shift, scale) in enumerate(((0.0, 1.0), (mean, 1.0), (mean, std))):
                found[v, layer] = by_torch((a - shift) / scale, (b - shift) / scale)
        return found

    size = LAYERS * 2 * n * WIDTH * 2
    title = f"All three cosines from a store in the page cache: {LAYERS} layers, {n:,} pairs, bfloat16, no intervals"
    contestants: dict[str, Work] = {FLOOR: lambda: _stream_store(store), OURS: ours, "torch": theirs}
    return Operation(f"cosine-store-bfloat16-{LAYERS}", title, size, truth, contestants)


def _stream_store(store: Store) -> None:
    """Map the residuals of every layer and read them once."""
    for layer in store.header.layers:
        streamed(store.layer(layer))


def goals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what share of the streaming bandwidth was reached, by processor time, and what else was aimed at."""
    found: list[dict[str, Any]] = []
    for operation, by_name in by_operation(rows).items():
        cpu = {name: median(row["cpu_seconds"]) for name, row in by_name.items()}
        found.append(
            judged(operation, "share of the bandwidth of one thread", cpu[FLOOR] / cpu[OURS], 3, at_least=GOAL)
        )
        for name, theirs in cpu.items():
            if name not in (OURS, FLOOR):
                what = f"processor time of {name} over ours"
                found.append(judged(operation, what, theirs / cpu[OURS], 2, at_least=1.0))
    return found


def benchmark(options: Options) -> dict[str, Any]:
    """Run everything; return the results as in `benchmarks/README.md`.

    Raises:
        WrongResult: a contestant is off.
        SystemExit: a name is none.
    """
    n = options.rows or (4096 if options.quick else 16_384)
    names = [f"cosine-{kind}-{name}" for name in DTYPES for kind in ("raw", "all")] + [
        MAPPED,
        f"cosine-store-bfloat16-{LAYERS}",
    ]
    refuse_unknown("operation", options.only, names)
    described = machine(options.folder or Path(tempfile.gettempdir()))
    begun, order = time.perf_counter(), random.Random(0)
    done: list[Operation] = []
    with one_thread(), tempfile.TemporaryDirectory(dir=options.folder) as folder:
        makers: list[Callable[[], list[Operation]]] = [
            *(
                lambda name=name, dtype=dtype: in_memory(n, name, dtype, QUICK if options.quick else PEERS)
                for name, dtype in DTYPES.items()
            ),
            lambda: [mapped(n, Path(folder), QUICK if options.quick else PEERS)],
            lambda: [in_store(n // 2, Path(folder))],
        ]
        for make, made in zip(makers, [names[0:2], names[2:4], names[4:6], names[6:7], names[7:]], strict=True):
            if options.only and not set(made) & set(options.only):
                continue
            operations = [each for each in make() if not options.only or each.name in options.only]
            for _ in range(options.runs or (3 if options.quick else 7)):
                for operation in operations:
                    operation.run(order.sample(list(operation.contestants), len(operation.contestants)))
            for operation in operations:
                operation.contestants.clear()  # and the tensors that they hold
            done += operations
    rows = [row for operation in done for row in operation.rows()]
    return {
        "machine": described,
        "versions": versions(_DISTRIBUTIONS),
        "data": {"pairs": n, "width": WIDTH, "massive": 3},
        "threads": 1,
        "minutes": round((time.perf_counter() - begun) / 60, 1),
        "titles": {operation.name: operation.title for operation in done},
        "labels": LABELS,
        "left_out": {},
        "goals": goals(rows),
        "rows": rows,
    }


def render(source: Path, folder: Path) -> None:
    """Write the table of results into a folder."""
    results = json.loads(source.read_text(encoding="utf-8"))
    about = "Cosine similarity of paired rows, one thread; the floor reads the same bytes once in the same run."
    text = markdown(results, results["titles"], OURS, f"Cosine benchmark ({source.stem})", about)
    rows: list[Sequence[object]] = []
    for operation, by_name in by_operation(results["rows"]).items():
        for name, row in by_name.items():
            own = median(row["cpu_seconds"])
            rate, share = row["bytes"] / own / 1e9, median(by_name[FLOOR]["cpu_seconds"]) / own
            rows.append((f"`{operation}`", results["labels"][name], f"{rate:.1f}", f"{share:.0%}", row["check"]))
    columns = ("operation", "contestant", "GB/s", "share of the bandwidth", "compared")
    text += section("Rates and errors", columns, rows, "By processor time, which other work beside it disturbs least.")
    write(folder / "cosine-benchmark.md", text + goals_section(results["goals"]))


def main(options: Options) -> None:
    """Measure, or render what was measured."""
    if options.table:
        render(options.table, options.docs)
    else:
        keep("cosine", options, lambda: benchmark(options))


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    if not chosen.table:
        restart_in_one_thread("benchmarks.cosine")
    main(chosen)
