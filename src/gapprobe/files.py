"""Writing files so that a kill or a full disk leaves the old one or the new one, and what disks fail at, in words.

Also how much room there is, on a disk and in memory.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import psutil

from gapprobe.errors import DataError, OutputError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file grew past the allowed file size",
    errno.EIO: "the disk reported an input/output error",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
}


@contextmanager
def as_output_error(what: str, safe: Callable[[], str]) -> Generator[None, None, None]:
    """Turn an OSError into an OutputError that says what failed, what is safe, and what to do."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        raise OutputError(
            f"{what}: {reason}. {safe()} Mend that (free some space, or choose another folder) "
            "and run the same again: it goes on where this stopped."
        ) from error


def require_room(folder: Path, size: int, what: str, mend: str | Callable[[int], str]) -> None:
    """Raise OutputError when the disk of `folder` has not `size` bytes left.

    Args:
        folder: need not be there yet.
        size: in bytes.
        what: takes them.
        mend: what to do about it, or a function that says it, given the bytes that are free.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        mend = mend if isinstance(mend, str) else mend(free)
        raise OutputError(f"{folder}: {what} takes about {told_bytes(size)}, and {told_bytes(free)} are free. {mend}")


def free_memory() -> int:
    """Return the bytes of main memory that are free, of this process' share where it has one (a container's limit).

    Pages of files that were read count as free: the kernel drops them when memory is asked for.
    """
    free = psutil.virtual_memory().available
    share = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((share / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (share / "memory.stat").read_text().splitlines())
        cached = int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return free
    return min(free, max(limit - used + cached, 0))


def told_count(count: int, what: str) -> str:
    """Return a number of things in words: "1 file", "2,000 files"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def told_bytes(size: int) -> str:
    """Return a number of bytes for people."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def read_bytes(what: str, path: Path | None, data: bytes | None) -> bytes:
    """Return the bytes of what a user gave as a file or as `data`.

    Raises:
        DataError: it cannot be read, or has none; `what` names it.
    """
    try:
        content = data if data is not None else Path(path or "").read_bytes()
    except OSError as error:
        raise DataError(f"{what} cannot be read: {error.strerror}") from error
    if not content:
        raise DataError(f"{what} is empty (zero bytes)")
    return content


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically and durably (temporary file, fsync, rename, fsync of the folder).

    Raises:
        OutputError: the folder cannot be written to, or has no room left.
    """
    with as_output_error(f"{path} cannot be written", lambda: "What is finished is kept."):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not sync folders, and need not.
        if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Write `value` as readable JSON, keys in the order given, refusing NaN and infinities."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
