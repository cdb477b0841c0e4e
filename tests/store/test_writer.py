import dataclasses
import datetime
import errno
import fcntl
import inspect
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gapprobe.errors import OutputError, StoreError
from gapprobe.store import arena, disk, sealing, table
from gapprobe.store import writer as writer_module
from gapprobe.store.care.repairing import repair_store
from gapprobe.store.care.verify import verify_store
from gapprobe.store.reader import open_store
from gapprobe.store.table import build_table, kind_of, read_table, row_schema
from gapprobe.store.writer import StoreWriter
from tests.store.rows import HEADER, equal, holds, make_row, reheaded, some_rows, write

O_DIRECT = getattr(os, "O_DIRECT", 0)


def changed(row, **fields):
    """A row that breaks the rules, past the checks of its class."""
    copy = dataclasses.replace(row)
    for name, value in fields.items():
        object.__setattr__(copy, name, value)
    return copy


def test_a_batch_lands_in_one_shard_and_shards_end_before_they_grow_too_large(tmp_path):
    rows = [make_row(str(i), 2) for i in range(10)]
    write(tmp_path, rows, batch=3, shard_bytes=500)  # 116 bytes a row: four fit
    assert open_store(tmp_path).info().shards == 3
    assert holds(tmp_path, rows)


def test_rows_stored_or_in_hand_are_not_stored_twice(tmp_path):
    rows = some_rows(6)
    with StoreWriter(tmp_path, HEADER) as writer:
        assert writer.append([rows[0], rows[1], rows[0]]) == 2
        assert writer.append(rows[:3]) == 1
        writer.flush()
        assert writer.ids == {row.id for row in rows[:3]}
        assert writer.append(rows[:4]) == 1
    with StoreWriter(tmp_path, HEADER) as writer:
        assert writer.append(rows) == 2
    assert holds(tmp_path, rows)


def test_empty_batches_and_a_store_without_rows(tmp_path):
    with StoreWriter(tmp_path, HEADER) as writer:
        assert writer.append([]) == 0
        writer.flush()
    assert holds(tmp_path, [])
    assert open_store(tmp_path).rows.empty


def test_tensors_are_copied_when_they_are_taken(tmp_path):
    row, kept = make_row("a", 3), make_row("a", 3)
    with StoreWriter(tmp_path, HEADER) as writer:
        writer.append([row])
        row.residual.zero_()
        row.token_ids.zero_()
    assert equal(open_store(tmp_path).row("a"), kept)


def test_closing_can_be_tried_again(tmp_path, monkeypatch):
    writer = StoreWriter(tmp_path, HEADER)
    writer.append(some_rows(3))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_pwrite)
        with pytest.raises(OutputError):
            writer.close()
    assert writer.append(some_rows(4)) == 1
    writer.close()
    assert holds(tmp_path, some_rows(4))


def test_a_closed_writer_takes_nothing_more(tmp_path):
    with StoreWriter(tmp_path, HEADER) as writer:
        writer.append(some_rows(2))
    with pytest.raises(StoreError, match="closed; open another"):
        writer.append(some_rows(3))
    with pytest.raises(StoreError, match="closed; open another"):
        writer.place(3)
    writer.close()
    assert holds(tmp_path, some_rows(2))


def test_a_store_too_large_for_any_memory_is_refused(tmp_path):
    header = reheaded(layers=tuple(range(10_000)), width=(1 << 24) - 1, dtype="float32")
    with pytest.raises(OutputError, match="cannot be opened for writing"):
        StoreWriter(tmp_path / "s", header, shard_bytes=1 << 60)
    assert not (tmp_path / "s").exists()


def test_tensors_that_are_not_contiguous(tmp_path):
    row = make_row("a", 3)
    turned = dataclasses.replace(row, residual=row.residual.transpose(0, 2).contiguous().transpose(0, 2))
    write(tmp_path, [turned])
    assert equal(open_store(tmp_path).row("a"), row)


