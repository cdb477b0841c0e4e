"""One trial of the fuzzer: bytes choose mutations, the changed store is built in a sandbox and examined."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.soak.case import Case, Seed
from tests.soak.mutations import mutate
from tests.soak.oracle import examine, examine_care, outside, snapshot


class Feed:
    """Choices made of bytes: a fuzzer that changes the bytes changes the choices. Zeros follow the last byte."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def randbytes(self, n: int) -> bytes:
        """Return the next n bytes."""
        taken = self._data[self._at : self._at + n]
        self._at += n
        return taken.ljust(n, b"\0")

    def randint(self, a: int, b: int) -> int:
        """Return a number from a to b."""
        size = (b - a).bit_length() + 7 >> 3
        return a + int.from_bytes(self.randbytes(size), "little") % (b - a + 1)

    def choice(self, seq: Sequence) -> object:
        """Return one of a sequence."""
        return seq[self.randint(0, len(seq) - 1)]


class Sandbox:
    """A folder with a sound store, files beside the store that nobody may touch, and room for one trial at a time."""

    def __init__(self, folder: Path) -> None:
        self._sound, self._room = folder / "sound", folder / "room"
        self.seed = Seed(self._sound)
        self._room.mkdir()
        self._outside = self._room / "outside"
        outside(self._outside, self._sound)
        self._before = snapshot(self._outside)

    def run(self, data: bytes) -> tuple[list[str], list[str]]:
        """Return which mutations the bytes chose, and what was wrong with how gapprobe took them."""
        feed = Feed(data)
        care = feed.randint(0, 2) == 2
        case = mutate(self.seed, feed)
        return case.told, self.judge(case, care)

    def judge(self, case: Case, care: bool) -> list[str]:
        """Return what is wrong with how gapprobe reads a store and writes to it or, with `care`, mends it."""
        path = self._room / "store"
        case.build(path)
        try:
            return (examine_care if care else examine)(path, case)
        finally:
            shutil.rmtree(path)
            if snapshot(self._outside) != self._before:
                shutil.rmtree(self._outside)
                outside(self._outside, self._sound)
