import pytest
import torch

from benchmarks import ensemble as bench
from benchmarks.ensemble import FLOOR, LOOP, OURS, STRENGTHS, Options, Work, WrongFit, benchmark, compared, make
from benchmarks.probes_data import FOLDS, make_layer
from gapprobe.probes.adapters import ModuleProbe

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


def test_both_do_the_same_work_and_other_work_is_refused():
    """Batches smaller than the rows, and members that stop early: the loop draws both as the ensemble does."""
    work = Work(make_layer(90, 12), PROBE)
    ours, theirs = bench.ensemble(work), bench.loop(work)
    assert ours.shape == (FOLDS * len(STRENGTHS), 90)
    # 25 steps of Adam in float32, whose sums run in another order.
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    compared(work, ours, theirs)
    with pytest.raises(WrongFit, match="log-odds of member 3"):
        compared(work, ours + 0.5 * (torch.arange(20) == 3)[:, None], theirs)
    with pytest.raises(WrongFit, match="of half 1.0e-03"):
        compared(work, ours * 1.001, theirs)
