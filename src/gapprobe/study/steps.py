"""Finished steps of a study on disk, so that a killed run goes on where it was and a finished one is not run twice.

A step is kept with a key made of everything that its result depends on; another key means running it again.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gapprobe.errors import OutputError
from gapprobe.files import write_json
from gapprobe.study.results import Json

MARKER = "study.json"


def key_of(*parts: str) -> str:
    """Return one hash of `parts`."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def peak_memory() -> int:
    """Return the most memory that this process has had so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Steps:
    """The steps of one study, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}

    def once(self, name: str, key: str, compute: Callable[[], Json]) -> Json:
        """Return the result of step `name`, from disk if it was kept under the same key, else by running it."""
        path = self._folder / f"{name}.json"
        kept = _read(path)
        if kept is None or kept.get("key") != key:
            start = time.perf_counter()
            result = compute()
            seconds = round(time.perf_counter() - start, 3)
            kept = {"key": key, "seconds": seconds, "peak_bytes": peak_memory(), "result": result}
            write_json(path, kept)
            # What is returned is what a resumed run would read: a value that JSON would change cannot slip through.
            kept = json.loads(path.read_text(encoding="utf-8"))
        self.note(name, kept["seconds"], int(kept.get("peak_bytes") or 0))
        return kept["result"]

    def note(self, name: str, seconds: float, peak_bytes: int) -> None:
        """Remember how long step `name` took, and the most memory that the process had had at its end."""
        self.seconds[name], self.peak_bytes[name] = seconds, peak_bytes

    def state(self, name: str, key: str) -> str:
        """Return how step `name` stands."""
        kept = _read(self._folder / f"{name}.json")
        if kept is None:
            return "to do"
        return "done" if kept.get("key") == key else "to do again: data, settings or version have changed"


def claim(out: Path, studies: dict[str, str]) -> None:
    """Make `out` the output folder of these studies (name to fingerprint), or refuse.

    Raises:
        OutputError: the folder holds something else, or a study of the same name that asks something else.
    """
    marker = out / MARKER
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; choose a folder")
    if not marker.exists():
        foreign = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
        if foreign:
            raise OutputError(
                f"output folder {out} is not empty and not gapprobe's (it holds {foreign[0]}); choose another one"
            )
        held: dict[str, str] = {}
    else:
        content = _read(marker)
        held = dict(content["studies"]) if content and isinstance(content.get("studies"), dict) else {}
    for name, fingerprint in studies.items():
        if held.get(name, fingerprint) != fingerprint:
            raise OutputError(
                f"output folder {out} holds another study called {name}: its model, questions or prompts differ "
                "from this one's. Choose another folder, or remove that one to start over"
            )
    if held | studies != held or not marker.exists():
        write_json(marker, {"gapprobe": "output folder of a study", "studies": held | studies})


def _read(path: Path) -> Json | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
