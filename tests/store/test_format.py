import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from gapprobe.errors import StoreError
from gapprobe.store.format import ROLES, ShardRecord, StoreHeader
from tests.store.rows import HEADER, reheaded, some_rows, write


def test_a_store_is_read_with_json_safetensors_and_pyarrow_alone(tmp_path):
    rows = some_rows(12)
    write(tmp_path / "s", rows, batch=5)
    store = tmp_path / "s"
    fields = json.loads((store / "store.json").read_text())
    assert (fields["format"], fields["version"], fields["layers"]) == ("gapprobe.store", 2, [0, 1, 3])
    found = {}
    for line in (store / "manifest.jsonl").read_bytes().splitlines():
        record = json.loads(line)
        claimed = record["line_sha256"]
        assert hashlib.sha256(line.replace(f'"line_sha256":"{claimed}",'.encode(), b"")).hexdigest() == claimed
        number = f"{record['shard']:06d}"
        content = Path(store, "shards", f"{number}.safetensors").read_bytes()
        assert (len(content), xxhash.xxh3_128_hexdigest(content)) == (record["shard_bytes"], record["shard_xxh128"])
        parquet = Path(store, "rows", f"{number}.parquet").read_bytes()
        assert (len(parquet), hashlib.sha256(parquet).hexdigest()) == (record["rows_bytes"], record["rows_sha256"])
        table = pq.read_table(store / "rows" / f"{number}.parquet").to_pylist()
        with safe_open(store / "shards" / f"{number}.safetensors", "pt") as shard:
            assert shard.metadata()["fingerprint"] == fields["fingerprint"]
            offsets = shard.get_tensor("offsets").tolist()
            assert (len(offsets) - 1, offsets[-1]) == (record["rows"], record["tokens"])
            assert bytes(shard.get_tensor("rows_parquet").tolist()) == parquet
            data = content[8 + int.from_bytes(content[:8], "little") :]
            *_, last = shard.offset_keys()
            sums = shard.get_tensor(last).tolist()
            data = data[: len(data) - 8 * len(sums)]
            blocks = [data[at : at + 2**20] for at in range(0, len(data), 2**20)]
            assert (last, sums) == ("block_checksums", [list(xxhash.xxh3_64_digest(block)) for block in blocks])
            check_moments(shard, fields)
            for i, columns in enumerate(table):
                tokens = slice(offsets[i], offsets[i + 1])
                by_token = [name for name in shard.offset_keys() if name.startswith(("residual.", "token_"))]
                tensors = {name: shard.get_tensor(name)[tokens] for name in by_token}
                found[columns["id"]] = (columns, tensors)
    assert set(found) == {row.id for row in rows}
    for row in rows:
        columns, tensors = found[row.id]
        assert columns == {"id": row.id, **row.columns}
        for i, layer in enumerate(HEADER.layers):
            assert tensors[f"residual.{layer:02d}"].equal(row.residual[i])
        for name in ("token_ids", "token_positions", "token_roles", "token_marks"):
            assert tensors[name].equal(getattr(row, name))


def check_moments(shard, fields):
    """As the page says: of the tokens at each position, by layer."""
    marks = shard.get_tensor("token_marks")
    for i, group in enumerate(marks >> i & 1 == 1 for i in range(len(fields["positions"]))):
        assert shard.get_tensor("moments.count")[i] == group.sum()
        for k, layer in enumerate(fields["layers"]):
            residual = shard.get_tensor(f"residual.{layer:02d}")[group].double()
            if len(residual):
                mean, std = shard.get_tensor("moments.mean")[i, k], shard.get_tensor("moments.std")[i, k]
                assert mean.double().allclose(residual.mean(0), atol=1e-6)
                assert std.double().allclose(residual.std(0, correction=0), atol=1e-6)


def test_the_code_of_the_format_page_reads_a_row(tmp_path):
    rows = some_rows(9)
    write(tmp_path / "s", rows)
    page = (Path(__file__).parents[2] / "docs" / "store-format.md").read_text()
    names = {"store": str(tmp_path / "s"), "wanted": rows[7].id}
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert names["residual"].equal(rows[7].residual[2])


def test_data_begin_on_a_page(tmp_path):
    write(tmp_path / "s", some_rows(3))
    content = (tmp_path / "s" / "shards" / "000000.safetensors").read_bytes()
    assert (8 + int.from_bytes(content[:8], "little")) % 4096 == 0


