"""Results of a benchmark as a markdown table and as a picture, an SVG that needs no plotting library.

Results are as `benchmarks/README.md` describes them; nothing here knows what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log10
from statistics import median
from typing import Any

_GRID = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_OURS, _VARIANT, _OTHERS, _LINE, _TEXT, _FAINT = "#0f766e", "#7cc4bd", "#a8b3c2", "#b91c1c", "#1f2933", "#5f6c7b"
_WIDTH, _LABELS, _BARS, _BAR, _STEP = 560, 205, 230, 13, 18


def markdown(results: Mapping[str, Any], titles: Mapping[str, str], ours: str, title: str, about: str) -> str:
    """Return a document with one table an operation.

    Args:
        results: of a benchmark.
        titles: of the operations that are shown, in their order.
        ours: the contestant that others are compared with.
        title: of the document.
        about: a sentence on the data.
    """
    machine = results["machine"]
    told = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    lines = [
        f"# {title}",
        "",
        f"{about} {_told(machine)}.",
        "",
        f"Versions: {told}.",
        "",
        "Seconds are the median of all runs, with the fastest and the slowest behind. “÷ floor” is how many times "
        f"longer than the floor, “÷ {ours}” how many times longer than {ours} it took; processor is the median time "
        "of all cores; memory is what resident memory grew by at most, mapped files counted.",
    ]
    text = "\n".join(lines) + "\n"
    for operation, heading in titles.items():
        if rows := _of(results, operation):
            columns = ("contestant", "seconds", "÷ floor", f"÷ {ours}", "processor", "memory, MB")
            text += section(heading, columns, [_cells(results, row, rows, ours) for row in rows])
    if results.get("left_out"):
        text += "\nLeft out:\n" + "".join(f"- {name}: {reason}\n" for name, reason in results["left_out"].items())
    return text


def section(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], about: str = "") -> str:
    """Return a section of a document: a heading, what is to be said about it, a table."""
    lines = ["", f"## {title}", "", *([about, ""] if about else []), f"| {' | '.join(columns)} |"]
    lines += ["|---" * len(columns) + "|", *(f"| {' | '.join(map(str, cells))} |" for cells in rows)]
    return "\n".join(lines) + "\n"


def picture(results: Mapping[str, Any], titles: Mapping[str, str], ours: str, title: str, about: str) -> str:
    """Return an SVG: a panel for each operation that has a floor, a bar for each contestant, the floor as a line."""
    panels = {name: _of(results, name) for name in titles}
    panels = {name: rows for name, rows in panels.items() if rows and rows[0]["floor"]}
    ratios = [_ratio(row, rows) for rows in panels.values() for row in rows]
    low, high = floor(log10(min(ratios)) * 3) / 3 - 0.1, ceil(log10(max(ratios)) * 3) / 3
    floor_name = next(iter(panels.values()))[0]["floor"]
    labels = results["labels"]
    tall = _STEP * max(len(rows) for rows in panels.values()) + 48
    body: list[str] = []
    for slot, (name, rows) in zip(_slots(len(panels)), panels.items(), strict=True):
        bars = [row for row in rows if row["contestant"] != floor_name]
        base = median(next(row for row in rows if row["contestant"] == floor_name)["seconds"])
        left, top = slot % 2 * (_WIDTH + 30) + 20, slot // 2 * tall + 92
        body += _panel(titles[name], bars, base, labels, ours, (low, high), left, top)
    width, height = 2 * _WIDTH + 70, (len(panels) + 1) // 2 * tall + 92
    multiple = (
        f"Time for the same work as a multiple of {labels[floor_name]} of as many bytes (red line), median of runs."
    )
    head = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' "
        "font-family='system-ui, sans-serif'>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
        _label(20, 32, title, size=20, weight="bold"),
        _label(20, 54, f"{multiple} Log scale, shorter is better."),
        _label(20, 72, f"{about} {_told(results['machine'])}.", size=11, fill=_FAINT),
    ]
    return "\n".join([*head, *body, "</svg>"]) + "\n"


def _slots(count: int) -> list[int]:
    """Return places in two columns: operations come in pairs, such as cold and warm, after one that may be alone."""
    return [i + (count % 2 if i else 0) for i in range(count)]


def _panel(
    title: str,
    bars: list[Mapping[str, Any]],
    base: float,
    labels: Mapping[str, str],
    ours: str,
    limits: tuple[float, float],
    left: float,
    top: float,
) -> list[str]:
    low, high = limits
    start, bottom = left + _LABELS, top + 22 + _STEP * len(bars)

    def at(ratio: float) -> float:
        return start + _BARS * (log10(ratio) - low) / (high - low)

    drawn = [_label(left, top + 10, title, size=13, weight="bold")]
    for tick in _GRID:
        if low <= log10(tick) <= high:
            major = log10(tick).is_integer()
            drawn.append(_rule(at(tick), top + 18, bottom, "#d5dbe3" if major else "#eef1f5"))
            if major:
                drawn.append(_label(at(tick), bottom + 13, f"{tick:g}×", size=10, fill=_FAINT, anchor="middle"))
    for i, row in enumerate(bars):
        seconds, y = median(row["seconds"]), top + 22 + _STEP * i
        name, weight = labels[row["contestant"]], "bold" if row["contestant"] == ours else "normal"
        colour = _OURS if row["contestant"] == ours else _VARIANT if row["contestant"].startswith(ours) else _OTHERS
        end = at(seconds / base)
        drawn += [
            _label(start - 6, y + 10, name, size=11, weight=weight, anchor="end"),
            f"<rect x='{start:.1f}' y='{y:.1f}' width='{max(1.0, end - start):.1f}' height='{_BAR}' fill='{colour}'/>",
            _label(
                start + _BARS + 8, y + 10, f"{_short(seconds / base)}×  {_seconds(seconds)}", size=11, weight=weight
            ),
        ]
    return [*drawn, _rule(at(1), top + 16, bottom + 2, _LINE, 2)]


def _label(
    x: float, y: float, text: str, size: int = 12, weight: str = "normal", fill: str = _TEXT, anchor: str = "start"
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' font-weight='{weight}' fill='{fill}' "
        f"text-anchor='{anchor}'>{escape(text)}</text>"
    )


def _rule(x: float, top: float, bottom: float, colour: str, width: int = 1) -> str:
    return (
        f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{top:.1f}' y2='{bottom:.1f}' stroke='{colour}' stroke-width='{width}'/>"
    )


def _of(results: Mapping[str, Any], operation: str) -> list[Mapping[str, Any]]:
    """Return the rows of an operation, fastest first."""
    rows = [row for row in results["rows"] if row["operation"] == operation]
    return sorted(rows, key=lambda row: median(row["seconds"]))


def _cells(results: Mapping[str, Any], row: Mapping[str, Any], rows: list[Mapping[str, Any]], ours: str) -> list[str]:
    seconds = row["seconds"]
    mine = next((median(other["seconds"]) for other in rows if other["contestant"] == ours), None)
    cells = [
        results["labels"][row["contestant"]],
        f"{_seconds(median(seconds))} ({_seconds(min(seconds))} – {_seconds(max(seconds))})",
        _short(_ratio(row, rows)) if row["floor"] else "",
        _short(median(seconds) / mine) if mine else "",
        _seconds(median(row["cpu_seconds"])),
        f"{row['peak_bytes'] / 1e6:,.0f}",
    ]
    bold = row["contestant"] == ours
    return [f"**{cell}**" if bold and cell else cell for cell in cells]


def _ratio(row: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> float:
    """Return how many times longer than its floor something took; 1 where there is no floor."""
    base = [median(other["seconds"]) for other in rows if other["contestant"] == row["floor"]]
    return median(row["seconds"]) / base[0] if base else 1.0


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 9.95 else f"{value:.0f}"


def _seconds(value: float) -> str:
    unit, name = (1.0, "s") if value >= 1 else (1e-3, "ms") if value >= 1e-3 else (1e-6, "µs")
    scaled = value / unit
    return (
        f"{scaled:.0f} {name}" if scaled >= 100 else f"{scaled:.1f} {name}" if scaled >= 10 else f"{scaled:.2f} {name}"
    )


def _told(machine: Mapping[str, Any]) -> str:
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine.get('filesystem', 'unknown file system')}, {machine['kernel']}"
    )
