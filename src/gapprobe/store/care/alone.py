"""What repairing, compacting and clearing up share: being alone with a store.

All of them change a store only in steps after each of which it holds the rows that it held before, or more.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from gapprobe.errors import StoreError
from gapprobe.files import as_output_error
from gapprobe.store import disk, sealing
from gapprobe.store.format import LOCK_FILE


@contextmanager
def alone(path: Path, what: str) -> Generator[None, None, None]:
    """Hold the lock of a store; a failing disk is an OutputError.

    Raises:
        StoreError: the file system has no locks, so that a writer could come between the steps.
    """
    safe = "No sealed row was touched."
    sealing.refuse_links(path)
    with as_output_error(f"{path}: {what}", lambda: safe), disk.exclusive(path / LOCK_FILE) as locked:
        if not locked:
            raise StoreError(
                f"{path}: {what}: its file system has no locks, so a writer could come in between. Copy the store to "
                "another disk, and do it there."
            )
        yield
