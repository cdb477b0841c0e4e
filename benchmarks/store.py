"""The store against other ways to keep activations, and against the disk itself, on the same data in one process.

    python -m benchmarks.store [--quick] [--runs N] [--json FILE] [--folder DIR] [--size-gb X] [--only NAME ...]
    python -m benchmarks.store --table FILE.json [--docs docs]

What each operation and figure means is in `benchmarks/README.md`; the contestants are in `store_contestants` and
`store_peers`, drawing in `_render`.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import random
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks._measure import (
    Cost,
    can_drop,
    can_write_directly,
    drop,
    files_of,
    machine,
    timed,
    versions,
)
from benchmarks._outcome import Runs, WrongResult, keep, refuse_unknown, write
from benchmarks._render import markdown, picture
from benchmarks.store_contestants import Contestant, Plain, PlainDirect
from benchmarks.store_data import Data, make_data
from benchmarks.store_peers import CONTESTANTS

_FULL_GB, _QUICK_GB = 2.0, 0.25
_ROWS_READ, _BATCH_READ = 50, 64
OURS = "gapprobe"


@dataclass
class Options:
    """Time writing and reading activations."""

    quick: bool = False
    """A quarter of a gigabyte and three rounds, in less than three minutes; prints the results."""
    runs: int | None = None
    """Rounds; five, or three with --quick."""
    size_gb: float | None = None
    """Gigabytes of residuals; two, or a quarter with --quick. They are held in memory, and on the disk once for each
    contestant."""
    folder: Path = Path()
    """A folder on the disk to be measured; the working folder by default. What is written there is taken away again."""
    only: tuple[str, ...] = ()
    """Names of contestants; all by default. The floor, `plain`, always runs."""
    json: Path | None = None
    """Write the results here. A full run writes to benchmarks/results/ by default; a file is never written over."""
    table: Path | None = None
    """Measure nothing: render the table and the picture of these results."""
    docs: Path = Path("docs")
    """Where the table and the picture go."""


@dataclass(frozen=True)
class Pick:
    """What one round reads; the same for all contestants."""

    layer: int
    rows: tuple[int, ...]
    batch: tuple[int, ...]
    other_layer: int
    other_row: int


@dataclass(frozen=True)
class Reading:
    """An operation on an opened contestant, and the tensors that it must give."""

    name: str
    read: Callable[[Any, Pick], list[Tensor]]
    expected: Callable[[Data, Pick], list[Tensor]]
    divisor: Callable[[Pick], int]
    """How often the operation is done in one timing."""


READINGS = (
    Reading("read-layer", lambda c, p: [c.layer(p.layer)], lambda d, p: [d.layer(p.layer)], lambda _: 1),
    Reading(
        "read-row",
        lambda c, p: [c.row(row) for row in p.rows],
        lambda d, p: [d.rows[row].residual for row in p.rows],
        lambda p: len(p.rows),
    ),
    Reading("read-last", lambda c, _: c.last(), lambda d, _: [d.last(i) for i in range(d.layers)], lambda _: 1),
    Reading("read-random", lambda c, p: [c.some(p.batch)], lambda d, p: [d.some(p.batch)], lambda _: 1),
)
TITLES = {
    "write": "Write all rows and fsync",
    "open": "Open and count the rows (nothing in the page cache)",
    "read-layer-cold": "One layer of all rows, from the disk",
    "read-layer-warm": "One layer of all rows, from the page cache",
    "read-row-cold": "One row, all layers, from the disk",
    "read-row-warm": "One row, all layers, from the page cache",
    "read-last-cold": "Last token of every row, all layers, from the disk",
    "read-last-warm": "Last token of every row, all layers, from the page cache",
    "read-random-cold": "Batch of 64 random rows, all layers, from the disk",
    "read-random-warm": "Batch of 64 random rows, all layers, from the page cache",
}


class Benchmark:
    """All contestants on the same data, in turn, round by round."""

    def __init__(self, data: Data, folder: Path, contestants: Sequence[type[Contestant]], runs: int) -> None:
        self.data = data
        self.folder = folder
        self.contestants = contestants
        self.runs = runs
        self.timings = Runs()
        self.left_in_cache: dict[str, int] = {}
        self._order = random.Random(0)

    def run(self) -> None:
        """Write in every round, then read in every round.

        Raises:
            WrongResult: a contestant gave other data than it was given.
        """
        for _ in range(self.runs):
            for contestant in self._turns():
                self._write(contestant)
        for contestant in self.contestants:
            self._check_all(contestant)
        for _ in range(self.runs):
            pick = self._pick()
            for contestant in self._turns():
                if contestant.reads and contestant is not Plain:
                    self._open(contestant)
            for reading in READINGS:
                expected = reading.expected(self.data, pick)
                for contestant in self._turns():
                    if contestant.reads:
                        self._read(contestant, reading, pick, expected)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the results, by operation, then contestant."""
        measured = [name for name in TITLES if can_drop or not (name == "open" or name.endswith("-cold"))]
        names = [each.name for each in self.contestants]
        return self.timings.rows(measured, names, lambda operation: None if operation == "open" else Plain.name)

    def _turns(self) -> list[type[Contestant]]:
        """Return the contestants in another order every time, so that none always follows the same one."""
        return self._order.sample(self.contestants, len(self.contestants))

    def _pick(self) -> Pick:
        count = len(self.data.rows)
        layer, other_layer = self._order.sample(range(self.data.layers), 2)
        return Pick(
            layer=layer,
            rows=tuple(self._order.sample(range(count), min(_ROWS_READ, count))),
            batch=tuple(self._order.sample(range(count), min(_BATCH_READ, count))),
            other_layer=other_layer,
            other_row=self._order.randrange(count),
        )

    def _write(self, contestant: type[Contestant]) -> None:
        folder = self.folder / contestant.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        # What others left to be written is not this one's to wait for.
        os.sync()
        # Once for the page cache, once for what is held before it is written.
        _, cost = timed(lambda: contestant.write(folder, self.data), 2 * self.data.bytes)
        check = "after the last round every value of every layer compared with the rows in memory, bit for bit: equal"
        self._add("write", contestant, cost, check)

    def _check_all(self, contestant: type[Contestant]) -> None:
        """Compare everything that was written, in portions."""
        reader = contestant(self.folder / contestant.name)
        if issubclass(contestant, Plain):
            found = ((reader.row(i), row.residual) for i, row in enumerate(self.data.rows))
        else:
            found = ((reader.layer(layer), self.data.layer(layer)) for layer in range(self.data.layers))
        if any(_differing(a, b) for a, b in found):
            raise WrongResult(f"{contestant.name} does not hold what was written")
        reader.close()
        self._cool(contestant, sparing_memory=True)

    def _open(self, contestant: type[Contestant]) -> None:
        def open_and_count() -> tuple[Contestant, int]:
            reader = contestant(folder)
            return reader, len(reader)

        folder = self.folder / contestant.name
        self._cool(contestant)
        (reader, count), cost = timed(open_and_count)
        reader.close()
        if count != len(self.data.rows):
            raise WrongResult(f"{contestant.name} counts {count} rows where {len(self.data.rows)} were written")
        self._add("open", contestant, cost, f"{count} rows counted: equal")

    def _read(self, contestant: type[Contestant], reading: Reading, pick: Pick, expected: list[Tensor]) -> None:
        """Time a reading twice: opened anew with nothing in the page cache, then again with all of it there.

        The second time the contestant has been opened anew too, so that no map is left of what is read, and used once
        for another layer and another row, so that what it looks up only once has been looked up.
        """

        def opened() -> tuple[Contestant, list[Tensor]]:
            reader = contestant(folder)
            return reader, _touched(reading.read(reader, pick))

        folder, divisor = self.folder / contestant.name, reading.divisor(pick)
        self._cool(contestant)
        (reader, tensors), cost = timed(opened)
        check = self._check(contestant, reading, tensors, expected)
        self._add(f"{reading.name}-cold", contestant, cost, check, divisor)
        reader.close()
        del reader, tensors
        reader = contestant(folder)
        if contestant is not Plain:
            reader.layer(pick.other_layer)
            reader.row(pick.other_row)
        tensors, cost = timed(lambda: _touched(reading.read(reader, pick)))
        check = self._check(contestant, reading, tensors, expected)
        self._add(f"{reading.name}-warm", contestant, cost, check, divisor)
        reader.close()
        del reader, tensors
        self._cool(contestant, sparing_memory=True)

    def _check(
        self, contestant: type[Contestant], reading: Reading, found: list[Tensor], expected: list[Tensor]
    ) -> str:
        """Compare bit for bit with what was written.

        The floor's bytes are those that begin its files: what they hold is not what was asked for, only as much.
        """
        values = sum(tensor.numel() for tensor in expected)
        if contestant is Plain:
            expected = _stream(self.data, [tensor.nbytes for tensor in expected])
        differing = sum(_differing(a, b) for a, b in zip(found, expected, strict=True))
        if differing:
            raise WrongResult(f"{contestant.name}, {reading.name}: {differing} bytes differ from what was written")
        what = "as many of the bytes written" if contestant is Plain else "all values"
        return f"{what} ({values:,} of 16 bits) compared with the rows in memory, bit for bit: equal"

    def _cool(self, contestant: type[Contestant], sparing_memory: bool = False) -> None:
        """Take the contestant's files out of the page cache: before a cold run, or only for the others to have it."""
        left = drop(self.folder / contestant.name) if can_drop else 0
        if not sparing_memory:
            self.left_in_cache[contestant.name] = max(left, self.left_in_cache.get(contestant.name, 0))

    def _add(self, operation: str, contestant: type[Contestant], cost: Cost, check: str, divisor: int = 1) -> None:
        self.timings.add(operation, contestant.name, cost, divisor, digits=7).check = check


