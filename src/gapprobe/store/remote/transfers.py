"""What pushing and pulling share: the manifest of a store elsewhere, several transfers at once, refusals."""

from __future__ import annotations

import hashlib
import io
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from gapprobe.errors import ConfigError, StoreError
from gapprobe.files import told_bytes, told_count
from gapprobe.store.format import MANIFEST_FILE, ShardRecord, StoreHeader, rows_name
from gapprobe.store.manifest import Manifest, manifest_lines
from gapprobe.store.remote.places import Damaged, Place

# 100,000 shards have lines of 40 MB.
MAX_MANIFEST_BYTES = 256 << 20
# No honest table comes near this.
MAX_TABLE_BYTES = 256 << 20

VERIFY = "Run `gapprobe store verify` where it was written."

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Transfer:
    """What a push or a pull did.

    Attributes:
        shards: transferred.
        rows: new where they went.
        bytes: transferred, shards and tables of rows together.
        skipped: shards that were there already.
    """

    shards: int
    rows: int
    bytes: int
    skipped: int

    def __str__(self) -> str:
        """Return a sentence."""
        return (
            f"{told_count(self.shards, 'shard')} transferred ({told_bytes(self.bytes)}, {self.rows:,} new rows); "
            f"{self.skipped:,} were there already"
        )


def manifest_there(there: Place) -> tuple[Manifest, Mapping[int, bytes]]:
    """Read the manifest there; return it, and its sound lines by shard as they stand.

    Raises:
        StoreError: it is too large, or two sound lines tell different things of one shard.
    """
    stream = io.BytesIO(there.read(MANIFEST_FILE, MAX_MANIFEST_BYTES) or b"")
    lines = list(manifest_lines(stream, there.at(MANIFEST_FILE)))
    return Manifest.of(lines), {record.shard: line for _, line, record in lines if record is not None}


def table_there(there: Place, record: ShardRecord) -> bytes | None:
    """Return a table of rows; None when it is not what the manifest says."""
    if record.rows_bytes > MAX_TABLE_BYTES:
        return None
    with suppress(Damaged):
        content = there.read(rows_name(record.shard), record.rows_bytes)
        if content is not None and hashlib.sha256(content).hexdigest() == record.rows_sha256:
            return content
    return None


def refuse_other_run(here: StoreHeader, there: StoreHeader, path: str, place: str) -> None:
    """Raise StoreError naming the fields in which two stores differ."""
    fields = there.differences(here, "there", "here")
    if fields:
        raise StoreError(f"{place} and {path} are of different runs: {fields}. Choose another place for one of them.")


def refuse_bad(bad: Sequence[str], total: int, place: str, mend: str) -> None:
    """Raise StoreError when some of a store's shards are bad, after all others have been moved."""
    if bad:
        raise StoreError(f"{place}: {len(bad)} of {total} shards are bad: {told(bad)}. {mend}")


def told(things: Sequence[str]) -> str:
    """Return the first of many things, and how many more there are."""
    more = f"; and {len(things) - 3} more" if len(things) > 3 else ""
    return "; ".join(things[:3]) + more


def in_order(
    work: Callable[[T], R],
    items: Sequence[T],
    transfers: int,
    there: Place,
    drop: Callable[[R], object] = lambda _: None,
) -> Generator[R, None, None]:
    """Work on several items at once and yield the results in the order of the items, a few of them ahead.

    When one fails, or the caller closes this early, the others are stopped, and results nobody took are dropped.
    """
    if transfers < 1:
        raise ConfigError(f"transfers {transfers} must be at least 1")
    transfers = transfers if there.parallel else 1
    ahead: deque[Future[R]] = deque()
    with ThreadPoolExecutor(transfers, "gapprobe-transfer") as pool:
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > 2 * transfers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BaseException:
            there.stop.set()
            pool.shutdown(cancel_futures=True)
            for future in ahead:
                if not future.cancelled() and future.exception() is None:
                    drop(future.result())
            raise