def test_an_axis_of_length_one_may_have_any_stride(tmp_path):
    header = reheaded(width=1)
    layers = len(header.layers)
    row = make_row("a", 1, header)
    row = dataclasses.replace(row, residual=row.residual.as_strided((layers, 1, 1), (1, 1, 0)))
    write(tmp_path, [row, make_row("b", 0, header)], header)
    assert holds(tmp_path, [row, make_row("b", 0, header)])


def test_a_place_of_less_than_nothing_is_refused_and_one_of_nothing_is_none(tmp_path):
    with StoreWriter(tmp_path, HEADER) as writer:
        writer.append(some_rows(2))
        with pytest.raises(StoreError, match="tokens is -1; give 0 or more"):
            writer.place(-1)
        assert writer.place(0).shape == (3, 0, 6)
    assert holds(tmp_path, some_rows(2))


def laid(writer, rows):
    """The same rows, with their residuals laid where the writer wants them."""
    place, first, found = writer.place(sum(len(row.token_ids) for row in rows)), 0, []
    for row in rows:
        here = place[:, first : first + len(row.token_ids)]
        here.copy_(row.residual)
        found.append(dataclasses.replace(row, residual=here))
        first += len(row.token_ids)
    return found


@pytest.mark.parametrize("shard_bytes", [1 << 20, 1000, 1])
def test_residuals_laid_in_their_place_are_not_copied(tmp_path, monkeypatch, shard_bytes):
    rows, copied = some_rows(24), []
    real = arena._as_bytes
    monkeypatch.setattr(arena, "_as_bytes", lambda residual: copied.append(residual) or real(residual))
    with StoreWriter(tmp_path, HEADER, shard_bytes=shard_bytes) as writer:
        writer.append(rows[:1])
        copied.clear()
        for start in range(1, 24, 5):
            writer.append(laid(writer, rows[start : start + 5]))
        assert not copied
        # The counter counts.
        writer.append([make_row("another", 2)])
        assert len(copied) == 1
    assert holds(tmp_path, [*rows, make_row("another", 2)])


@pytest.mark.parametrize(("where", "error"), [("_as_bytes", MemoryError), ("_Line", KeyboardInterrupt)])
def test_a_batch_that_is_stopped_on_its_way_leaves_nothing_behind(tmp_path, monkeypatch, where, error):
    rows, real, calls = some_rows(6), getattr(arena, where), []

    def failing(*given):
        calls.append(given)
        if len(calls) == 2:
            raise error
        return real(*given)

    with StoreWriter(tmp_path, HEADER) as writer:
        writer.append(rows[:2])
        calls.clear()
        monkeypatch.setattr(arena, where, failing)
        with pytest.raises(error):
            writer.append([make_row("never", 3), make_row("copied", 2)])
        assert writer.append(rows) == 4
    assert holds(tmp_path, rows)


def test_every_other_residual_of_the_place_is_not_in_its_place(tmp_path):
    row = make_row("a", 3)
    with StoreWriter(tmp_path, HEADER) as writer:
        place = writer.place(6)
        place[:, ::2].copy_(row.residual)
        writer.append([dataclasses.replace(row, residual=place[:, ::2])])
    assert holds(tmp_path, [row])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.data())
