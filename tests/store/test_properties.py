"""Whatever is written, however it is cut into batches, flushes, shards and writers, reads back bit for bit."""

import os
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from gapprobe.errors import StoreError
from gapprobe.store import disk, packing
from gapprobe.store.format import ShardRecord, StoredRow, StoreHeader, shard_name
from gapprobe.store.reader import Store, open_store
from gapprobe.store.shard import file_xxh128, open_shard
from gapprobe.store.writer import StoreWriter
from tests.store.rows import HEADER, equal, holds, make_row, reheaded, some_rows, write

FAST = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=8)
# A row of its own each, any token, all in one.
SHARD_BYTES = st.sampled_from([1, 150, 400, 1 << 20])
DENSE = st.sampled_from([0, 1 / 8, 1, 100])
# beartype, which checks types in tests, looks at random items of a list; no strategy of ours draws at random.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
FIELDS = ("residual", "token_ids", "token_positions", "token_roles", "token_marks")


@pytest.fixture(autouse=True, scope="module")
def no_syncing():
    """Nothing here is about surviving a crash, and syncing takes most of the time."""
    with mock.patch.object(os, "fsync", return_value=None):
        yield


@st.composite
def headers(draw):
    return reheaded(
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        layers=tuple(sorted(draw(st.sets(st.integers(0, 120), min_size=1, max_size=4)))),
        width=draw(st.integers(1, 9)),
        positions=tuple(draw(st.lists(NAMES, unique=True, max_size=3))),
    )


VALUES = {
    "words": st.none() | st.text(st.characters(exclude_categories=("Cs",)), max_size=6),
    "whole": st.none() | st.integers(-(2**63), 2**63 - 1),
    "real": st.none() | st.floats(allow_nan=False),
    "true": st.none() | st.booleans(),
    "numbers": st.none() | st.lists(st.integers(-5, 5), max_size=3),
}


