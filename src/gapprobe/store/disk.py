"""Files that appear whole or not at all: temporaries, exclusive names, locks, fsync. Knows no tensors and no rows."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".tmp-"
# Of both memory and files, for writing past the page cache; as large as any disk asks for.
ALIGNMENT = 4096
# Large enough to keep a disk busy, small enough for a cache.
PIECE = 4 << 20
# Not on all platforms.
_DIRECT: int = getattr(os, "O_DIRECT", 0)
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


def open_regular(path: Path) -> int:
    """Open a file for reading; links are followed.

    Raises:
        OSError: there is none, or what stands there is no file: a pipe would be waited for, a device read without end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no file, but something else")
    return descriptor


def read_small(path: Path, most: int) -> bytes | None:
    """Return the content of a file; None if there is none, it cannot be read, or it has more than `most` bytes."""
    try:
        # Neither pipes nor devices: they would be waited for, or never end.
        if not path.is_file() or path.stat().st_size > most:
            return None
        return path.read_bytes()
    except OSError:
        return None


@contextmanager
def temporary(folder: Path) -> Generator[tuple[Path, int], None, None]:
    """Create a file of our own in `folder`; yield its path and descriptor; take the path away at the end.

    The descriptor is locked, so that whoever clears leftovers can tell a dead writer's file from a live one's.
    """
    while True:
        path = folder / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        # Between these two calls a clearing process may have taken the file for a leftover.
        if not _try_lock(descriptor) or os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)
    try:
        yield path, descriptor
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def clear_temporaries(folder: Path, dry_run: bool = False) -> dict[Path, int]:
    """Take away the temporaries of writers that died; return which, and their bytes."""
    found: dict[Path, int] = {}
    for path in folder.glob(f"{TEMPORARY}*"):
        # What is no file is none of ours.
        if path.is_symlink() or not path.is_file():
            continue
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if _try_lock(descriptor):
                    found[path] = os.fstat(descriptor).st_size
                    if not dry_run:
                        path.unlink()
            finally:
                os.close(descriptor)
    return found


@contextmanager
def exclusive(path: Path) -> Generator[bool, None, None]:
    """Hold the lock of a store; yield False where the file system has none."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            locked = True
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def write_past_cache(descriptor: int) -> None:
    """Have the file written from memory to the disk at once, without a copy in the page cache, where that is possible.

    Much larger than memory, a store would only push other files out of it; and copying took more than the disk did
    (2.6 against 0.5 to 2 GB/s here). Whatever is written must begin and end at multiples of `ALIGNMENT`, in the file
    and in memory; the first piece that does not ends it.
    """
    if _DIRECT:
        # Where the file system refuses (tmpfs did before Linux 6.6), it is written as any other.
        with suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | _DIRECT)


def write_all(descriptor: int, data: memoryview, at: int) -> None:
    """Write `data` (bytes) at a position of the file, and have the disk begin at once, not when the file is synced."""
    done = 0
    while done < len(data):
        try:
            count = os.pwrite(descriptor, data[done : done + PIECE], at + done)
        except OSError as error:
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & _DIRECT:
                raise
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
            continue
        if hasattr(os, "posix_fadvise"):
            # On Linux this starts writing dirty pages, and drops only clean ones.
            os.posix_fadvise(descriptor, at + done, count, os.POSIX_FADV_DONTNEED)
        done += count


def sync(path: Path) -> None:
    """Make a file's content durable, whoever wrote it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve(descriptor: int, size: int) -> None:
    """Claim `size` bytes now, so that a full disk shows before the first byte is written."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
                raise


def publish(source: Path, target: Path) -> bool:
    """Give a finished, synced temporary its final name; False when that name is taken. Never overwrites."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # No hard links here: an empty file of that name is the claim, and we rename over our own claim.
        try:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        except FileExistsError:
            return False
        os.rename(source, target)
    return True


def append_line(path: Path, line: bytes, locked: bool) -> None:
    """Append one line durably. A failure leaves the file as it was where the caller holds the lock."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        before = os.fstat(descriptor).st_size
        # Never continue a line that a killed writer tore.
        torn = before > 0 and os.pread(descriptor, 1, before - 1) != b"\n"
        if torn and locked:
            # Between two lines it would count as damage for ever.
            cut_torn_line(path)
            before, torn = os.fstat(descriptor).st_size, False
        data = (b"\n" if torn else b"") + line
        try:
            if os.write(descriptor, data) != len(data):
                raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            if locked:
                os.ftruncate(descriptor, before)
            raise
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cut_torn_line(path: Path) -> None:
    """Take away what follows the last newline. Only under the lock."""
    with suppress(FileNotFoundError):
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            os.truncate(path, whole)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
