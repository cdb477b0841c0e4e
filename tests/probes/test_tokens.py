"""Rows of many tokens: which are read, how they become one, and how little of them is in memory at once."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import gapprobe as gp
from gapprobe.errors import DataError, StoreError
from gapprobe.probes import tokens
from gapprobe.probes.tokens import Position, Tokens, read_position
from gapprobe.store.format import ROLES, StoredRow, StoreHeader
from gapprobe.store.reader import open_store
from gapprobe.store.writer import StoreWriter
from tests.conftest import WEIGHTS

LAYERS, WIDTH = (0, 2), 5
MARKS = {"end": 1, "picture": 2}


def written(path, lengths, dtype=torch.float32, picture=2, values=None):
    """Write rows of many tokens in two shards: the last is marked `end`, the first ones `picture`."""
    header = StoreHeader(
        model={"source": "a test", "weights": WEIGHTS, "architecture": "none", "family": "none", "revision": ""},
        processor="",
        attention="eager",
        padding_side="left",
        dtype=str(dtype).removeprefix("torch."),
        layers=LAYERS,
        width=WIDTH,
        positions=tuple(MARKS),
        generation={},
        versions={},
    )
    g = torch.Generator().manual_seed(0)
    rows = []
    for i, length in enumerate(lengths):
        x = torch.randn(len(LAYERS), length, WIDTH, generator=g) if values is None else values[i]
        place = torch.arange(length)
        marks = (place == length - 1) * MARKS["end"] + (place < picture) * MARKS["picture"]
        roles = torch.tensor([ROLES["other"], ROLES["question"], ROLES["entity"]])[place % 3]
        columns = {"long": length > 4, "who": i % 7}
        rows.append(StoredRow(f"r{i}", columns, x.to(dtype), place, place, roles.byte(), marks.byte()))
    for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        with StoreWriter(path, header) as writer:
            writer.append(part)
    return open_store(path)


@pytest.fixture(params=["float32", "bfloat16"])
def store(request, tmp_path):
    return written(tmp_path / "s", [2, 9, 3, 4, 2, 7, 5, 3], getattr(torch, request.param))


def chosen(row, name):
    if name == "all":
        return torch.ones(len(row.token_roles), dtype=torch.bool)
    return row.token_marks & MARKS[name] > 0 if name in MARKS else row.token_roles == ROLES[name]


POOLED = {"mean": lambda x: x.double().mean(0), "max": lambda x: x.double().amax(0), "last": lambda x: x[-1].double()}


@pytest.mark.parametrize("name", ["end", "picture", "question", "all"])
@pytest.mark.parametrize("pool", POOLED)
def test_pooled_rows_are_those_of_one_row_after_another(store, pool, name, monkeypatch):
    rows = ["r6", "r0", "r7", "r1", "r3"]  # of both shards, out of order
    expected = torch.stack(
        [POOLED[pool](row.residual[1][chosen(row, name)]) for row in map(store.row, rows)]
    ).float()  # sums of so few float32 numbers are exact in float64, in any order
    found = read_position(store, 2, f"{pool}({name})", rows)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    monkeypatch.setattr(tokens, "BLOCK", 1)  # a row at a time
    assert torch.equal(read_position(store, 2, f"{pool}({name})", rows), expected)


@pytest.mark.parametrize("name", ["picture", "question", "all"])
def test_without_pooling_all_tokens_come_row_after_row(store, name):
    rows = ["r5", "r2", "r1"]
    found = read_position(store, 0, name, rows)
    assert isinstance(found, Tokens)
    assert found.values.dtype == store.header.torch_dtype
    for own, row in zip((found[i : i + 1].values for i in range(3)), map(store.row, rows), strict=True):
        assert torch.equal(own, row.residual[0][chosen(row, name)])


def test_one_token_a_row_is_read_as_before(store):
    assert torch.equal(read_position(store, 2, "end"), store.layer(2, position="end"))
    assert not Position(store, "end").several
    one = ["r0", "r2", "r4"]  # one token of a question each, which no position marks
    assert read_position(store, 2, "question", one).shape == (3, WIDTH)


def test_means_are_taken_in_float64(tmp_path):
    values = torch.tensor([1e8, 1.0, -1e8])[None, :, None].expand(len(LAYERS), 3, WIDTH)
    store = written(tmp_path / "s", [3, 3], values=[values, values])
    assert torch.equal(read_position(store, 0, "mean(all)"), torch.full((2, WIDTH), 1 / 3))
    means = Tokens(values[0].bfloat16(), torch.tensor([0, 3])).pooled("mean")
    assert means.dtype == torch.float32  # 1 / 3 is no bfloat16


def test_nan_stays_nan_when_pooled():
    x = Tokens(torch.tensor([[1.0, 2.0], [torch.nan, 3.0], [4.0, 5.0]]), torch.tensor([0, 2, 3]))
    for pool in ("mean", "max"):
        assert torch.isnan(x.pooled(pool)).tolist() == [[True, False], [False, False]]


def test_what_is_not_there_is_refused_before_anything_is_read(store):
    with pytest.raises(StoreError, match=r"no position 'entity\[-1\]'; it has end, picture\. Or give a role .*mean"):
        Position(store, "mean(entity[-1])")
    with pytest.raises(StoreError, match=r"no position 'sum\(all\)'"):
        Position(store, "sum(all)")
    with pytest.raises(StoreError, match=r"row 'r0' has no token at 'image' \(8 of 8 rows have none\)"):
        Position(store, "mean(image)")
    with pytest.raises(StoreError, match="no row 'r99'"):
        Position(store, "mean(all)", ["r1", "r99"])
    with pytest.raises(StoreError, match="no layer 1; it has 0, 2"):
        read_position(store, 1, "mean(all)")


def test_tokens_are_indexed_by_row():
    x = Tokens(torch.arange(12.0).reshape(6, 2), torch.tensor([0, 1, 4, 6]))
    assert len(x) == 3
    assert x.row.tolist() == [0, 1, 1, 1, 2, 2]
    for rows in (torch.tensor([2, 0]), slice(1, 3), torch.tensor([True, False, True]), slice(0, 0)):
        picked = x[rows]
        expected = [x.values[x.row == i] for i in torch.arange(3)[rows]]
        assert picked.lengths.tolist() == [len(own) for own in expected]
        assert torch.equal(picked.values, torch.cat([*expected, torch.empty(0, 2)]))
    assert [x[some].values.shape[0] for some in x.blocks(3)] == [1, 3, 2]
    assert x.pooled("last").tolist() == [[0.0, 1.0], [6.0, 7.0], [10.0, 11.0]]
    for bad in ([0, 1, 4], [1, 4, 6], [0, 4, 4, 6], []):
        with pytest.raises(DataError, match="offsets must rise from 0 to the 6 tokens"):
            Tokens(x.values, torch.tensor(bad, dtype=torch.int64))


def test_a_layer_is_never_in_memory_with_all_its_tokens(tmp_path):
    """The layer takes 200 MB; a block of it, its float64 copy and the reader's own needs take a fraction of that."""
    n, t, d = 200, 512, 512
    x = np.random.default_rng(0).standard_normal((n * t, d), dtype=np.float32)
    gp.import_activations(tmp_path / "s", {0: x}, lengths=[t] * n)
    code = f"""
import re
from pathlib import Path
from gapprobe.probes.tokens import read_position
from gapprobe.store.reader import open_store
def peak():  # of this program alone: getrusage would count the one that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
store = open_store({str(tmp_path / "s")!r})
read_position(store, 0, "mean(all)", store.ids[:4])  # whatever the first call loads
before = peak()
read_position(store, 0, "mean(all)")
print(peak() - before)
"""
    peak = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    # A block is there once as read and once in float64 while the next is read; what is freed, the allocator may keep.
    assert x.nbytes / 4 > 2 * (4 + 8) * tokens.BLOCK
    assert peak < x.nbytes / 2


