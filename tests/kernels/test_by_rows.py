"""Parts of a sweep by several threads, which wait for work between sweeps."""

import multiprocessing
import threading
import time

import pytest
import torch

from gapprobe.kernels.compiled import by_rows


@pytest.fixture(autouse=True)
def four_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)


def parts(rows=10, width=100, worth=1):
    """Return the parts, and which threads took them."""
    found = []

    def run(first, last):
        found.append((first, last, threading.current_thread().name))

    by_rows(run, rows, width, worth)
    return sorted(found)


def test_every_row_is_taken_once_by_threads_that_stay():
    assert [part[:2] for part in parts()] == [(0, 2), (2, 5), (5, 7), (7, 10)]
    assert parts()[0][2] == threading.current_thread().name
    before = threading.active_count()
    names = {part[2] for _ in range(20) for part in parts()[1:]}
    assert len(names) <= 3
    assert threading.active_count() == before


@pytest.mark.parametrize(("rows", "worth", "count"), [(3, 1, 3), (10, 400, 2), (10, 600, 1), (0, 1, 1)])
def test_no_more_threads_than_pay(rows, worth, count):
    assert len(parts(rows=rows, worth=worth)) == count


@pytest.mark.parametrize("bad", [0, 2, 7])  # the caller's own part, and others'
def test_what_goes_wrong_in_a_part_is_raised_when_all_have_ended(bad):
    ended = []

    def run(first, last):
        if first == bad:
            raise ZeroDivisionError
        time.sleep(0.05)
        ended.append((first, last))

    with pytest.raises(ZeroDivisionError):
        by_rows(run, 10, 100, 1)
    assert sorted(ended) == [part for part in ((0, 2), (2, 5), (5, 7), (7, 10)) if part[0] != bad]
    assert len(parts()) == 4


def child(queue):
    queue.put([part[:2] for part in parts()])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")
def test_a_child_has_threads_of_its_own():
    together = threading.Barrier(4)
    by_rows(lambda *_: together.wait(), 4, 1, 1)  # each part has a thread, all of which wait now
    time.sleep(0.1)
    expected = [part[:2] for part in parts()]
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    process = fork.Process(target=child, args=(queue,))
    process.start()
    assert queue.get(timeout=30) == expected
    process.join(60)
    assert process.exitcode == 0
