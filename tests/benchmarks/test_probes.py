import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import probes, probes_data
from benchmarks._outcome import WrongResult
from benchmarks.probes import OURS, Benchmark, Options, benchmark, compared, goals, main, render
from benchmarks.probes_contestants import (
    CONTESTANTS,
    Gapprobe,
    Matmul,
    SklearnLbfgsF64,
    TooSlow,
    fit_layer,
    widths,
)
from benchmarks.probes_data import FOLDS, Sweep, load_layers, make_layer

SWEEP = Sweep("sweep-90x12", "Tiny", (make_layer(90, 12), make_layer(90, 12, seed=1)), torch.tensor([1e-3, 0.1, 10.0]))
SWEEP = dataclasses.replace(SWEEP, strengths=SWEEP.strengths.double())
NAMES = {contestant.name for contestant in CONTESTANTS}


@pytest.fixture(scope="module")
def certified():
    return [fit_layer(layer, SWEEP.strengths, range(FOLDS)) for layer in SWEEP.layers]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    real = tmp_path_factory.mktemp("real") / "real.pt"
    layers = [make_layer(80, 10, seed) for seed in range(5)]
    torch.save((torch.stack([layer.x for layer in layers]), layers[0].y), real)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "_MANY", (3, 70, 8))
        options = Options(runs=2, real=real, many=True)
        return benchmark(options, sizes=[(90, 12), (100, 8)])


def test_every_contestant_runs_every_sweep_in_every_round(results):
    sweeps = {"sweep-90x12", "sweep-100x8", "sweep-real-4x80x10"}
    took_part = {(sweep, name) for sweep in sweeps for name in NAMES} | {("many-3x70x8", OURS)}
    assert {(row["operation"], row["contestant"]) for row in results["rows"]} == took_part
    assert set(results["titles"]) == sweeps | {"many-3x70x8"}
    assert results["left_out"] == {}
    for row in results["rows"]:
        assert len(row["seconds"]) == len(row["cpu_seconds"]) == 2
        assert row["floor"] == (None if row["operation"] == "many-3x70x8" else Matmul.name)
        assert row["furthest"] <= 1e-5 or "shown only" in row["check"]
    checks = {(row["operation"], row["contestant"]): row["check"] for row in results["rows"]}
    assert checks["sweep-90x12", OURS].startswith("40 fits")
    assert checks["sweep-90x12", SklearnLbfgsF64.name].startswith("1 of 5 folds, times multiplied by 5; 8 fits")
    assert checks["sweep-real-4x80x10", OURS].startswith("160 fits")
    assert checks["many-3x70x8", OURS].startswith("2 threads; 150 fits")
    assert {"scikit-learn", "torch", "gapprobe"} <= set(results["versions"])


@pytest.mark.parametrize("contestant", [each for each in CONTESTANTS if not issubclass(each, Matmul)])
def test_every_contestant_solves_the_problem_that_is_compared(contestant, certified):
    each = contestant(SWEEP, certified)
    count, furthest = compared(each.name, SWEEP, certified, each.solutions(each.fit(range(FOLDS))), None)
    assert count == 2 * FOLDS * 3
    assert furthest <= 1e-3


def test_a_contestant_that_misses_the_optimum_is_refused():
    class Sloppy(SklearnLbfgsF64):
        name = "sloppy"
        settings = {"max_iter": 3}

    with pytest.raises(WrongResult, match="sloppy is .* of the optimum off it at sweep-90x12"):
        Benchmark([Matmul, Gapprobe, Sloppy], runs=1).sweep(SWEEP)


@pytest.mark.parametrize("changed", ["weights", "free", "nan"])
def test_a_contestant_whose_solution_is_another_is_refused(certified, changed):
    ours = Gapprobe(SWEEP, certified)
    solutions = ours.solutions(certified)
    last = solutions[-1]
    other = {
        "weights": {"weights": last.weights * 1.05},
        "free": {"free": last.free + 0.05},
        "nan": {"free": last.free * torch.nan},
    }[changed]
    solutions[-1] = dataclasses.replace(last, **other)
    with pytest.raises(WrongResult, match="gapprobe is .* fold 4"):
        compared(OURS, SWEEP, certified, solutions, 1e-5)
    assert compared(OURS, SWEEP, certified, solutions[:-1], 1e-5)[1] <= 1e-6


def test_a_certificate_that_claims_too_much_is_refuted(certified):
    boast = [dataclasses.replace(fits, objective=fits.objective * 1.001) for fits in certified]
    peer = SklearnLbfgsF64(SWEEP, boast)
    with pytest.raises(WrongResult, match="below what gapprobe certified"):
        compared(peer.name, SWEEP, boast, peer.solutions(peer.fit([0])), None)


def test_who_takes_too_long_is_left_out_by_reason(certified):
    class Slow(SklearnLbfgsF64):
        name = "slow"
        limit = 0.0

    with pytest.raises(TooSlow, match="1 of 6 fits done"):
        Slow(SWEEP, certified).fit([0])
    run = Benchmark([Matmul, Gapprobe, Slow], runs=2)
    run.sweep(SWEEP)
    assert "1 of 6 fits done" in run.left_out["slow, sweep-90x12"]
    assert {row["contestant"] for row in run.rows(["sweep-90x12"])} == {Matmul.name, OURS}


def test_a_peer_that_takes_long_runs_once(monkeypatch):
    monkeypatch.setattr(probes, "_ONCE", 0.0)
    run = Benchmark([Matmul, Gapprobe, SklearnLbfgsF64], runs=2)
    run.sweep(SWEEP)
    assert {name: len(timings.seconds) for (_, name), timings in run.timings.items()} == {
        Matmul.name: 2,
        OURS: 2,
        SklearnLbfgsF64.name: 1,
    }


