"""The finding in words, computed from the numbers; nothing here is written by hand for a particular result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def headline(families: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one sentence on the gap of each study and one on its probe.

    Args:
        families: the `families` part of results.json.
    """
    return " ".join(f"{_gap(name, family)} {_probe(family)}" for name, family in families.items())


def _gap(name: str, family: Mapping[str, Any]) -> str:
    n = family["counted"]["n"]
    if not n:
        return f"{name}: no trial counts, so there is no gap to measure."
    told, shown = family["settings"]["text_only"]["accuracy"], family["settings"]["visual"]["accuracy"]
    gap = family["gap"]["absolute"]
    if gap["ci"][0] > 0:
        finding = f"a gap of {_points(gap)}"
    elif gap["ci"][1] < 0:
        finding = f"no gap but the reverse, {_points(gap)}"
    else:
        finding = f"no gap beyond chance ({_points(gap)})"
    return (
        f"{name} answers {told:.0%} of {n:,} questions about an object that is named, and {shown:.0%} when it is only "
        f"shown: {finding}."
    )


def _points(gap: Mapping[str, Any]) -> str:
    low, high = gap["ci"]
    return f"{100 * gap['value']:.0f} points, 95 % interval {100 * low:.0f} to {100 * high:.0f}"


def _probe(family: Mapping[str, Any]) -> str:
    verdicts = family["probe"]["verdict"]
    if not verdicts:
        return family["probe"]["why_not"]
    return next(iter(verdicts.values()))["sentence"]
