"""The results of a study as Markdown tables, for a README or a paper's appendix. Nothing is computed here.

Texts from a model or a configuration are escaped: what they hold can be no markup, and no line of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gapprobe.markdown import escaped
from gapprobe.report.series import (
    CONTROLS,
    METHODS,
    READERS,
    SETTINGS,
    SPLITS,
    Ends,
    Family,
    Number,
    interval,
    number,
    percent,
    seen,
)
from gapprobe.study.headline import family_name


def markdown(results: Mapping[str, Any]) -> str:
    """Return the results (docs/results.md) as Markdown tables with n and 95 % intervals; the same in, the same out."""
    families: Mapping[str, Family] = results["families"]
    names = {key: family_name(key, family) for key, family in families.items()}
    parts = [f"# {escaped(results['study']['title'])}", escaped(results["headline"])]
    if results["study"]["note"]:
        parts.append(f"*{escaped(results['study']['note'])}*")
    parts.append("95 % intervals in brackets, from the crossed bootstrap over questions and images (docs/results.md).")
    for key, family in families.items():
        parts += [f"## {escaped(names[key])}", *_family(family)]
    parts += ["## Time and memory", _steps(results["steps"], names)]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts.append(
        f"{escaped(str(results['machine']['cpu']))}, {results['machine']['cores']} cores; {escaped(versions)}."
    )
    return "\n\n".join(parts) + "\n"


def _family(family: Family) -> list[str]:
    model, data, counted = family["model"], family["data"], family["counted"]
    lost = ", ".join(f"{n} {reason}" for reason, n in counted["excluded"].items())
    size = ""
    if seen(family):
        size = f", {model['parameters']:,} parameters, {model['layers']} layers, width {model['width']}"
    parts = [
        f"{escaped(model['source'])}: {escaped(model['architecture'])}{size}. {data['questions']} questions about "
        f"{data['entities']} entities, {data['images']} images; {counted['n']:,} of {data['trials']:,} trials count "
        f"({lost}).",
        _table(
            ("accuracy", "all trials", "trials that count"),
            [(name, _share(family["raw"][key]), _share(family["settings"].get(key))) for key, name in SETTINGS.items()],
        ),
        _gap(family),
        _judges(family),
        _choices(family),
    ]
    if seen(family):
        parts += [_probe(family), _recipe(family), _layers(family), _selective(family)]
    return [part for part in parts if part]


def _gap(family: Family) -> str:
    gap = family["gap"]
    lines = [
        f"**Gap**: {_points(gap['absolute'])} points; relative {percent(gap['relative']['value'])} "
        f"{interval(gap['relative']['ci'], 100, 1)}."
    ]
    if by := gap.get("ci_by"):
        told = "; ".join(f"{kind} {interval(ci, 100, 1)}" for kind, ci in by.items())
        test = gap["mcnemar"]
        lines.append(
            f"Interval when only one kind is resampled: {told}. Right only when named {test['only_told']}, only when "
            f"shown {test['only_shown']} (McNemar p {'none' if test['p'] is None else format(test['p'], '.2g')})."
        )
    if published := family.get("published"):
        lines.append(
            f"The paper's figures for {published['name']}: {percent(published['text_only'], 0)} text only, "
            f"{percent(published['visual'], 0)} visual."
        )
    return " ".join(lines)


def _judges(family: Family) -> str:
    judges = family.get("judges")
    if not judges:
        return ""
    rows = [(judge, *_gap_cells(cells["n"], cells, cells["gap"])) for judge, cells in judges["by_judge"].items()]
    return _table(("judge", "n", "text only", "visual", "gap, points"), rows) + (
        f"\n\nThe judges differ on {judges['differ']} of {judges['answers']} answers."
    )


def _choices(family: Family) -> str:
    choices = family.get("choices")
    if not choices:
        return ""
    rows = [
        (
            str(READERS.get(reader, reader)),
            *_gap_cells(cells["counted"]["n"], cells["settings"], cells["gap"]["absolute"]),
        )
        for reader, cells in choices["by"].items()
        if cells
    ]
    told = f"{choices['questions']} questions with {choices['options']} options"
    return _table((f"multiple choice ({told}), read by", "n", "text only", "visual", "gap, points"), rows)


def _gap_cells(n: int, settings: Mapping[str, Any], gap: Mapping[str, Any]) -> tuple[str, ...]:
    return (str(n), _share(settings["text_only"]), _share(settings["visual"]), _points(gap))


def _probe(family: Family) -> str:
    probe = family["probe"]
    rows: list[tuple[str, ...]] = []
    for split, verdict in probe["verdict"].items():
        name = str(SPLITS.get(split, split))
        if verdict is None:
            rows.append((name, escaped(str((probe.get(split) or {}).get("why_not", "not computed"))), "", "", ""))
            continue
        control, difference = verdict["control_auc"] or {}, verdict["difference"] or {}
        named = str(verdict["control"] and CONTROLS.get(verdict["control"], verdict["control"]))
        rows.append(
            (
                name,
                _cell(verdict["probe"]["auc"], verdict["probe"]["ci"]),
                f"{named} {_cell(control.get('auc'), control.get('ci'))}",
                _cell(difference.get("value"), difference.get("ci")),
                "yes" if verdict["beats"] else "no",
            )
        )
    n = f"n = {probe['n']}, {probe['positives']} right"
    return _table((f"failure probe, AUC ({n})", "probe", "best control", "difference", "beats it"), rows)


def _recipe(family: Family) -> str:
    recipe = family.get("recipe")
    if not recipe or not recipe["leakage"]:
        return ""
    rows = [
        (
            f"by {group}",
            str(leak["layer"]),
            _share(leak["published"]),
            _share(leak["grouped"]),
            _points(leak["difference"]),
        )
        for group, leak in recipe["leakage"].items()
    ]
    head = (
        f"published recipe, accuracy (n = {recipe['n']}, commoner class {percent(recipe['majority'])})",
        "layer",
        "random rows",
        "grouped",
        "leakage, points",
    )
    return _table(head, rows)


def _layers(family: Family) -> str:
    lens, cosine = family["lens"], family["cosine"]
    columns = {
        "P(answer), told": (lens["text"], lens["ci"]["text"]),
        "shown": (lens["visual"], lens["ci"]["visual"]),
        "shown, right": (lens["visual_success"], lens["ci"]["visual_success"]),
        "shown, wrong": (lens["visual_failure"], lens["ci"]["visual_failure"]),
        "cosine, right": (cosine["success"], cosine["ci"]["success"]),
        "cosine, wrong": (cosine["failure"], cosine["ci"]["failure"]),
    }
    rows = [
        (str(layer), *(_cell(values[i], ci[i]) for values, ci in columns.values()))
        for i, layer in enumerate(family["layers"])
    ]
    return _table(("layer", *columns), rows)


def _selective(family: Family) -> str:
    selective = family["selective"]
    if selective.get("why_not"):
        return escaped(selective["why_not"])
    methods = [key for key in METHODS if key in selective]
    rows: list[tuple[str, ...]] = [
        (
            f"{part} at the threshold",
            *(_cell(selective[key][part], selective[key]["ci"][part]) for key in methods),
        )
        for part in ("coverage", "risk")
    ]
    found = {(m["method"], m["measure"]): _cell(m["value"], m["ci"]) for m in selective.get("measures", ())}
    measures = dict.fromkeys(measure for _, measure in found)
    rows += [(measure, *(found[key, measure] for key in methods)) for measure in measures]
    return _table((f"selective prediction (n = {selective['n']})", *(METHODS[key] for key in methods)), rows)


def _steps(steps: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    rows = [
        (
            escaped(names.get(step["family"], step["family"])),
            step["step"],
            f"{step['seconds']:.1f}",
            f"{step['peak_bytes'] / 1e6:,.0f}" if step.get("peak_bytes") else "",
        )
        for step in steps
    ]
    return _table(("study", "step", "seconds", "peak memory of the process so far, MB"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _share(cell: Mapping[str, Any] | None) -> str:
    return "" if cell is None else f"{percent(cell['accuracy'])} {interval(cell['ci'], 100, 1)}".strip()


def _points(cell: Mapping[str, Any]) -> str:
    value = cell["value"]
    return "not computed" if value is None else f"{number(100 * value, 1)} {interval(cell['ci'], 100, 1)}"


def _cell(value: Number | None, ci: Ends) -> str:
    return f"{number(value)} {interval(ci)}".strip()
