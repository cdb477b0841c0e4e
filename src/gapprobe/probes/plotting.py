"""A sweep as a Plotly figure: area by layer, a panel for each split, every probe beside its controls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from gapprobe.errors import ConfigError

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Okabe and Ito's colours; controls differ by dash as well.
_PROBES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_CONTROLS = {"shuffled": "dot", "question_only": "dash", "layer_0": "dashdot"} | {
    "random_projection": "longdash",
    "random_model": "longdashdot",
}
_GREY = "#7F7F7F"
_ABOUT = ("position", "target", "split", "seed")


def area_by_layer(table: pd.DataFrame) -> go.Figure:
    """Draw `ProbeSweep.table`: lines with their intervals, one panel for each position, target, split and seed.

    Raises:
        ConfigError: plotly is not installed.
    """
    try:
        from plotly.subplots import make_subplots
    except ImportError as error:
        raise ConfigError("plotting needs plotly: pip install 'gapprobe[report]'") from error
    several = [name for name in _ABOUT if table[name].nunique() > 1]
    groups = list(table.groupby(list(_ABOUT), sort=False))
    titles = [
        ", ".join(f"{n} {part[n].iloc[0]}" for n in several) or f"split {part['split'].iloc[0]}" for _, part in groups
    ]
    figure = make_subplots(rows=1, cols=len(groups), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.03)
    probes = list(dict.fromkeys(table["probe"]))
    shown: set[str] = set()
    for column, (_, part) in enumerate(groups, start=1):
        for (probe, kind), line in part.groupby(["probe", "kind"], sort=False):
            own = kind == "probe"
            name = (
                str(probe) if own else f"{kind}" + (f", {probe}" if len(probes) > 1 and kind != "question_only" else "")
            )
            owned = own or (len(probes) > 1 and kind != "question_only")
            color = _PROBES[probes.index(str(probe)) % len(_PROBES)] if owned else _GREY
            line = line.sort_values("layer")
            if own:
                band = [*line["ci_low"], *line["ci_high"][::-1]]
                layers = [*line["layer"], *line["layer"][::-1]]
                fill = {"fill": "toself", "fillcolor": color, "opacity": 0.18, "line": {"width": 0}}
                figure.add_scatter(
                    x=layers, y=band, mode="lines", **fill, hoverinfo="skip", showlegend=False, row=1, col=column
                )
            figure.add_scatter(
                x=line["layer"],
                y=line["auc"],
                name=name,
                legendgroup=name,
                showlegend=name not in shown,
                mode="lines+markers" if own else "lines",
                line={"color": color, "dash": "solid" if own else _CONTROLS.get(str(kind), "dot")},
                customdata=line[["ci_low", "ci_high", "n"]],
                hovertemplate="%{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}], n = %{customdata[2]}",
                row=1,
                col=column,
            )
            shown.add(name)
    figure.add_hline(y=0.5, line={"color": _GREY, "width": 1})
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="area under the ROC curve, held-out rows", col=1)
    figure.update_layout(template="plotly_white", hovermode="x unified", legend={"orientation": "h", "y": -0.2})
    return figure
