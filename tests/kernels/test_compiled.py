"""Kernels compile for cards that are not here, within what these cards have, and as docs/compiled-kernels.md says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_the_table_of_compiled_kernels_still_holds():
    # A process of its own: Triton interprets in some others, and jaxtyping wraps functions in this one.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiled", "--check"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_what_a_card_lacks_is_told():
    from benchmarks.compiled import Compiled, faults

    fine = Compiled("pull", "bfloat16", 64, "gfx942", 100, 0, 65536, 8, "mfma")
    assert faults(fine) == []
    assert faults(Compiled("cosine, raw", "bfloat16", 0, "sm_80", 100, 0, 64, 0, "")) == []
    bad = Compiled("pull", "bfloat16", 64, "gfx942", 100, 4, 65537, 0, "")
    assert [fault.split(": ")[1] for fault in faults(bad)] == [
        "4 bytes or registers are spilled",
        "65537 bytes of shared memory, 65536 are there",
        "no instruction for tensor cores",
    ]
