"""Processes of the crash soak: writers that get killed or meet a failing disk, readers that compare all they see.

`crash` starts them and judges what they leave; nothing here decides when to kill.
"""

import errno
import json
import os
import random
import signal
import stat
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from gapprobe.errors import OutputError, StoreError
from gapprobe.store import disk
from gapprobe.store.care.clearing import collect_garbage
from gapprobe.store.care.compacting import compact_store
from gapprobe.store.care.merging import merge_stores
from gapprobe.store.care.repairing import repair_store
from gapprobe.store.format import STORE_FILE, StoredRow
from gapprobe.store.reader import Store, open_store
from gapprobe.store.writer import StoreWriter
from tests.store.rows import CALLS as WRITERS_CALLS
from tests.store.rows import equal, make_row, reheaded

HEADER = reheaded(layers=(0, 7, 15, 31), width=512)
# A token takes 4 KiB: rows of nothing, of a few KiB, of some hundred, and of up to 2 MB.
TOKENS = (2, 0, 1, 5, 90, 0, 3, 1, 2, 480, 4, 1, 0, 60, 8, 1, 300, 2, 6, 0)
GAVE_UP = 3
BAD_AT_MOST = 20
# A reader that had opened a store before old files were cleared away opens it anew, which need not help at once.
AGAIN = 10
# tqdm's own lock is one between processes, of which each that is killed would leave a semaphore behind.
tqdm.set_lock(threading.RLock())
CALLS = (*WRITERS_CALLS, "replace")
FAILING = ("pwrite", "write", "fsync", "link", "rename", "posix_fallocate")


