"""What a killed writer was doing, told from what it left; and disks too small for what is to be written."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from gapprobe.store.format import MANIFEST_FILE, ROWS, SHARDS, STORE_FILE
from gapprobe.store.manifest import listed_numbers, read_manifest


class Unable(Exception):
    """A scenario needs what this machine does not have, and is left out."""


def whereabouts(path: Path) -> str:
    """Say from what it left what a killed writer was doing."""
    if not (path / STORE_FILE).exists():
        return "before store.json"
    manifest = path / MANIFEST_FILE
    if manifest.exists() and not manifest.read_bytes().endswith(b"\n"):
        return "inside a line of the manifest"
    drafts = {folder: [file for file in (path / folder).glob(".tmp-*") if _dead(file)] for folder in (SHARDS, ROWS)}
    if listed_numbers(path) - {record.shard for record in read_manifest(path).records}:
        return "between publishing and the manifest"
    if drafts[ROWS] and drafts[SHARDS]:
        try:
            with drafts[SHARDS][0].open("rb") as stream:
                return "inside the shard's data" if stream.read(8) in (b"", bytes(8)) else "after the shard's header"
        except FileNotFoundError:
            # Who writes or tends beside it has just cleared it away.
            return "around the temporaries"
    if drafts[SHARDS] or drafts[ROWS]:
        return "around the temporaries"
    return "between shards"


def _dead(file: Path) -> bool:
    """Whether nobody holds the lock of a temporary."""
    try:
        descriptor = os.open(file, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


@contextmanager
def small_disk(path: Path, small: bool) -> Generator[Callable[[int], None], None, None]:
    """Mount a disk too small for the rows; yield what makes it larger by some bytes."""
    if not small:
        yield lambda _: None
        return
    size = 3 << 20

    def mount(*options: str) -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", *options, "tmpfs", path], capture_output=True, text=True)
        if done.returncode:
            raise Unable(f"no small disk: {done.stderr.strip() or 'mount failed'}")

    def grow(more: int) -> None:
        nonlocal size
        size += more
        mount(f"remount,size={size}")

    if os.geteuid() or not sys.platform.startswith("linux"):
        raise Unable("no small disk: only root can mount one, on Linux")
    mount(f"size={size}")
    try:
        yield grow
    finally:
        subprocess.run(["umount", path], check=True)