@st.composite
def rows_of(draw, header, name):
    """A row with any number of tokens, any of them marked as anything, and some columns."""
    tokens = draw(st.integers(0, 6))
    marks = draw(st.lists(st.integers(0, 2 ** len(header.positions) - 1), min_size=tokens, max_size=tokens))
    columns = draw(st.sets(st.sampled_from(sorted(VALUES))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    residual = torch.randn(len(header.layers), tokens, header.width, generator=generator)
    return StoredRow(
        id=name,
        columns={column: draw(VALUES[column]) for column in sorted(columns)},
        residual=residual.to(header.torch_dtype),
        token_ids=torch.randint(-(2**40), 2**40, (tokens,), generator=generator),
        token_positions=torch.arange(tokens) * 3,
        token_roles=torch.randint(0, 10, (tokens,), generator=generator).to(torch.uint8),
        token_marks=torch.tensor(marks, dtype=torch.uint8),
    )


def lists_of_rows(header, most=10):
    return st.lists(NAMES, unique=True, max_size=most).flatmap(
        lambda names: st.tuples(*(rows_of(header, name) for name in names))
    )


def check(store: Store, rows: dict[str, StoredRow], data: st.DataObject) -> None:
    """All ways of reading give the rows of a store, of which it is known what they are, bit for bit."""
    stored = [rows[id_] for id_ in store.ids]
    header = store.header
    assert len(store) == len(stored) == len(set(store.ids))
    names = {name for row in stored for name in row.columns}
    for row, told in zip(stored, store.table.to_pylist(), strict=True):
        full = replace(row, columns={name: row.columns.get(name) for name in names})
        assert told == {"id": row.id} | full.columns
        assert equal(store.row(row.id), full)
    assert list(store.rows.index) == list(store.ids)
    assert set(store.rows.columns) == names

    asked = data.draw(st.none() | st.lists(st.sampled_from(stored), max_size=12)) if stored else None
    chosen = stored if asked is None else asked
    ids = None if asked is None else [row.id for row in asked]
    layers = data.draw(st.none() | st.lists(st.sampled_from(header.layers), unique=True))
    batch = store.batch(ids, layers)
    at = [header.layers.index(layer) for layer in (header.layers if layers is None else layers)]
    assert batch.ids == tuple(row.id for row in chosen)
    assert batch.layers == tuple(header.layers[i] for i in at)
    assert batch.offsets.tolist() == [0, *np.cumsum([len(row.token_ids) for row in chosen])]
    empty = torch.empty(len(header.layers), 0, header.width, dtype=header.torch_dtype)
    assert batch.residual.dtype == header.torch_dtype
    assert batch.residual.equal(torch.cat([empty, *(row.residual for row in chosen)], 1)[at])
    for name in FIELDS[1:]:
        found = getattr(batch, name)
        assert found.equal(torch.cat([torch.empty(0, dtype=found.dtype), *(getattr(row, name) for row in chosen)]))

    for i, layer in enumerate(header.layers):
        empty = torch.empty(0, header.width, dtype=header.torch_dtype)
        assert store.layer(layer, rows=ids).equal(torch.cat([empty, *(row.residual[i] for row in chosen)]))
        everything = torch.cat([empty, *(row.residual[i] for row in stored)])
        marks = torch.cat([torch.empty(0, dtype=torch.uint8), *(row.token_marks for row in stored)])
        for bit, position in enumerate(header.positions):
            one = [row for row in chosen if (row.token_marks >> bit & 1).sum() == 1]
            lines = [row.residual[i][row.token_marks >> bit & 1 == 1] for row in one]
            assert store.layer(layer, position, [row.id for row in one]).equal(torch.cat([empty, *lines]))
            if len(one) < len(chosen):
                with pytest.raises(StoreError, match="rows have not exactly one"):
                    store.layer(layer, position, ids)
            check_moments(store.moments(layer, position), everything[marks >> bit & 1 == 1])
        check_moments(store.moments(layer), everything)


def check_moments(found, tokens):
    """Roughly: `test_moments` is about how near they are."""
    assert found.count == len(tokens)
    if len(tokens):
        assert found.mean.allclose(tokens.double().mean(0), rtol=1e-5, atol=1e-5)
        assert found.std.allclose(tokens.double().std(0, correction=0), rtol=1e-5, atol=1e-5)


@FAST
@given(st.data())
def test_any_rows_read_back_in_every_way(data):
    header = data.draw(headers())
    rows = data.draw(lists_of_rows(header))
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(packing, "DENSE_SHARE", data.draw(DENSE)):
        with StoreWriter(folder, header, data.draw(SHARD_BYTES)) as writer:
            left = list(rows)
            while left:
                count = data.draw(st.integers(1, len(left)))
                batch, left = left[:count], left[count:]
                # Rows given before, and twice in a batch, are left out.
                again = data.draw(st.lists(st.sampled_from(rows[: len(rows) - len(left)]), max_size=3))
                assert writer.append([*batch, *again]) == len(batch)
                if data.draw(st.booleans()):
                    writer.flush(wait=data.draw(st.booleans()))
        store = open_store(folder)
        assert store.verify() == []
        assert store.ids == tuple(row.id for row in rows)
        check(store, {row.id: row for row in rows}, data)


@FAST
@given(st.data())
def test_long_lines_in_any_order_with_repeats(data):
    """As above where a line takes a page or more: these are read another way."""
    header = reheaded(width=data.draw(st.sampled_from([2048, 5000])), layers=(2, 7))
    rows = [
        make_row(str(i), tokens, header)
        for i, tokens in enumerate(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=12)))
    ]
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(packing, "DENSE_SHARE", data.draw(DENSE)):
        write(Path(folder), rows, header, batch=data.draw(st.integers(1, 12)))
        check(open_store(folder), {row.id: row for row in rows}, data)


