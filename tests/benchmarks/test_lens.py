import dataclasses
import json

import pytest
import torch

from benchmarks._outcome import WrongResult
from benchmarks.lens import (
    AIMED,
    FLOOR,
    OURS,
    RIVAL,
    SHAPES,
    Benchmark,
    Options,
    benchmark,
    compared,
    goals,
    main,
    render,
    truth_of,
)
from benchmarks.lens_contestants import CONTESTANTS, Gapprobe, Matmul, Naive, make_case

SMALL = [(3, 7, 300, 16, torch.float32), (3, 7, 300, 16, torch.bfloat16)]


@pytest.fixture(scope="module")
def results():
    return benchmark(Options(runs=2), SMALL)


@pytest.fixture(scope="module")
def case():
    return make_case(*SMALL[0])


def test_every_contestant_runs_every_case_in_every_round(results):
    names = {each.name for each in CONTESTANTS}
    cases = {"lens-3x7x300x16", "lens-3x7x300x16-16bit"}
    assert {(row["operation"], row["contestant"]) for row in results["rows"]} == {(c, n) for c in cases for n in names}
    for row in results["rows"]:
        assert len(row["seconds"]) == len(row["cpu_seconds"]) == 2
        assert row["floor"] == FLOOR
        assert ("21 of 21 ranks the same" in row["check"]) == (row["contestant"] != FLOOR)
    assert set(results["left_out"]) == {"nnterp 1.3", "tuned-lens 0.2"}


def test_targets_rise_from_anywhere_to_the_top(case):
    rank = truth_of(case).rank
    assert rank[0].float().mean() > 30
    assert rank[-1].float().mean() < 3


@pytest.mark.parametrize("what", ["rank", "log_prob", "entropy", "top_log_prob", "shape"])
def test_a_contestant_that_reads_something_else_is_refused(case, what):
    truth, found = truth_of(case), Gapprobe(case).read()
    assert "21 of 21 ranks the same" in compared(OURS, case, truth, found)
    change = {
        "rank": {"rank": found.rank + (torch.arange(7) == 3)[:, None]},
        "log_prob": {"log_prob": found.log_prob + 1e-3},
        "entropy": {"entropy": found.entropy * torch.nan},
        "top_log_prob": {"top_log_prob": found.top_log_prob.flip(2)},
        "shape": {name: None if each is None else each[:, :6] for name, each in vars(found).items()},
    }[what]
    with pytest.raises(WrongResult, match="gapprobe"):
        compared(OURS, case, truth, dataclasses.replace(found, **change))


def test_a_wrong_contestant_ends_the_benchmark(case):
    class Unnormed(Naive):
        name = "unnormed"

        def logits(self, x):
            return x @ self.case.unembedding.weight.T

    with pytest.raises(WrongResult, match="unnormed"):
        Benchmark([Matmul, Gapprobe, Unnormed], runs=1).case(case)


def test_goals_are_those_of_the_first_shape():
    assert make_case(*SHAPES[0]).name == AIMED

    def row(operation, contestant, cpu, peak):
        return {"operation": operation, "contestant": contestant, "cpu_seconds": cpu, "peak_bytes": peak}

    rows = [
        row(AIMED, FLOOR, [1.0, 2.0, 9.0], 1),
        row(AIMED, OURS, [2.2], 10),
        row(AIMED, RIVAL, [3.3], 600),
        row("lens-1x1x1x1", FLOOR, [1.0], 1),
        row("lens-1x1x1x1", OURS, [5.0], 1),
    ]
    found = goals(rows)
    assert [(goal["value"], goal["met"]) for goal in found] == [(1.1, True), (1.5, False), (60.0, True), (5.0, None)]


def test_names_that_are_none_are_refused_and_results_never_written_over(tmp_path):
    with pytest.raises(SystemExit, match="no contestant 'lens'"):
        benchmark(Options(only=("lens",)))
    there = tmp_path / "results.json"
    there.write_text("{}")
    with pytest.raises(SystemExit, match="never written over"):
        main(Options(quick=True, json=there))


def test_the_quick_form_is_the_first_shape():
    found = benchmark(Options(quick=True, runs=1, only=(OURS,)), SMALL)
    assert {(row["operation"], row["contestant"]) for row in found["rows"]} == {
        ("lens-3x7x300x16", OURS),
        ("lens-3x7x300x16", FLOOR),
    }


def test_table_shows_every_contestant_case_and_goal(results, tmp_path):
    source = tmp_path / "lens-2026-01-02.json"
    source.write_text(json.dumps(results))
    render(source, tmp_path / "docs")
    table = (tmp_path / "docs" / "lens-benchmark.md").read_text(encoding="utf-8")
    for label in results["labels"].values():
        assert label in table
    for title in results["titles"].values():
        assert f"## {title}\n" in table
    assert table.count("peak memory of naive over ours") == 2
    assert "nnterp 1.3: asks for modules" in table