def benchmark(data: Data, folder: Path, runs: int, only: Sequence[str] = ()) -> dict[str, Any]:
    """Run all contestants that can be imported; return the results as in `benchmarks/README.md`.

    Raises:
        WrongResult: a contestant gave other data than it was given.
        SystemExit: a name in `only` is none, or the disk has no room.
    """
    refuse_unknown("contestant", only, [each.name for each in CONTESTANTS])
    chosen = [each for each in CONTESTANTS if not only or each.name in {*only, Plain.name}]
    left_out = {each.name: reason for each in chosen if (reason := _missing(each, folder))}
    contestants = [each for each in chosen if each.name not in left_out]
    needed, free = int(data.bytes * (len(contestants) + 0.5)), shutil.disk_usage(folder).free
    if needed > free:
        sys.exit(f"{folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} are needed; give a smaller --size-gb")
    described = machine(folder)
    with tempfile.TemporaryDirectory(prefix="gapprobe-benchmark-", dir=folder) as inside:
        run = Benchmark(data, Path(inside), contestants, runs)
        run.run()
        sizes = {c.name: sum(path.stat().st_size for path in files_of(run.folder / c.name)) for c in contestants}
    distributions = [name for each in contestants for name in each.distributions]
    return {
        "machine": described,
        "versions": versions(distributions) | {"sqlite": sqlite3.sqlite_version},
        "data": {
            "rows": len(data.rows),
            "tokens": data.tokens,
            "layers": data.layers,
            "width": data.width,
            "dtype": data.header.dtype,
            "bytes": data.bytes,
            "rows_a_batch": len(data.batches[0]),
        },
        "cold": {
            "how": "posix_fadvise(DONTNEED) on every file, all of them synced, before every cold run"
            if can_drop
            else "not measured: files cannot be taken out of the page cache here",
            "bytes_left_by_mincore": run.left_in_cache,
        },
        "threads": torch.get_num_threads(),
        "disk_bytes": sizes,
        "labels": {each.name: each.label for each in contestants},
        "left_out": left_out,
        "rows": run.rows(),
    }


