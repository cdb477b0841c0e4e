"""The progress bar of whatever goes through the bytes of a store."""

from __future__ import annotations

import threading

from tqdm import tqdm

# Seconds after which a bar shows.
DELAY = 1


class Bar:
    """A bar in bytes that threads may advance; it shows when it takes longer than a moment."""

    def __init__(self, what: str, total: int, shown: bool) -> None:
        self._bar = tqdm(
            total=total, unit="B", unit_scale=True, unit_divisor=1000, desc=what, delay=DELAY, disable=not shown
        )
        self._guard = threading.Lock()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, count: int) -> None:
        """Advance by so many bytes."""
        with self._guard:
            self._bar.update(count)
