"""How the report's figures look: lines with bands, labels, whiskers, axes; and the same numbers as a table or in words.

A figure's `layout.meta` says which axis names its rows, from which `table` and `describe` read it out. What is drawn
is decided in `series` and `figures`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from gapprobe.report.series import GREY, Ends, Number, Series, Span, ends, interval, number

GRID = "rgba(120,130,140,0.22)"
_CLEAR, _INK = "rgba(0,0,0,0)", "#1d2329"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"
_LINE_HEIGHT = 16  # pixels that a label takes


def style(figure: go.Figure, height: int, index: tuple[str, str], **margin: int) -> None:
    """Apply the look that all figures share; zoom is off, so that scrolling a phone never catches in a figure.

    Args:
        figure: changed in place.
        height: in pixels; the width is the page's.
        index: the axis ("x" or "y") that names the rows of the figure's table, and what it names.
        margin: of `l`, `r`, `t`, `b`, in pixels.
    """
    font = {"family": _FONT, "size": 12.5, "color": _INK}
    figure.update_layout(
        template=None,
        height=height,
        showlegend=False,
        meta={"index": index[0], "title": index[1]},
        margin={"l": 62, "r": 24, "t": 14, "b": 46, "pad": 0} | margin,
        font=font,
        paper_bgcolor=_CLEAR,
        plot_bgcolor=_CLEAR,
        hovermode="x unified" if index == ("x", "layer") else "closest",
        dragmode=False,
        modebar={"bgcolor": _CLEAR, "color": GREY},
        hoverdistance=60,
        hoverlabel={"font": font | {"size": 12}, "bgcolor": "#ffffff", "bordercolor": "#c3c9cf"},
    )
    axes: dict[str, Any] = {"fixedrange": True, "gridcolor": GRID, "zeroline": False, "title_font_size": 12.5}
    figure.update_xaxes(**axes, showline=True, linecolor=GREY, title_standoff=6)
    figure.update_yaxes(**axes, title_standoff=8)


def layer_ticks(layers: Sequence[Number], most: int) -> dict[str, Any]:
    """Return axis settings with at most about `most` ticks, at whole layers."""
    last = layers[-1]
    step = next((s for s in (1, 2, 4, 5, 8, 10, 20) if last / s <= most), 50)
    return {"tickmode": "linear", "tick0": 0, "dtick": step, "range": [layers[0] - 0.2, last + 0.2]}


def line(series: Series, **settings: Any) -> go.Scatter:
    """Return a line with its values and intervals as hover text; dots mark the layers where there are few."""
    intervals: Sequence[Ends] = series.ci or [None] * len(series.y)
    marked = len(series.x) <= 16 and series.width > 2
    return go.Scatter(
        x=list(series.x),
        y=list(series.y),
        name=series.name,
        mode="lines+markers" if marked else "lines",
        line={"color": series.color, "width": series.width, "dash": series.dash},
        marker={"size": 5.5},
        text=[f"{number(y)} {interval(ci)}".rstrip() for y, ci in zip(series.y, intervals, strict=True)],
        hovertemplate="%{text}",
        cliponaxis=False,
    ).update(settings)


def bands(series: Series) -> list[go.Scatter]:
    """Return a closed polygon for each unbroken run of intervals: a missing layer leaves a hole and no bridge."""
    runs: list[list[tuple[Number, Span]]] = [[]]
    for x, ci in zip(series.x, series.ci, strict=False):
        if pair := ends(ci):
            runs[-1].append((x, pair))
        elif runs[-1]:
            runs.append([])
    return [
        go.Scatter(
            x=[x for x, _ in run] + [x for x, _ in reversed(run)],
            y=[low for _, (low, _) in run] + [high for _, (_, high) in reversed(run)],
            fill="toself",
            fillcolor=series.color,
            opacity=0.16,
            mode="none",
            hoverinfo="skip",
        )
        for run in runs
        if len(run) > 1
    ]


def label_lines(figure: go.Figure, lines: Sequence[Series], span: Span) -> None:
    """Name each line at its right end, in ink beside a swatch, moved apart where two would touch."""
    layout: Any = figure.layout
    plot = layout.height - layout.margin.t - layout.margin.b
    last = [next(y for y in reversed(series.y) if y is not None) for series in lines]
    heights = spread([(y - span[0]) / (span[1] - span[0]) for y in last], _LINE_HEIGHT / plot)
    for series, height in zip(lines, heights, strict=True):
        at = {"xref": "paper", "yref": "paper"}
        swatch = {"color": series.color, "width": series.width, "dash": series.dash}
        ends_at = {"xanchor": 1, "x0": 8, "x1": 30, "y0": height, "y1": height}
        figure.add_shape(type="line", xsizemode="pixel", line=swatch, **ends_at, **at)
        named = {"text": series.name, "showarrow": False}
        figure.add_annotation(x=1, xanchor="left", xshift=34, y=height, yanchor="middle", **named, **at)


def spread(places: Sequence[Number], least: Number) -> list[Number]:
    """Move heights in [0, 1] apart until neighbours are `least` from each other, keeping their order and the range."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    lowest, highest = 0, 1
    for i in order:
        moved[i] = max(moved[i], lowest)
        lowest = moved[i] + least
    for i in reversed(order):
        moved[i] = min(moved[i], highest)
        highest = moved[i] - least
    return moved


