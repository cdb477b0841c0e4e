"""Writing files so that a kill or a full disk leaves the old one or the new one, never half of one."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from gapprobe.errors import OutputError

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def explained(path: Path) -> Generator[None]:
    """Turn an operating-system error on writing `path` into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise OutputError(
                f"no room left to write {path}: free some space or choose another output folder, then run the same "
                "command again; what is finished is kept and not run twice"
            ) from error
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically and durably (temporary file, fsync, rename, fsync of the folder).

    Raises:
        OutputError: the folder cannot be written to, or has no room left.
    """
    with explained(path):
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
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, value: object) -> None:
    """Write `value` as readable JSON, keys in the order given, refusing NaN and infinities."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