LENGTHS = [2 + (7 * i) % 6 for i in range(70)]


@pytest.fixture
def needles(tmp_path):
    """One token of each row knows the label: its first feature says so, the second what it is."""
    g = torch.Generator().manual_seed(1)
    right = torch.rand(len(LENGTHS), generator=g) < 0.5
    values = []
    for length, label in zip(LENGTHS, right.tolist(), strict=True):
        x = torch.randn(len(LAYERS), length, WIDTH, generator=g)
        x[:, :, 0] -= 2.0
        at = int(torch.randint(length, (1,), generator=g))
        x[1, at, 0] += 6.0
        x[1, at, 1] += 4.0 if label else -4.0
        values.append(x)
    store = written(tmp_path / "s", LENGTHS, values=values)
    return store, pd.Series(right.numpy(), index=[f"r{i}" for i in range(len(LENGTHS))], name="right")


def test_a_sweep_reads_pooled_positions(needles):
    store, target = needles
    options = {"layers": [2], "strengths": [1.0], "replicates": 20, "folds": 3, "controls": []}
    sweep = gp.sweep_probes(store, target, position=["mean(all)", "max(all)"], **options)
    for pool in ("mean", "max"):
        x = read_position(store, 2, f"{pool}(all)", target.index)
        alone = gp.import_activations(store.path.parent / pool, {2: x.numpy()}, target.to_frame())
        expected = gp.sweep_probes(alone, target, **options).cell().scores
        np.testing.assert_array_equal(sweep.cell(position=f"{pool}(all)").scores, expected)
    direction = gp.probe_direction(store, target, layer=2, position="mean(all)", strength=1.0)
    assert direction.about["position"] == "mean(all)"
    assert direction.vector.abs().argmax() == 1


