import os
import pickle
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from gapprobe.errors import StoreError
from gapprobe.store import batches
from gapprobe.store.batches import TokenBatches
from gapprobe.store.reader import open_store
from tests.store.rows import HEADER, make_row, reheaded, some_rows, write

TENSORS = ("residual", "offsets", "token_ids", "token_positions", "token_roles", "token_marks")
TOKEN = 3 * 6 * 2  # bytes of a token's residuals in a store of the usual header


def same(a, b):
    """Whether two lists of batches agree bit for bit."""
    return len(a) == len(b) and all(
        x.ids == y.ids and x.layers == y.layers and all(getattr(x, n).equal(getattr(y, n)) for n in TENSORS)
        for x, y in zip(a, b, strict=True)
    )


def order(found):
    return [id_ for batch in found for id_ in batch.ids]


def check(found, rows, layers=(0, 1, 3)):
    """Each of the rows, if it has tokens, is in one of the batches, bit for bit."""
    by_id = {row.id: row for row in rows}
    chosen = [HEADER.layers.index(layer) for layer in layers]
    for batch in found:
        assert batch.layers == tuple(layers)
        assert batch.residual.is_contiguous()
        for i, id_ in enumerate(batch.ids):
            tokens, row = slice(*batch.offsets[i : i + 2].tolist()), by_id[id_]
            assert batch.residual[:, tokens].equal(row.residual[chosen])
            for name in TENSORS[2:]:
                assert getattr(batch, name)[tokens].equal(getattr(row, name))
        assert batch.offsets[-1] == len(batch.token_ids) == batch.residual.shape[1]
    assert Counter(order(found)) == Counter(row.id for row in rows if len(row.token_ids))


@pytest.fixture(scope="module")
def rows():
    return some_rows(60)


@pytest.fixture(scope="module")
def store(tmp_path_factory, rows):
    """60 rows of 0 to 4 tokens in 12 shards."""
    path = tmp_path_factory.mktemp("store") / "s"
    write(path, rows, batch=5)
    return path


# A window of any size: smaller than a token, a few rows, a few shards, all.
@pytest.mark.parametrize("window", [1, 5 * TOKEN, 40 * TOKEN, 1 << 20])
@pytest.mark.parametrize("seed", [None, 0])
def test_each_row_with_tokens_comes_once_bit_for_bit(store, rows, window, seed):
    for budget in (1, 7, 1000):
        data = TokenBatches(store, token_budget=budget, seed=seed, window_bytes=window)
        found = list(data)
        check(found, rows)
        assert len(data) == len(found)


@pytest.mark.parametrize("seed", [None, 0])
def test_batches_are_as_large_as_the_budget_allows(store, seed):
    found = list(TokenBatches(store, token_budget=6, seed=seed, window_bytes=20 * TOKEN))
    sizes = [len(batch.token_ids) for batch in found]
    assert max(sizes) <= 6
    following = [batch.offsets[1] for batch in found[1:]]
    assert all(size + first > 6 for size, first in zip(sizes, following, strict=False))


def test_a_row_beyond_the_budget_is_a_batch_by_itself(tmp_path):
    rows = [make_row(str(i), n) for i, n in enumerate((1, 9, 1, 1, 8))]
    write(tmp_path, rows)
    found = list(TokenBatches(tmp_path, token_budget=2, seed=None))
    assert [batch.ids for batch in found] == [("0",), ("1",), ("2", "3"), ("4",)]
    check(found, rows)


def test_without_a_seed_rows_keep_the_order_of_the_store(store, rows):
    found = list(TokenBatches(store, token_budget=7, seed=None, window_bytes=9 * TOKEN))
    assert order(found) == [row.id for row in rows if len(row.token_ids)]
    data = TokenBatches(store, token_budget=7, seed=None)
    data.set_epoch(3)
    assert same(list(data), found)


def test_seed_and_epoch_decide_the_order(store):
    def run(seed, epoch, window):
        return order(TokenBatches(store, token_budget=7, seed=seed, epoch=epoch, window_bytes=window))

    for window in (20 * TOKEN, 1 << 20):
        runs = {(seed, epoch): run(seed, epoch, window) for seed in (0, 1) for epoch in (0, 1)}
        assert all(run(*key, window) == found for key, found in runs.items())
        assert len({tuple(found) for found in runs.values()}) == 4


