"""Memory: told before any fit, and not exceeded, however large the store."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gapprobe.errors import DataError
from gapprobe.kernels.preconditioner import FEWEST, TOGETHER
from gapprobe.probes.reading import Reading
from gapprobe.probes.room import Need
from gapprobe.probes.sweep import sweep_probes
from gapprobe.store.exchange.importing import import_activations

ROWS, LAYERS, WIDTH = 2000, 40, 512

# In a process of its own, whose memory nothing else has grown. A first, small sweep brings in what any sweep takes:
# the libraries' own code.
SWEEP = """
import json, sys
from pathlib import Path
import numpy as np, pandas as pd
import gapprobe as gp
from gapprobe.probes.room import Need

needs, jobs = [], Need.jobs
def told(self, wanted, free):
    needs.append(self.layer + self.kept)
    return jobs(self, wanted, free)
Need.jobs = told

def peak():  # not getrusage's, which begins with that of the process that started this one
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10

folder, probe = sys.argv[1:]
rng = np.random.default_rng(0)
labels = pd.DataFrame({"right": rng.random(200) < 0.5}, index=[f"s{i}" for i in range(200)])
small = gp.import_activations(f"{folder}/small-{probe}", rng.normal(size=(200, 2, 16)).astype("float32"), labels)
settings = {"probe": probe, "strengths": [0.1], "folds": 3, "permutations": 1, "replicates": 20, "jobs": 1}
gp.sweep_probes(small, "right", **settings)
Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
before = peak()
sweep = gp.sweep_probes(gp.open_store(f"{folder}/large"), "right", **settings)
print(json.dumps({"grown": peak() - before, "need": needs[-1], "auc": sweep.best()["auc"][0]}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("room")
    rng = np.random.default_rng(0)
    right = rng.random(ROWS) < 0.5
    x = np.empty((ROWS, LAYERS, WIDTH), dtype=np.float32)
    for layer in range(LAYERS):
        x[:, layer] = rng.normal(size=(ROWS, WIDTH))
    x[:, 7, 3] += 4 * right
    labels = pd.DataFrame({"right": right}, index=[f"r{i}" for i in range(ROWS)])
    return folder, import_activations(folder / "large", x, labels)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says what a process took at most")
@pytest.mark.parametrize("probe", ["logistic", "mean_difference"])
def test_a_store_larger_than_what_a_sweep_may_take_is_swept(large, probe):
    folder, store = large
    done = subprocess.run([sys.executable, "-c", SWEEP, str(folder), probe], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["grown"] <= told["need"] < store.info().bytes
    assert told["auc"] > 0.9  # the planted layer was read


def need_of(store, **options):
    """Return what a sweep says that it needs, having been stopped before any fit."""
    asked = []

    class Told(Exception):
        pass

    def jobs(*given):
        asked.append(given[0])
        raise Told

    settings = {"replicates": 20, "permutations": 1, "folds": 3} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Need, "jobs", jobs)
        with pytest.raises(Told):
            sweep_probes(store, "right", **settings)
    return asked[0]


def test_the_estimate_grows_with_what_is_asked_for(large):
    _, store = large
    base = need_of(store, layers=[0, 1])
    more = need_of(store, layers=[0, 1, 2, 3])
    assert more.layer == base.layer
    scores = 8 * ROWS * 6 * (1 + 1 + 1)  # at six strengths: of the probe twice, and of one permutation
    assert more.kept - base.kept == 2 * scores
    held = need_of(store, layers=[0, 1], coefficients=True)
    assert held.kept - base.kept == 2 * 8 * 6 * 3 * (WIDTH + 1)
    assert need_of(store, layers=[0, 1], replicates=1000).after == 50 * base.after
    assert need_of(store, layers=[0, 1], seed=[0, 1]).layer == base.layer  # seeds are fitted one after the other
    # Fits beyond what is done in one go bring only the scores of rows that they are judged on.
    many = need_of(store, layers=[0, 1], permutations=1000)
    most = need_of(store, layers=[0, 1], permutations=2000)
    assert most.layer - many.layer == 8 * 1000 * ROWS * 6


def test_hessians_that_folds_share_are_counted_where_rows_are_many_enough_for_them(tmp_path):
    def need(rows: int) -> int:
        rng = np.random.default_rng(0)
        labels = pd.DataFrame({"right": rng.random(rows) < 0.5}, index=[f"r{i}" for i in range(rows)])
        x = rng.normal(size=(rows, 1, WIDTH)).astype(np.float32)
        return need_of(import_activations(tmp_path / str(rows), x, labels)).layer

    few, many, more = (need(FEWEST * WIDTH + i) for i in (-8, 0, 8))
    # Three folds each of the probe, its shuffled labels and three controls, at six strengths.
    assert many - few == more - many + 8 * min(15 * 6 * WIDTH**2, TOGETHER)


def test_jobs_are_fewer_where_memory_holds_fewer_and_none_is_refused_with_the_figures():
    need = Need(layer=100_000_000, kept=50_000_000, after=1000, what="7 rows")
    assert need.jobs(8, 10_000_000_000) == 8
    assert need.jobs(8, 370_000_000) == 3
    assert need.jobs(1, 370_000_000) == 1
    with pytest.raises(DataError, match=r"one layer of 7 rows takes about 100.0 MB of memory, and 50.0 MB more .* 149"):
        need.jobs(8, 149_000_000)
    with pytest.raises(DataError, match=r"the bootstrap takes about 1.0 GB of memory.*use fewer replicates"):
        Need(layer=10, kept=10, after=1_000_000_000, what="").jobs(1, 1_000_000)


def test_a_sweep_that_memory_does_not_hold_is_refused_before_any_fit(large, monkeypatch):
    _, store = large

    def never(*_, **__):
        raise AssertionError("read a layer")

    monkeypatch.setattr(Reading, "__call__", never)
    with pytest.raises(AssertionError, match="read a layer"):
        sweep_probes(store, "right")
    monkeypatch.setattr("gapprobe.probes.sweep.free_memory", lambda: 20_000_000)
    with pytest.raises(
        DataError, match=r"2,000 rows x 512 wide x 55 fits at up to 6 strengths takes about .* are free"
    ):
        sweep_probes(store, "right")