def side_label(figure: go.Figure, y: str, text: str, axis: str = "y") -> None:
    """Write `text` to the right of the plot at the category `y`."""
    figure.add_annotation(
        x=1, xref="paper", xanchor="left", xshift=8, y=y, yref=axis, text=text, showarrow=False, font={"size": 12}
    )


def whiskers(values: Sequence[Number], intervals: Sequence[Ends]) -> dict[str, Any] | None:
    """Return error bars for `values`, none where there is no interval; None where there is none at all."""
    if not any(ends(ci) for ci in intervals):
        return None
    pairs = [(value, *(ends(ci) or (value, value))) for value, ci in zip(values, intervals, strict=True)]
    up, down = [high - value for value, _, high in pairs], [value - low for value, low, _ in pairs]
    return {"type": "data", "array": up, "arrayminus": down, "color": _INK, "thickness": 1.4, "width": 4}


def plain(text: str, most: int | None = None) -> str:
    """Write a foreign string so that Plotly's markup (links, line breaks) stays text; cut it at `most` characters."""
    return html.escape(text if most is None or len(text) <= most else text[: most - 1] + "…", quote=False)


def table(figure: go.Figure) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the numbers that a figure draws, as text."""
    columns = {name: dict(cells) for name, cells in _named(figure)}
    places = dict.fromkeys(place for cells in columns.values() for place in cells)
    meta = _meta(figure)
    order = sorted(places) if meta["index"] == "x" else list(places)
    rows = [[html.unescape(str(at)), *(cells.get(at, "not computed") for cells in columns.values())] for at in order]
    return [meta["title"], *columns], rows


def describe(figure: go.Figure) -> str:
    """Return the figure in a sentence for each line (where it starts and ends) or each kind of mark."""
    meta, sentences = _meta(figure), list[str]()
    for name, cells in _named(figure):
        if meta["index"] == "x" and len(cells) > 1:
            known = [f"{text} at {meta['title']} {place}" for place, text in cells if text != "not computed"]
            sentences.append(f"{name}: from {known[0]} to {known[-1]}.")
        else:
            marks = "; ".join(f"{html.unescape(str(place))} {text}" for place, text in cells)
            sentences.append(f"{name}: {marks}.")
    return " ".join(sentences)


def _named(figure: go.Figure) -> list[tuple[str, list[tuple[Any, str]]]]:
    """Return each trace that has a name (bands have none) with its places and their texts."""
    index = _meta(figure)["index"]
    return [
        (f"{trace.name}, {trace.meta}" if trace.meta else trace.name, list(zip(trace[index], trace.text, strict=True)))
        for trace in figure.data
        if trace.name
    ]


def _meta(figure: go.Figure) -> dict[str, str]:
    layout: Any = figure.layout
    return layout.meta
