"""Environments for packages whose requirements clash with ours."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def environment(folder: Path, requirements: Sequence[str]) -> Path:
    """Make an environment that lies over ours, if it is not there yet; return its Python.

    What the requirements do not bring, such as torch, is the same as here.

    Raises:
        RuntimeError: it cannot be made.
    """
    python = folder / "bin" / "python"
    if python.exists():
        return python
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    commands = [
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", *requirements],
    ]
    for number, command in enumerate(commands):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"its environment cannot be made: {done.stderr.strip().splitlines()[-1]}")
        if number == 0:
            packages = next((folder / "lib").glob("python*/site-packages"))
            (packages / "ours.pth").write_text(f"{ours}\n", encoding="utf-8")
    return python