def test_the_order_is_the_same_for_ever(store):
    data = TokenBatches(store, token_budget=4, seed=7, epoch=2, window_bytes=30 * TOKEN)
    assert [int(id_.removeprefix("row ")) for id_ in order(data)[:12]] == [
        9,
        52,
        47,
        17,
        25,
        12,
        35,
        44,
        30,
        45,
        53,
        38,
    ]


def test_setting_the_epoch_is_making_anew(store):
    data = TokenBatches(store, token_budget=7, start=3)
    data.set_epoch(4)
    assert same(list(data), list(TokenBatches(store, token_budget=7, epoch=4)))


def test_a_store_that_fits_the_window_is_permuted_uniformly(tmp_path):
    write(tmp_path, [make_row(name, 1) for name in "abc"], batch=2)
    data, found = TokenBatches(tmp_path, token_budget=3), Counter()
    for epoch in range(360):
        data.set_epoch(epoch)
        found["".join(order(data))] += 1
    assert len(found) == 6
    chi_square = sum((count - 60) ** 2 / 60 for count in found.values())
    assert chi_square < 20.5  # of 5 degrees of freedom, exceeded once in 1,000


def test_a_larger_store_is_mixed_from_all_over_by_long_reads(tmp_path, monkeypatch):
    """Rows of 32 shards in windows of a tenth: each holds rows from nearly everywhere, in no order; reads are few."""
    header, line = reheaded(width=2048, layers=(0,)), 4096
    row = make_row("a row", 1, header)
    rows = [replace(row, id=str(i)) for i in range(3200)]
    write(tmp_path, rows, header, batch=100, shard_bytes=100 * (line + 18))
    data = TokenBatches(tmp_path, token_budget=320, window_bytes=320 * line)
    calls, real = [], os.preadv

    def count(descriptor, buffers, at, *flags):
        calls.append(sum(map(len, buffers)))
        return real(descriptor, buffers, at, *flags)

    monkeypatch.setattr(os, "preadv", count)
    numbers = np.array([int(id_) for id_ in order(data)])
    assert sorted(numbers) == list(range(3200))
    for window in numbers.reshape(10, 320):
        # 64 runs of 5 rows; as many different shards as 64 draws with replacement out of 32 give, 28 on average.
        assert 22 < len(set(window // 100)) <= 32
        assert abs(np.corrcoef(np.arange(320), window)[0, 1]) < 0.2
    # A read for each run, or two where the first finds that the disk has to be waited for.
    assert len([size for size in calls if size >= line]) < 10 * 64 * 2 + 100


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("window", [20 * TOKEN, 1 << 20])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_nothing(store, workers, window):
    data = TokenBatches(store, token_budget=7, window_bytes=window, start=2)
    loader = DataLoader(data, batch_size=None, num_workers=workers, multiprocessing_context="fork")
    assert same(list(loader), list(data))
    assert len(loader) == len(data)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_that_live_on_see_the_epoch(store, method):
    data = TokenBatches(store, token_budget=7, window_bytes=20 * TOKEN)
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=method, persistent_workers=True)
    for epoch, start in ((0, 0), (1, 0), (1, 5)):
        data.set_epoch(epoch, start)
        alone = TokenBatches(store, token_budget=7, window_bytes=20 * TOKEN, epoch=epoch, start=start)
        # `list` would ask for the length, of the epoch before.
        assert same([batch for batch in loader], list(alone))


def test_it_pickles_small_and_whatever_is_appended_later_is_not_seen(tmp_path):
    rows = some_rows(20)
    write(tmp_path, rows[:10])
    data = TokenBatches(tmp_path, token_budget=5)
    wanted = list(data)
    write(tmp_path, rows)
    assert same(list(data), wanted)
    text = pickle.dumps(data)
    assert len(text) < 5000
    assert same(list(pickle.loads(text)), wanted)
    check(list(TokenBatches(tmp_path, token_budget=5)), rows)


def test_going_on_in_mid_epoch_reads_nothing_of_what_was_before(store, monkeypatch):
    whole = list(TokenBatches(store, token_budget=7, epoch=1, window_bytes=20 * TOKEN))
    data = TokenBatches(store, token_budget=7, epoch=1, window_bytes=20 * TOKEN, start=len(whole) - 2)
    opened, real = [], batches.open_shard
    monkeypatch.setattr(batches, "open_shard", lambda path, *a: opened.append(path.stem) or real(path, *a))
    assert same(list(data), whole[-2:])
    shards = {int(id_.removeprefix("row ")) // 5 for batch in whole[-2:] for id_ in batch.ids}
    assert {int(name) for name in opened} == shards
    for start in (len(whole), len(whole) + 3):
        data.set_epoch(1, start)
        assert (len(data), list(data)) == (0, [])


def test_processes_that_train_together_share_the_batches(store):
    whole = list(TokenBatches(store, token_budget=7, window_bytes=20 * TOKEN))
    count = len(whole)
    assert count % 4
    found = [TokenBatches(store, token_budget=7, window_bytes=20 * TOKEN, share=(rank, 4)) for rank in range(4)]
    for rank, data in enumerate(found):
        assert same(list(data), whole[rank : count - count % 4 : 4])
        data.set_epoch(0, 1)
        assert len(data) == len(list(data)) == count // 4 - 1


def test_some_layers_in_any_order(store, rows):
    check(list(TokenBatches(store, token_budget=7, layers=[3, 0])), rows, layers=(3, 0))


def test_some_rows_in_any_order(store, rows):
    chosen = [rows[i] for i in (33, 2, 6, 40, 33)]  # row 6 has no tokens
    found = list(TokenBatches(open_store(store), token_budget=2, rows=(row.id for row in chosen)))
    check(found, [rows[i] for i in (2, 33, 40)])
    assert list(TokenBatches(store, token_budget=2, rows=[])) == []
    assert order(TokenBatches(store, token_budget=2, rows="row 2")) == ["row 2"]


@pytest.mark.parametrize("dense", [0, 1])
def test_a_position_gives_one_token_a_row(tmp_path, monkeypatch, dense):
    monkeypatch.setattr("gapprobe.store.packing.DENSE_SHARE", dense)
    rows = some_rows(30)
    write(tmp_path, rows, batch=5)
    for position, token in (("last_input", 0), ("last_output", -1)):
        data = TokenBatches(tmp_path, token_budget=4, position=position, layers=[3, 1], window_bytes=7 * TOKEN)
        found = list(data)
        assert [len(batch.ids) for batch in found] == [4] * 6
        check(
            found,
            [
                replace(row, residual=row.residual[:, i], **{name: getattr(row, name)[i] for name in TENSORS[2:]})
                for row in rows
                for i in [slice(0, 1) if token == 0 else slice(-1, None)]
            ],
            layers=(3, 1),
        )


def test_a_row_without_just_one_token_at_the_position_is_named(tmp_path):
    rows = [make_row(name, 3) for name in "abcd"]
    rows[2].token_marks[1] |= 1
    rows[3].token_marks[0] = 0
    write(tmp_path, rows)
    for names, told in (("abcd", "'c' has 2"), ("abd", "'d' has 0")):
        with pytest.raises(StoreError, match=rf"row {told} tokens at 'last_input'\. Leave such rows out"):
            TokenBatches(tmp_path, token_budget=4, position="last_input", rows=list(names))
    assert len(order(TokenBatches(tmp_path, token_budget=4, position="last_input", rows=["a", "b"]))) == 2


def test_the_last_batch_may_be_left_out(store):
    found = list(TokenBatches(store, token_budget=7, seed=None))
    assert len(found[-1].token_ids) < 7
    assert same(list(TokenBatches(store, token_budget=7, seed=None, drop_last=True)), found[:-1])
    total = sum(len(batch.token_ids) for batch in found)
    whole = TokenBatches(store, token_budget=total, drop_last=True)
    assert (len(whole), len(list(whole))) == (1, 1)
    assert list(TokenBatches(store, token_budget=total + 1, drop_last=True)) == []


def test_stores_without_rows_or_tokens_give_no_batch(tmp_path):
    for name, rows in (("none", []), ("failed", [make_row("a", 0), make_row("b", 0)])):
        write(tmp_path / name, rows)
        for seed in (None, 0):
            data = TokenBatches(tmp_path / name, token_budget=4, seed=seed, drop_last=True)
            assert (len(data), list(data)) == (0, [])


def test_what_is_wrong_is_named(store):
    for arguments, told in (
        ({"token_budget": 0}, "token_budget is 0; give 1 or more"),
        ({"window_bytes": 0}, "window_bytes is 0"),
        ({"seed": -1}, "seed is -1; give 0 or more"),
        ({"epoch": -1}, "epoch is -1"),
        ({"start": -2}, "start is -2"),
        ({"share": (2, 2)}, r"share is \(2, 2\).*rank 1"),
        ({"share": (-1, 2)}, "rank is -1"),
        ({"share": (0, 0)}, "processes is 0"),
        ({"layers": [0, 2]}, "no layer 2; it has 0, 1, 3"),
        ({"position": "image"}, "no position 'image'; it has last_input, last_output"),
        ({"rows": ["row 1", "nobody"]}, r"no row 'nobody' \(1 of 2 are missing\)"),
    ):
        with pytest.raises(StoreError, match=told):
            TokenBatches(store, **{"token_budget": 5, **arguments})
    with pytest.raises(StoreError, match="is no gapprobe store"):
        TokenBatches(store / "shards", token_budget=5)


def test_a_shard_that_is_damaged_or_gone_is_an_error_also_in_workers(tmp_path):
    write(tmp_path, some_rows(30), batch=5)
    data = TokenBatches(tmp_path, token_budget=7)
    file = tmp_path / "shards/000003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StoreError, match="000003.* bytes, the manifest says"):
        list(data)
    file.unlink()
    with pytest.raises(StoreError, match="000003.*cannot be read"):
        list(data)
    found = iter(DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="fork"))
    with pytest.raises(StoreError, match="000003.*cannot be read"):
        list(found)
    # The loader would wait for five seconds until it lets go of a worker that failed.
    found._workers[0].terminate()


def wide_rows(count):
    """Rows of 64 tokens, 2 MB each, with a header for them."""
    header = reheaded(width=1 << 14, layers=(0,))
    row = make_row("a row", 64, reheaded(width=1, layers=(0,)))
    return header, [
        replace(row, id=str(i), residual=torch.full((1, 64, 1 << 14), i, dtype=torch.bfloat16)) for i in range(count)
    ]


def test_a_batch_is_memory_of_its_own(tmp_path):
    header, rows = wide_rows(6)
    write(tmp_path, rows, header, batch=2)
    for window in (1, 1 << 30):  # a batch at a time, or all at once
        first, second, third = TokenBatches(tmp_path, token_budget=128, seed=None, window_bytes=window)
        first.residual.fill_(-1)
        assert torch.cat([second.residual, third.residual], 1).equal(torch.cat([row.residual for row in rows[2:]], 1))
        assert {batch.residual.untyped_storage().nbytes() for batch in (first, second, third)} == {4 << 20}


def test_nothing_is_left_behind_by_a_loop_that_ends_early(store):
    def files():
        """Open and mapped files of the store; what other tests left open may close at any moment."""
        names = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        names += Path("/proc/self/maps").read_text().splitlines()
        return [name for name in names if str(store) in name]

    before = set(threading.enumerate())
    data = TokenBatches(store, token_budget=2, window_bytes=5 * TOKEN)
    for _ in data:
        break
    running = iter(data)
    next(running)
    running.close()
    del data, running
    assert not files()
    assert set(threading.enumerate()) <= before


def test_memory_stays_flat(tmp_path):
    """128 MB of rows through windows of 4 MB."""
    header, rows = wide_rows(64)
    write(tmp_path, rows, header, batch=8)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    data = TokenBatches(tmp_path, token_budget=64, window_bytes=4 << 20)
    before, most = resident(), 0
    for epoch in range(2):
        data.set_epoch(epoch)
        for batch in data:
            assert batch.residual.shape == (1, 64, 1 << 14)
            most = max(most, resident() - before)
    assert most < 48 << 20