def test_residuals_laid_anywhere_are_stored_as_they_are(lengths, data):
    rows = [make_row(f"row {i}", length) for i, length in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as folder:
        with StoreWriter(folder, HEADER, shard_bytes=data.draw(st.sampled_from([1, 500, 1 << 20]))) as writer:
            # Some are stored already and left out, some are not laid, and they come in any order.
            before = [row for row in rows if data.draw(st.booleans())]
            writer.append(before)
            mixed = [
                lay if data.draw(st.booleans()) else row for lay, row in zip(laid(writer, rows), rows, strict=True)
            ]
            writer.append(data.draw(st.permutations(mixed)))
        assert holds(Path(folder), rows)


def test_rows_in_hand_are_sealed_when_the_caller_fails(tmp_path):
    rows = some_rows(3)

    def fail():
        with StoreWriter(tmp_path, HEADER) as writer:
            writer.append(rows)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert holds(tmp_path, rows)


@pytest.mark.parametrize("name", ["", "a\nb", "\x00", "\x85", "\ud800"])
def test_ids_that_no_table_can_hold_are_refused(tmp_path, name):
    with StoreWriter(tmp_path, HEADER) as writer, pytest.raises(StoreError, match="id is text"):
        writer.append([changed(make_row("a", 1), id=name)])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("residual", torch.zeros(3, 2, 6)),
        ("residual", torch.zeros(3, 1, 6, dtype=torch.bfloat16)),
        ("residual", torch.zeros(2, 2, 6, dtype=torch.bfloat16)),
        ("residual", torch.zeros(3, 2, 7, dtype=torch.bfloat16)),
        ("token_positions", torch.zeros(3, dtype=torch.int64)),
        ("token_ids", torch.zeros(2)),
        ("token_roles", torch.zeros(2, dtype=torch.int64)),
        ("token_marks", torch.tensor([1, 4], dtype=torch.uint8)),
    ],
)
def test_tensors_that_do_not_fit_the_header_are_refused_by_name(tmp_path, field, value):
    with StoreWriter(tmp_path, HEADER) as writer, pytest.raises(StoreError, match=rf"row 'a'.*{field}"):
        writer.append([changed(make_row("a", 2), **{field: value})])


def test_columns_keep_their_type(tmp_path):
    rows = [dataclasses.replace(make_row(str(i), 1), columns={"x": x}) for i, x in enumerate([None, 1, 2.5, "one"])]
    with StoreWriter(tmp_path, HEADER) as writer:
        writer.append(rows[:1])
        writer.flush()
        writer.append(rows[1:2])
        writer.flush()
        writer.append(rows[2:3])
        with pytest.raises(StoreError, match="column changes its type.*x"):
            writer.append(rows[3:])
    with StoreWriter(tmp_path, HEADER) as writer, pytest.raises(StoreError, match="column changes its type"):
        writer.append(rows[3:])
    assert open_store(tmp_path).rows["x"].tolist()[1:] == [1.0, 2.5]


def test_a_column_of_two_types_in_one_batch_is_refused_by_name(tmp_path):
    rows = [dataclasses.replace(make_row(str(x), 1), columns={"x": x}) for x in (1, "one")]
    with StoreWriter(tmp_path, HEADER) as writer, pytest.raises(StoreError, match="x.*one type in all rows"):
        writer.append(rows)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**65), 2**65), st.floats(), st.text(max_size=3), st.just("\ud800")
)


@settings(max_examples=500, deadline=None)
@given(st.one_of(VALUES, st.lists(VALUES, max_size=3), st.lists(st.lists(VALUES, max_size=2), max_size=2)), st.data())
def test_what_is_known_of_a_kind_holds_for_all_its_values(value, data):
    kind = kind_of(value)
    if kind is None:
        return
    found = pa.scalar(value).type  # raises for what no table can hold
    like = data.draw(st.one_of(VALUES, st.lists(VALUES, max_size=3)).filter(lambda other: kind_of(other) == kind))
    assert pa.scalar(like).type == found


def test_columns_of_a_kind_seen_before_are_not_looked_at_again(tmp_path, monkeypatch):
    asked, real = [], writer_module.row_schema
    monkeypatch.setattr(writer_module, "row_schema", lambda columns: asked.append(dict(columns)) or real(columns))
    rows = [dataclasses.replace(make_row(str(i), 1), columns={"s": "a", "n": i, "l": [0.5] * i}) for i in range(9)]
    with StoreWriter(tmp_path, HEADER) as writer:
        writer.append(rows[:3])
        asked.clear()
        writer.append(rows[3:])
        assert not any(asked)
        # Others of the same columns are: a kind that is new, and what arrow alone can tell.
        for changed_to in ({"s": None}, {"s": "é"}, {"n": 2**63 - 1, "s": "\ud800"}):
            with suppress(StoreError):
                writer.append([dataclasses.replace(make_row(f"{changed_to}", 1), columns=changed_to)])
            assert "s" in asked[-1]


