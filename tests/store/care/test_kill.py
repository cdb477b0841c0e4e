"""Repairing, compacting, merging and clearing up, really killed at each call that changes the disk.

After a kill the store opens with the rows that it had before or has after; what runs again ends as if nothing had been.
"""

import multiprocessing
import os
import shutil
import signal

import pytest
import torch

from gapprobe.store.care.clearing import collect_garbage
from gapprobe.store.care.compacting import compact_store
from gapprobe.store.care.merging import merge_stores
from gapprobe.store.care.repairing import repair_store
from gapprobe.store.care.verify import verify_store
from gapprobe.store.reader import open_store
from tests.store.damage import flip
from tests.store.rows import CALLS, die_at_call, equal, holds, some_rows, write


def act(action, path):
    """Run one of the actions on what lies in a folder."""
    torch.set_num_threads(1)
    store = path / "store"
    if action == "repair":
        repair_store(store, progress=False)
    elif action == "compact":
        compact_store(store, progress=False)
    elif action == "merge":
        merge_stores([path / "a", path / "b"], store, progress=False)
    elif action == "gc":
        collect_garbage(store, damaged=True)


def die_in(action, path, number, links):
    """Entry of a child process: run an action, and be killed at the given call that changes the disk."""
    die_at_call(number, links, (*CALLS, "replace", "rmdir"))
    act(action, path)


def prepare(action, path):
    """Make what the action is for; return the rows that are sound before, and those that must be there after."""
    rows, store = some_rows(12), path / "store"
    if action == "merge":
        write(path / "a", rows[2:5])
        write(path / "b", rows[4:8], batch=4)
        write(store, rows[:2])
        return rows[:2], rows[:8]
    write(store, rows)
    if action == "compact":
        return rows, rows
    if action == "gc":
        # Something of everything: files of a compaction, temporaries of the dead, and what a repair moved.
        compact_store(store)
        (store / "shards/.tmp-1-dead").write_bytes(b"half")
        (store / "shards/000007.safetensors").write_bytes(b"not ours")
        (store / "damaged").mkdir()
        os.rename(store / "shards/000007.safetensors", store / "damaged/000007.safetensors")
        return rows, rows
    # Damage of each kind that a repair mends: a shard's own parts, a table of rows, a line, a missing shard.
    flip(store / "shards/000000.safetensors", 20)
    flip(store / "rows/000001.parquet", 100)
    flip(store / "manifest.jsonl", (store / "manifest.jsonl").read_bytes().rindex(b"}") - 30)
    (store / "shards/000002.safetensors").unlink()
    return [*rows[3:6]], [*rows[:6], *rows[9:]]


@pytest.fixture(scope="module")
def processes():
    """Children fork from a clean server that has imported torch already, so that each takes milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.store.care.test_kill"])
    return context


@pytest.mark.filterwarnings("ignore:.*manifest is damaged")
@pytest.mark.parametrize(
    ("action", "links", "step", "least"),
    [
        ("repair", True, 1, 20),
        ("compact", True, 1, 8),
        ("compact", False, 1, 8),
        ("merge", True, 1, 20),
        ("merge", False, 1, 20),
        ("gc", True, 1, 8),
    ],
)
def test_killed_at_every_call_that_changes_the_disk(tmp_path, processes, action, links, step, least):
    made = tmp_path / "made"
    sound, wanted = prepare(action, made)

    def kill(number):
        path = tmp_path / str(number)
        shutil.copytree(made, path)
        child = processes.Process(target=die_in, args=(action, path, number, links))
        child.start()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        # Whoever reads now sees no wrong row, and none less than before.
        store = path / "store"
        seen = open_store(store)
        assert set(seen.ids) >= {row.id for row in sound}
        assert all(equal(seen.row(row.id), row) for row in sound)
        assert set(seen.ids) <= {row.id for row in some_rows(12)}
        if action in ("compact", "gc"):
            assert [p for p in verify_store(store, progress=False) if "not sealed" not in p.what] == []
        # A writer that comes by clears up, and loses nothing.
        if (number // step) % 2 and action != "repair":
            write(store, [])
        act(action, path)
        assert holds(store, wanted)
        assert not list(store.rglob(".tmp-*"))
        shutil.rmtree(path)
        return child.exitcode == 0

    number, finished = 0, False
    while not finished:
        number += step
        finished = kill(number)
    assert number > least
