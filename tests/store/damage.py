"""Damage done to stores on purpose, and blocks of checksums small enough for stores that tests write in no time."""

from pathlib import Path

import pytest

from gapprobe.store.care.verify import verify_store
from gapprobe.store.manifest import read_header, read_manifest
from gapprobe.store.shard import open_shard

SMALL_BLOCK = 64


def flip(file: Path, at: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


def use_small_blocks(patch: pytest.MonkeyPatch) -> None:
    """Have everything take a checksum of each 64 bytes, so that damage in a small shard touches few rows."""
    for module in ("packing", "shard", "care.examining"):
        patch.setattr(f"gapprobe.store.{module}.BLOCK", SMALL_BLOCK)


def place(store: Path, number: int, tensor: str, line: int = 0) -> int:
    """Return where a line of a tensor begins in its shard's file."""
    record = next(r for r in read_manifest(store).records if r.shard == number)
    shard = open_shard(store / f"shards/{number:06d}.safetensors", read_header(store), record)
    _, shape, begin = shard.tensors[tensor]
    lines = shard.tensors[tensor][1][0] if shape else 1
    size = shard.path.stat().st_size
    ends = sorted([b for _, _, b in shard.tensors.values() if b > begin] + [size])
    return begin + (ends[0] - begin) // max(1, lines) * line


def files(store: Path) -> dict[str, bytes]:
    """Return the content of all files by name."""
    return {str(f.relative_to(store)): f.read_bytes() for f in sorted(store.rglob("*")) if f.is_file()}


def flip_each(store: Path, report: Path) -> None:
    """Entry of a child process (without the slow checks of types): flip a bit of every byte of every file in turn.

    Writes down each flip that `verify_store` neither finds, in that file, nor may overlook.
    """
    before, missed = read_header(store), list[str]()
    for file in sorted(f for f in store.rglob("*") if f.is_file()):
        content = file.read_bytes()
        for at in range(len(content)):
            changed = bytearray(content)
            changed[at] ^= 1 << at % 8
            file.write_bytes(changed)
            found = verify_store(store, progress=False)
            if file.name == "store.json" and not found:
                # Names of packages and of folders, and white space: recorded, never a reason to refuse.
                sound = read_header(store).compared == before.compared
            else:
                # A damaged end of the manifest is that of a killed writer, and leaves a shard without a line.
                wanted = "000000.safetensors" if file.suffix == ".jsonl" and at == len(content) - 1 else file.name
                sound = any(wanted in problem.file or wanted in problem.what for problem in found)
            if not sound:
                missed.append(f"{file.name} {at}: {found}")
        file.write_bytes(content)
    report.write_text("\n".join([*missed, *map(str, verify_store(store))]))