@pytest.mark.parametrize("columns", [{"id": "b"}, {"x": 2**70}, {"x": "\ud800"}])
def test_columns_that_no_table_can_hold_are_refused_by_name(tmp_path, columns):
    with StoreWriter(tmp_path, HEADER) as writer, pytest.raises(StoreError, match=next(iter(columns))):
        writer.append([changed(make_row("a", 1), columns=columns)])


MODEL = dict(HEADER.model)


@pytest.mark.parametrize(
    ("field", "here", "there", "changes"),
    [
        ("model.weights", "'abc'", "'xyz'", {"model": MODEL | {"weights": "xyz"}}),
        ("model.architecture", "'A'", "'B'", {"model": MODEL | {"architecture": "B"}}),
        ("model.quantised", "None", "'int8'", {"model": MODEL | {"quantised": "int8"}}),
        ("processor", "'def'", "'ghi'", {"processor": "ghi"}),
        ("attention", "'eager'", "'sdpa'", {"attention": "sdpa"}),
        ("padding_side", "'left'", "'right'", {"padding_side": "right"}),
        ("dtype", "'bfloat16'", "'float32'", {"dtype": "float32"}),
        ("layers", r"\[0, 1, 3\]", r"\[0, 1\]", {"layers": (0, 1)}),
        ("width", "6", "8", {"width": 8}),
        ("positions", r"\['last_input', 'last_output'\]", r"\['last_input'\]", {"positions": ("last_input",)}),
        ("generation.stop", "'###'", "None", {"generation": {"max_new_tokens": 10, "temperature": 0.5}}),
    ],
)
def test_another_run_is_refused_naming_the_field_and_both_values(tmp_path, field, here, there, changes):
    write(tmp_path, some_rows(2))
    with pytest.raises(StoreError, match=f"{field} is {here} in the store and {there} in this run"):
        StoreWriter(tmp_path, reheaded(**changes))
    assert holds(tmp_path, some_rows(2))


def test_other_versions_and_another_source_are_recorded_not_refused(tmp_path):
    write(tmp_path, some_rows(3))
    write(tmp_path, some_rows(6), reheaded(versions={"torch": "3.0"}, model=MODEL | {"source": "hub/name"}))
    assert holds(tmp_path, some_rows(6))
    first, second = (tmp_path / "manifest.jsonl").read_text().splitlines()
    assert "versions" not in first
    assert '"versions":{"torch":"3.0"}' in second


def test_a_newer_store_is_not_written_to(tmp_path):
    write(tmp_path, some_rows(2))
    file = tmp_path / "store.json"
    file.write_text(file.read_text().replace('"version": 2', '"version": 3'))
    with pytest.raises(StoreError, match="version 3"):
        StoreWriter(tmp_path, HEADER)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        StoreWriter(tmp_path, HEADER)
    with pytest.raises(OutputError, match="is a file"):
        StoreWriter(tmp_path / "thesis.tex", HEADER)
    with pytest.raises(OutputError, match="Not a directory"):
        StoreWriter(tmp_path / "thesis.tex" / "store", HEADER)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from gapprobe.errors import OutputError
from tests.store.rows import make_row, write
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
write(Path(sys.argv[1]), [make_row(str(i), 4) for i in range(3)])
try:
    write(Path(sys.argv[1]), [make_row(str(i), 400) for i in range(3, 6)])
except OutputError as error:
    print(error)
