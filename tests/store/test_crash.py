"""Real processes, really killed. What is sealed stays; what resumes ends as if nothing had happened.

`make soak` does the last test for longer, with larger rows.
"""

import multiprocessing
import random
import time

import pytest

from gapprobe.store.care.compacting import compact_store
from gapprobe.store.care.verify import verify_store
from gapprobe.store.reader import open_store
from gapprobe.store.writer import StoreWriter
from tests.soak.crash import SCENARIOS, Soak
from tests.store.rows import HEADER, equal, holds, some_rows, write, write_and_die, write_in_child, write_slice_in_child


@pytest.fixture(scope="module")
def processes():
    """Children fork from a clean server that has imported torch already, so that each takes milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.store.rows"])
    return context


def all_sealed_rows_are_right(path, rows):
    """A reader sees no bad shard; verify finds nothing but what the next writer will adopt."""
    wanted = {row.id: row for row in rows}
    store = open_store(path)
    return all(equal(store.row(name), wanted[name]) for name in store.ids) and all(
        "published but not sealed" in problem.what for problem in verify_store(path)
    )


def test_killed_at_random_moments_then_resumed_equals_uninterrupted(tmp_path, processes):
    rows, pick = some_rows(60), random.Random(0)
    progress = []
    for kill in range(8):
        started = tmp_path / f"started {kill}"
        child = processes.Process(target=write_in_child, args=(tmp_path / "s", len(rows), str(started)))
        child.start()
        while not started.exists():
            time.sleep(0.001)
        time.sleep(pick.uniform(0, 0.15))
        child.kill()
        child.join()
        if (tmp_path / "s" / "store.json").exists():
            assert all_sealed_rows_are_right(tmp_path / "s", rows)
            progress.append(len(open_store(tmp_path / "s").ids))
    assert progress == sorted(progress)
    write(tmp_path / "s", rows, batch=7)
    assert holds(tmp_path / "s", rows)
    assert not list((tmp_path / "s").rglob(".tmp-*"))


@pytest.mark.parametrize(("links", "step"), [(True, 3), (False, 7)])
def test_killed_at_calls_that_change_the_disk(tmp_path, processes, links, step):
    rows, number = some_rows(4), 0
    while True:
        number += step
        path = tmp_path / str(number)
        child = processes.Process(target=write_and_die, args=(path, number, links))
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -9
        if (path / "store.json").exists():
            before = open_store(path).ids
            assert all_sealed_rows_are_right(path, rows)
            with StoreWriter(path, HEADER) as writer:
                assert writer.ids >= set(before)
        write(path, rows, batch=1)
        assert holds(path, rows)
        assert not list(path.rglob(".tmp-*"))
        assert {f.stem for f in (path / "shards").iterdir()} == {f.stem for f in (path / "rows").iterdir()}
    assert number > 30
    assert holds(path, rows)


def test_processes_that_append_at_once_store_every_row_once(tmp_path, processes):
    rows = some_rows(40)
    parts = [(0, 25), (15, 40), (5, 30)]
    children = [processes.Process(target=write_slice_in_child, args=(tmp_path / "s", *part)) for part in parts]
    for child in children:
        child.start()
    seen = 0
    while any(child.is_alive() for child in children):
        # Readers open while writers write.
        if (tmp_path / "s" / "store.json").exists():
            ids = open_store(tmp_path / "s").ids
            assert len(set(ids)) == len(ids) >= seen
            seen = len(ids)
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert holds(tmp_path / "s", rows)


@pytest.mark.parametrize("torn", [b'{"line_sha', b"{", b"\0\0\0", b"x" * 5000])
def test_a_line_that_a_dead_writer_tore_is_no_damage_when_a_live_one_goes_on(tmp_path, torn):
    rows = some_rows(9)
    with StoreWriter(tmp_path, HEADER) as alive:
        alive.append(rows[:3])
        alive.flush()
        for last in (6, 9):
            with (tmp_path / "manifest.jsonl").open("ab") as manifest:
                manifest.write(torn)
            alive.append(rows[:last])
            alive.flush()
            assert verify_store(tmp_path) == []
    assert holds(tmp_path, rows)


def test_readers_that_were_there_before_a_compaction_see_the_same_rows_after_it(tmp_path):
    rows = some_rows(12)
    write(tmp_path, rows)
    early = open_store(tmp_path)
    assert equal(early.row("row 2"), rows[2])
    compact_store(tmp_path, progress=False)
    assert all(equal(early.row(row.id), row) for row in rows)
    assert early.refresh() == 0
    assert len(early.records) == 1
    assert all(equal(early.row(row.id), row) for row in rows)


@pytest.fixture(scope="module")
def soak(tmp_path_factory):
    return Soak(tmp_path_factory.mktemp("soak"), seed=7, count=40, shrink=20)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_short_soak(soak, scenario):
    tally = soak.run(scenario, kills=2)
    if tally.skipped:
        pytest.skip(tally.skipped)
    assert tally.kills >= 2
    assert tally.bad == []
    assert tally.problems == []