class Writing(RuleBasedStateMachine):
    """Two writers in turn and a reader: nothing is lost, nothing stored twice, nothing read that was not written."""

    data: st.DataObject

    @initialize(data=st.data())
    def begin(self, data):
        self.stack = ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.stack.enter_context(mock.patch.object(packing, "DENSE_SHARE", data.draw(DENSE)))
        self.header = data.draw(headers())
        self.path = self.folder / "store"
        # What a row is follows from its id, as in a capture: it does not matter which writer is first with it.
        self.rows: dict[str, StoredRow] = {}
        self.given: list[set[str]] = [set(), set()]
        self.safe: set[str] = set()
        self.writers = [StoreWriter(self.path, self.header, data.draw(SHARD_BYTES)) for _ in range(2)]
        self.reader = open_store(self.path)

    def some(self, data, most=5):
        names = data.draw(st.lists(NAMES | st.sampled_from([*self.rows, "a"]), max_size=most))
        for name in names:
            if name not in self.rows:
                self.rows[name] = data.draw(rows_of(self.header, name))
        return [self.rows[name] for name in names]

    @rule(data=st.data(), which=st.integers(0, 1))
    def append(self, data, which):
        rows = self.some(data)
        new = {row.id for row in rows} - self.given[which]
        count = self.writers[which].append(rows)
        assert count == len(new) or (count < len(new) and new & self.given[1 - which])
        self.given[which] |= new

    @rule(which=st.integers(0, 1), wait=st.booleans())
    def flush(self, which, wait):
        self.writers[which].flush(wait)
        if wait:
            self.safe |= self.given[which]
            assert self.given[which] <= set(open_store(self.path).ids)

    @rule(data=st.data(), which=st.integers(0, 1))
    def reopen(self, data, which):
        self.writers[which].close()
        self.safe |= self.given[which]
        self.writers[which] = StoreWriter(self.path, self.header, data.draw(SHARD_BYTES))
        assert self.safe <= self.writers[which].ids

    @rule(data=st.data(), which=st.integers(0, 1))
    def adopt(self, data, which):
        """Take the shards of another store, some of whose rows may be here already."""
        rows = list({row.id: row for row in self.some(data)}.values())
        with tempfile.TemporaryDirectory(dir=self.folder) as other:
            write(Path(other), rows, self.header, batch=2)
            for record in open_store(other).records:
                self.writers[which].adopt(Path(other, shard_name(record.shard)), record)
        self.given[which] |= {row.id for row in rows}

    @rule(data=st.data())
    def read_on(self, data):
        """A reader that does not refresh sees what it saw."""
        check(self.reader, self.rows, data)

    @rule(data=st.data())
    def refresh(self, data):
        before, safe = self.reader.ids, set(self.safe)
        assert self.reader.refresh() == len(self.reader.ids) - len(before)
        assert self.reader.ids[: len(before)] == before
        assert safe <= set(self.reader.ids) <= self.given[0] | self.given[1]
        check(self.reader, self.rows, data)

    def teardown(self):
        if hasattr(self, "stack"):
            with self.stack:
                for writer in self.writers:
                    writer.close()
                store = open_store(self.path)
                assert store.verify() == []
                assert Counter(store.ids) == Counter(self.given[0] | self.given[1])
                names = {name for id_ in store.ids for name in self.rows[id_].columns}
                for id_ in store.ids:
                    row = self.rows[id_]
                    assert equal(store.row(id_), replace(row, columns={n: row.columns.get(n) for n in names}))


TestWriting = Writing.TestCase
TestWriting.settings = settings(
    deadline=None, max_examples=25, stateful_step_count=12, suppress_health_check=[HealthCheck.too_slow]
)


