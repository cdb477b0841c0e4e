"""What a reader of a damaged or hostile store must do: the right rows, or a StoreError, soon, in little memory.

`examine` tries every public way to read a store, then to write to it, and returns what it did not like.
"""

import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch

from gapprobe.errors import OutputError, StoreError
from gapprobe.store.care.clearing import collect_garbage
from gapprobe.store.care.compacting import compact_store
from gapprobe.store.care.repairing import repair_store
from gapprobe.store.care.verify import verify_store
from gapprobe.store.format import StoredRow
from gapprobe.store.reader import Store, TokenBatch, open_store
from gapprobe.store.writer import StoreWriter
from tests.soak.case import Case
from tests.store.rows import HEADER, equal, make_row

SECONDS = 5.0
MEMORY = 512 << 20

T = TypeVar("T")


class Hang(BaseException):
    """Raised by the alarm, and by nothing that anyone catches."""


class Examiner:
    """Runs one operation after another and takes note of those that fail in a way they must not."""

    def __init__(self, case: Case) -> None:
        self.findings: list[str] = []
        # What is as large as it says takes time and memory in proportion.
        self._patient = case.enormous

    def run(self, what: str, operation: Callable[[], T], *allowed: type[Exception]) -> T | None:
        """Return the operation's result, or None where it raised; take note of hangs, memory and foreign errors."""
        begun, before, late = time.monotonic(), peak(), False
        try:
            with _alarm(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = operation()
        except (StoreError, *allowed) as error:
            result = None
            # An error is there to be printed.
            if not _printable(str(error)):
                self.findings.append(f"{what}: a message that no terminal should see: {str(error)!r:.300}")
        except Hang as error:
            result = None
            late = True
            self.require(self._patient, f"{what}: still not done after {SECONDS} s{_where(error)}")
        except Exception as error:
            result = None
            self.findings.append(f"{what}: {type(error).__name__}: {str(error)[:200]!r}{_where(error)}")
        took, more = time.monotonic() - begun, peak() - before
        self.require(late or self._patient or took < SECONDS, f"{what}: took {took:.1f} s")
        self.require(self._patient or more < MEMORY, f"{what}: took {more >> 20} MiB of memory")
        return result

    def require(self, sound: bool, what: str) -> None:
        """Take note of something that is not as it must be."""
        if not sound:
            self.findings.append(what)


def examine(path: Path, case: Case) -> list[str]:
    """Try all there is to try with the store that `case` built at `path`; return what went wrong."""
    outside, ask = path.parent / "outside", Examiner(case)
    before = snapshot(outside)
    # A store that is enormous, and is what its manifest says, takes as long as it takes to read all of it.
    problems = None if case.enormous else ask.run("verify", lambda: verify_store(path, progress=False))
    if case.seen and len(case.told) == 1 and problems == []:
        ask.findings.append("verify: finds nothing")
    store = ask.run("open_store", lambda: open_store(path))
    ids: tuple[str, ...] = ()
    if store is not None:
        ids = _read(ask, store, case)
    elif case.harmless:
        ask.findings.append("open_store: refuses a store that is sound enough")
    _write(ask, path, store, case, ids)
    ask.require(snapshot(outside) == before, "something outside the store has changed")
    return ask.findings


def examine_care(path: Path, case: Case) -> list[str]:
    """Repair, compact and clear up the store that `case` built at `path`; return what went wrong."""
    if case.enormous:
        return []
    outside, ask = path.parent / "outside", Examiner(case)
    before = snapshot(outside)
    done = ask.run("repair", lambda: repair_store(path, progress=False), OutputError)
    if done is not None:
        problems = ask.run("verify after repair", lambda: verify_store(path, progress=False))
        # A column may have one type in one shard of an author and another in the next, which nobody can join.
        left = [str(problem) for problem in problems or () if "NaN or infinite" not in problem.what]
        sure = not case.authored and not case.anything
        ask.require(problems is not None and not (left and sure), f"repair: leaves {left[:1]}")
        _rows_are_right(ask, path, case, "repair")
    ask.require(done is not None or not case.harmless, "repair: refuses a store that is sound enough")
    compacted = ask.run("compact", lambda: compact_store(path, 1 << 20, progress=False), OutputError)
    cleared = ask.run("gc", lambda: collect_garbage(path, damaged=True), OutputError)
    if done is not None:
        ask.require(compacted is not None and cleared is not None, "compact or gc: refuses a store that was repaired")
        _rows_are_right(ask, path, case, "compact and gc")
    ask.require(snapshot(outside) == before, "something outside the store has changed")
    return ask.findings


def _rows_are_right(ask: Examiner, path: Path, case: Case, what: str) -> None:
    """After a repair no row of a store that only accidents befell is wrong."""
    store = ask.run(f"open_store after {what}", lambda: open_store(path))
    ids = None if store is None else ask.run(f"ids after {what}", lambda: store.ids)
    if store is None or ids is None:
        ask.findings.append(f"{what}: leaves a store that cannot be read")
        return
    ask.require(not case.harmless or set(case.rows) <= set(ids), f"{what}: rows are missing")
    for id_ in ids:
        row = ask.run(f"row after {what}", lambda id_=id_: store.row(id_))
        # Where an author gave one id to two rows, a repair keeps the first.
        if id_ in case.rows and not case.authored and not case.anything:
            ask.require(row is not None and right(row, case.rows[id_]), f"{what}: {id_} is wrong")


def _read(ask: Examiner, store: Store, case: Case) -> tuple[str, ...]:
    ask.run("repr", lambda: repr(store))
    ids = ask.run("ids", lambda: store.ids)
    frame = ask.run("rows", lambda: store.rows)
    info = ask.run("info", store.info)
    ask.run("str(info)", lambda: str(info))
    ask.run("refresh", store.refresh)
    if case.harmless:
        ask.require(ids is not None and set(ids) == set(case.rows), "rows are missing")
        ask.require(frame is not None and info is not None, "a table or summary is missing")
    layers = store.header.layers[:4]
    if ids is None:
        # Bulk reads of everything need no ids, so they may work all the same.
        for layer in layers:
            ask.run("layer", lambda layer=layer: store.layer(layer))
        ask.run("batch", store.batch)
        return ()
    rows = {id_: ask.run("row", lambda id_=id_: store.row(id_)) for id_ in ids}
    for id_, row in rows.items():
        if row is not None and case.must(id_):
            ask.require(right(row, case.rows[id_]), f"row: {id_} is wrong")
        elif row is not None:
            _sane(ask, store, row)
        ask.require(row is not None or not case.harmless, f"row: {id_} is missing")
    if frame is not None:
        ask.require(tuple(frame.index) == ids, "rows: the index is not the ids")
        for id_ in filter(case.must, ids):
            if "n" in frame and not case.free:
                ask.require(frame.loc[id_, "n"] == case.rows[id_].columns["n"], f"rows: {id_} is wrong")
    batch = ask.run("batch", store.batch)
    if batch is not None:
        _same(ask, batch, rows, "batch")
        ask.require(batch.ids == ids, "batch: other ids")
    some = [id_ for id_ in ids[::-2] if rows[id_] is not None]
    chosen = ask.run("batch", lambda: store.batch(some, layers[::-1]))
    if chosen is not None:
        _same(ask, replace(chosen, residual=chosen.residual.flip(0)), rows, "batch of some rows", len(layers))
    for index, layer in enumerate(layers):
        flat = ask.run("layer", lambda layer=layer: store.layer(layer))
        if flat is not None and batch is not None:
            ask.require(same_bits(flat, batch.residual[index]), "layer: differs from batch")
        for position in store.header.positions:
            ask.run("moments", lambda layer=layer, position=position: store.moments(layer, position))
            _position(ask, store, case, rows, layer, position)
        found = ask.run("moments", lambda layer=layer: store.moments(layer))
        if case.harmless:
            tokens = sum(len(row.token_ids) for row in case.rows.values())
            ask.require(found is not None and found.count == tokens, "moments: of another number of tokens")
    return ids


def _position(ask: Examiner, store: Store, case: Case, rows: dict, layer: int, position: str) -> None:
    """One token a row: from the dense copies where there are any, which only `verify` compares with the rest."""
    bit, index = 1 << store.header.positions.index(position), store.header.layers.index(layer)
    marked = {id_: row.token_marks & bit != 0 for id_, row in rows.items() if row is not None}
    single = [id_ for id_, marks in marked.items() if marks.sum() == 1]
    lines = ask.run("layer at a position", lambda: store.layer(layer, position, single))
    if lines is not None:
        for id_, line in zip(single, lines, strict=True):
            right = same_bits(line, rows[id_].residual[index][marked[id_]][0])
            ask.require(right or not case.must(id_), f"layer at {position}: {id_} is wrong")
    ask.run("layer at a position", lambda: store.layer(layer, position))


def _same(ask: Examiner, batch: TokenBatch, rows: dict, what: str, layers: int | None = None) -> None:
    """Bulk reads agree with reads of single rows, whatever those hold."""
    for id_, (first, last) in zip(batch.ids, pairwise(batch.offsets.tolist()), strict=True):
        row = rows.get(id_)
        if row is None:
            continue
        same = same_bits(batch.residual[:, first:last], row.residual[:layers])
        for name in ("token_ids", "token_positions", "token_roles", "token_marks"):
            same &= getattr(batch, name)[first:last].equal(getattr(row, name))
        ask.require(same, f"{what}: differs from row")


def _sane(ask: Examiner, store: Store, row: StoredRow) -> None:
    """A row of an author is at least a row."""
    header, tokens = store.header, len(row.token_ids)
    shape = (len(header.layers), tokens, header.width)
    ask.require(row.residual.shape == shape, f"row: shape {row.residual.shape} instead of {shape}")
    ask.require(row.residual.dtype == header.torch_dtype, "row: dtype")
    for name in ("token_positions", "token_roles", "token_marks"):
        ask.require(len(getattr(row, name)) == tokens, f"row: {name} has another length")


def _write(ask: Examiner, path: Path, store: Store | None, case: Case, ids: tuple[str, ...]) -> None:
    """Opening for writing clears up; what could be read before can be read after, and a new row too."""
    header = HEADER if store is None else store.header
    new = make_row("new", 2)
    closed = False

    def append() -> None:
        nonlocal closed
        with StoreWriter(path, header, 1) as writer:
            if header == HEADER:
                writer.append([new])
        closed = True

    ask.run("StoreWriter", append, OutputError)
    ask.require(closed or not case.harmless, "StoreWriter: refuses a store that is sound enough")
    after = ask.run("open_store again", lambda: open_store(path))
    found = None if after is None else ask.run("ids again", lambda: after.ids)
    if after is None or found is None:
        ask.require(not case.harmless, "after writing it cannot be read any more")
        return
    # Shards of an author may lie in wait, unsealed, for a writer to adopt them.
    ask.require(set(ids) <= set(found) or case.anything, "rows that were sealed are gone after writing")
    if closed and header == HEADER and not case.anything:
        row = ask.run("row again", lambda: after.row("new"))
        ask.require(right(row, new) if row is not None else not case.harmless, "the new row is not there")
    for id_ in filter(case.must, found):
        row = ask.run("row again", lambda id_=id_: after.row(id_))
        ask.require(row is None or right(row, case.rows[id_]), f"row again: {id_} is wrong")


def outside(folder: Path, sound: Path) -> None:
    """Make what lies beside a store and must stay as it is."""
    folder.mkdir()
    (folder / "victim.txt").write_text("years of work\nwithout a newline at the end")
    (folder / "folder").mkdir()
    (folder / "folder" / ".tmp-1-aa").write_text("mine")
    (folder / ".tmp-1-aa").write_text("mine")
    for name in ("shards/000000.safetensors", "rows/000000.parquet", "manifest.jsonl"):
        (folder / Path(name).name).write_bytes((sound / name).read_bytes())
    (folder / "000009.safetensors").touch()


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Return all names and contents in a folder."""
    return {str(file): file.read_bytes() if file.is_file() else None for file in sorted(folder.rglob("*"))}


def right(row: StoredRow, wanted: StoredRow) -> bool:
    """Whether a row is what was written, but for columns that only other shards have."""
    columns = {name: value for name, value in row.columns.items() if name in wanted.columns or value is not None}
    return equal(replace(row, columns=columns), wanted)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes; NaN, which an author may write, is not equal to itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return not a.numel() or a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))


def peak() -> int:
    """Return the most memory that this process ever had resident, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextmanager
def _alarm(seconds: float):
    """Break off what blocks. Where there is no alarm (another thread, another system) it takes as long as it takes."""

    def ring(*_: object) -> None:
        raise Hang

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _where(error: BaseException) -> str:
    """Return the last places in gapprobe that an error came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "gapprobe" in frame.filename]
    return "".join(f" < {Path(frame.filename).name}:{frame.name}:{frame.line}" for frame in frames[:-3:-1])


def _printable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\x1b" not in text and "\0" not in text
