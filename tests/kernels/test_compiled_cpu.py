"""What numba makes of the sweeps, for machines that are not here: numbers side by side are read at once."""

import os
import pickle
import platform
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from gapprobe.kernels import (
    columns_cpu,
    cosine,
    cosine_cpu,
    history_cpu,
    lens_cpu,
    line_cpu,
    logistic,
    logit_lens,
    moments,
    perceptron_cpu,
    products_cpu,
    progress_cpu,
    standardised_cpu,
)
from gapprobe.kernels.logit_lens import Unembedding
from gapprobe.probes.modules import ModuleProbe

SWEEPS = {
    "cosine": cosine_cpu.sums,
    "columns": columns_cpu.sums,
    "lens": lens_cpu.look,
    "dots": products_cpu.loop_dots,
    "combined": products_cpu.loop_combined,
    "line": line_cpu.walk,
    "remember": history_cpu._remember,
    "before": history_cpu._before,
    "after": history_cpu._after,
    "aim": line_cpu._aim,
    "progress": progress_cpu._look,
    "perceptron": perceptron_cpu._run,
    "fill": standardised_cpu._fill,
    "to_shared": standardised_cpu._to_shared,
    "to_own": standardised_cpu._to_own,
}
COMPILE = """
import pickle, sys
from tests.kernels.test_compiled_cpu import SWEEPS

with open(sys.argv[1], "rb") as file:
    wanted = pickle.load(file)
found = []
for name, signatures in wanted.items():
    for signature in signatures:
        SWEEPS[name].compile(signature)
        found.append((name, str(signature), SWEEPS[name].inspect_asm(signature)))
with open(sys.argv[2], "wb") as file:
    pickle.dump(found, file)
"""


def asked_for():
    """Return the signatures that calls of every kind leave behind."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(4, 40).to(dtype)
        mean, std = x.double().mean(0), x.double().std(0)
        for setting in ((), (mean,), (mean, std)):
            cosine.paired(x, x, *setting)
        moments.alike(x)
    end = Unembedding(torch.randn(50, 40), None, "none", None, None, 1e-6)
    logit_lens.read(torch.randn(2, 4, 40), end, torch.zeros(4, 1, dtype=torch.int64), top_k=3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        logistic.fit(torch.randn(60, 40).to(dtype), torch.arange(60)[None] % 2 == 0, torch.ones(1, 60))
    for dtype in (torch.float32, torch.float64):
        module = ModuleProbe(lambda d: nn.Sequential(nn.Linear(d, 1), nn.Flatten(0)), "line", dtype=dtype, steps=1)
        module.fit(
            torch.randn(60, 40), torch.arange(60)[None] % 2 == 0, torch.ones(1, 60).double(), torch.ones(1).double(), 0
        )
    return {name: list(sweep.signatures) for name, sweep in SWEEPS.items()}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="looks for instructions of an x86 processor")
@pytest.mark.parametrize("processor", ["haswell", "skylake-avx512", "znver4"])
def test_no_sweep_gathers_what_lies_side_by_side(processor, tmp_path):
    # An index that might be negative, as far as the compiler knows, costs a sweep five times its time: it gathers.
    (tmp_path / "asked").write_bytes(pickle.dumps(asked_for()))
    # For another processor than this one nothing is run, and nothing is kept where others would find it.
    environment = dict(os.environ) | {"NUMBA_CPU_NAME": processor, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run(
        [sys.executable, "-c", COMPILE, str(tmp_path / "asked"), str(tmp_path / "found")], env=environment, check=True
    )
    found = pickle.loads((tmp_path / "found").read_bytes())
    assert len(found) >= 37
    for name, signature, code in found:
        assert not re.findall(r"v\w*gather\w+", code), (name, signature)
        assert re.findall(r"v(fn?madd\w+|addps|divpd)\s.*[yz]mm", code), (name, signature)
