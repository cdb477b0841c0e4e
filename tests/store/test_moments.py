"""Moments against float64; what is allowed comes from the error that two passes in float32 make on the same data."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from gapprobe.errors import StoreError
from gapprobe.kernels.moments import alike
from gapprobe.store.format import ShardRecord, shard_name
from gapprobe.store.manifest import read_manifest
from gapprobe.store.moments import Moments, by_position, combine, moments
from gapprobe.store.reader import open_store
from tests.store.rows import make_row, reheaded, some_rows, write

T, D = 3000, 16


def normal(tokens=T, width=D, seed=0):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


CASES = {
    "normal": normal(),
    "mean a thousand, deviation a hundredth": normal() * 1e-2 + 1000,
    "bfloat16": normal().bfloat16(),
    "bfloat16 with a large mean": (normal() + 300).bfloat16(),
    "float16 at the end of its range": torch.where(normal() > 0, 65504.0, -65504.0).half(),
    "drifting": normal() * 1e-2 + torch.linspace(0, 10, T)[:, None],
    "two groups far apart": torch.cat([normal(T // 2), normal(T // 2, seed=1) + 1000]),
    "an outlier in each hundred tokens": normal() + 1000 * (torch.arange(T)[:, None] % 100 == 0),
    "several pieces": normal(40_000, 8),
    "a few tokens": normal(3),
    "two tokens": normal(2) + 100,
}


def while_written(x):
    """Those of all tokens, as a writer takes them of some."""
    return moments(x, np.arange(len(x)))


def when_asked_for(x):
    """Those of all tokens, as a reader takes them."""
    return Moments(len(x), *alike(x))


both_ways = pytest.mark.parametrize("taken", [while_written, when_asked_for])


def exact(x):
    """Mean and standard deviation in float64, by numpy."""
    x = x.double().numpy()
    return x.mean(0), x.std(0)


def two_passes(x):
    """The same in float32: the plain way."""
    x = x.float()
    mean = x.mean(0)
    return mean, (x - mean).square().mean(0).sqrt()


def check(x, mean, std, parts=1):
    """The largest error over the dimensions is at most twice that of two passes and a rounding to float32.

    A rounding of the mean is one of values: it may be much smaller than they. Several shards keep rounded means each,
    so that their common deviation has such a rounding in it.
    """
    (mean32, std32), (mean64, std64) = two_passes(x), exact(x)
    either = np.spacing(np.float32(max(std64.max(), np.abs(mean64).max())))
    deviation = np.spacing(np.float32(std64.max()))
    assert error(mean, mean64) <= 2 * (error(mean32, mean64) + either)
    assert error(std, std64) <= 2 * (error(std32, std64) + (deviation if parts == 1 else either))


def error(found, truth):
    return np.abs(found.double().numpy() - truth).max()


@pytest.mark.parametrize("name", CASES)
def test_each_position_errs_no_more_than_two_passes_in_float32_may(name):
    x = CASES[name]
    # All alike, or in all four ways at once.
    for marks in (torch.full((len(x),), 2, dtype=torch.uint8), (torch.arange(len(x)) * 7 // 3 % 4).to(torch.uint8)):
        count, mean, std = by_position(torch.stack([x, x.flip(1)]), marks, 2)
        groups = [marks & 1 == 1, marks & 2 == 2]
        assert count.tolist() == [int(group.sum()) for group in groups]
        for g, group in enumerate(groups):
            if group.any():
                check(x[group], mean[g, 0], std[g, 0])
                check(x.flip(1)[group], mean[g, 1], std[g, 1])
            else:
                assert not mean[g].any()
                assert not std[g].any()


@pytest.mark.parametrize("name", CASES)
def test_all_tokens_err_no_more_than_two_passes_in_float32_may(name):
    x = CASES[name]
    for tokens in (x, x[::3], x[1:].flip(1), x[:67], x[:66], x[:1]):
        found = when_asked_for(tokens)
        check(tokens, found.mean, found.std)


@both_ways
def test_one_token_is_its_own_mean_and_dimensions_that_never_change_deviate_by_nothing(taken):
    one = normal(1)
    found = taken(one)
    assert found.mean.equal(one[0].double())
    assert not found.variance.any()
    still = normal()
    still[:, 3] = 3.14159
    found = taken(still)
    assert found.mean[3] == still[0, 3].double()
    assert (found.variance == 0).tolist() == [i == 3 for i in range(D)]


@both_ways
def test_no_token_has_no_mean(taken):
    none = taken(torch.empty(0, D))
    for found in (none, combine([], D), combine([none], D)):
        assert found.count == 0
        assert found.mean.shape == found.std.shape == (D,)
        assert found.mean.isnan().all()
        assert found.variance.isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_what_is_not_finite_or_overflows_shows_in_its_dimension_and_groups_alone(value):
    """A square beyond float32 counts as infinite; nothing turns it into a plausible number."""
    x = torch.stack([normal(), normal(seed=1)])
    x[0, 700, 5] = value
    marks = (torch.arange(T) % 2 + 1).to(torch.uint8)  # token 700 is at position 0
    count, mean, std = by_position(x, marks, 2)
    assert count.tolist() == [T // 2, T // 2]
    bad = torch.zeros(2, 2, D, dtype=torch.bool)
    bad[0, 0, 5] = True
    assert (~std.isfinite()).equal(bad)
    assert not (~mean.isfinite() & ~bad).any()
    found = when_asked_for(x[0])
    assert (~found.std.isfinite()).equal(bad[0, 0])
    assert not (~found.mean.isfinite() & ~bad[0, 0]).any()


@both_ways
def test_groups_put_together_are_as_good_as_the_whole(taken):
    for x in CASES.values():
        whole = taken(x)
        for sizes in ([1, len(x) - 1], [len(x) - 1, 0, 1], [len(x) // 3 + 1] * 3):
            parts = [taken(part) for part in x.split(sizes if sum(sizes) == len(x) else len(x) // 3 + 1)]
            for group in (parts, parts[::-1]):
                together = combine(group, x.shape[1])
                assert together.count == whole.count
                check(x, together.mean.float(), together.std.float())


@both_ways
def test_the_mean_square_norm_is_that_of_the_vectors(taken):
    x = normal() + 2
    wanted = np.square(x.double().numpy()).sum(1).mean()
    assert taken(x).mean_square_norm == pytest.approx(wanted, rel=1e-7)
    assert taken(x).std.equal(taken(x).variance.sqrt())


def tokens_of(rows, header, layer, position=None):
    """All tokens of some rows at a layer, or those marked."""
    chosen = [slice(None) if position is None else row.token_marks >> position & 1 == 1 for row in rows]
    return torch.cat([row.residual[header.layers.index(layer)][keep] for row, keep in zip(rows, chosen, strict=True)])


def check_store(path, rows, header):
    store = open_store(path)
    for layer in header.layers:
        for index, position in enumerate((None, *header.positions)):
            x = tokens_of(rows, header, layer, index - 1 if position else None)
            found = store.moments(layer, position)
            assert found.count == len(x)
            check(x, found.mean.float(), found.std.float(), len(store.records))


def rows_with_gaps(header, shift=0.0):
    """40 rows: some without tokens, some without a token at a position, one with two."""
    rows = some_rows(40, header)
    rows[2].token_marks[:] = 0
    rows[4].token_marks[:] = 1
    return [replace(row, residual=(row.residual + shift).to(header.torch_dtype)) for row in rows]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shift", [0, 1000])
@pytest.mark.parametrize("shards", [1, 8])
def test_a_store_keeps_the_moments_of_all_its_shards(tmp_path, dtype, shift, shards):
    header = reheaded(dtype=dtype)
    rows = rows_with_gaps(header, shift)
    write(tmp_path, rows, header, batch=40 // shards)
    assert open_store(tmp_path).info().shards == shards
    check_store(tmp_path, rows, header)


def strip(path, numbers):
    """Take the moments out of some shards, as a writer that takes none would leave them: optional says the format."""
    records = []
    for record in read_manifest(path).records:
        file = path / shard_name(record.shard)
        if record.shard in numbers:
            content = without_moments(file.read_bytes())
            file.write_bytes(content)
            record = replace(record, shard_bytes=len(content), shard_xxh128=xxhash.xxh3_128_hexdigest(content))
        records.append(record)
    (path / "manifest.jsonl").write_bytes(b"".join(ShardRecord.to_line(record) for record in records))


def without_moments(content):
    """The same safetensors file without the tensors `moments.*`."""
    begin = 8 + int.from_bytes(content[:8], "little")
    entries, data = json.loads(content[8:begin]), bytearray()
    metadata = entries.pop("__metadata__")
    kept = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        piece = content[begin + first : begin + last]
        if name == "block_checksums":
            piece = b"".join(xxhash.xxh3_64_digest(data[at : at + 2**20]) for at in range(0, len(data), 2**20))
            entry["shape"] = [len(piece) // 8, 8]
        if not name.startswith("moments."):
            kept[name] = entry | {"data_offsets": [len(data), len(data) + len(piece)]}
            data += piece
    text = json.dumps({"__metadata__": metadata} | kept).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("numbers", [{0, 1, 2, 3}, {1, 2}])
def test_shards_without_moments_give_the_same(tmp_path, numbers):
    header = reheaded(dtype="float32")
    rows = rows_with_gaps(header)
    write(tmp_path, rows, header, batch=10)
    before = {
        (layer, position): open_store(tmp_path).moments(layer, position)
        for layer in header.layers
        for position in (None, *header.positions)
    }
    strip(tmp_path, numbers)
    store = open_store(tmp_path)
    assert store.verify() == []
    kept = [b"moments.mean" in Path(tmp_path, shard_name(r.shard)).read_bytes() for r in store.records]
    assert [i for i, has in enumerate(kept) if not has] == sorted(numbers)
    check_store(tmp_path, rows, header)
    for (layer, position), wanted in before.items():
        found = store.moments(layer, position)
        assert found.count == wanted.count
        # Both were rounded to float32 by shard, or not.
        assert found.mean.allclose(wanted.mean, rtol=0, atol=2e-7)
        assert found.std.allclose(wanted.std, rtol=2e-7, atol=0)


def test_positions_and_stores_without_tokens_have_no_mean(tmp_path):
    rows = [make_row(name, 2) for name in "ab"]
    for row in rows:
        row.token_marks[:] = 1
    for name, stored in (("none", []), ("failed", [make_row("c", 0)]), ("unmarked", rows)):
        write(tmp_path / name, stored)
        found = open_store(tmp_path / name).moments(3, "last_output")
        assert found.count == 0
        assert found.mean.isnan().all()
        assert found.variance.isnan().all()
    assert open_store(tmp_path / "unmarked").moments(3, "last_input").count == 4


def test_a_row_that_is_not_finite_makes_its_moments_so_and_verify_names_it(tmp_path):
    rows = [make_row(str(i), 2) for i in range(4)]
    rows[2].residual[1, 0, 4] = torch.nan
    write(tmp_path, rows, batch=2)
    store = open_store(tmp_path)
    assert store.moments(1).mean.isnan().nonzero()[:, 0].tolist() == [4]
    assert store.moments(1, "last_input").mean.isnan().nonzero()[:, 0].tolist() == [4]
    for found in (store.moments(1, "last_output"), store.moments(0), store.moments(3)):
        assert found.mean.isfinite().all()
        assert found.variance.isfinite().all()
    assert [problem.rows for problem in store.verify()] == [("2",)]


def test_layers_and_positions_that_are_not_there_are_named(tmp_path):
    write(tmp_path, some_rows(3))
    store = open_store(tmp_path)
    with pytest.raises(StoreError, match="no layer 2"):
        store.moments(2)
    with pytest.raises(StoreError, match="no position 'image'"):
        store.moments(3, "image")
