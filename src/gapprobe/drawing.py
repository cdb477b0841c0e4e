"""What the figures of results share: Plotly, if it is there; colours; and a line with its interval.

What a line is called may come from data: it reaches a figure as text, never as markup.
"""

from __future__ import annotations

import html
from importlib import import_module
from typing import Any

import pandas as pd

from gapprobe.errors import ConfigError

# Okabe and Ito's colours, which colour-blind readers tell apart; lines differ by dash as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
GREY = "#7F7F7F"


def plotly(part: str = "graph_objects") -> Any:
    """Return a module of Plotly.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(f"plotly.{part}")
    except ImportError as error:
        raise ConfigError("plotting needs plotly: pip install 'gapprobe[report]'") from error


def look(number: int) -> dict[str, str]:
    """Return colour and dash of the line of that number."""
    return {"color": COLOURS[number % len(COLOURS)], "dash": DASHES[number % len(DASHES)]}


def line_with_band(
    figure: Any,
    line: pd.DataFrame,
    x: str,
    y: str,
    *,
    name: str,
    style: dict[str, str],
    group: str | None = None,
    legend: bool = True,
    markers: bool = True,
    at: tuple[int, int] | None = None,
) -> None:
    """Add a line and, behind it, its interval.

    Args:
        figure: added to.
        line: the points, with the columns `ci_low` and `ci_high`, and `n` if it is to stand on hover.
        x: column.
        y: column.
        name: in the legend.
        style: see `look`.
        group: of lines that the legend shows and hides together; the name where left out.
        legend: whether the legend names it.
        markers: whether points are marked.
        at: row and column of a panel.
    """
    shared: dict[str, Any] = {"legendgroup": html.escape(name if group is None else group)}
    shared |= {} if at is None else {"row": at[0], "col": at[1]}
    known = line.dropna(subset=["ci_low", "ci_high"])
    figure.add_scatter(
        x=[*known[x], *known[x][::-1]],
        y=[*known["ci_low"], *known["ci_high"][::-1]],
        mode="lines",
        fill="toself",
        fillcolor=style["color"],
        opacity=0.18,
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
        **shared,
    )
    counted = "n" in line
    figure.add_scatter(
        x=line[x],
        y=line[y],
        name=html.escape(name),
        mode="lines+markers" if markers else "lines",
        line=style,
        customdata=line[["ci_low", "ci_high", *(["n"] if counted else [])]],
        hovertemplate="%{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]"
        + (", n = %{customdata[2]}" if counted else ""),
        showlegend=legend,
        **shared,
    )