"""


def test_no_room_for_a_shard_is_an_output_error_and_costs_no_sealed_row(tmp_path):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "s")], cwd=root, capture_output=True, text=True, check=True
    )
    for part in (
        "3 rows could not be stored",
        "allowed file size",
        "All rows sealed before (3) are safe",
        "run the same again",
    ):
        assert part in done.stdout
    assert holds(tmp_path / "s", [make_row(str(i), 4) for i in range(3)])
    assert not list((tmp_path / "s").rglob(".tmp-*"))
    write(tmp_path / "s", [make_row(str(i), 400) for i in range(3, 6)])
    assert holds(tmp_path / "s", [make_row(str(i), 4 if i < 3 else 400) for i in range(6)])


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/proc/mounts").exists(), reason="no small disk: only root can mount one"
)
def test_a_disk_that_is_really_full(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("no small disk to fill: this container may not mount one")
    try:
        rows = [make_row(str(i), 200) for i in range(100)]
        with pytest.raises(OutputError, match="the disk is full"):
            write(tmp_path / "s", rows, batch=1)
        kept = len(open_store(tmp_path / "s").ids)
        assert 3 < kept < 100
        assert holds(tmp_path / "s", rows[:kept])
        assert not list((tmp_path / "s").rglob(".tmp-*"))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["pwrite", "write", "fsync", "posix_fallocate", "link"])
def test_a_failing_disk_is_an_output_error_and_the_rows_in_hand_can_be_flushed_again(tmp_path, monkeypatch, call, code):
    rows = some_rows(6)
    write(tmp_path, rows[:3])
    writer = StoreWriter(tmp_path, HEADER)
    writer.append(rows)
    real = getattr(os, call)
    # Fail each call of this kind in turn, until there is none left that could.
    for turn in range(20):
        calls = iter(range(100))

        def failing(*args, calls=calls, turn=turn):
            if next(calls) == turn:
                if call == "write":
                    real(args[0], args[1][:10])
                raise OSError(code, "injected")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                writer.flush()
                break
            except OutputError as error:
                assert "sealed before" in str(error)  # noqa: PT017 (the last turn does not fail)
        assert [p for p in verify_store(tmp_path) if "not sealed" not in p.what] == []
        assert not list(tmp_path.rglob(".tmp-*"))
    else:
        pytest.fail("it never succeeded")
    assert turn > 0
    StoreWriter(tmp_path, HEADER).close()
    assert holds(tmp_path, rows)


def test_large_shards_are_written_past_the_page_cache_and_hold_the_same(tmp_path, monkeypatch):
    """Also where the file system refuses at once, or at the first write."""
    rows, direct, written = [make_row(str(i), 20_000) for i in range(20)], [], {}

    def watched(descriptor, data, at, real=os.pwrite):
        direct.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & O_DIRECT))
        return real(descriptor, data, at)

    ways = {
        "directly": (os, "pwrite", watched),
        "never asked": (disk, "_DIRECT", 0),
        "refused": (fcntl, "fcntl", unable_to_set),
        "refused later": (os, "pwrite", unable_to_write),
    }
    for name, (module, attribute, replacement) in ways.items():
        with monkeypatch.context() as patch:
            patch.setattr(module, attribute, replacement)
            write(tmp_path / name, rows, batch=len(rows))
        written[name] = (tmp_path / name / "shards" / "000000.safetensors").read_bytes()
        assert verify_store(tmp_path / name) == []
    assert len(written["directly"]) > 2 * disk.PIECE
    assert (sum(direct) >= 2) == can_write_directly(tmp_path)
    assert len(set(written.values())) == 1
    assert holds(tmp_path / "directly", rows)


def can_write_directly(folder):
    try:
        os.close(os.open(folder / "probe", os.O_CREAT | os.O_WRONLY | O_DIRECT))
    except OSError:
        return False
    return bool(O_DIRECT)


def unable_to_set(descriptor, command, *value, real=fcntl.fcntl):
    if command == fcntl.F_SETFL:
        raise OSError(errno.EINVAL, "injected")
    return real(descriptor, command, *value)


def unable_to_write(descriptor, data, at, real=os.pwrite):
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & O_DIRECT:
        raise OSError(errno.EINVAL, "injected")
    return real(descriptor, data, at)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: real(descriptor, data[:7], at))
    write(tmp_path, some_rows(5))
    assert holds(tmp_path, some_rows(5))


def test_a_torn_last_line_is_ignored_and_written_over(tmp_path):
    rows = some_rows(9)
    write(tmp_path, rows[:6])
    manifest = tmp_path / "manifest.jsonl"
    content = manifest.read_bytes()
    for length in range(content.index(b"\n") + 1, len(content), 23):
        manifest.write_bytes(content[:length])
        assert open_store(tmp_path).ids == tuple(row.id for row in rows[:3])
    write(tmp_path, rows)
    assert holds(tmp_path, rows)
    assert len(manifest.read_bytes().splitlines()) == 3


@pytest.mark.parametrize("lose", [Path.unlink, lambda shard: shard.write_bytes(shard.read_bytes()[:5000])])
def test_the_last_copy_of_rows_is_not_cleared_away(tmp_path, lose):
    write(tmp_path, some_rows(6))
    shards, tables = tmp_path / "shards", tmp_path / "rows"
    for folder, suffix in ((shards, "safetensors"), (tables, "parquet")):
        (folder / f"000007.{suffix}").write_bytes((folder / f"000000.{suffix}").read_bytes())
    # The manifest still names it, and its table of rows is there.
    lose(shards / "000000.safetensors")
    StoreWriter(tmp_path, HEADER).close()
    assert (shards / "000007.safetensors").exists()
    repair_store(tmp_path, progress=False)
    assert holds(tmp_path, some_rows(6))


def test_sealing_reads_the_manifest_only_when_somebody_else_has_changed_it(tmp_path, monkeypatch):
    reads, real = [], writer_module.read_manifest
    monkeypatch.setattr(writer_module, "read_manifest", lambda path: reads.append(path) or real(path))
    with StoreWriter(tmp_path, HEADER) as writer:
        opened = len(reads)
        for row in some_rows(5):
            writer.append([row])
            writer.flush()
        assert len(reads) == opened
        write(tmp_path, some_rows(7)[5:])
        before = len(reads)
        writer.append([some_rows(8)[7]])
        writer.flush()
        assert len(reads) == before + 1
        assert writer.ids == {row.id for row in some_rows(8)}
    assert holds(tmp_path, some_rows(8))


def test_a_lost_manifest_comes_back_from_the_files(tmp_path):
    rows = some_rows(9)
    write(tmp_path, rows)
    before = (tmp_path / "manifest.jsonl").read_bytes()
    (tmp_path / "manifest.jsonl").unlink()
    StoreWriter(tmp_path, HEADER).close()
    assert (tmp_path / "manifest.jsonl").read_bytes() == before


def test_leftovers_are_cleared_and_what_is_no_leftover_is_not(tmp_path):
    rows = some_rows(9)
    write(tmp_path, rows)
    shards, tables = tmp_path / "shards", tmp_path / "rows"
    (shards / ".tmp-1-dead").write_bytes(b"half")
    (shards / "000007.safetensors").write_bytes((shards / "000000.safetensors").read_bytes())
    (shards / "000008.safetensors").write_bytes(b"")
    (tables / "000008.parquet").write_bytes(b"")
    for folder, suffix in (("shards", "safetensors"), ("rows", "parquet")):  # sealed elsewhere
        (tmp_path / folder / f"000009.{suffix}").write_bytes((tmp_path / folder / f"000001.{suffix}").read_bytes())
    (shards / "000010.safetensors").write_bytes(b"not ours")
    (tables / "000010.parquet").write_bytes(b"not ours")
    with disk.temporary(shards) as (alive, _):
        StoreWriter(tmp_path, HEADER).close()
        left = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}
        sealed = {f"shards/00000{i}.safetensors" for i in range(3)} | {f"rows/00000{i}.parquet" for i in range(3)}
        assert left == sealed | {
            "store.json", "manifest.jsonl", "lock", f"shards/{alive.name}",
            "shards/000010.safetensors", "rows/000010.parquet",
        }  # fmt: skip
    assert [problem.file for problem in verify_store(tmp_path)] == ["shards/000010.safetensors"]
    write(tmp_path, some_rows(12))
    assert (shards / "000003.safetensors").exists()


@pytest.mark.parametrize("missing", ["link", "flock", "both"])
def test_file_systems_without_hard_links_or_locks(tmp_path, monkeypatch, missing):
    def unable(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    if missing != "flock":
        monkeypatch.setattr(os, "link", unable)
    if missing != "link":
        monkeypatch.setattr("fcntl.flock", unable)
    rows = some_rows(12)
    a, b = StoreWriter(tmp_path, HEADER), StoreWriter(tmp_path, HEADER)
    for i in range(0, 12, 4):
        a.append(rows[i : i + 3])
        b.append(rows[i + 1 : i + 4])
        a.flush()
        b.flush()
    assert holds(tmp_path, rows)


def test_two_writers_in_turn_store_each_row_once(tmp_path):
    rows = some_rows(8)
    a, b = StoreWriter(tmp_path, HEADER), StoreWriter(tmp_path, HEADER)
    a.append(rows[:6])
    b.append(rows[2:])
    a.flush()
    b.flush()
    assert a.ids == {row.id for row in rows[:6]}
    assert b.ids == {row.id for row in rows}
    assert holds(tmp_path, rows)


def test_the_next_shard_fills_while_the_disk_writes(tmp_path, monkeypatch):
    rows = some_rows(9)
    release, waiting = threading.Event(), threading.Event()
    real = os.fsync

    def slow(descriptor):
        waiting.set()
        assert release.wait(30)
        real(descriptor)

    with StoreWriter(tmp_path, HEADER, shard_bytes=1) as writer:
        monkeypatch.setattr(os, "fsync", slow)
        writer.append(rows[:3])
        assert waiting.wait(30)
        # The first shard hangs in the disk, the second one is taken all the same; both are in hand, neither is sealed.
        assert writer.append(rows[3:6]) == 3
        assert writer.append(rows[:6]) == 0
        assert writer.ids == frozenset()
        blocked = threading.Thread(target=writer.append, args=(rows[6:],))
        blocked.start()
        blocked.join(0.2)
        assert blocked.is_alive()  # There is memory for two shards, not for three.
        release.set()
        blocked.join(30)
    assert holds(tmp_path, rows)


def test_a_disk_that_fails_in_the_background_is_told_at_the_next_call_and_loses_nothing(tmp_path, monkeypatch):
    rows = some_rows(6)
    writer = StoreWriter(tmp_path, HEADER, shard_bytes=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_pwrite)
        writer.append(rows[:3])
        for _ in range(2):
            with pytest.raises(OutputError, match="3 rows could not be stored: the disk is full"):
                writer.flush()
        writer.append(rows[3:4])
        with pytest.raises(OutputError, match="the disk is full"):
            writer.append(rows[4:])
    assert writer.append(rows[4:]) == 2
    writer.close()
    assert holds(tmp_path, rows)


def failing_pwrite(*_):
    raise OSError(errno.ENOSPC, "injected")


def test_memory_stays_within_twice_the_size_of_a_shard(tmp_path):
    """As the writer states it; 512 MB pass through 2 times 32 MB, in a process that does nothing else."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        grown, sealed = pool.apply(grow_in_child, (tmp_path / "s", 32 << 20))
    assert sealed >= 15
    # The pieces on their way to the disk; buffers for moments, the table and what the allocator keeps.
    assert grown < 2 * (32 << 20) + 3 * disk.PIECE + (24 << 20)


