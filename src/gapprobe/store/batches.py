"""Batches of tokens for training: whole rows, mixed over the shards of a store, read in large pieces.

Decides which rows make up which batch, and reads them a window at a time; `gather` knows how to read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Int64, Shaped, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from gapprobe.ahead import ahead
from gapprobe.errors import StoreError
from gapprobe.kernels.memory import fresh
from gapprobe.store.format import layer_name, shard_name
from gapprobe.store.gather import Job, Part, position_jobs, run_jobs, token_jobs, token_offsets
from gapprobe.store.memory import enough_memory
from gapprobe.store.reader import Store, TokenBatch, open_store
from gapprobe.store.shard import Shard, open_shard
from gapprobe.store.table import ID, read_table

# A window is drawn from about so many places: enough to mix, few enough that each is a long read.
RUNS = 64


class TokenBatches(IterableDataset[TokenBatch]):
    """Batches of whole rows of a store for a training loop, in an order that its seed decides.

    Each row with tokens comes exactly once an epoch; rows without any (calls that failed) are left out. A batch takes
    the next rows as long as their tokens stay within the budget; a longer row is a batch by itself. What is yielded
    is memory of the caller's own.

    The order: short runs of rows from random places of the whole store are drawn into a window of memory and mixed
    there row by row. A store that fits the window is thus permuted uniformly; of a larger one, rows stored side by
    side are likely to meet in a window again. The order depends on the rows, seed, epoch, position, number of layers
    and `window_bytes`, never on the number of workers, the machine or the versions of packages.

    In a `torch.utils.data.DataLoader` (with `batch_size=None`) worker w of k reads the batches w, w + k, ..., and
    the loader yields them in the order that a single process would. What was sealed when this was made is what is
    read, by all workers and in all epochs.

    The next window is read while the batches of this one are used: about twice `window_bytes` of memory in all,
    however many workers share it, besides the batches themselves.

    Args:
        store: an open store, or its folder. Making this reads the header of each shard.
        token_budget: most tokens of a batch. With a position, most rows.
        layers: some of the store's, in the order wanted; all by default.
        rows: ids of the rows to take, in any order; all by default.
        position: take only the token so marked of each row.
        seed: of the order; None keeps that of the store.
        epoch: see `set_epoch`.
        start: see `set_epoch`.
        share: (rank, processes) of a process that trains together with others: it takes the batches rank,
            rank + processes, ..., each process equally many; batches that do not go round at the end are left out.
        window_bytes: how much of the residuals is mixed at once.
        drop_last: leave the last batch of the epoch out if it is below the budget.

    Attributes:
        path: the folder of the store.
        layers: whose residuals the batches have.

    Raises:
        StoreError: there is no such store, layer, row or position; a row has tokens but not exactly one at the
            position; a number is out of range; or a file is damaged.
    """

    def __init__(
        self,
        store: Store | str | Path,
        *,
        token_budget: int,
        layers: Sequence[int] | None = None,
        rows: Iterable[str] | None = None,
        position: str | None = None,
        seed: int | None = 0,
        epoch: int = 0,
        start: int = 0,
        share: tuple[int, int] = (0, 1),
        window_bytes: int = 256 << 20,
        drop_last: bool = False,
    ) -> None:
        store = store if isinstance(store, Store) else open_store(store)
        self.path, self._header, self._records = store.path, store.header, store.records
        self.layers = tuple(self._header.layers if layers is None else layers)
        for layer in self.layers:
            self._header.layer_index(layer, self.path)
        _refuse_below(1, token_budget=token_budget, window_bytes=window_bytes, processes=share[1])
        _refuse_below(0, seed=seed or 0, rank=share[0])
        if share[0] >= share[1]:
            raise StoreError(f"share is {share}: of {share[1]} processes the last one has rank {share[1] - 1}")
        self._budget, self._window_bytes, self._drop_last = token_budget, window_bytes, drop_last
        self._seed, self._share = seed, share
        self._position = None if position is None else self._header.position_index(position, self.path)
        # Number in the store of each shard's first row.
        self._base = np.cumsum([0] + [record.rows for record in self._records], dtype=np.int64)
        self._rows, self._lengths = self._measure(None if rows is None else _numbers(store, rows))
        # Shared memory: workers that outlive an epoch (`persistent_workers`) see what `set_epoch` sets.
        self._turn = torch.zeros(2, dtype=torch.int64).share_memory_()
        self.set_epoch(epoch, start)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the order of what is iterated next. The same epoch gives the same batches again.

        Args:
            epoch: 0 or more; each gives another order of the same rows.
            start: leave out so many batches, to go on where an epoch was cut short. They are not read.

        Raises:
            StoreError: a number is negative.
        """
        _refuse_below(0, epoch=epoch, start=start)
        self._turn[0], self._turn[1] = epoch, start

    def __len__(self) -> int:
        """Return how many batches the next iteration yields, all workers together.

        Where rows are of unequal length, another epoch may have another number of batches: ask again. (A DataLoader
        warns when it yields more than it said when it was asked last.)
        """
        return len(self._mine(self._plan()))

    def __iter__(self) -> Iterator[TokenBatch]:
        """Yield the batches of the epoch, or of a DataLoader's worker its share of them.

        Raises:
            StoreError: a file is damaged or no longer there.
        """
        worker, plan = get_worker_info(), self._plan()
        mine = self._mine(plan) if worker is None else self._mine(plan)[worker.id :: worker.num_workers]
        if not len(mine):
            return
        loads = np.split(mine, np.flatnonzero(np.diff(plan.windows[mine])) + 1)
        # One window is filled while another is used up, always in the same memory: touching fresh memory costs more.
        most = max((plan.tokens[load].sum() for load in loads if len(load) > 1), default=0)
        rooms = [self._room(int(most)), self._room(int(most if len(loads) > 1 else 0))]
        with closing(ahead(lambda each: self._load(plan, *each), zip(loads, cycle(rooms), strict=False))) as windows:
            for loaded in windows:
                yield from loaded.batches()

    def _mine(self, plan: _Plan) -> NDArray[np.int64]:
        """Return the numbers of the batches that this process yields, with all its workers."""
        rank, processes = self._share
        count = len(plan.windows)
        return np.arange(rank, count - count % processes, processes)[int(self._turn[1]) :]

    def _plan(self) -> _Plan:
        sizes = self._lengths * (len(self.layers) * self._header.width * self._header.torch_dtype.itemsize)
        if self._seed is None:
            windows, order = _begin(sizes) // self._window_bytes, np.arange(len(sizes))
        else:
            # Raw words of PCG64 are the same everywhere and for ever; numpy's own shuffles are not promised to be.
            random = np.random.PCG64([self._seed, int(self._turn[0])])
            shards = np.searchsorted(self._base, self._rows, side="right")
            windows = _windows(sizes, shards, self._window_bytes, random)
            order = np.lexsort((random.random_raw(len(sizes)), windows))
        cuts = _cut(self._lengths[order], self._budget)
        tokens = np.add.reduceat(self._lengths[order], cuts[:-1]) if len(order) else np.empty(0, np.int64)
        if self._drop_last and len(tokens) and tokens[-1] < self._budget:
            cuts, tokens = cuts[:-1], tokens[:-1]
        return _Plan(self._rows[order], cuts, tokens, windows[order[cuts[:-1]]])

    def _measure(self, chosen: NDArray[np.int64] | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the numbers of the rows to yield, rising, and how many tokens each has."""
        lengths = np.zeros(self._base[-1], np.int64)
        for number, (first, last) in enumerate(zip(self._base[:-1].tolist(), self._base[1:].tolist(), strict=True)):
            here = np.arange(first, last) if chosen is None else chosen[slice(*np.searchsorted(chosen, (first, last)))]
            if len(here):
                shard, rows = self._shard(number), here - first
                lengths[here] = np.diff(shard.offsets)[rows]
                if self._position is not None:
                    counts = shard.marked(self._position)[1][rows]
                    wrong = np.flatnonzero((counts != 1) & (lengths[here] > 0))
                    if len(wrong):
                        raise StoreError(
                            f"{self.path}: row {self._ids(number)[rows[wrong[0]]]!r:.80} has {counts[wrong[0]]} tokens "
                            f"at {self._header.positions[self._position]!r}. Leave such rows out through `rows`."
                        )
                    lengths[here] = counts
        rows = np.flatnonzero(lengths)
        return rows, lengths[rows]

    def _shard(self, number: int) -> Shard:
        # Opened anew each time: there may be any number of shards, each in use for a few of its rows.
        record = self._records[number]
        return open_shard(self.path / shard_name(record.shard), self._header, record)

    def _ids(self, number: int) -> list[str]:
        table = read_table(self.path, self._header, self._records[number], [ID])
        return cast(list[str], table.column(ID).to_pylist())

    @enough_memory()
    def _room(self, tokens: int) -> Shaped[Tensor, "l t d"]:
        return fresh((len(self.layers), tokens, self._header.width), self._header.torch_dtype)

    @enough_memory()
    def _load(self, plan: _Plan, batches: NDArray[np.int64], room: Shaped[Tensor, "l t d"]) -> _Loaded:
        """Read the rows of some batches, in the order in which they are yielded, into `room` or, one batch, its own."""
        pieces = [plan.rows[plan.cuts[batch] : plan.cuts[batch + 1]] for batch in batches]
        rows = np.concatenate(pieces)
        shards = np.searchsorted(self._base, rows, side="right") - 1
        parts: list[Part] = []
        ids = np.empty(len(rows), object)
        for number in np.unique(shards).tolist():
            here, base = np.flatnonzero(shards == number), int(self._base[number])
            parts.append(Part(self._shard(number), base, rows[here] - base, here))
            ids[here] = np.array(self._ids(number), object)[rows[here] - base]
        names = [layer_name(layer) for layer in self.layers]
        if self._position is None:
            offsets, jobs = token_offsets(parts), token_jobs(parts, names)
        else:
            marked = [part.shard.marked(self._position)[0][part.rows] for part in parts]
            offsets = np.arange(len(rows) + 1)
            jobs = [Job(part.shard, names, lines, part.places) for part, lines in zip(parts, marked, strict=True)]
        tokens = int(offsets[-1])
        residual = room[:, :tokens] if len(batches) > 1 else self._room(tokens)
        if self._position is None:
            run_jobs(jobs, residual)
        else:
            for i, (layer, name) in enumerate(zip(self.layers, names, strict=True)):
                index = self._header.layers.index(layer)
                run_jobs(position_jobs(parts, index, name, self._position), residual[i : i + 1])
        numbers, codes = torch.empty(2, tokens, dtype=torch.int64), torch.empty(2, tokens, dtype=torch.uint8)
        for out, kinds in ((numbers, ("token_ids", "token_positions")), (codes, ("token_roles", "token_marks"))):
            run_jobs([Job(job.shard, kinds, job.lines, job.places) for job in jobs], out[..., None])
        cuts = np.cumsum([0] + [len(piece) for piece in pieces], dtype=np.int64)
        return _Loaded(ids, self.layers, residual, offsets, numbers, codes, cuts)


@dataclass(frozen=True)
class _Plan:
    """Numbers of the rows in the order of an epoch; batch i has those from `cuts[i]` to `cuts[i + 1]`.

    `tokens` tells how many tokens each batch has, `windows` the window that it begins in.
    """

    rows: NDArray[np.int64]
    cuts: NDArray[np.int64]
    tokens: NDArray[np.int64]
    windows: NDArray[np.int64]


@dataclass(frozen=True)
class _Loaded:
    """The rows of some batches, one after another; batch i has those from `cuts[i]` to `cuts[i + 1]`."""

    ids: NDArray[np.object_]
    layers: tuple[int, ...]
    residual: Shaped[Tensor, "l t d"]
    offsets: Int64[np.ndarray, " n_1"]
    numbers: Int64[Tensor, "2 t"]
    codes: UInt8[Tensor, "2 t"]
    cuts: NDArray[np.int64]

    def batches(self) -> Iterator[TokenBatch]:
        """Copy each batch out, unless there is but one, so that whoever keeps a batch keeps no other."""
        for first, last in zip(self.cuts[:-1].tolist(), self.cuts[1:].tolist(), strict=True):
            begin, end = self.offsets[[first, last]].tolist()
            residual = self.residual
            if len(self.cuts) > 2:
                residual = fresh((len(self.layers), end - begin, residual.shape[2]), residual.dtype)
                residual.copy_(self.residual[:, begin:end])
            yield TokenBatch(
                tuple(self.ids[first:last].tolist()),
                self.layers,
                residual,
                torch.from_numpy(self.offsets[first : last + 1] - begin),
                *self.numbers[:, begin:end].clone(),
                *self.codes[:, begin:end].clone(),
            )


def _windows(
    sizes: NDArray[np.int64], shards: NDArray[np.int64], window_bytes: int, random: np.random.PCG64
) -> NDArray[np.int64]:
    """Cut the rows of each shard into runs of about a window's `RUNS`-th, and deal the runs to windows at random."""
    run_bytes = max(1, window_bytes // RUNS)
    # Cut elsewhere in each epoch, lest the same rows always stay together.
    places = (_begin(sizes) + int(random.random_raw()) % run_bytes) // run_bytes
    starts = np.ones(len(sizes), bool)
    starts[1:] = (np.diff(places) > 0) | (np.diff(shards) > 0)
    run = np.cumsum(starts) - 1
    whole = np.bincount(run, sizes).astype(np.int64)
    order = np.argsort(random.random_raw(len(whole)), kind="stable")
    windows = np.empty(len(whole), np.int64)
    windows[order] = _begin(whole[order]) // window_bytes
    return windows[run]


def _cut(lengths: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """Return where batches begin and the last one ends, each as many rows as the budget allows, but at least one."""
    ends, cuts = np.cumsum(lengths), [0]
    while cuts[-1] < len(lengths):
        before = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(ends, before + budget, side="right"))))
    return np.array(cuts)


def _begin(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where each of a sequence of sizes begins."""
    return np.cumsum(sizes) - sizes


def _numbers(store: Store, rows: Iterable[str]) -> NDArray[np.int64]:
    """Return the numbers of rows, rising, each once."""
    wanted = {rows} if isinstance(rows, str) else set(rows)
    found = [number for number, id_ in enumerate(store.ids) if id_ in wanted]
    if len(found) < len(wanted):
        missing = wanted.difference(store.ids)
        raise StoreError(f"{store.path} has no row {min(missing)!r:.80} ({len(missing)} of {len(wanted)} are missing)")
    return np.array(found, np.int64)


def _refuse_below(least: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < least:
            raise StoreError(f"{name} is {value}; give {least} or more")