def save_rows(path: Path, count: int, shrink: int = 1) -> list[StoredRow]:
    """Make the rows of a soak and keep them in a file, for writers to write and readers to compare with."""
    rows = [make_row(f"row {i}", TOKENS[i % len(TOKENS)] // shrink, HEADER) for i in range(count)]
    torch.save(rows, path)
    return rows


def load_rows(path: Path) -> list[StoredRow]:
    """Map what `save_rows` kept, so that ten processes hold it once."""
    return torch.load(path, mmap=True, weights_only=False)


@dataclass(frozen=True)
class Life:
    """How one writer process lives.

    Attributes:
        rows: numbers of the rows it writes, in its order.
        batch, shard_bytes: how it groups them.
        waits: whether it waits for each third batch to be sealed, or lets the background thread run behind.
        links: whether the file system knows hard links.
        dies_at: the call that changes the disk in the middle of which it kills itself, by name and number, or None.
        faults: probability that such a call fails, or writes less than it should.
        patience: how often it tries again after an OutputError.
        seed: of the faults.
        tends: empty for a writer; else what it does to the store in place of writing: compact, merge or repair.
        sources: stores to merge.
    """

    store: Path
    rows_file: Path
    rows: Sequence[int]
    batch: int
    shard_bytes: int
    waits: bool
    links: bool
    dies_at: tuple[str, int] | None
    faults: float
    patience: int
    seed: int
    tends: str = ""
    sources: Sequence[Path] = ()


def live(life: Life, started: Path) -> None:
    """Entry of a process that changes a store. Ends with `GAVE_UP` when the disk failed more often than it bears."""
    torch.set_num_threads(1)
    if life.tends:
        _tend(life, started)
        return
    rows = load_rows(life.rows_file)
    rows = [rows[i] for i in life.rows]
    _meddle(life)
    started.touch()
    tries = iter(range(life.patience))
    writer = _persist(lambda: StoreWriter(life.store, HEADER, life.shard_bytes), tries)
    for number, start in enumerate(range(0, len(rows), life.batch)):
        batch = rows[start : start + life.batch]
        _persist(lambda batch=batch: writer.append(batch), tries)
        if number % 3 == 2:
            _persist(lambda: writer.flush(wait=life.waits), tries)
    _persist(writer.close, tries)


def _tend(life: Life, started: Path) -> None:
    pick = random.Random(life.seed)
    # First: if the writer died before it made the store, the next one is begun only when this process has begun.
    started.touch()
    while life.tends == "compact" and not (life.store / STORE_FILE).exists():
        time.sleep(0.01)
    _meddle(life)
    if life.tends == "merge":
        merge_stores(life.sources, life.store, progress=False)
    elif life.tends == "repair":
        repair_store(life.store, progress=False)
    else:
        for _ in range(8):
            compact_store(life.store, pick.choice((1 << 20, 4 << 20, 16 << 20, 64 << 20)), progress=False)
            if pick.random() < 0.5:
                collect_garbage(life.store)


def _persist(attempt: Callable, tries) -> object:
    while True:
        try:
            return attempt()
        except OutputError:
            if next(tries, None) is None:
                # As a shell's kill would: no hook runs, nothing is flushed.
                os._exit(GAVE_UP)


def whole_pages(size: int) -> int:
    """Return how much of so many bytes can be written past the page cache; less than a page never is."""
    return size // disk.ALIGNMENT * disk.ALIGNMENT or size


def _meddle(life: Life) -> None:
    """Have this process's calls to the disk fail, fall short, or be its last."""
    pick, done, real = random.Random(life.seed), Counter(), {name: getattr(os, name) for name in CALLS}

    def meddled(name):
        def call(*args, **kwargs):
            if name == "write" and not stat.S_ISREG(os.fstat(args[0]).st_mode):
                # How processes talk to one another is no part of the soak.
                return real[name](*args, **kwargs)
            if name == "link" and not life.links:
                raise PermissionError(errno.EPERM, "Operation not permitted")
            done[name] += 1
            if (name, done[name]) == life.dies_at:
                if name in ("write", "pwrite"):
                    real[name](args[0], args[1][: whole_pages(len(args[1]) // 2)], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            if pick.random() < life.faults:
                if name in ("write", "pwrite") and pick.random() < 0.7:
                    count = pick.randint(1, len(args[1]))
                    return real[name](args[0], args[1][: pick.choice((count, whole_pages(count)))], *args[2:])
                if name in FAILING:
                    raise OSError(pick.choice((errno.EIO, errno.ENOSPC)), "injected")
            return real[name](*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, meddled(name))


def watch(path: Path, rows_file: Path, stop: Path, report: Path, anew: bool, cleared: bool) -> None:
    """Entry of a reader process: read all that is visible, again and again, and compare it with what was written.

    Args:
        path: the store, which may not be there yet.
        rows_file: of `save_rows`.
        stop: the reader ends, after a last pass, when this file appears.
        report: where it says what it saw.
        anew: open the store for each pass; otherwise once, and refresh.
        cleared: files of shards that were joined may be cleared away; a StoreError then calls for opening it anew.
    """
    torch.set_num_threads(1)
    wanted = {row.id: row for row in load_rows(rows_file)}
    seen, bad, told, store, known, turn = Counter(), [], [], None, frozenset(), 0
    last, again = False, 0
    while (again or not last) and len(bad) < BAD_AT_MOST:
        last = stop.exists()
        if not (path / STORE_FILE).exists():
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                if store is None or anew:
                    store = open_store(path)
                else:
                    store.refresh()
                look(store, wanted, turn := turn + 1)
                if not known <= set(store.ids):
                    raise AssertionError(f"{len(known - set(store.ids))} rows that were sealed are gone")
                known, again = frozenset(store.ids), 0
                seen["passes"] += bool(known)
                seen["rows"] += len(known)
            except StoreError:
                store, again = None, again + 1
                seen["again"] += 1
                if not cleared or again == AGAIN:
                    bad.append(traceback.format_exc())
                    again = 0
            # Whatever a reader meets is what this soak is about.
            except Exception:
                bad.append(traceback.format_exc())
            told += [str(warning.message) for warning in caught]
        # Let writers have the processor too.
        time.sleep(0.005)
    report.write_text(json.dumps({**seen, "bad": bad, "warnings": sorted(set(told))}))


def look(store: Store, wanted: dict[str, StoredRow], turn: int) -> None:
    """Read every visible row by itself and all of them in bulk; raise AssertionError when a bit differs."""
    ids = store.ids
    assert len(set(ids)) == len(ids) == len(store), "a row is stored twice"
    for name in ids:
        assert equal(store.row(name), wanted[name]), f"{name} differs"
    full = [name for name in ids if len(wanted[name].token_ids)]
    index = turn % len(HEADER.layers)
    if turn % 3 == 0:
        batch = store.batch()
        for name in ("residual", "token_ids", "token_positions", "token_roles", "token_marks"):
            parts = [getattr(wanted[i], name) for i in ids]
            assert getattr(batch, name).equal(_cat(parts, name)), f"batch().{name} differs"
    elif turn % 3 == 1:
        lines = store.layer(HEADER.layers[index])
        assert lines.equal(_cat([wanted[i].residual[index] for i in ids], "layer")), "layer() differs"
    else:
        for position, token in (("last_input", 0), ("last_output", -1)):
            lines = store.layer(HEADER.layers[index], position, full)
            assert len(lines) == len(full), f"{position} has {len(lines)} lines for {len(full)} rows"
            assert all(a.equal(wanted[i].residual[index, token]) for a, i in zip(lines, full, strict=True)), position


def _cat(parts: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    shape = {"residual": (len(HEADER.layers), 0, HEADER.width), "layer": (0, HEADER.width)}.get(name, (0,))
    dtype = {"residual": torch.bfloat16, "layer": torch.bfloat16}.get(name)
    codes = name in ("token_roles", "token_marks")
    empty = torch.empty(shape, dtype=dtype or (torch.uint8 if codes else torch.int64))
    return torch.cat([empty, *parts], dim=1 if name == "residual" else 0)
