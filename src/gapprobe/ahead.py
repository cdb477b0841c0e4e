"""Work on the next item while the caller is busy with this one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(work: Callable[[T], R], items: Iterable[T]) -> Generator[R]:
    """Yield what `work` makes of each item, which a thread makes of the next one while the caller has this one.

    An error that `work` raises comes where its result would have come. Close the generator to leave early: the thread
    is waited for.
    """
    with ThreadPoolExecutor(1, "gapprobe-ahead") as thread:
        before: Future[R] | None = None
        for item in items:
            coming = thread.submit(work, item)
            if before is not None:
                yield before.result()
            before = coming
        if before is not None:
            yield before.result()
