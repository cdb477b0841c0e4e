"""What is said when there is not enough memory."""

from __future__ import annotations

import errno
from collections.abc import Generator
from contextlib import contextmanager

from gapprobe.errors import StoreError


@contextmanager
def enough_memory() -> Generator[None, None, None]:
    """Turn a lack of memory into a StoreError. Also a decorator."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        # torch says it in a RuntimeError, mmap in an OSError.
        torchs = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
        if not torchs and not isinstance(error, MemoryError) and getattr(error, "errno", None) != errno.ENOMEM:
            raise
        raise StoreError(
            "what was asked for takes more memory than there is. Ask for fewer rows or layers, or iterate over "
            "TokenBatches."
        ) from error
