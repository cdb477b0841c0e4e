import dataclasses
import json
import mmap
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from benchmarks import _measure
from benchmarks._outcome import WrongResult
from benchmarks.store import OURS, READINGS, TITLES, Benchmark, Options, benchmark, main, render
from benchmarks.store_contestants import Memmap, Plain
from benchmarks.store_data import make_data
from benchmarks.store_peers import CONTESTANTS

# Several batches, several shards, several chunks of zarr.
DATA = dataclasses.replace(make_data(250_000, layers=3, width=16), shard_bytes=100_000)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return benchmark(DATA, tmp_path_factory.mktemp("benchmark"), runs=2)


def test_every_contestant_runs_every_operation_in_every_round_and_gives_the_same_data(results):
    ran = {contestant.name for contestant in CONTESTANTS} - set(results["left_out"])
    reading = ran - {contestant.name for contestant in CONTESTANTS if not contestant.reads}
    assert {Plain.name, OURS, "safetensors", "numpy memmap", "sqlite"} <= ran
    took_part = {("write", name) for name in ran} | {(what, name) for what in TITLES for name in reading}
    assert {(row["operation"], row["contestant"]) for row in results["rows"]} == took_part - {("open", Plain.name)}
    for row in results["rows"]:
        assert len(row["seconds"]) == len(row["cpu_seconds"]) == 2
        assert min(row["seconds"]) > 0
        assert row["check"].endswith("equal")
        assert row["floor"] == (None if row["operation"] == "open" else Plain.name)
    assert all(size >= DATA.bytes for size in results["disk_bytes"].values())
    assert {"python", "torch", "gapprobe"} <= set(results["versions"])


def test_what_was_written_is_taken_away(tmp_path):
    benchmark(make_data(20_000, layers=2, width=8), tmp_path, runs=1, only=("safetensors",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["layer", "row", "last", "some"])
def test_a_contestant_that_gives_other_data_is_refused(tmp_path, wrong):
    class Flipped(Memmap):
        name = "flipped"

    def flip(self, *arguments):
        result = getattr(Memmap, wrong)(self, *arguments)
        changed = [tensor.clone() for tensor in (result if isinstance(result, list) else [result])]
        changed[-1].view(-1).view(torch.uint8)[-1] ^= 1
        return changed if isinstance(result, list) else changed[0]

    setattr(Flipped, wrong, flip)
    with pytest.raises(WrongResult, match="flipped"):
        Benchmark(DATA, tmp_path, [Plain, Flipped], runs=1).run()


def test_the_floor_reads_as_many_bytes_from_the_beginning_on_and_around(tmp_path):
    Plain.write(tmp_path, DATA)
    everything = torch.cat([row.residual.view(-1).view(torch.uint8) for row in DATA.rows])
    floor = Plain(tmp_path)
    rows = list(range(len(DATA.rows)))
    assert torch.equal(floor.some(rows), everything)
    assert torch.equal(floor.row(1), everything[: DATA.rows[1].residual.nbytes])
    floor.close()


def test_an_unknown_contestant_and_a_full_disk_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="no contestant 'pickle'"):
        benchmark(DATA, tmp_path, runs=1, only=("pickle",))
    huge = dataclasses.replace(DATA, offsets=DATA.offsets * 10**12)
    with pytest.raises(SystemExit, match="smaller --size-gb"):
        benchmark(huge, tmp_path, runs=1)


def test_results_are_never_written_over(tmp_path):
    there = tmp_path / "results.json"
    there.write_text("{}")
    with pytest.raises(SystemExit, match="never written over"):
        main(Options(quick=True, json=there, folder=tmp_path))


def test_table_and_picture_show_every_contestant_and_operation(results, tmp_path):
    source = tmp_path / "store-2026-01-02.json"
    source.write_text(json.dumps(results))
    render(source, tmp_path / "docs")
    table = (tmp_path / "docs" / "store-benchmark.md").read_text(encoding="utf-8")
    picture = (tmp_path / "docs" / "store-benchmark.svg").read_text(encoding="utf-8")
    drawn = " ".join(ElementTree.fromstring(picture).itertext())
    for label in results["labels"].values():
        assert label in table
        assert label in drawn
    for operation, title in TITLES.items():
        assert f"## {title}\n" in table
        assert (title in drawn) == (operation != "open")


def test_ratios_are_of_medians():
    from benchmarks._render import markdown

    def row(name, *seconds):
        return {
            "operation": "write",
            "contestant": name,
            "seconds": seconds,
            "cpu_seconds": seconds,
            "peak_bytes": 3_000_000,
            "floor": "plain",
            "check": "",
        }

    rows = [row("plain", 2.0, 1.0, 9.0), row(OURS, 3.0, 3.0, 8.0), row("other", 12.0, 12.0, 12.0)]
    machine = {"cpu": "C", "cores": 2, "memory_bytes": 2**30, "kernel": "K"}
    labels = {each["contestant"]: each["contestant"] for each in rows}
    text = markdown({"machine": machine, "versions": {}, "labels": labels, "rows": rows}, TITLES, OURS, "T", "A.")
    assert "| plain | 2.00 s (1.00 s – 9.00 s) | 1.00 | 0.67 | 2.00 s | 3 |" in text
    assert "| **gapprobe** | **3.00 s (3.00 s – 8.00 s)** | **1.50** | **1.00** | **3.00 s** | **3** |" in text
    assert "| other | 12.0 s (12.0 s – 12.0 s) | 6.00 | 4.00 | 12.0 s | 3 |" in text


def test_the_clock_sees_time_processor_and_memory():
    result, cost = _measure.timed(lambda: len(b"x" * 50_000_000))
    assert result == 50_000_000
    assert 45_000_000 < cost.peak_bytes < 100_000_000
    assert 0 < cost.cpu_seconds < 10
    assert 0 < cost.seconds < 10


@pytest.mark.skipif(not _measure.can_drop, reason="no way to drop caches here")
def test_bytes_in_the_page_cache_are_counted_and_dropped(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(bytes(10 * mmap.PAGESIZE + 1))
    (tmp_path / "empty").touch()
    _measure.sync_tree(tmp_path)
    assert _measure._resident(tmp_path / "deep" / "file") == 11 * mmap.PAGESIZE
    left = 11 * mmap.PAGESIZE if _measure.machine(tmp_path)["filesystem"] == "tmpfs" else 0
    assert _measure.drop(tmp_path) == left


def test_each_reading_is_timed_cold_and_warm():
    assert set(TITLES) == {"write", "open"} | {f"{r.name}-{t}" for r in READINGS for t in ("cold", "warm")}