def render(source: Path, folder: Path) -> None:
    """Write the table and the picture of results into a folder."""
    results = json.loads(source.read_text(encoding="utf-8"))
    data = results["data"]
    about = (
        f"{data['bytes'] / 1e9:.2f} GB of {data['dtype']}: {data['rows']:,} rows of 20 to 40 tokens, "
        f"{data['layers']} layers of width {data['width']:,}."
    )
    title = f"Store benchmark ({source.stem})"
    write(folder / "store-benchmark.md", markdown(results, TITLES, OURS, title, about))
    write(folder / "store-benchmark.svg", picture(results, TITLES, OURS, "Keeping activations on disk", about))


def main(options: Options) -> None:
    """Measure, or render what was measured."""
    if options.table:
        render(options.table, options.docs)
        return

    def measure() -> dict[str, Any]:
        gigabytes = options.size_gb or (_QUICK_GB if options.quick else _FULL_GB)
        # The quick form has several shards too.
        data = replace(make_data(int(gigabytes * 1e9)), shard_bytes=(64 if options.quick else 256) << 20)
        return benchmark(data, options.folder, options.runs or (3 if options.quick else 5), options.only)

    keep("store", options, measure)


def _missing(contestant: type[Contestant], folder: Path) -> str:
    """Return why a contestant cannot run; an empty text when it can."""
    try:
        importlib.import_module(contestant.module)
    except ImportError as error:
        return f"cannot be imported: {error}"
    if contestant is PlainDirect and not can_write_directly(folder):
        return "the file system has no direct writing"
    return ""


def _touched(tensors: list[Tensor]) -> list[Tensor]:
    """Read every byte, as a consumer would: a map costs nothing before it is touched."""
    for tensor in tensors:
        tensor.view(-1).view(torch.int64).numpy().sum()
    return tensors


def _differing(a: Tensor, b: Tensor) -> int:
    a, b = (each.contiguous().view(-1).view(torch.uint8) for each in (a, b))
    if len(a) != len(b):
        return max(len(a), len(b))
    # Whole words compare eight times as fast as bytes.
    return 0 if torch.equal(a.view(torch.int64), b.view(torch.int64)) else int((a != b).sum())


def _stream(data: Data, sizes: Sequence[int]) -> list[Tensor]:
    """Return the first bytes of all rows one after another, cut into pieces of these sizes; around again at the end."""
    parts: list[Tensor] = []
    missing = sum(sizes)
    for row in itertools.cycle(data.rows):
        parts.append(row.residual.view(-1).view(torch.uint8)[:missing])
        missing -= len(parts[-1])
        if not missing:
            break
    return list(torch.cat(parts).split(list(sizes)))


if __name__ == "__main__":
    main(tyro.cli(Options))
