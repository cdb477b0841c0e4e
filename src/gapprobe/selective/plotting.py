"""A selective report as a Plotly figure: risk over coverage, and how far probabilities can be believed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from gapprobe import drawing

if TYPE_CHECKING:
    import plotly.graph_objects as go


def drawn(curves: pd.DataFrame, reliability: pd.DataFrame) -> go.Figure:
    """Draw `SelectiveReport.curves` and, in a second panel where it holds anything, `SelectiveReport.reliability`.

    Raises:
        ConfigError: plotly is not installed.
    """
    titles = ["Risk over coverage", *(["Reliability"] if len(reliability) else [])]
    figure = drawing.plotly("subplots").make_subplots(
        rows=1, cols=len(titles), subplot_titles=titles, horizontal_spacing=0.12
    )
    for i, (method, line) in enumerate(curves.groupby("method", sort=False)):
        style = drawing.look(i)
        drawing.line_with_band(
            figure, line, "coverage", "risk", name=str(method), style=style, markers=False, at=(1, 1)
        )
        points = reliability[reliability["method"] == method]
        if len(points):
            figure.add_scatter(
                x=points["confidence"],
                y=points["accuracy"],
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": points["ci_high"] - points["accuracy"],
                    "arrayminus": points["accuracy"] - points["ci_low"],
                },
                name=figure.data[-1].name,
                legendgroup=figure.data[-1].legendgroup,
                showlegend=False,
                mode="lines+markers",
                line=style,
                customdata=points[["n"]],
                hovertemplate="%{x:.3f}: %{y:.3f}, n = %{customdata[0]}",
                row=1,
                col=2,
            )
    figure.update_xaxes(title_text="coverage (share answered)", range=[0, 1], row=1, col=1)
    figure.update_yaxes(title_text="risk (share wrong among the answered)", rangemode="tozero", row=1, col=1)
    if len(reliability):
        grey = {"color": drawing.GREY, "width": 1}
        ends = {"x": [0, 1], "y": [0, 1], "mode": "lines", "line": grey, "hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(**ends, row=1, col=2)
        figure.update_xaxes(title_text="probability of being right, mean of the bin", range=[0, 1], row=1, col=2)
        figure.update_yaxes(title_text="share right", range=[0, 1], row=1, col=2)
    figure.update_layout(template="plotly_white", legend={"orientation": "h", "y": -0.2}, height=460)
    return figure
