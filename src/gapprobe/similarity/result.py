"""What a comparison by cosine found: arrays, a table with intervals, a file, a figure."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gapprobe import drawing
from gapprobe.errors import DataError
from gapprobe.files import write_bytes

if TYPE_CHECKING:
    import plotly.graph_objects as go

VARIANTS = {
    "raw": "raw: residuals as they are",
    "centred": "centred: less the mean of all rows",
    "standardised": "standardised: and over each dimension's deviation",
}
_FORMAT = "gapprobe.cosine"


@dataclass(frozen=True)
class CosineResult:
    """Cosine of each pair at every layer. With several positions the arrays have a first axis of positions.

    Attributes:
        layers: the layers looked at.
        raw: of the residuals as they are; inflated by the few huge dimensions that all rows share.
        centred: after the mean of all rows of both sides is taken off; NaN where nothing is left of a row, as at
            layer 0 when every prompt ends in the same token.
        standardised: after every dimension is divided by its deviation, too: none has more say than another.
        positions: the tokens whose residuals were compared.
        left: ids of the rows on the left, in the order of the arrays.
        right: ids of their partners.
        groups: of each pair, as text; "all" where none were given.
        lonely: rows that were asked for and found no partner.
        table: one row for each position, layer, group and variant: `mean` with `ci_low` and `ci_high`; `n` pairs behind
            it; `left_out`, pairs without a cosine, a row of which holds NaN, an infinity, or nothing after centring;
            `unrelated`, the mean cosine of left rows with right rows of other pairs.
    """

    layers: tuple[int, ...]
    raw: Float[np.ndarray, "*p l n"]
    centred: Float[np.ndarray, "*p l n"]
    standardised: Float[np.ndarray, "*p l n"]
    positions: tuple[str, ...]
    left: tuple[str, ...]
    right: tuple[str, ...]
    groups: Shaped[np.ndarray, " n"]
    lonely: int
    table: pd.DataFrame

    def save(self, path: str | Path) -> Path:
        """Write all of it to one safetensors file; `gp.load_cosine` reads it back.

        Raises:
            OutputError: it cannot be written, or the disk is full.
        """
        told: dict[str, object] = {
            **{name: getattr(self, name) for name in ("layers", "positions", "left", "right", "lonely")},
            "groups": self.groups.tolist(),
            "table": self.table.to_dict("list"),
        }
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in VARIANTS}
        write_bytes(Path(path), save(arrays, metadata={_FORMAT: json.dumps(told, ensure_ascii=False)}))
        return Path(path)

    def plot(self) -> go.Figure:
        """Draw the means by layer with their intervals, every variant beside the others; a row for each position.

        Raises:
            ConfigError: plotly is not installed.
        """
        return _drawn(self.table, self.positions)


def load_cosine(path: str | Path) -> CosineResult:
    """Read what `CosineResult.save` wrote.

    Raises:
        DataError: there is no such file, or it is none.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            told: dict[str, Any] = json.loads((file.metadata() or {})[_FORMAT])
            arrays = {name: file.get_tensor(name) for name in VARIANTS}
        layers, positions, left, right = (tuple(told[name]) for name in ("layers", "positions", "left", "right"))
        groups, table = np.array(told["groups"], dtype=str), pd.DataFrame(told["table"])
        # One position has an axis of its own where it was given in a list.
        shapes = {array.shape[-2:] for array in arrays.values()} | {(len(layers), len(right))}
        axes = {array.shape[:-2] for array in arrays.values()}
        allowed = ({(len(positions),)}, {()}) if len(positions) == 1 else ({(len(positions),)},)
        if len(shapes) > 1 or axes not in allowed or groups.shape != (len(left),) or len(left) != len(right):
            raise ValueError("its arrays do not belong together")
        return CosineResult(layers, **arrays, positions=positions, left=left, right=right, groups=groups,
                            lonely=int(told["lonely"]), table=table)  # fmt: skip
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be read as cosines; give a file that CosineResult.save wrote") from error


def _drawn(table: pd.DataFrame, positions: tuple[str, ...]) -> go.Figure:
    several = len(positions) > 1
    told = [f", {html.escape(position)}" if several else "" for position in positions]
    titles = [f"{title}{at}" for at in told for title in VARIANTS.values()]
    figure = drawing.plotly("subplots").make_subplots(
        rows=len(positions), cols=len(VARIANTS), subplot_titles=titles, shared_xaxes=True, horizontal_spacing=0.05
    )
    groups = list(dict.fromkeys(table["group"]))
    for (position, group, variant), line in table.groupby(["position", "group", "variant"], sort=False):
        line = line.sort_values("layer")
        row, col = positions.index(str(position)) + 1, list(VARIANTS).index(str(variant)) + 1
        first = (row, col) == (1, 1)
        spoken = html.escape(str(group))
        name = f"{spoken} (n = {line['n'].max():,})" if first else spoken
        style = drawing.look(groups.index(group))
        drawing.line_with_band(
            figure, line, "layer", "mean", name=name, style=style, group=str(group), legend=first, at=(row, col)
        )
        if group == groups[0]:
            figure.add_scatter(
                x=line["layer"],
                y=line["unrelated"],
                name="rows of different pairs",
                legendgroup="unrelated",
                showlegend=first,
                mode="lines",
                line={"color": drawing.GREY, "dash": "dot"},
                hovertemplate="%{y:.3f}",
                row=row,
                col=col,
            )
    figure.update_xaxes(title_text="layer", row=len(positions))
    figure.update_yaxes(title_text="mean cosine, 95 % interval", col=1)
    figure.update_layout(
        template="plotly_white",
        hovermode="x unified",
        legend={"orientation": "h", "y": -0.2},
        height=380 * len(positions),
    )
    return figure