def test_plain_probes_are_told_to_pool(needles):
    store, target = needles
    with pytest.raises(
        DataError, match=r"^the probe 'logistic' reads one vector a row.*position='mean\(all\)'.*attention"
    ):
        gp.sweep_probes(store, target, position="all")
    with pytest.raises(DataError, match=r"'all'.*position='mean\(all\)'"):
        gp.probe_direction(store, target, layer=2, position="all")
    with pytest.raises(StoreError, match="has no token at 'image'"):
        gp.sweep_probes(store, target, position="mean(image)")


def test_a_probe_of_tokens_finds_what_pooling_blurs(needles):
    store, target = needles
    options = {"layers": [2], "replicates": 20, "folds": 3, "controls": []}
    probe = gp.find_probe("attention")
    attended = gp.sweep_probes(store, target, position="all", probe=probe, **options).best()["auc"].item()
    pooled = gp.sweep_probes(store, target, position="mean(all)", **options).best()["auc"].item()
    assert attended > 0.9
    assert attended > pooled


def test_a_probe_of_tokens_takes_one_token_a_row(needles):
    store, target = needles
    options = {"layers": [2], "replicates": 20, "folds": 3, "controls": [], "strengths": [1.0]}
    swept = gp.sweep_probes(store, target, position="max(all)", probe=["attention", "logistic"], **options)
    assert set(swept.best()["probe"]) == {"attention", "logistic"}
    assert swept.cell(probe="attention").verdict.probe.value > 0.5


def test_what_knows_no_tokens_refuses_probes_of_tokens(needles):
    store, target = needles
    x = store.layer(2, position="end")
    for call in (
        lambda: gp.online_code(x, target.to_numpy(), probe="attention"),
        lambda: gp.ProbeClassifier("attention").fit(x.numpy(), target.to_numpy()),
        lambda: gp.probe_direction(store, target, layer=2, position="end", probe="attention"),
    ):
        with pytest.raises(gp.ConfigError, match="'attention' reads tokens, and here there are only rows"):
            call()


def test_the_command_pools(needles, tmp_path, capsys):
    from gapprobe.cli import main

    store, _ = needles
    out = tmp_path / "out"
    main(["probe", str(store.path), "--target", "long", "--position", "mean(all)", "--folds", "3", "--out", str(out)])
    assert "logistic at mean(all), split random" in capsys.readouterr().out
