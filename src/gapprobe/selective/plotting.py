"""A selective report as a Plotly figure: risk over coverage, and how far probabilities can be believed."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import pandas as pd

from gapprobe.errors import ConfigError

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Okabe and Ito's colours; methods differ by dash as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def drawn(curves: pd.DataFrame, reliability: pd.DataFrame) -> go.Figure:
    """Draw `SelectiveReport.curves` and, in a second panel where it holds anything, `SelectiveReport.reliability`.

    Raises:
        ConfigError: plotly is not installed.
    """
    try:
        from plotly.subplots import make_subplots
    except ImportError as error:
        raise ConfigError("plotting needs plotly: pip install 'gapprobe[report]'") from error
    titles = ["Risk over coverage", *(["Reliability"] if len(reliability) else [])]
    figure = make_subplots(rows=1, cols=len(titles), subplot_titles=titles, horizontal_spacing=0.12)
    for i, (method, line) in enumerate(curves.groupby("method", sort=False)):
        color, name = _COLOURS[i % len(_COLOURS)], html.escape(str(method))
        style = {"color": color, "dash": _DASHES[i % len(_DASHES)]}
        figure.add_scatter(
            x=[*line["coverage"], *line["coverage"][::-1]],
            y=[*line["ci_low"], *line["ci_high"][::-1]],
            **{"mode": "lines", "fill": "toself", "fillcolor": color, "opacity": 0.18, "line": {"width": 0}},
            hoverinfo="skip",
            legendgroup=name,
            showlegend=False,
            row=1,
            col=1,
        )
        figure.add_scatter(
            x=line["coverage"],
            y=line["risk"],
            name=name,
            legendgroup=name,
            mode="lines",
            line=style,
            customdata=line[["ci_low", "ci_high"]],
            hovertemplate="%{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]",
            row=1,
            col=1,
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
                name=name,
                legendgroup=name,
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
        grey = {"color": "#7F7F7F", "width": 1}
        ends = {"x": [0, 1], "y": [0, 1], "mode": "lines", "line": grey, "hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(**ends, row=1, col=2)
        figure.update_xaxes(title_text="probability of being right, mean of the bin", range=[0, 1], row=1, col=2)
        figure.update_yaxes(title_text="share right", range=[0, 1], row=1, col=2)
    figure.update_layout(template="plotly_white", legend={"orientation": "h", "y": -0.2}, height=460)
    return figure
