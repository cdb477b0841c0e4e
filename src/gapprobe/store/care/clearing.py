"""Taking away what no row needs: temporaries of dead writers, files of replaced shards, and, when asked, damaged files.

Only files whose names this format gives are looked at, and of those only what is provably held elsewhere is removed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gapprobe.files import told_bytes, told_count
from gapprobe.store import disk, sealing
from gapprobe.store.care.alone import alone
from gapprobe.store.format import DAMAGED, ROWS, SHARDS, rows_name, shard_name
from gapprobe.store.homes import Homes
from gapprobe.store.manifest import listed_numbers, read_header, read_manifest

_SHOWN = 20
_DAMAGED_NAME = re.compile(
    r"[0-9]{6,10}\.(safetensors|parquet)|manifest-[0-9]{6}\.jsonl|store-[0-9]{6}\.json|lost-[0-9]{6}\.txt"
)


@dataclass(frozen=True)
class Garbage:
    """What was removed, or would be.

    Attributes:
        path: of the store.
        files: their bytes, by path inside the store.
        kept: shards without a line of the manifest that were not removed, and why.
        dry_run: whether nothing was removed.
    """

    path: Path
    files: dict[str, int]
    kept: dict[str, str]
    dry_run: bool

    @property
    def bytes(self) -> int:
        """Return how much room the files take."""
        return sum(self.files.values())

    def __str__(self) -> str:
        """Return a line for each file, of many the first."""
        would = "would be removed" if self.dry_run else "removed"
        lines = [f"{self.path}: {told_count(len(self.files), 'file')} of {told_bytes(self.bytes)} {would}"]
        lines += [f"  {name}  {told_bytes(size)}" for name, size in list(self.files.items())[:_SHOWN]]
        lines += [f"  and {len(self.files) - _SHOWN:,} more"] if len(self.files) > _SHOWN else []
        return "\n".join(lines + [f"  {name} stays: {why}" for name, why in self.kept.items()])


def collect_garbage(path: str | Path, dry_run: bool = False, damaged: bool = False) -> Garbage:
    """Remove temporaries of writers that died, and files of shards that others have replaced.

    A shard without a line of the manifest goes only if all its rows are sealed in shards that are there. Programs that
    have had the store open since before a compaction must open it anew afterwards.

    Args:
        path: the folder.
        dry_run: only say what would be removed.
        damaged: remove also what repairs moved to `damaged/`.

    Raises:
        StoreError: there is no store, it is damaged, or its file system has no locks.
        OutputError: a file cannot be removed.
    """
    path = Path(path)
    header = read_header(path)
    files: dict[str, int] = {}
    kept: dict[str, str] = {}
    with alone(path, "it cannot be cleared up"):
        for folder in (path, path / SHARDS, path / ROWS):
            found = disk.clear_temporaries(folder, dry_run)
            files |= {str(file.relative_to(path)): size for file, size in found.items()}
        records = read_manifest(path).records
        unnamed = sorted(listed_numbers(path) - {record.shard for record in records})
        sealed = Homes(path, header, records if unnamed else ())
        for number in unnamed:
            why = sealed.why_needed(number)
            if why:
                kept[shard_name(number)] = why
                continue
            files |= _sizes(path, (rows_name(number), shard_name(number)))
            if not dry_run:
                sealing.remove(path, number)
        if damaged:
            entries = [entry for entry in (path / DAMAGED).glob("*") if _DAMAGED_NAME.fullmatch(entry.name)]
            # A folder that stood where a file should is not ours to empty.
            names = sorted(entry.name for entry in entries if entry.is_symlink() or not entry.is_dir())
            files |= _sizes(path, (f"{DAMAGED}/{name}" for name in names))
            for name in () if dry_run else names:
                (path / DAMAGED / name).unlink()
            if not dry_run:
                # It stays where something else lies in it.
                with suppress(OSError):
                    (path / DAMAGED).rmdir()
    return Garbage(path, files, kept, dry_run)


def _sizes(path: Path, names: Iterable[str]) -> dict[str, int]:
    return {name: (path / name).stat().st_size for name in names if (path / name).exists()}
