"""What a lens read, as Plotly figures: layer by token, over the picture, and by layer for groups of rows.

Words come from models and are hostile: they reach a figure as text, never as markup.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped

from gapprobe.errors import ConfigError, DataError
from gapprobe.lens.reading import LensReading
from gapprobe.store.format import ROLES

if TYPE_CHECKING:
    import PIL.Image
    import plotly.graph_objects as go

    from gapprobe.models.model import Model

SHOWN = 10  # words on hover
WIDE, CELL = 400, 46  # most tokens whose words stand in the figure, and the pixels of one
LONGEST = 8  # characters of a word in a cell; hover shows all
_SCALE = "Blues"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def heatmap(reading: LensReading, words: Model | Sequence[str] | None = None) -> go.Figure:
    """Draw one row: layers upwards, tokens to the right, in each cell the best word, darker the surer it is.

    With targets the colour is the first target's probability, and its rank stands on hover.

    Args:
        reading: of one row (`LensReading.of`), with top words.
        words: the model, for its tokenizer, or the vocabulary as text; numbers of tokens are shown without.

    Raises:
        DataError: the reading is of several rows, of none, or has neither targets nor top words.
        ConfigError: plotly is not installed.
    """
    go = _plotly()
    value, named, told = _cells(reading, _spoken(words))
    spoken = _spoken(words)
    names = [f"{i}: {html.escape(spoken(int(token)))}" for i, token in enumerate(reading.token_ids)]
    figure = go.Figure(
        go.Heatmap(
            z=value,
            x=list(range(len(names))),
            y=[str(layer) for layer in reading.layers],
            text=named,
            texttemplate="%{text}" if len(names) <= WIDE else None,
            customdata=told,
            hovertemplate="%{customdata}<extra></extra>",
            colorscale=_SCALE,
            zmin=0,
            zmax=1,
            colorbar={"title": {"text": _meaning(reading), "side": "right"}},
        )
    )
    figure.update_xaxes(tickvals=list(range(len(names))), ticktext=names, tickangle=-60, title_text="token")
    figure.update_yaxes(title_text="layer", type="category")
    size = {"height": 200 + 24 * len(reading.layers), "width": 160 + CELL * min(len(names), WIDE)}
    figure.update_layout(template="plotly_white", **size, title={"text": html.escape(reading.label), "x": 0})
    return figure


def lens_over_image(
    reading: LensReading,
    image: PIL.Image.Image,
    boxes: Float[np.ndarray, "k 4"],
    words: Model | Sequence[str] | None = None,
) -> go.Figure:
    """Draw what the lens reads at each image token over the patch that it is of; a slider picks the layer.

    Args:
        reading: of one row, its image tokens among the tokens.
        image: the picture.
        boxes: where the row's image tokens lie, as shares of the picture (`Model.boxes`).
        words: the model, for its tokenizer, or the vocabulary as text; numbers of tokens are shown without.

    Raises:
        DataError: the reading is not of one row, or has another number of image tokens than there are boxes.
        ConfigError: plotly is not installed.
    """
    go = _plotly()
    patches = np.flatnonzero(reading.token_roles == ROLES["image"])
    if len(patches) != len(boxes):
        raise DataError(
            f"the reading has {len(patches)} image tokens and there are {len(boxes)} boxes: they do not match"
        )
    value, named, told = _cells(reading, _spoken(words))
    width, height = image.size
    placed = np.flatnonzero((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
    # Coarse tiles first: what lies on top is what the pointer finds.
    placed = placed[np.argsort(-((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))[placed], kind="stable")]
    figure = go.Figure()
    each = len(placed) + 1
    for i, layer in enumerate(reading.layers):
        shown = i == len(reading.layers) - 1
        for k in placed:
            left, top, right, bottom = boxes[k] * np.array([width, height, width, height])
            sure = value[i, patches[k]]
            figure.add_scatter(
                x=[left, right, right, left, left],
                y=[top, top, bottom, bottom, top],
                mode="lines",
                fill="toself",
                fillcolor=f"rgba(230,159,0,{0.0 if np.isnan(sure) else 0.75 * sure:.3f})",
                line={"color": "rgba(255,255,255,0.6)", "width": 1},
                text=told[i, patches[k]],
                hoverinfo="text",
                hoveron="fills",
                visible=shown,
                showlegend=False,
            )
        middle = (boxes[placed, :2] + boxes[placed, 2:]) / 2 * np.array([width, height])
        figure.add_scatter(
            x=middle[:, 0],
            y=middle[:, 1],
            mode="text",
            text=[named[i, patches[k]] for k in placed],
            textfont={"size": 12, "color": "#111111"},
            hoverinfo="skip",
            visible=shown,
            showlegend=False,
            name=f"layer {layer}",
        )
    steps = [
        {
            "label": str(layer),
            "method": "update",
            "args": [{"visible": [place // each == i for place in range(each * len(reading.layers))]}],
        }
        for i, layer in enumerate(reading.layers)
    ]
    slider = {"steps": steps, "active": len(steps) - 1, "currentvalue": {"prefix": "layer "}, "pad": {"t": 20}}
    figure.add_layout_image(
        # Paled, so that words are read on dark pictures as on bright ones.
        **{"source": _png(image), "x": 0, "y": 0, "sizex": width, "sizey": height, "xref": "x", "yref": "y"},
        sizing="stretch",
        layer="below",
        opacity=0.6,
    )
    figure.update_xaxes(range=[0, width], visible=False, constrain="domain")
    figure.update_yaxes(range=[height, 0], visible=False, scaleanchor="x")
    title = html.escape(f"{reading.label}; colour: {_meaning(reading)}")
    figure.update_layout(template="plotly_white", height=640, sliders=[slider], title={"text": title, "x": 0.5})
    return figure


def by_layer(table: pd.DataFrame, title: str = "") -> go.Figure:
    """Draw `LensReading.by_layer`: the probability of the target by layer, a line with its interval for each group.

    Raises:
        ConfigError: plotly is not installed.
    """
    go = _plotly()
    figure = go.Figure()
    for i, (group, line) in enumerate(table.groupby("group", sort=False)):
        line = line.sort_values("layer")
        colour = _COLOURS[i % len(_COLOURS)]
        figure.add_scatter(
            x=[*line["layer"], *line["layer"][::-1]],
            y=[*line["ci_low"], *line["ci_high"][::-1]],
            mode="lines",
            fill="toself",
            fillcolor=colour,
            opacity=0.18,
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
        )
        figure.add_scatter(
            x=line["layer"],
            y=line["probability"],
            name=f"{html.escape(str(group))} (n = {int(line['n'].max())})",
            mode="lines+markers",
            line={"color": colour, "dash": _DASHES[i % len(_DASHES)]},
            customdata=line[["ci_low", "ci_high"]],
            hovertemplate="%{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]",
        )
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="probability of the target", rangemode="tozero")
    legend = {"orientation": "h", "y": -0.2}
    head = {"text": html.escape(title), "x": 0.5}
    figure.update_layout(template="plotly_white", hovermode="x unified", legend=legend, title=head)
    return figure


def _plotly() -> Any:
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ConfigError("plotting needs plotly: pip install 'gapprobe[report]'") from error
    return go


def _meaning(reading: LensReading) -> str:
    return "probability of the target" if reading.targets.shape[1] else "probability of the best word"


def _spoken(words: Model | Sequence[str] | None) -> Callable[[int], str]:
    """Return how a token reads, spaces made visible."""
    if words is None:
        return str
    if isinstance(words, Sequence):
        return lambda token: words[token].replace(" ", "␣").replace("\n", "⏎")
    decode = cast(Any, words.tokenizer).convert_ids_to_tokens
    back = cast(Any, words.tokenizer).convert_tokens_to_string
    kept: dict[int, str] = {}

    def spoken(token: int) -> str:
        if token not in kept:
            raw = str(decode(token))
            text = str(back([raw])) if raw[:1] not in "▁Ġ" else "␣" + str(back([raw])).strip()
            kept[token] = (text or raw).replace(" ", "␣").replace("\n", "⏎")
        return kept[token]

    return spoken


def _cells(
    reading: LensReading, spoken: Callable[[int], str]
) -> tuple[Float[np.ndarray, "l t"], Shaped[np.ndarray, "l t"], Shaped[np.ndarray, "l t"]]:
    """Return of every layer and token the colour, the word in it, and what hover tells."""
    if len(set(reading.row.tolist())) != 1:
        raise DataError(f"a figure shows the tokens of one row, not of {len(set(reading.row.tolist()))}: see `of(id)`")
    q, k = reading.targets.shape[1], reading.top_words.shape[2]
    if not q and not k:
        raise DataError("the reading has neither targets nor top words: read with targets or top_k")
    value = reading.probability[..., 0] if q else np.exp(reading.top_log_prob[..., 0])
    roles = {code: name for name, code in ROLES.items()}
    named, told = np.empty(value.shape, dtype=object), np.empty(value.shape, dtype=object)
    for i, layer in enumerate(reading.layers):
        for t, token in enumerate(reading.token_ids.tolist()):
            best = [(spoken(int(w)) if w >= 0 else "?", float(np.exp(p))) for w, p in _best(reading, i, t)]
            word = best[0][0] if best else ""
            named[i, t] = html.escape(word if len(word) <= LONGEST else word[: LONGEST - 1] + "…")
            role = roles.get(int(reading.token_roles[t]), "other")
            lines = [f"layer {layer}, token {t}: {html.escape(spoken(token))} ({role})"]
            if q and reading.targets[t, 0] >= 0:
                target = html.escape(spoken(int(reading.targets[t, 0])))
                lines.append(f"target {target}: {value[i, t]:.3f}, rank {reading.rank[i, t, 0]:,}")
            lines += [f"{n}. {html.escape(w)} {p:.3f}" for n, (w, p) in enumerate(best, start=1)]
            lines.append(f"entropy {reading.entropy[i, t]:.2f} nats")
            if reading.kl is not None:
                lines.append(f"KL(final || layer) {reading.kl[i, t]:.3f} nats")
            told[i, t] = "<br>".join(lines)
    return value, named, told


def _best(reading: LensReading, layer: int, token: int) -> list[tuple[int, float]]:
    words, logs = reading.top_words[layer, token, :SHOWN], reading.top_log_prob[layer, token, :SHOWN]
    return list(zip(words.tolist(), logs.tolist(), strict=True))


def _png(image: PIL.Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
