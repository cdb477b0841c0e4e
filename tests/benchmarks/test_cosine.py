import json

import numpy as np
import pytest

from benchmarks import cosine
from benchmarks._outcome import WrongResult
from benchmarks.cosine import FLOOR, OURS, Operation, Options, benchmark, goals, main, render


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cosine, "WIDTH", 320)
        return benchmark(Options(runs=2, rows=64, folder=tmp_path_factory.mktemp("bench")))


def test_every_contestant_runs_every_operation_in_every_round(results):
    memory = {f"cosine-{kind}-{name}" for kind in ("raw", "all") for name in cosine.DTYPES}
    took_part = {(operation, name) for operation in memory for name in (FLOOR, OURS, *cosine.PEERS)}
    took_part |= {(cosine.MAPPED, name) for name in (FLOOR, OURS, *cosine.PEERS)}
    took_part |= {(f"cosine-store-bfloat16-{cosine.LAYERS}", name) for name in (FLOOR, OURS, "torch")}
    assert {(row["operation"], row["contestant"]) for row in results["rows"]} == took_part
    for row in results["rows"]:
        assert len(row["seconds"]) == len(row["cpu_seconds"]) == 2
        assert row["floor"] == FLOOR
        assert ("off from float64" in row["check"]) == (row["contestant"] != FLOOR)
    sizes = {row["operation"]: row["bytes"] for row in results["rows"]}
    assert sizes["cosine-raw-float32"] == 2 * 64 * 320 * 4
    assert sizes["cosine-store-bfloat16-4"] == 4 * 64 * 320 * 2


@pytest.mark.parametrize("off", [1e-4, np.nan])
def test_a_contestant_that_is_off_is_refused(off):
    wrong = Operation("cosine-raw-x", "X", 8, np.ones((1, 3)), {"sloppy": lambda: np.array([[1, 1 + off, 1]])})
    with pytest.raises(WrongResult, match="sloppy is off by .* in cosine-raw-x"):
        wrong.run(["sloppy"])


def test_goals_are_met_by_medians_of_processor_time():
    def row(contestant, *seconds):
        return {"operation": "cosine-raw-x", "contestant": contestant, "cpu_seconds": seconds}

    found = goals([row(FLOOR, 0.8, 0.8, 9.0), row(OURS, 1.0, 0.5, 2.0), row("numpy", 0.9)])
    assert [(goal["value"], goal["met"]) for goal in found] == [(0.8, True), (0.9, False)]


def test_names_that_are_none_are_refused_and_results_never_written_over(tmp_path):
    with pytest.raises(SystemExit, match="no operation 'cosine-raw-int8'"):
        benchmark(Options(only=("cosine-raw-int8",)))
    there = tmp_path / "results.json"
    there.write_text("{}")
    with pytest.raises(SystemExit, match="never written over"):
        main(Options(quick=True, json=there))


def test_the_table_shows_every_contestant_operation_and_goal(results, tmp_path):
    source = tmp_path / "cosine-2026-01-02.json"
    source.write_text(json.dumps(results))
    render(source, tmp_path / "docs")
    table = (tmp_path / "docs" / "cosine-benchmark.md").read_text(encoding="utf-8")
    for label in results["labels"].values():
        assert label in table
    for title in results["titles"].values():
        assert f"## {title}\n" in table
    assert table.count("share of the bandwidth of one thread") == len(results["titles"])
