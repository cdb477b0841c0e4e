"""How long the demo takes, step by step, and how much memory it needs.

    python -m benchmarks.demo [--quick] [--runs 3] [--json FILE]

Each run is a fresh process and a fresh folder, as a user would run it. No peer does the same, so there is no contestant
beside ours.
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class Options:
    """Time the demo."""

    quick: bool = False
    """Use the demo's quick form."""
    runs: int = 3
    """Fresh runs."""
    json: Path | None = None
    """Write the table to this file."""


def main(options: Options) -> None:
    """Run the demo several times and print one row a step."""
    seconds: dict[str, list[float]] = {}
    peak, versions = 0, {}
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "gapprobe", "demo", "--out", f"{folder}/demo"]
            start = time.perf_counter()
            subprocess.run(command + ["--quick"] * options.quick, check=True, stderr=subprocess.DEVNULL)
            seconds.setdefault("whole process", []).append(round(time.perf_counter() - start, 2))
            results = json.loads(Path(folder, "demo", "results.json").read_text(encoding="utf-8"))
        peak = max(peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
        versions = results["versions"]
        for step in results["steps"]:
            seconds.setdefault(f"{step['family']}: {step['step']}", []).append(step["seconds"])
    rows = [
        {"operation": name, "contestant": "gapprobe", "seconds": runs, "peak_bytes": peak, "floor": None, "check": None}
        for name, runs in seconds.items()
    ]
    table = {"machine": {"cpu": platform.processor(), "system": platform.system()}, "versions": versions, "rows": rows}
    text = json.dumps(table, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
