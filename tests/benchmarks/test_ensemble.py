from dataclasses import replace

import pytest
import torch

from benchmarks import ensemble as bench
from benchmarks._outcome import WrongResult
from benchmarks.ensemble import EXACT, FLOOR, LOOP, OURS, STRENGTHS, Options, Work, benchmark, compared, make
from benchmarks.probes_data import FOLDS, make_layer
from gapprobe.probes.modules import ModuleProbe

PROBE = ModuleProbe(make, "mlp", STRENGTHS, steps=25, lr=1e-2, batch=64, every=5, patience=2)


def test_results_hold_every_contestant_and_a_verdict():
    results = benchmark(Options(runs=2), sizes=((90, 12),), probe=PROBE)
    assert [(row["operation"], row["contestant"]) for row in results["rows"]] == [
        ("ensemble-90x12", name) for name in (OURS, LOOP, FLOOR)
    ]
    for row in results["rows"]:
        assert len(row["seconds"]) == len(row["cpu_seconds"]) == 2
        assert row["floor"] == FLOOR
    assert results["rows"][0]["check"].startswith("log-odds of 20 members")
    (goal,) = results["goals"]
    assert goal["met"] == (goal["value"] >= 10)


@pytest.mark.parametrize(
    "probe",
    [
        PROBE,
        replace(PROBE, batch=1000),
        replace(PROBE, batch=16, held_out=0.3),  # more rows held out than a batch has
        # In float32 some members end 1e-2 apart: rounding puts a unit on the other side of its kink.
        ModuleProbe(make, "mlp", STRENGTHS, steps=300),
    ],
    ids=["batches", "all rows", "small batches", "as measured"],
)
def test_in_float64_the_ensemble_is_the_loop(probe):
    """Rows, batches, penalty, Adam, the rule to stop and members let go: a difference in any is 1e-4 at least."""
    work = Work(make_layer(200, 64), replace(probe, dtype=torch.float64))
    ours, theirs = bench.ensemble(work), bench.loop(work)
    assert ours.shape == (FOLDS * len(STRENGTHS), 200)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=EXACT)


def test_work_that_is_not_the_same_is_refused():
    work = Work(make_layer(90, 12), PROBE)
    exact = Work(work.layer, replace(PROBE, dtype=torch.float64))
    ours, theirs, twins = bench.ensemble(work), bench.loop(work), (bench.ensemble(exact), bench.loop(exact))
    assert compared(work, ours, theirs, twins).startswith("log-odds of 20 members")
    other = (torch.arange(20) == 3)[:, None]
    with pytest.raises(WrongResult, match="log-odds of member 3 are"):
        compared(work, ours + 0.5 * other, theirs, twins)
    # It is the loop's member that has drifted: ours is where float64 says.
    assert compared(work, ours, theirs + 0.5 * other, twins).startswith("log-odds of 20 members")
    with pytest.raises(WrongResult, match="log-odds of member 3 are"):
        compared(work, ours + 0.5 * other, theirs - 0.5 * other, twins)
    with pytest.raises(WrongResult, match="of half 1.0e-03"):
        compared(work, ours * 1.001, theirs, twins)
    with pytest.raises(WrongResult, match="log-odds of member 3 in float64 are"):
        compared(work, ours, theirs, (twins[0] + 1e-6 * other, twins[1]))