def test_roles_are_those_of_the_format_page():
    page = (Path(__file__).parents[2] / "docs" / "store-format.md").read_text()
    listed = page.split("`token_roles`: ")[1].split("\n\n")[0]
    found = {name.replace(" ", "_"): int(code) for code, name in re.findall(r"(\d+) (answer cue|\w+)", listed)}
    assert dict(ROLES) == found


def test_header_survives_json():
    assert StoreHeader.from_json(HEADER.to_json(), "here") == HEADER


def test_the_fingerprint_is_the_one_the_page_defines():
    fields = {
        "model.architecture": "A", "model.family": "llava", "model.weights": "abc", "processor": "def",
        "attention": "eager", "padding_side": "left", "dtype": "bfloat16", "layers": [0, 1, 3], "width": 6,
        "positions": ["last_input", "last_output"], "generation.max_new_tokens": 10, "generation.stop": "###",
        "generation.temperature": 0.5,
    }  # fmt: skip
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    assert HEADER.fingerprint == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float64"}, {"layers": ()}, {"layers": (1, 1)}, {"layers": (-1,)}, {"width": 0}, {"width": 1 << 24},
        {"positions": ("a", "a")}, {"positions": tuple("abcdefghi")}, {"generation": {"t": float("nan")}},
    ],
)  # fmt: skip
def test_a_header_that_no_store_can_have_is_refused(changes):
    with pytest.raises(StoreError):
        reheaded(**changes)


def edited(**changes) -> bytes:
    return json.dumps(json.loads(HEADER.to_json()) | changes).encode()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (edited(version=3), "version 3; this gapprobe reads 2. Update gapprobe"),
        (edited(version=1), "version 1; this gapprobe reads 2. No release wrote it"),
        (edited(version="1"), "does not describe a gapprobe store"),
        (edited(format="zarr"), "does not describe a gapprobe store"),
        (edited(width=7), "fingerprint"),
        (edited(width="6"), "'width'"),
        (edited(width=True), "'width'"),
        (edited(layers=[0, "1"]), "'layers'"),
        (edited(model=None), "'model'"),
        (edited(generation={"stop": []}), "'generation'"),
        (b"", "damaged"),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "damaged"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b"\xff\xfe", "damaged"),
        (b" " * (1 << 20) + HEADER.to_json(), "more than"),
    ],
)
def test_a_damaged_or_newer_header_is_refused(text, told):
    with pytest.raises(StoreError, match=told):
        StoreHeader.from_json(text, "store.json")


def test_unknown_fields_are_ignored():
    assert StoreHeader.from_json(edited(colour="blue"), "store.json") == HEADER


@given(st.integers(0, 10**9), st.integers(0, 10**12), st.text("0123456789abcdef", min_size=64, max_size=64))
def test_manifest_lines_round_trip_with_fields_of_the_future(shard, size, checksum):
    record = ShardRecord(shard, 3, size, size, checksum, size, checksum)
    line = replace(record, later={"colour": "blue"}).to_line()
    assert line.endswith(b"\n")
    read = ShardRecord.from_line(line[:-1])
    assert read == record
    assert read.to_line() == line


@given(st.data())
def test_any_changed_byte_of_a_manifest_line_is_seen(data):
    line = bytearray(ShardRecord(1, 2, 3, 4, "a" * 64, 5, "b" * 64).to_line()[:-1])
    line[data.draw(st.integers(0, len(line) - 1))] ^= data.draw(st.integers(1, 255))
    assert ShardRecord.from_line(bytes(line)) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_no_manifest_line(line):
    assert ShardRecord.from_line(line) is None


@pytest.mark.parametrize("change", [{"shard": -1}, {"shard": 10**10}, {"rows": "2"}, {"tokens": None}])
def test_a_manifest_line_with_a_sound_checksum_but_impossible_fields_is_refused(change):
    body = json.dumps(
        dict(shard=1, rows=2, tokens=3, shard_bytes=4, shard_xxh128="a", rows_bytes=5, rows_sha256="b") | change
    )
    line = b'{"line_sha256":"%s",' % hashlib.sha256(body.encode()).hexdigest().encode() + body[1:].encode()
    with pytest.raises(StoreError):
        ShardRecord.from_line(line)
