"""Functions from one family's results (docs/results.md) to a Plotly figure, or to None where there is nothing to draw.

Every drawn number stands in results.json as it is; a value that is null there leaves a hole, never a zero.
"""

from __future__ import annotations

import math

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from gapprobe.report import drawing, series
from gapprobe.report.series import BLUE, GREY, SETTINGS, VARIANTS, VERMILION, Family, Series, Span, interval, percent

_COLORS = {"text_only": BLUE, "visual": VERMILION}
_LEGEND = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"}


def gap_bars(family: Family) -> go.Figure | None:
    """Accuracy with intervals: text only and visual on the rows that count, above all five settings on all trials."""
    groups = {
        "rows that count": ({key: family["settings"][key] for key in _COLORS}, 1),
        "all trials": ({key: family["raw"][key] for key in SETTINGS}, 0.5),
    }
    figure = make_subplots(
        rows=2, shared_xaxes=True, vertical_spacing=0.16, row_heights=[2.4, 5], subplot_titles=list(groups)
    )
    for row, (name, (cells, opacity)) in enumerate(groups.items(), start=1):
        known = {key: cell for key, cell in cells.items() if cell["accuracy"] is not None}
        values = [cell["accuracy"] for cell in known.values()]
        bars = go.Bar(
            x=values,
            y=[SETTINGS[key] for key in known],
            orientation="h",
            name=name,
            width=0.66,
            marker={"color": [_COLORS.get(key, GREY) for key in known], "opacity": opacity},
            error_x=drawing.whiskers(values, [cell["ci"] for cell in known.values()]),
            text=[f"{percent(c['accuracy'])} {interval(c['ci'], 100, 1)}, n = {c['n']}" for c in known.values()],
            textposition="none",
            hovertemplate="%{y}: %{text}<extra></extra>",
        )
        figure.add_trace(bars, row=row, col=1)
        counts = sorted({cell["n"] for cell in known.values()})
        n = f"n = {'–'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))}" if counts else "no rows"
        title = {"text": f"<b>{name}</b>, {n}", "x": 0, "xanchor": "left", "font": {"size": 13}}
        figure.update_annotations(title, selector={"text": name})
        labels = [SETTINGS[key] for key in cells]
        figure.update_yaxes(type="category", categoryarray=labels, range=[len(labels) - 0.5, -0.5], row=row)
        for key, label in zip(cells, labels, strict=True):
            share = f"<b>{percent(cells[key]['accuracy'])}</b>" if key in known else "no rows"
            drawing.side_label(figure, label, share, "y" if row == 1 else "y2")
    if not any(len(trace.x) for trace in figure.data):
        return None
    drawing.style(figure, 330, ("y", "setting"), l=112, r=66, t=26)
    figure.update_xaxes(range=[0, 1], tickformat=".0%")
    figure.update_xaxes(title_text="answers judged right (% of rows)", row=2)
    figure.update_yaxes(categoryorder="array", showgrid=False)
    return figure


def accuracy_by_relation(family: Family) -> go.Figure | None:
    """Text-only and visual accuracy of each relation, the widest gap first, with the interval of the visual one."""
    rows = {drawing.plain(row["relation"]): row for row in family["by_relation"] or []}
    order = sorted(rows, key=lambda name: ((rows[name]["visual"] or 0) - (rows[name]["text_only"] or 0), name))
    figure = go.Figure()
    for key, symbol in (("text_only", "circle-open"), ("visual", "circle")):
        names = [name for name in order if rows[name][key] is not None]
        values = [rows[name][key] for name in names]
        intervals = [rows[name]["ci"] if key == "visual" else None for name in names]
        texts = [
            f"{percent(value)} {interval(ci, 100, 1)}".rstrip() for value, ci in zip(values, intervals, strict=True)
        ]
        dots = go.Scatter(
            x=values,
            y=names,
            mode="markers",
            name=SETTINGS[key],
            marker={"color": _COLORS[key], "size": 9, "symbol": symbol, "line": {"width": 2, "color": _COLORS[key]}},
            error_x=drawing.whiskers(values, intervals),
            text=texts,
            cliponaxis=False,
            hovertemplate="%{y}: %{text}<extra>%{fullData.name}</extra>",
        )
        figure.add_trace(dots)
    if not any(len(trace.x) for trace in figure.data):
        return None
    for name in order:
        if pair := series.ends([rows[name]["visual"], rows[name]["text_only"]]):
            bridge = {"color": drawing.GRID, "width": 5}
            figure.add_shape(type="line", x0=pair[0], x1=pair[1], y0=name, y1=name, line=bridge, layer="below")
        drawing.side_label(figure, name, f"n = {rows[name]['n']}")
    drawing.style(figure, 76 + 24 * len(order), ("y", "relation"), l=112, r=66, t=26)
    figure.update_xaxes(range=[-0.02, 1.02], tickformat=".0%", title_text="answers judged right (% of rows that count)")
    figure.update_yaxes(categoryorder="array", categoryarray=order, range=[len(order) - 0.4, -0.6], showgrid=False)
    figure.update_yaxes(tickvals=order, ticktext=[drawing.plain(rows[name]["relation"], 40) for name in order])
    figure.update_yaxes(automargin=True)
    figure.update_layout(showlegend=True, legend=_LEGEND)
    return figure