def grow_in_child(path, shard_bytes):
    """Write rows of 1 MB; return by how much resident memory grew at most, and how many shards were sealed."""
    torch.set_num_threads(1)
    header = reheaded(width=4096, layers=tuple(range(8)))
    row = make_row("warm", 16, header)
    write(path.with_name("warm"), [row], header)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    with StoreWriter(path, header, shard_bytes) as writer:
        for i in range(512):
            writer.append([dataclasses.replace(row, id=str(i))])
    return memory("VmHWM") - before, len(list((path / "shards").iterdir()))


def memory(name):
    """A line of /proc/self/status, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("value", [b"x", {"a": 1}, [b"x"], datetime.date(2020, 1, 1)])
def test_a_column_that_could_not_be_read_back_is_refused(value):
    # Past the check of types, which only tests have.
    with pytest.raises(StoreError, match="column 'x' cannot be stored"):
        inspect.unwrap(row_schema)({"x": value})


def test_lists_with_gaps_widen_to_floats_too():
    widened = inspect.unwrap(build_table)(["a", "b"], [{"x": [2**60 + 1, None]}, {"x": [0.5]}])
    assert widened["x"].to_pylist() == [[float(2**60), None], [0.5]]


def test_rows_with_columns_of_their_own_begin_another_shard_before_their_table_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(arena, "MAX_COLUMN_BYTES", 1 << 20)
    monkeypatch.setattr(table, "MAX_TABLE_BYTES", 4 << 20)
    rows = [dataclasses.replace(make_row(str(i), 0), columns={f"c{i}": i}) for i in range(1000)]
    write(tmp_path, rows, batch=10, shard_bytes=1 << 20)
    store = open_store(tmp_path)
    assert store.ids == tuple(row.id for row in rows)
    assert len(store.records) > 1
    for shard in store.records:
        assert read_table(tmp_path, HEADER, shard).num_columns * shard.rows * 8 <= 1 << 20


def test_a_try_after_rows_were_dropped_and_the_disk_failed_is_whole(tmp_path, monkeypatch):
    rows = [make_row(f"row {i}", 40) for i in range(4)]
    with StoreWriter(tmp_path, HEADER) as writer:
        writer.append(rows)
        with StoreWriter(tmp_path, HEADER) as other:
            other.append(rows[:1])
        real, failures = sealing.publish, iter([True])

        def publish(*arguments):
            if next(failures, False):
                raise OSError(errno.EIO, "injected")
            return real(*arguments)

        monkeypatch.setattr(sealing, "publish", publish)
        with pytest.raises(OutputError):
            writer.flush()
    assert verify_store(tmp_path) == []
    store = open_store(tmp_path)
    assert all(equal(store.row(row.id), row) for row in rows)


def test_a_shard_that_is_not_as_planned_is_not_written(tmp_path, monkeypatch):
    rows = [make_row(f"row {i}", 40) for i in range(3)]
    real = writer_module.derive
    monkeypatch.setattr(
        writer_module,
        "derive",
        lambda *given: {name: part[..., :-1, :] if part.ndim > 1 else part for name, part in real(*given).items()},
    )
    with pytest.raises(ValueError, match="planned"), StoreWriter(tmp_path, HEADER) as writer:
        writer.append(rows)
    assert not open_store(tmp_path).ids


def test_a_row_without_its_position_has_zeros_in_the_dense_copy(monkeypatch):
    monkeypatch.setattr(arena, "fresh", lambda shape, dtype, **_: torch.full(shape, torch.nan, dtype=dtype))
    filled = arena.Arena(HEADER, 8)
    unmarked = dataclasses.replace(make_row("b", 2), token_marks=torch.zeros(2, dtype=torch.uint8))
    filled.add([make_row("a", 3), unmarked])
    assert filled.at_position(0)[:, 1].eq(0).all()
    assert filled.at_position(0)[:, 0].isfinite().all()
