"""What every benchmark needs: a clock with peak memory, files out of the page cache, the machine and the versions.

Nothing here knows what is being measured. Caches are dropped on Linux only; elsewhere `can_drop` is False.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SAMPLING = 0.005
_TOUCHED = 256 << 20
can_drop = hasattr(os, "posix_fadvise")


@dataclass(frozen=True)
class Cost:
    """What one run took.

    Attributes:
        seconds: of the wall clock.
        cpu_seconds: of the processor, of all threads, the kernel's part included.
        peak_bytes: by which the resident memory of this process grew at its peak; mapped pages of files are resident.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def timed(work: Callable[[], T], memory: int = _TOUCHED) -> tuple[T, Cost]:
    """Run something once; return its result and what it took.

    Args:
        work: what is timed.
        memory: bytes that it may touch, page cache included. As many are touched and freed beforehand: a virtual
            machine hands free memory back to its host, and getting it again costs more than the disk does.
    """
    _return_memory()
    with mmap.mmap(-1, memory) as pages:
        pages[:: mmap.PAGESIZE] = bytes(-(-memory // mmap.PAGESIZE))
    with _peak() as peak:
        start, cpu = time.perf_counter(), time.process_time()
        result = work()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return result, Cost(seconds, cpu, peak[0])


def files_of(folder: Path) -> list[Path]:
    """Return all files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sync_tree(folder: Path) -> None:
    """Fsync every file and folder of a tree: what a library that does not sync still owes."""
    for path in (*files_of(folder), *(p for p in folder.rglob("*") if p.is_dir()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def drop(folder: Path) -> int:
    """Push a tree's files out of the page cache; return how many of their bytes `mincore` still finds there.

    What was not synced stays.
    """
    files = files_of(folder)
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return sum(_resident(path) for path in files)


def machine(folder: Path) -> dict[str, str | int]:
    """Describe the machine, and the disk below a folder."""
    described: dict[str, str | int] = {
        "cpu": _first_match(Path("/proc/cpuinfo"), r"model name\s*: (.*)") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "load": f"{os.getloadavg()[0]:.2f} at the start",
    }
    with suppress(OSError):
        described |= _disk(folder.resolve())
    return described


def versions(distributions: Sequence[str]) -> dict[str, str]:
    """Return the versions of Python and of those distributions that are installed."""
    found = {"python": platform.python_version()}
    for name in distributions:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Yield a list that holds the growth of resident memory at its peak once the block has ended."""
    result = [0]
    try:
        # Writing 5 resets the kernel's own high-water mark, which misses nothing and costs nothing.
        _RESET.write_text("5")
        before = _status("VmRSS")
    except OSError:
        with _sampled(result):
            yield result
        return
    yield result
    result[0] = max(0, _status("VmHWM") - before)


@contextmanager
def _sampled(result: list[int]) -> Iterator[None]:
    done, before = threading.Event(), _resident_now()

    def watch() -> None:
        while not done.wait(_SAMPLING):
            result[0] = max(result[0], _resident_now() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _resident_now() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def _return_memory() -> None:
    """Give back what allocators keep from earlier runs, so that a later run's growth shows."""
    gc.collect()
    # What lives now lives on: collecting looks only at what a run leaves behind, else it takes longer than most runs.
    gc.freeze()
    if "pyarrow" in sys.modules:
        sys.modules["pyarrow"].default_memory_pool().release_unused()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident(path: Path) -> int:
    """Return how many bytes of a file are in the page cache."""
    size = path.stat().st_size
    if not size:
        return 0
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        flags = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(pages)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), flags
        )
        # The map cannot be closed while something points into it.
        del first
        if failed:
            raise OSError(ctypes.get_errno(), f"mincore of {path} failed")
        return int((np.frombuffer(flags, np.uint8) & 1).sum()) * mmap.PAGESIZE


def _status(field: str) -> int:
    found = _first_match(_STATUS, rf"{field}:\s+(\d+) kB")
    if not found:
        raise OSError(f"{_STATUS} says nothing of {field}")
    return int(found) * 1024


def _first_match(path: Path, pattern: str) -> str:
    match = re.search(pattern, path.read_text()) if path.exists() else None
    return match[1].strip() if match else ""


def _disk(folder: Path) -> dict[str, str | int]:
    """Return the file system of a folder and what the kernel knows of the disk below it."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    here = [mount for mount in mounts if folder.is_relative_to(mount[1])]
    # Of two mounts on one point the later one is seen.
    described: dict[str, str | int] = {"filesystem": max(reversed(here), key=lambda mount: len(mount[1]))[2]}
    device = folder.stat().st_dev
    queue = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue")
    for name in ("rotational", "read_ahead_kb"):
        if (queue / name).exists():
            described[name] = int((queue / name).read_text())
    return described


def can_write_directly(folder: Path) -> bool:
    """Return whether files of a folder can be written past the page cache."""
    if not hasattr(os, "O_DIRECT"):
        return False
    path = folder / f"probe-{os.getpid()}"
    try:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)
    return True


def tell(line: str) -> None:
    """Say how far a benchmark is, beside its results."""
    print(line, file=sys.stderr, flush=True)
