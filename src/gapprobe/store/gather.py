"""Which lines of which shards make up what was asked for, and reading them: several shards at once, in large pieces."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray
from torch import Tensor

from gapprobe.store.format import position_name
from gapprobe.store.shard import PIECE, Shard

# Enough reads in flight to keep a disk busy; more only fight over memory.
_READERS = 4


@dataclass(frozen=True)
class Part:
    """Rows of one shard.

    Attributes:
        base: number in the store of the shard's first row.
        rows: numbers of the rows in the shard.
        places: where they stand among all rows asked for.
    """

    shard: Shard
    base: int
    rows: NDArray[np.int64]
    places: NDArray[np.int64]


@dataclass(frozen=True)
class Job:
    """Lines of some tensors of one shard, and where in the result they go."""

    shard: Shard
    names: Sequence[str]
    lines: NDArray[np.int64]
    places: NDArray[np.int64]

    @property
    def consecutive(self) -> bool:
        """Return whether the lines stand in the shard as they are wanted."""
        return bool((np.diff(self.lines) == 1).all() and (np.diff(self.places) == 1).all())

    def ask_for(self) -> None:
        """Have the disk fetch the lines ahead of their being read, if it can do so in one piece a tensor."""
        if self.consecutive:
            self.shard.ask_for(self.names, int(self.lines[0]), int(self.lines[-1]) + 1)

    def run(self, out: Shaped[Tensor, "k n d"]) -> None:
        """Read the lines into their places."""
        self.shard.take(self.names, self.lines, out, self.places)


def token_offsets(parts: Sequence[Part], position: int | None = None) -> NDArray[np.int64]:
    """Return where the tokens of each row begin among those of all rows asked for, and where the last one's end.

    With a position, counted are only the tokens so marked.
    """
    lengths = np.zeros(sum(len(part.rows) for part in parts), np.int64)
    for part in parts:
        lengths[part.places] = _stretches(part, position)[1]
    return np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])


def token_jobs(parts: Sequence[Part], names: Sequence[str], position: int | None = None) -> list[Job]:
    """Return what to read for all tokens of rows, or for those marked as a position."""
    base = token_offsets(parts, position)
    jobs: list[Job] = []
    for part in parts:
        starts, lengths, tokens = _stretches(part, position)
        within = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        if len(within):
            lines, places = within + np.repeat(starts, lengths), within + np.repeat(base[part.places], lengths)
            jobs.append(Job(part.shard, names, lines if tokens is None else tokens[lines], places))
    return jobs


def _stretches(
    part: Part, position: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64] | None]:
    """Return by row where its tokens begin and how many they are, counted among the marked ones if these are given."""
    tokens = None if position is None else np.flatnonzero(part.shard.marks >> position & 1)
    bounds = part.shard.offsets if tokens is None else np.searchsorted(tokens, part.shard.offsets)
    starts = bounds[part.rows]
    return starts, bounds[part.rows + 1] - starts, tokens


def position_jobs(parts: Sequence[Part], layer: int, name: str, position: int) -> list[Job]:
    """Return what to read for each row's one token at a position, from its dense copy where the shard has one.

    Args:
        parts: rows that each have exactly one such token.
        layer: its index in the header.
        name: the layer's tensor.
        position: its index in the header.
    """
    dense = position_name(position)
    return [
        Job(part.shard, [dense], part.rows + layer * part.shard.rows, part.places)
        if dense in part.shard.tensors
        else Job(part.shard, [name], part.shard.marked(position)[0][part.rows], part.places)
        for part in parts
    ]


def run_jobs(jobs: Sequence[Job], out: Shaped[Tensor, "k n d"]) -> None:
    """Read all jobs into `out`, several shards at once where it pays for the threads."""
    if len(jobs) == 1 or out.numel() * out.element_size() < PIECE:
        for job in jobs:
            job.run(out)
    else:

        def run(number: int) -> None:
            # The disk is never without something to fetch, nor does it fetch more than memory may hold.
            for following in jobs[number + _READERS : number + _READERS + 1]:
                following.ask_for()
            jobs[number].run(out)

        with ThreadPoolExecutor(_READERS, "gapprobe-read") as pool:
            list(pool.map(run, range(len(jobs))))
