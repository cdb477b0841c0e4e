"""A sweep as a Plotly figure: area by layer, a panel for each split, every probe beside its controls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from gapprobe import drawing

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Controls differ by dash.
_CONTROLS = {"shuffled": "dot", "question_only": "dash", "layer_0": "dashdot"} | {
    "random_projection": "longdash",
    "random_model": "longdashdot",
}
_ABOUT = ("position", "target", "split", "seed")


def area_by_layer(table: pd.DataFrame) -> go.Figure:
    """Draw `ProbeSweep.table`: lines with their intervals, one panel for each position, target, split and seed.

    Raises:
        ConfigError: plotly is not installed.
    """
    several = [name for name in _ABOUT if table[name].nunique() > 1]
    groups = list(table.groupby(list(_ABOUT), sort=False))
    titles = [
        ", ".join(f"{n} {part[n].iloc[0]}" for n in several) or f"split {part['split'].iloc[0]}" for _, part in groups
    ]
    figure = drawing.plotly("subplots").make_subplots(
        rows=1, cols=len(groups), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.03
    )
    probes = list(dict.fromkeys(table["probe"]))
    shown: set[str] = set()
    for column, (_, part) in enumerate(groups, start=1):
        for (probe, kind), line in part.groupby(["probe", "kind"], sort=False):
            own = kind == "probe"
            owned = own or (len(probes) > 1 and kind != "question_only")
            name = str(probe) if own else f"{kind}, {probe}" if owned else str(kind)
            colour = drawing.COLOURS[probes.index(str(probe)) % len(drawing.COLOURS)] if owned else drawing.GREY
            line = line.sort_values("layer")
            if own:
                style = {"color": colour, "dash": "solid"}
                drawing.line_with_band(
                    figure, line, "layer", "auc", name=name, style=style, legend=name not in shown, at=(1, column)
                )
            else:
                figure.add_scatter(
                    x=line["layer"],
                    y=line["auc"],
                    name=name,
                    legendgroup=name,
                    showlegend=name not in shown,
                    mode="lines",
                    line={"color": colour, "dash": _CONTROLS.get(str(kind), "dot")},
                    customdata=line[["ci_low", "ci_high", "n"]],
                    hovertemplate="%{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}], n = %{customdata[2]}",
                    row=1,
                    col=column,
                )
            shown.add(name)
    figure.add_hline(y=0.5, line={"color": drawing.GREY, "width": 1})
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="area under the ROC curve, held-out rows", col=1)
    figure.update_layout(template="plotly_white", hovermode="x unified", legend={"orientation": "h", "y": -0.2})
    return figure
