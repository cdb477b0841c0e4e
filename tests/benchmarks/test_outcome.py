import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import _outcome
from benchmarks._measure import Cost
from benchmarks._outcome import RESULTS, Runs, WrongResult, goals_section, judged, keep, one_thread

ROOT = RESULTS.parent.parent


@dataclass
class Options:
    quick: bool = False
    json: Path | None = None


def results():
    return {"goals": [judged("sweep", "times", 2.0, 2, at_least=1.5)], "rows": []}


def test_costs_of_something_done_often_or_in_part_are_of_one_time():
    runs = Runs()
    runs.add("read", "ours", Cost(3.0, 1.5, 10), done=3).check = "equal"
    runs.add("read", "ours", Cost(6.0, 1.5, 7), done=3)
    runs.add("fit", "peer", Cost(1.00004, 0.5, 1), done=1 / 5, digits=3).more["furthest"] = 1e-7
    read, fit = runs.rows(["write", "read", "fit"], ["ours", "peer"], {"read": "plain"}.get)
    assert read == {
        "operation": "read",
        "contestant": "ours",
        "seconds": [1.0, 2.0],
        "cpu_seconds": [0.5, 0.5],
        "peak_bytes": 10,
        "floor": "plain",
        "check": "equal",
    }
    assert (fit["seconds"], fit["cpu_seconds"], fit["floor"], fit["furthest"]) == ([5.0], [2.5], None, 1e-7)


@pytest.mark.parametrize(
    ("value", "bound", "met", "said"),
    [
        (2.0, {"at_least": 2.0}, True, "2.0 | at least 2 | yes"),
        (1.999, {"at_least": 2.0}, False, "2.0 | at least 2 | **no**"),
        (30.0, {"at_most": 30.0}, True, "30.0 | at most 30 | yes"),
        (30.001, {"at_most": 30.0}, False, "30.0 | at most 30 | **no**"),
        (np.nan, {"at_most": 30.0}, False, "nan | at most 30 | **no**"),
        (1.0, {"at_least": None}, None, "1.0 |  | shown only"),
        (1.0, {}, None, "1.0 |  | shown only"),
    ],
)
def test_a_value_is_judged_before_it_is_rounded(value, bound, met, said):
    goal = judged("sweep", "times", value, 2, **bound)
    assert goal["met"] is met
    assert f"| `sweep` | times | {said} |\n" in goals_section([goal])


def test_a_full_run_gets_a_new_file_every_time(monkeypatch, tmp_path):
    monkeypatch.setattr(_outcome, "RESULTS", tmp_path / "results")
    for _ in range(3):
        keep("demo", Options(), results)
    *others, first = sorted((tmp_path / "results").iterdir())
    assert [path.name for path in others] == [f"{first.stem}-2.json", f"{first.stem}-3.json"]
    assert json.loads(first.read_text()) == results()


def test_a_quick_run_prints_its_results_and_tells_its_goals_beside_them(capsys):
    keep("demo", Options(quick=True), results)
    said = capsys.readouterr()
    assert json.loads(said.out) == results()
    assert re.fullmatch(r"sweep +times +2\.000 at least 1\.5 +met\n", said.err)


def test_a_wrong_result_ends_the_benchmark_and_nothing_is_written(tmp_path):
    def wrong():
        raise WrongResult("sloppy is off by 1")

    with pytest.raises(SystemExit, match="stopped: sloppy is off by 1"):
        keep("demo", Options(json=tmp_path / "results.json"), wrong)
    assert list(tmp_path.iterdir()) == []


def test_one_thread_is_put_back():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("threads", "begun"), [("2", 2), ("1", 1)])
def test_a_program_starts_once_more_unless_it_has_one_thread(tmp_path, threads, begun):
    lines = ["import sys", "from benchmarks._outcome import restart_in_one_thread", "print('begun', flush=True)"]
    (tmp_path / "program.py").write_text(
        "\n".join([*lines, "restart_in_one_thread('program')", "print(*sys.argv[1:])"])
    )
    told = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    run = subprocess.run(
        [sys.executable, "-m", "program", "--only", "a b"],
        env={**os.environ, **told, "OMP_NUM_THREADS": threads, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert run.stdout == "begun\n" * begun + "--only a b\n"


@pytest.mark.parametrize("name", ["capture", "cosine", "lens", "probes", "store"])
def test_documents_are_those_of_the_results_that_they_name(name, tmp_path):
    document = ROOT / "docs" / f"{name}-benchmark.md"
    source = re.search(r"\((.*)\)", document.read_text(encoding="utf-8").splitlines()[0])
    importlib.import_module(f"benchmarks.{name}").render(RESULTS / f"{source[1]}.json", tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (ROOT / "docs" / path.name).read_bytes()
