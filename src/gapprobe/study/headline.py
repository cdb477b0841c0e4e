"""The finding in words, computed from the numbers; nothing here is written by hand for a particular result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONTROLS = {
    "shuffled": "shuffled labels",
    "question_only": "a predictor that sees only the question",
    "layer_0": "the embeddings",
}
FAMILY_NAMES = {"llava": "LLaVA", "llava_next": "LLaVA-NeXT", "instructblip": "InstructBLIP"}


def family_name(name: str, family: Mapping[str, Any]) -> str:
    """Return how a study is called in the report: its name, and its model's family where the name does not say it."""
    kind = str(family["model"]["family"])
    known = FAMILY_NAMES.get(kind, kind)
    return known if name == kind else f"{name} ({known})"


def headline(families: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a sentence on the gap of each study, one on its failure probe, one on what the published recipe leaks.

    Args:
        families: the `families` part of results.json.
    """
    return " ".join(
        " ".join(filter(None, (_gap(family_name(name, family), family), _probe(family), _leakage(family))))
        for name, family in families.items()
    )


def _gap(name: str, family: Mapping[str, Any]) -> str:
    n = family["counted"]["n"]
    if not n:
        return f"{name}: no trial counts, so there is no gap to measure."
    told, shown = family["settings"]["text_only"]["accuracy"], family["settings"]["visual"]["accuracy"]
    low, high = family["gap"]["absolute"]["ci"]
    points = f"{100 * family['gap']['absolute']['value']:.0f} points [{100 * low:.0f}, {100 * high:.0f}]"
    if low > 0:
        finding = f"a gap of {points}"
    elif high < 0:
        finding = f"no gap but the reverse, {points}"
    else:
        finding = f"no gap beyond chance, {points}"
    return (
        f"{name} answers {told:.0%} right when the object is named, and {shown:.0%} when it is only shown ({n:,} "
        f"trials): {finding}."
    )


def _probe(family: Mapping[str, Any]) -> str:
    if family["probe"] is None:
        return "It answered behind a server, so no probe read it."
    verdict = next((v for v in family["probe"]["verdict"].values() if v is not None), None)
    if verdict is None:
        return str(family["probe"]["why_not"])
    area = verdict["probe"]["auc"]
    if verdict["control"] is None:
        return f"Its failure probe has an AUC of {area:.2f}, and no control to compare it with."
    against = f"{CONTROLS[verdict['control']]} ({verdict['control_auc']['auc']:.2f})"
    if verdict["beats"]:
        return f"Its failure probe (AUC {area:.2f}) beats its best control, {against}."
    return f"Its failure probe (AUC {area:.2f}) does not beat its best control, {against}."


def _leakage(family: Mapping[str, Any]) -> str:
    leaks = (family.get("recipe") or {}).get("leakage") or {}
    if not leaks:
        return ""
    group, worst = max(leaks.items(), key=lambda leak: leak[1]["difference"]["value"])
    published, left = worst["published"]["accuracy"], worst["grouped"]["accuracy"]
    points, (low, high) = 100 * worst["difference"]["value"], worst["difference"]["ci"]
    if low <= 0:
        return f"The published recipe foresees {published:.0%} of the outcomes; no leakage beyond chance shows in that."
    return (
        f"The published recipe foresees {published:.0%} of the outcomes, and {left:.0%} when no {group} is on both "
        f"sides of the split: {points:.0f} points [{100 * low:.0f}, {100 * high:.0f}] of it are leakage."
    )
