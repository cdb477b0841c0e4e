"""The wheel: what is in it, and the demo from it in an empty folder, without network."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NO_NETWORK = """
import socket
def refuse(self, address):
    raise OSError(f"this test allows no network, and something asked for {address}")
socket.socket.connect = refuse
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # From a copy: building in the tree would leave files in it.
    source = out / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out / "dist"), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return next((out / "dist").glob("*.whl"))


def test_the_wheel_has_all_parts_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for part in (
        "gapprobe/py.typed",
        "gapprobe/kernels/logistic.py",
        "gapprobe/report/template.html",
        "gapprobe/demo/digits.parquet",
        "gapprobe/demo/llava.toml",
        "gapprobe/demo/models/llava/model.safetensors",
        "gapprobe/demo/models/instructblip/model.safetensors",
        "gapprobe/demo/models/instructblip/qformer_tokenizer/tokenizer.json",
    ):
        assert part in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"gapprobe"}
    assert len(names) == len(set(names))
    assert wheel.stat().st_size < 12e6


@pytest.mark.parametrize("family", ["instructblip"])
def test_the_demo_runs_from_the_wheel_in_an_empty_folder_without_network(
    wheel: Path, family: str, tmp_path: Path
) -> None:
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed), str(wheel)]
    subprocess.run(pip, check=True)
    (installed / "sitecustomize.py").write_text(NO_NETWORK, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    where = [
        sys.executable,
        "-c",
        "import gapprobe, gapprobe.kernels; print(gapprobe.__file__, gapprobe.kernels.__file__)",
    ]
    told = subprocess.run(where, env=environment, cwd=empty, capture_output=True, text=True, check=True).stdout
    assert told.count(str(installed)) == 2

    demo = [sys.executable, "-m", "gapprobe", "demo", "--quick", "--family", family]
    done = subprocess.run(demo, env=environment, cwd=empty, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((empty / "gapprobe-demo-quick" / "results.json").read_text(encoding="utf-8"))
    assert list(results["families"]) == [family]
    assert (empty / "gapprobe-demo-quick" / "report.html").stat().st_size > 1e6
    assert [path.name for path in empty.iterdir()] == ["gapprobe-demo-quick"]