def probability_by_layer(family: Family) -> go.Figure | None:
    """Mean probability of the answer token by layer: text only against visual, the visual one also by outcome."""
    return _over_layers(series.lens(family), "probability of the answer token", (0, 1))


def probability_variants(family: Family) -> go.Figure | None:
    """The four conventions of the logit lens side by side: final norm or none, gold or generated token."""
    variants = {key: (family["lens"].get("variants") or {}).get(key) or {} for key in VARIANTS}
    names = [
        key
        for key, cells in variants.items()
        if any(Series("", (), cells.get(setting) or [], "").known for setting in ("text", "visual"))
    ]
    if not names:
        return None
    rows = math.ceil(len(names) / 2)
    figure = make_subplots(
        rows=rows,
        cols=2,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.06,
        vertical_spacing=0.24 / rows,
        subplot_titles=[VARIANTS[name] for name in names],
    )
    for place, name in enumerate(names):
        for key, label, color, dash in (("text", "text only", BLUE, "solid"), ("visual", "visual", VERMILION, "dash")):
            drawn = Series(label, family["layers"], variants[name].get(key) or [], color, dash=dash)
            if drawn.known:
                trace = drawing.line(drawn, mode="lines", meta=VARIANTS[name], legendgroup=key, showlegend=place == 0)
                figure.add_trace(trace, row=place // 2 + 1, col=place % 2 + 1)
    figure.for_each_annotation(lambda title: title.update(font={"size": 12}))
    drawing.style(figure, 130 + 130 * rows, ("x", "layer"), l=62, r=12, t=50)
    figure.update_yaxes(range=[0, 1])
    figure.update_yaxes(title_text="probability", col=1)
    figure.update_xaxes(drawing.layer_ticks(family["layers"], most=6))
    figure.update_xaxes(title_text="layer", row=rows)
    figure.update_layout(showlegend=True, legend={**_LEGEND, "y": 1.1})
    return figure


def probe_by_layer(family: Family, span: Span | None = None) -> go.Figure | None:
    """AUC of the probe by layer under the headline split, with its controls under the same folds."""
    return _over_layers(series.probe(family), "AUC (0.5 = chance)", span, chance=0.5)


def splits_by_layer(family: Family, span: Span | None = None) -> go.Figure | None:
    """AUC of the same probe by layer when the folds are grouped in different ways, and when they are not."""
    return _over_layers(series.splits(family), "AUC (0.5 = chance)", span, chance=0.5)


def cosine_by_layer(family: Family, span: Span | None = None) -> go.Figure | None:
    """Mean cosine similarity by layer of a trial's two states, for linking successes and failures."""
    return _over_layers(series.cosine(family), "cosine similarity", span)


def centred_cosine_by_layer(family: Family, span: Span | None = None) -> go.Figure | None:
    """The same after the mean of all states compared at a layer was taken away: what all trials share is gone."""
    return _over_layers(series.centred_cosine(family), "cosine similarity, centred", span)


def risk_coverage(family: Family, top: float = 1.0) -> go.Figure | None:
    """Share wrong among the answered over the share answered, one curve a method, a dot at its operating point."""
    curves = {key: curve for key, curve in series.risk(family).items() if curve.known}
    if not curves:
        return None
    figure = go.Figure()
    for key, curve in curves.items():
        figure.add_trace(drawing.line(curve, mode="lines"))
        method = family["selective"][key]
        if method["coverage"] is not None and method["risk"] is not None:
            dot = go.Scatter(
                x=[method["coverage"]],
                y=[method["risk"]],
                mode="markers",
                name=f"{curve.name} · threshold",
                marker={"color": curve.color, "size": 10, "line": {"color": "white", "width": 1.5}},
                text=[f"risk {percent(method['risk'])} at coverage {percent(method['coverage'])}"],
                hovertemplate="%{text}<extra>%{fullData.name}</extra>",
            )
            figure.add_trace(dot)
    drawing.style(figure, 340, ("x", "coverage"), r=136)
    figure.update_xaxes(range=[0, 1], tickformat=".0%", title_text="coverage (% of rows answered)")
    figure.update_yaxes(range=[0, top], tickformat=".0%", title_text="risk (% wrong among the answered)")
    drawing.label_lines(figure, list(curves.values()), (0, top))
    return figure


def _over_layers(lines: list[Series], title: str, span: Span | None, chance: float | None = None) -> go.Figure | None:
    """Draw lines over the layers with their bands beneath and their names at the right end."""
    drawn = [part for part in lines if part.known]
    if not drawn:
        return None
    values = [value for part in drawn for value in part.extremes]
    low, high = span or (min(values), max(values))
    figure = go.Figure([band for part in drawn for band in drawing.bands(part)])
    figure.add_traces([drawing.line(part) for part in drawn])
    drawing.style(figure, 350, ("x", "layer"), r=136)
    figure.update_xaxes(drawing.layer_ticks(drawn[0].x, most=12), title_text="layer (0 = embeddings)")
    figure.update_yaxes(range=[low, high], title_text=title)
    if chance is not None:
        figure.add_hline(y=chance, line={"color": GREY, "width": 1}, layer="below")
    drawing.label_lines(figure, drawn, (low, high))
    return figure
