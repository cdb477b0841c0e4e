"""One item ahead, in order, on another thread."""

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from gapprobe.ahead import ahead


def test_the_next_one_is_made_while_the_caller_has_this_one() -> None:
    begun = [threading.Event() for _ in range(4)]
    threads = set[int]()

    def work(number: int) -> int:
        begun[number].set()
        threads.add(threading.get_ident())
        return number**2

    found: list[int] = []
    for number, result in enumerate(ahead(work, range(4))):
        found.append(result)
        if number < 3:
            assert begun[number + 1].wait(10)
        # And no more than one: what is made ahead takes memory.
        assert not any(event.is_set() for event in begun[number + 2 :])
    assert found == [0, 1, 4, 9]
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_nothing_and_one() -> None:
    assert list(ahead(str, ())) == []
    assert list(ahead(str, [1])) == ["1"]


def test_an_error_comes_in_the_place_of_its_result() -> None:
    results = ahead(lambda number: 6 // number, [3, 2, 0, 1])
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_who_leaves_early_waits_for_the_thread_and_asks_for_no_more() -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for number in range(9):
            asked.append(number)
            yield number

    with closing(ahead(str, items())) as results:
        next(results)
    assert asked == [0, 1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gapprobe-ahead")]
