"""A store that claims a terabyte: 10,000 shards, all links to one file most of which is a hole that reads as zeros."""

import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gapprobe.store.batches import TokenBatches
from gapprobe.store.format import ShardRecord, ShardSize, rows_name, shard_name
from gapprobe.store.packing import plan_shard
from gapprobe.store.reader import open_store
from tests.store.rows import HEADER

SHARDS, ROWS, TOKENS = 10_000, 12, 32
WIDE = replace(HEADER, layers=tuple(range(33)), width=4096)


def build(path, shards):
    """Write the store; return how many bytes it claims. Each shard has a table of rows of its own beside it."""
    for name in ("shards", "rows"):
        (path / name).mkdir(parents=True)
    (path / "store.json").write_bytes(WIDE.to_json())
    template, number = io.BytesIO(), "#" * 6
    table = pa.table({"id": [f"{number}/{row:02d}" for row in range(ROWS)], "setting": ["visual"] * ROWS})
    # Plain, so that the number can be replaced in the file's bytes: 10,000 tables take longer to encode.
    pq.write_table(table, template, compression="none", use_dictionary=False, write_statistics=False)
    content = template.getvalue()
    size = claim(path / shard_name(0), len(content))
    with (path / "manifest.jsonl").open("wb") as manifest:
        for shard in range(shards):
            if shard:
                os.link(path / shard_name(0), path / shard_name(shard))
            rows = content.replace(number.encode(), f"{shard:06d}".encode())
            (path / rows_name(shard)).write_bytes(rows)
            digest = hashlib.sha256(rows).hexdigest()
            manifest.write(ShardRecord(shard, ROWS, ROWS * TOKENS, size, "0" * 32, len(rows), digest).to_line())
    return size * shards


def claim(path, table):
    """Write a shard of which the header, offsets and marks exist, and layer 3 of each row's first token: ones."""
    plan = plan_shard(WIDE, ShardSize(ROWS, ROWS * TOKENS, table))
    first = np.arange(0, ROWS * TOKENS, TOKENS)
    marks = np.zeros(ROWS * TOKENS, np.uint8)
    marks[first] = 1
    ones = torch.ones(WIDE.width, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    with path.open("wb") as file:

        def put(name, data, line=0):
            file.seek(plan.tensors[name][2] + line * len(data))
            file.write(data)

        file.truncate(plan.size)
        file.write(plan.head)
        put("offsets", np.append(first, ROWS * TOKENS).astype(np.int64).tobytes())
        put("token_marks", marks.tobytes())
        for row in range(ROWS):
            put("residual.03", ones, row * TOKENS)
            put("position.00", ones, 3 * ROWS + row)
    return plan.size


@pytest.fixture
def terabyte(tmp_path):
    """Two seconds and 45 MB of disk."""
    assert build(tmp_path / "s", SHARDS) > 10**12
    yield tmp_path / "s"
    shutil.rmtree(tmp_path / "s")


CHILD = """
import json, sys, time
from pathlib import Path
from gapprobe.store.reader import open_store

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def opened():
    start = time.perf_counter()
    return open_store(sys.argv[1]), time.perf_counter() - start

before, found = resident(), {}
found["open"] = min(opened()[1] for _ in range(5))
store = opened()[0]
found["rows"] = len(store)
found["opened"] = resident() - before
row = store.row("005000/03")
few = store.layer(3, rows=["009999/11", "000000/00", "009999/11"])
last = store.layer(3, "last_input", ["000001/00", "004321/07"])
found["row"] = [list(row.residual.shape), row.residual[:, 0, 0].tolist(), row.columns]
found["few"] = few[:, 0].nonzero()[:, 0].tolist(), list(few.shape)
found["last"] = last.unique().tolist(), list(last.shape)
found["read"] = resident() - before
print(json.dumps(found))
"""


def test_opening_a_terabyte_takes_no_time_and_reading_of_it_no_memory(terabyte):
    child = subprocess.run([sys.executable, "-c", CHILD, terabyte], capture_output=True, text=True, check=True)
    found = json.loads(child.stdout)
    assert found["open"] < 1
    assert found["rows"] == SHARDS * ROWS
    assert found["opened"] < 50 << 20
    assert found["read"] < 200 << 20
    assert found["row"] == [[33, 32, 4096], [float(layer == 3) for layer in range(33)], {"setting": "visual"}]
    assert found["few"] == [[0, 32, 64], [96, 4096]]
    assert found["last"] == [[1.0], [2, 4096]]


def open_now():
    """Descriptors and maps of files that this process holds."""
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".safetensors")]
    return len(list(Path("/proc/self/fd").iterdir())), len(maps)


def test_reading_many_shards_holds_none_of_them(tmp_path):
    build(tmp_path / "s", 150)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = open_now()
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[0] + 20, hard))
    try:
        store = open_store(tmp_path / "s")
        kept = [store.layer(3, "last_input"), store.layer(3, rows=store.ids[5::120])]
        kept += [store.batch(store.ids[::60], [3, 4]), store.row(store.ids[70]), store.moments(0, "last_input")]
        kept += list(TokenBatches(store, token_budget=320, layers=[3], position="last_input"))
        assert kept[0].shape == (150 * ROWS, 4096)
        assert kept[0].min() == 1
        assert open_now() == before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_maps_end_with_the_tensors_that_need_them(tmp_path):
    build(tmp_path / "s", 3)
    store, before = open_store(tmp_path / "s"), open_now()
    one = store.layer(3, rows=store.ids[12:14])
    view = one[32:]
    # Before Python 3.13, a map keeps a descriptor too.
    assert open_now() in {(before[0], 1), (before[0] + 1, 1)}
    del one
    assert view[0, 0] == 1
    del view
    assert open_now() == before
