"""The table of all seeds: `python -m examples.digits.table --runs runs/digits --results runs/study-0/results.json …`.

Accuracies are the study's own (`gapprobe study run` on each seed's folders), minutes are the training logs'. Results
are given in the order of the seeds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from examples.digits.train import FAMILIES, LOG, meets_bounds

SEEDS_FILE = Path(__file__).parent / "SEEDS.md"
SETTINGS = ("identification", "text_only", "full_information", "visual", "guess_control")
HEAD = """# All trained seeds

Accuracy on all rows of the study (no row filter) with 95 % interval: ten of the shipped test images to each question.
The seed that is shipped is the lowest whose text-only accuracy is at least 0.9 on every blank image and whose
identification is at least 0.8, in both families: a rule fixed before training, which does not look at the gap (how the
length of the bridges' training was chosen is told in README.md). Minutes are wall time of vision tower, language model
and bridge together, beside other work on a 2-core machine; the first two are shared by both families of a seed.

"""


PROBE_HEAD = """## Gap and failure probe

On the trials that count (identification and full information right, guess control wrong). The probe's layer is chosen
on training rows, folds keep images together, the best control is the strongest of shuffled labels, question only and
layer 0. A probe beats it when the interval of the paired difference lies above 0.
"""


@dataclass(frozen=True)
class Table:
    """Write the table of all seeds."""

    results: tuple[Path, ...]
    """The study's results.json of each seed, in the order of `seeds`."""
    runs: Path = Path("runs/digits")
    """Folder in which the seeds were trained."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The seeds."""
    out: Path = SEEDS_FILE
    """The Markdown file to write."""


def read_logs(root: Path) -> dict[str, dict[str, Any]]:
    """Return the training logs of one seed by stage."""
    stages = ("vision", "language", *FAMILIES)
    return {name: json.loads((root / name / LOG).read_text(encoding="utf-8")) for name in stages}


def render_table(logs: dict[int, dict[str, dict[str, Any]]], results: dict[int, dict[str, Any]]) -> str:
    """Return the table in Markdown from every seed's training logs and study results."""
    shipped = next((seed for seed in sorted(logs) if meets_bounds(logs[seed])), None)
    titles = ["family", "seed", *(name.replace("_", " ") for name in SETTINGS), "minutes", "threads", "shipped"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for family in FAMILIES:
        for seed in sorted(logs):
            raw = results[seed]["families"][family]["raw"]
            cells = [_cell(raw[name]) for name in SETTINGS]
            minutes = sum(logs[seed][name]["seconds"] for name in ("vision", "language", family)) / 60
            told = "yes" if seed == shipped else "no"
            threads = logs[seed][family]["threads"]
            lines.append("| " + " | ".join([family, str(seed), *cells, f"{minutes:.1f}", str(threads), told]) + " |")
    return HEAD + "\n".join([*lines, "", *_probe_table(results)]) + "\n"


def _probe_table(results: dict[int, dict[str, Any]]) -> list[str]:
    """Return the gap and the failure probe of every seed, on the trials that count, split by image."""
    titles = ["family", "seed", "gap (points)", "probe AUC", "best control", "its AUC", "difference", "beats it"]
    lines = [PROBE_HEAD, "| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for family in FAMILIES:
        for seed in sorted(results):
            part = results[seed]["families"][family]
            gap, verdict = part["gap"]["absolute"], part["probe"]["verdict"]["image"]
            low, high = gap["ci"]
            cells = [
                f"{100 * gap['value']:.0f} [{100 * low:.0f}, {100 * high:.0f}] (n={gap['n']})",
                _cell(verdict["probe"], "auc"),
                verdict["control"].replace("_", " "),
                _cell(verdict["control_auc"], "auc"),
                _cell(verdict["difference"], "value"),
                "yes" if verdict["beats"] else "no",
            ]
            lines.append("| " + " | ".join([family, str(seed), *cells]) + " |")
    return lines


def _cell(figure: dict[str, Any], name: str = "accuracy") -> str:
    low, high = figure["ci"]
    return f"{figure[name]:.3f} [{low:.3f}, {high:.3f}] (n={figure['n']})"


def main(table: Table) -> None:
    """Read, render, write."""
    if len(table.results) != len(table.seeds):
        raise SystemExit(f"{len(table.results)} results for {len(table.seeds)} seeds; give one results.json for each")
    logs = {seed: read_logs(table.runs / f"seed-{seed}") for seed in table.seeds}
    results = {
        seed: json.loads(path.read_text(encoding="utf-8"))
        for seed, path in zip(table.seeds, table.results, strict=True)
    }
    table.out.write_text(render_table(logs, results), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Table))