def test_the_floor_multiplies_as_often_and_as_wide_as_gapprobe_did(certified):
    fits = certified[0]
    assert sum(widths(fits)) == int(fits.steps.sum())
    assert widths(fits)[0] == len(fits.steps)
    assert widths(fits) == sorted(widths(fits), reverse=True)


def test_residuals_are_as_described_and_the_same_for_a_seed():
    layer = make_layer(4000, 320, seed=3)
    assert torch.equal(layer.x, make_layer(4000, 320, seed=3).x)
    massive = list(probes_data.MASSIVE)
    x = layer.x.double()
    assert (x.mean(0).abs()[massive] > 10 * x.mean(0).abs().median()).all()
    rest = x[:, [j for j in range(320) if j not in massive]]
    values = torch.linalg.eigvalsh(rest.T.cov()).flip(0).numpy()
    slope = np.polyfit(np.log(np.arange(10, 200)), np.log(values[9:199]), 1)[0]
    assert slope == pytest.approx(-probes_data.POWER, abs=0.2)
    assert torch.bincount(layer.fold).tolist() == [800] * FOLDS
    assert 0.3 < layer.y.float().mean() < 0.7


def test_layers_of_a_file_are_spread_or_chosen(tmp_path):
    x = torch.arange(31).float()[:, None, None].expand(31, 10, 2)
    torch.save((x, torch.arange(10) % 2 == 0), tmp_path / "real.pt")
    assert [int(layer.x[0, 0]) for layer in load_layers(tmp_path / "real.pt")] == [1, 11, 20, 30]
    assert [int(layer.x[0, 0]) for layer in load_layers(tmp_path / "real.pt", [3, 2])] == [3, 2]
    with pytest.raises(SystemExit, match="no layer 31; there are 0 to 30"):
        load_layers(tmp_path / "real.pt", [3, 31])


def test_a_store_gives_layers_and_the_label_that_is_named(monkeypatch, tmp_path):
    class Header:
        layers, positions = (0, 4, 8), ("last_input",)

    class Store:
        header = Header
        rows = pd.DataFrame({"text": ["a", "b", "c"], "correct": [True, False, True]})

        def layer(self, layer, position):
            assert position == "last_input"
            return torch.full((3, 2), layer, dtype=torch.float16)

    monkeypatch.setattr(probes_data, "open_store", lambda _: Store())
    layers = load_layers(tmp_path, label="correct")
    assert [float(each.x[0, 0]) for each in layers] == [4.0, 8.0]
    assert [(each.x.dtype, each.y.tolist()) for each in layers] == [(torch.float32, [True, False, True])] * 2
    with pytest.raises(SystemExit, match="two values; such are: correct"):
        load_layers(tmp_path, label="text")


def test_goals_are_met_by_medians_of_processor_time():
    def row(operation, contestant, *seconds):
        times = {"seconds": (9.0,), "cpu_seconds": seconds}
        return {"operation": operation, "contestant": contestant, "furthest": 1e-7} | times

    rows = [
        row("sweep-2000x1024", OURS, 1.0, 2.0, 9.0),
        row("sweep-2000x1024", probes.RIVAL, 30.0),
        row("sweep-real-4x9x9", OURS, 1.0),
        row("sweep-real-4x9x9", probes.RIVAL, 7.9),
        row("sweep-2000x4096", OURS, 1.0),
        row("sweep-2000x4096", SklearnLbfgsF64.name, 1.0),
        row("many-33x2000x4096", OURS, 50.0),
    ]
    found = {goal["operation"]: goal for goal in goals(rows)}
    assert (found.pop("sweep-2000x4096")["at_least"], len(found)) == (None, 3)
    assert (found["sweep-2000x1024"]["value"], found["sweep-2000x1024"]["met"]) == (15.0, True)
    assert (found["sweep-real-4x9x9"]["at_least"], found["sweep-real-4x9x9"]["met"]) == (8.0, False)
    assert (found["many-33x2000x4096"]["value"], found["many-33x2000x4096"]["met"]) == (9.0, True)


def test_the_quick_form_is_the_first_size_with_few_contestants():
    results = benchmark(Options(quick=True, runs=1), sizes=[(90, 12), (100, 8)])
    assert {row["operation"] for row in results["rows"]} == {"sweep-90x12"}
    assert {row["contestant"] for row in results["rows"]} == {each.name for each in probes._QUICK}


def test_names_that_are_none_are_refused():
    with pytest.raises(SystemExit, match="no contestant 'liblinear'"):
        benchmark(Options(only=("liblinear",)))
    with pytest.raises(SystemExit, match="no operation 'many-33x2000x4096'"):
        benchmark(Options(operations=("many-33x2000x4096",)))
    with pytest.raises(SystemExit, match="--peer-folds is 1 to 5, not 6"):
        benchmark(Options(peer_folds=6))


def test_results_are_never_written_over(tmp_path):
    there = tmp_path / "results.json"
    there.write_text("{}")
    with pytest.raises(SystemExit, match="never written over"):
        main(Options(quick=True, json=there))


def test_table_shows_every_contestant_operation_and_goal(results, tmp_path):
    source = tmp_path / "probes-2026-01-02.json"
    source.write_text(json.dumps(results))
    render(source, tmp_path / "docs")
    table = (tmp_path / "docs" / "probes-benchmark.md").read_text(encoding="utf-8")
    for label in results["labels"].values():
        assert label in table
    for title in results["titles"].values():
        assert f"## {title}\n" in table
    assert table.count("processor time of sklearn-lbfgs-f32 over ours") == 3
    assert "seconds of the wall clock" in table