@FAST
@given(st.data())
def test_dense_positions_change_nothing(data):
    header = data.draw(headers())
    rows = data.draw(lists_of_rows(header))
    batch, shard_bytes = data.draw(st.integers(1, 4)), data.draw(SHARD_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for dense in (0, 1000):
            path = Path(folder, str(dense))
            with mock.patch.object(packing, "DENSE_SHARE", dense):
                write(path, rows, header, batch, shard_bytes)
            store = open_store(path)
            for record, base in zip(store.records, np.cumsum([0] + [r.rows for r in store.records]), strict=False):
                shard = open_shard(path / shard_name(record.shard), header, record)
                # Where there are no tokens, copies of theirs take no room either.
                names = [f"position.{i:02d}" for i in range(len(header.positions))] if dense and record.tokens else []
                assert [name for name in sorted(shard.tensors) if name.startswith("position.")] == names
                for bit, name in enumerate(names):
                    for number, row in enumerate(rows[base : base + record.rows]):
                        one = row.residual[:, row.token_marks >> bit & 1 == 1]
                        wanted = one[:, 0] if one.shape[1] == 1 else torch.zeros(len(header.layers), header.width)
                        assert shard.read(name)[:, number].equal(wanted.to(header.torch_dtype))
            check(store, {row.id: row for row in rows}, data)
            found.append(store)
        single = [
            [row.id for row in rows if (row.token_marks >> bit & 1).sum() == 1] for bit in range(len(header.positions))
        ]
        for position, ids in zip(header.positions, single, strict=True):
            for layer in header.layers:
                a, b = (store.layer(layer, position, ids[::-1]) for store in found)
                assert a.equal(b)


def test_a_reader_during_writing_sees_whole_rows_only(tmp_path):
    rows = {row.id: row for row in some_rows(60)}

    def work():
        with StoreWriter(tmp_path, HEADER, 300) as writer:
            for row in rows.values():
                writer.append([row])
                writer.flush(wait=False)

    StoreWriter(tmp_path, HEADER).close()
    store, sizes = open_store(tmp_path), [0]
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(work)
        last = False
        while not last:
            last = writing.done()
            assert store.refresh() == len(store) - sizes[-1]
            batch = store.batch()
            assert batch.ids == tuple(list(rows)[: len(store)])
            seen = [rows[id_] for id_ in batch.ids]
            assert batch.residual.equal(torch.cat([torch.empty(3, 0, 6).bfloat16(), *(r.residual for r in seen)], 1))
            assert all(equal(store.row(row.id), row) for row in seen[sizes[-1] :])
            sizes.append(len(store))
    writing.result()
    assert sizes[-1] == len(rows)
    assert len(set(sizes)) > 2


def donate(folder: Path, rows, header: StoreHeader = HEADER, batch: int = 4) -> list[tuple[Path, ShardRecord]]:
    """Write another store and return its shards."""
    write(folder, rows, header, batch)
    return [(folder / shard_name(record.shard), record) for record in open_store(folder).records]


@FAST
@given(st.data())
def test_adopting_takes_what_is_new(data):
    rows = some_rows(12)
    pick = st.lists(st.sampled_from(range(12)), unique=True, max_size=8)
    stored, in_hand, other = (data.draw(pick) for _ in range(3))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "store")
        write(path, [rows[i] for i in stored])
        donors = donate(Path(folder, "other"), [rows[i] for i in other], batch=data.draw(st.integers(1, 8)))
        with StoreWriter(path, HEADER, data.draw(SHARD_BYTES)) as writer:
            writer.append([rows[i] for i in in_hand])
            here, taken = {*stored, *in_hand}, []
            for file, record in donors:
                taken.append(writer.adopt(file, record))
            assert sum(taken) == len(set(other) - here)
            assert [writer.adopt(file, record) for file, record in donors] == [0] * len(donors)
        assert holds(path, [rows[i] for i in {*here, *other}])
        assert all(file.exists() for file, _ in donors)
        assert not list(path.rglob(f"{disk.TEMPORARY}*"))


@FAST
@given(st.data())
def test_any_flipped_byte_of_a_shard_to_adopt_is_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "store")
        write(path, some_rows(3))
        ((file, record),) = donate(Path(folder, "other"), [make_row(name, 2) for name in "abcd"])
        content = bytearray(file.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        file.write_bytes(content)
        with StoreWriter(path, HEADER) as writer, pytest.raises(StoreError, match="000000"):
            writer.adopt(file, record)
        assert holds(path, some_rows(3))


def test_shards_that_do_not_fit_are_not_adopted(tmp_path):
    rows = [make_row(name, 2) for name in "abcd"]
    ((file, record),) = donate(tmp_path / "other", rows)
    content = file.read_bytes()
    cases = [
        (content[:-1], record, "has .* bytes, the manifest says"),
        (content, replace(record, rows=3), "is damaged"),
        (content, replace(record, tokens=7), "is damaged"),
        (content, replace(record, shard_xxh128="0" * 32), "checksum"),
        (content, replace(record, rows_sha256="0" * 64), "table of rows"),
    ]
    foreign = [
        ({"dtype": "float32"}, "is damaged|another store"),
        ({"layers": (0, 1)}, "is damaged|another store"),
        ({"processor": "another"}, "another store"),
    ]
    write(tmp_path / "store", some_rows(3))
    with StoreWriter(tmp_path / "store", HEADER) as writer:
        for changed, told, message in cases:
            file.write_bytes(changed)
            with pytest.raises(StoreError, match=message):
                writer.adopt(file, told)
        file.write_bytes(content)
        for i, (fields, message) in enumerate(foreign):
            header = reheaded(**fields)
            ((odd, line),) = donate(tmp_path / f"odd {i}", [make_row("e", 2, header)], header)
            with pytest.raises(StoreError, match=message):
                writer.adopt(odd, line)
        # A column of another type than here.
        ((odd, line),) = donate(tmp_path / "column", [replace(rows[0], columns={"n": "text"})])
        with pytest.raises(StoreError, match="column changes its type"):
            writer.adopt(odd, line)
        assert writer.adopt(file, record) == 4
    assert file_xxh128(file) == record.shard_xxh128
    assert holds(tmp_path / "store", [*some_rows(3), *rows])
