"""What the benchmarks' mains share: runs as rows, goals and their bounds, results as files, and keeping to one thread.

Nothing here knows what is being measured. The clock is in `_measure`, tables and pictures are in `_render`.
"""

from __future__ import annotations

import datetime
import json
import operator
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from threadpoolctl import threadpool_limits

from benchmarks._measure import Cost, tell
from benchmarks._render import section

RESULTS = Path(__file__).parent / "results"
_BOUNDS = {"at_least": operator.ge, "at_most": operator.le}
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


class WrongResult(Exception):
    """A contestant gives something else than what is right; it is none, and its timings mean nothing."""


class Options(Protocol):
    """What every benchmark is told of its results: a quick run's are printed unless they get a file."""

    quick: bool
    json: Path | None


@dataclass
class Timings:
    """What was measured for one operation of one contestant."""

    seconds: list[float] = field(default_factory=list[float])
    cpu_seconds: list[float] = field(default_factory=list[float])
    peak_bytes: int = 0
    check: str = ""
    more: dict[str, Any] = field(default_factory=dict[str, Any])
    """Fields that only this benchmark has."""


class Runs(dict[tuple[str, str], Timings]):
    """Timings by operation and contestant."""

    def add(
        self, operation: str, contestant: str, cost: Cost, done: float = 1.0, digits: int = 4, said: str = ""
    ) -> Timings:
        """Add a run and say so; return the timings that it belongs to.

        Args:
            operation: what was run.
            contestant: who ran it.
            cost: of the run.
            done: how often the run did the operation; times are of once.
            digits: of seconds that are kept.
            said: behind what the run took.
        """
        timings = self.setdefault((operation, contestant), Timings())
        seconds, cpu = cost.seconds / done, cost.cpu_seconds / done
        timings.seconds.append(round(seconds, digits))
        timings.cpu_seconds.append(round(cpu, digits))
        timings.peak_bytes = max(timings.peak_bytes, cost.peak_bytes)
        took = f"{seconds:10.{digits}f} s {cpu:10.{digits}f} s of processor {cost.peak_bytes / 1e6:8.1f} MB"
        tell(f"{operation:<28} {contestant:<24} {took}{said}")
        return timings

    def rows(
        self, operations: Sequence[str], contestants: Sequence[str], floor: Callable[[str], str | None]
    ) -> list[dict[str, Any]]:
        """Return the rows of the results, by operation, then contestant; `floor` names the limit of an operation."""
        return [
            {
                "operation": operation,
                "contestant": contestant,
                "seconds": timings.seconds,
                "cpu_seconds": timings.cpu_seconds,
                "peak_bytes": timings.peak_bytes,
                "floor": floor(operation),
                **timings.more,
                "check": timings.check,
            }
            for operation in operations
            for contestant in contestants
            if (timings := self.get((operation, contestant)))
        ]


def by_operation(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return rows of results by operation and contestant."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["operation"], {})[row["contestant"]] = row
    return found


def judged(operation: str, what: str, value: float, digits: int, **bound: float | None) -> dict[str, Any]:
    """Return what was aimed at, what came out, and whether it is met: None where the value is shown only.

    Args:
        operation: where it was aimed at.
        what: the value is.
        value: as it is judged.
        digits: of the value that are kept.
        bound: `at_least` or `at_most` with its limit; none, or a limit of None, where the value is shown only.
    """
    met = next((_BOUNDS[name](value, limit) for name, limit in bound.items() if limit is not None), None)
    return {"operation": operation, "goal": what, "value": round(value, digits), **bound, "met": met}


def wanted(goal: Mapping[str, Any]) -> str:
    """Return a goal's bound in words; nothing where it has none."""
    return next((f"{name.replace('_', ' ')} {goal[name]:g}" for name in _BOUNDS if goal.get(name) is not None), "")


def goals_section(
    goals: Sequence[Mapping[str, Any]], heading: str = "wanted", bound: Callable[[Mapping[str, Any]], str] = wanted
) -> str:
    """Return the goals as a section of a document, their bounds in words below a heading."""
    met = {True: "yes", False: "**no**", None: "shown only"}
    rows = [(f"`{goal['operation']}`", goal["goal"], goal["value"], bound(goal), met[goal["met"]]) for goal in goals]
    return section("Goals", ("operation", "goal", "value", heading, "met"), rows)


def write(path: Path, text: str) -> None:
    """Write a file, whose folder need not be there yet, and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    tell(f"{path}")


def keep(name: str, options: Options, benchmark: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a benchmark, tell its goals, write its results or print them, and return them.

    Raises:
        SystemExit: the file of the results exists, or a contestant is none.
    """
    target = options.json or (None if options.quick else _unused(name))
    if target and target.exists():
        sys.exit(f"{target} exists; results are never written over")
    try:
        results = benchmark()
    except WrongResult as error:
        sys.exit(f"stopped: {error}")
    for goal in results.get("goals", ()):
        met = {True: "met", False: "MISSED", None: "shown only"}[goal["met"]]
        tell(f"{goal['operation']:<28} {goal['goal']:<54} {goal['value']:8.3f} {wanted(goal):<14} {met}")
    text = json.dumps(results, indent=1)
    if target:
        write(target, text + "\n")
    else:
        print(text)
    return results


def refuse_unknown(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """End the program at a name that is none."""
    if unknown := sorted(set(names) - set(known)):
        sys.exit(f"no {what} {unknown[0]!r}; there are {', '.join(known)}")


@contextmanager
def one_thread() -> Generator[None]:
    """Keep torch and every BLAS to one thread, whatever they were told when they were loaded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def restart_in_one_thread(module: str) -> None:
    """Start `python -m module` with the same arguments once more unless libraries were told to keep to one thread.

    They look at these variables when they are loaded, which has happened: once more, from the beginning.
    """
    if any(os.environ.get(name) != value for name, value in _ONE_THREAD.items()):
        os.environ.update(_ONE_THREAD)
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])


def _unused(name: str) -> Path:
    """Return a name of today for results of a benchmark, with a number when today has some."""
    today = f"{name}-{datetime.date.today().isoformat()}"
    number, path = 2, RESULTS / f"{today}.json"
    while path.exists():
        number, path = number + 1, RESULTS / f"{today}-{number}.json"
    return path
