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
from jaxtyping import Float, Int64, Shaped

from gapprobe import drawing
from gapprobe.errors import DataError
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
_OVER = [[0.0, "rgba(230,159,0,0)"], [1.0, "rgba(230,159,0,0.8)"]]  # orange: black words are read on it
MANY = 400  # patches of one size whose words still stand in the picture


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
    go = drawing.plotly()
    spoken = _spoken(words)
    value, named, told = _cells(reading, spoken)
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
    go = drawing.plotly()
    patches = np.flatnonzero(reading.token_roles == ROLES["image"])
    if len(patches) != len(boxes):
        raise DataError(
            f"the reading has {len(patches)} image tokens and there are {len(boxes)} boxes: they do not match"
        )
    value, named, told = _cells(reading, _spoken(words))
    width, height = image.size
    grids = _grids(boxes * np.array([width, height, width, height]))
    figure = go.Figure()
    for i, layer in enumerate(reading.layers):
        for patch, across, down in grids:
            tokens = patches[patch]
            figure.add_heatmap(
                x=across,
                y=down,
                z=np.where(patch >= 0, value[i, tokens], np.nan),
                text=np.where(patch >= 0, named[i, tokens], ""),
                texttemplate="%{text}" if patch.size <= MANY else None,
                textfont={"size": 12, "color": "#111111"},
                customdata=np.where(patch >= 0, told[i, tokens], ""),
                hovertemplate="%{customdata}<extra></extra>",
                hoverongaps=False,
                colorscale=_OVER,
                zmin=0,
                zmax=1,
                xgap=1,
                ygap=1,
                showscale=False,
                name=f"layer {layer}",
                visible=i == len(reading.layers) - 1,
            )
    steps = [
        {
            "label": str(layer),
            "method": "update",
            "args": [{"visible": [place // len(grids) == i for place in range(len(figure.data))]}],
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
    go = drawing.plotly()
    figure = go.Figure()
    for i, (group, line) in enumerate(table.groupby("group", sort=False)):
        name = f"{group} (n = {line['n'].max():,})"
        drawing.line_with_band(
            figure, line.sort_values("layer"), "layer", "probability", name=name, style=drawing.look(i)
        )
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="probability of the target", rangemode="tozero")
    legend = {"orientation": "h", "y": -0.2}
    head = {"text": html.escape(title), "x": 0.5}
    figure.update_layout(template="plotly_white", hovermode="x unified", legend=legend, title=head)
    return figure


def _meaning(reading: LensReading) -> str:
    return "probability of the target" if reading.targets.shape[1] else "probability of the best word"


def _spoken(words: Model | Sequence[str] | None) -> Callable[[int], str]:
    """Return how a token reads, spaces made visible."""
    if words is None:
        return str
    if isinstance(words, str):
        raise DataError("words is one text; give the vocabulary as a list, a word for each token, or the model")
    if isinstance(words, Sequence):

        def word(token: int) -> str:
            if token >= len(words):
                raise DataError(f"the vocabulary has {len(words)} words, and the reading has the token {token}")
            return words[token].replace(" ", "␣").replace("\n", "⏎")

        return word
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


def _grids(
    boxes: Float[np.ndarray, "k 4"],
) -> list[tuple[Int64[np.ndarray, "r c"], Float[np.ndarray, " c_1"], Float[np.ndarray, " r_1"]]]:
    """Lay boxes of one size out as a grid: the box in each of its cells, -1 for none, and the cells' edges.

    Coarse ones come first: what lies on top is what the pointer finds. Boxes without area have no cell.
    """
    sizes = np.round(boxes[:, 2:] - boxes[:, :2], 3)
    kinds = np.unique(sizes[(sizes > 0).all(1)], axis=0)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for size in sorted(kinds.tolist(), key=lambda size: -size[0] * size[1]):
        own = np.flatnonzero((sizes == size).all(1))
        starts, places = zip(*(_cells_along(boxes[own, axis], size[axis]) for axis in (0, 1)), strict=True)
        cells = np.full((len(starts[1]) - 1, len(starts[0]) - 1), -1)
        cells[places[1], places[0]] = own
        found.append((cells, starts[0], starts[1]))
    return found


def _cells_along(
    starts: Float[np.ndarray, " k"], size: float
) -> tuple[Float[np.ndarray, " c_1"], Int64[np.ndarray, " k"]]:
    """Return the edges of cells along one axis, and the cell of each box; a gap between boxes is a cell of its own."""
    at = np.unique(np.round(starts, 2))
    edges = [at[0]]
    for start in at:
        if start - edges[-1] > size / 2:
            edges.append(start)
        edges.append(start + size)
    return np.array(edges), np.searchsorted(edges, starts + size / 4) - 1


def _best(reading: LensReading, layer: int, token: int) -> list[tuple[int, float]]:
    words, logs = reading.top_words[layer, token, :SHOWN], reading.top_log_prob[layer, token, :SHOWN]
    return list(zip(words.tolist(), logs.tolist(), strict=True))


def _png(image: PIL.Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
