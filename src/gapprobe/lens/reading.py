"""What a lens read: small arrays beside the tokens they are of, as tables, as a file, and what is asked of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int64, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gapprobe import stats
from gapprobe.errors import DataError
from gapprobe.files import write_bytes
from gapprobe.store.columns import by_id
from gapprobe.store.format import ROLES

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from gapprobe.models.model import Model

FORMAT = "gapprobe lens 1"


@dataclass(frozen=True, eq=False)
class LensReading:
    """One line a token, q targets and k words a line. Logarithms are natural.

    Attributes:
        layers: the layers looked at.
        label: lens, norm and target, in words: which of the conventions this is.
        ids: the rows.
        row: which of `ids` each line is of.
        token_ids, token_positions, token_roles: the token whose residual was read, as in the store.
        targets: words whose standing was asked for; -1 is none.
        log_prob: of each target; NaN where there is none.
        rank: of each target, 1 = most probable, words that tie share the better rank; 0 where there is no target.
        entropy: of the distribution, in nats.
        top_words: the most probable words, best first.
        top_log_prob: their log-probabilities.
        kl: KL(final || layer) in nats; None if it was not asked for.
    """

    layers: tuple[int, ...]
    label: str
    ids: tuple[str, ...]
    row: Int64[np.ndarray, " t"]
    token_ids: Int64[np.ndarray, " t"]
    token_positions: Int64[np.ndarray, " t"]
    token_roles: UInt8[np.ndarray, " t"]
    targets: Int64[np.ndarray, "t q"]
    log_prob: Float[np.ndarray, "l t q"]
    rank: Int64[np.ndarray, "l t q"]
    entropy: Float[np.ndarray, "l t"]
    top_words: Int64[np.ndarray, "l t k"]
    top_log_prob: Float[np.ndarray, "l t k"]
    kl: Float[np.ndarray, "l t"] | None

    @property
    def probability(self) -> Float[np.ndarray, "l t q"]:
        """Return the probability of each target."""
        return np.exp(self.log_prob)

    @property
    def skipped(self) -> int:
        """Return how many residuals were NaN or infinite, and so have no reading."""
        return int(np.isnan(self.entropy).sum())

    @cached_property
    def table(self) -> pd.DataFrame:
        """Return one line a token, target and layer (one without target where there are none).

        Columns: id, token, position, role, layer, entropy, kl, top_word, top_log_prob, and for targets target, log_prob
        and rank.
        """
        layers, t, q = self.log_prob.shape
        names = {code: name for name, code in ROLES.items()}
        base = {
            "id": np.array(self.ids, dtype=object)[self.row],
            "token": self.token_ids,
            "position": self.token_positions,
            "role": np.array([names.get(int(code), "other") for code in self.token_roles], dtype=object),
        }
        times = max(1, q)

        def spread(values: np.ndarray) -> np.ndarray:  # [l t] to lines
            return np.repeat(values.reshape(-1), times)

        columns = {name: np.tile(np.repeat(column, times), layers) for name, column in base.items()}
        columns["layer"] = np.repeat(np.array(self.layers, dtype=np.int64), t * times)
        columns["entropy"] = spread(self.entropy)
        if self.kl is not None:
            columns["kl"] = spread(self.kl)
        if self.top_words.shape[2]:
            columns["top_word"] = spread(self.top_words[..., 0])
            columns["top_log_prob"] = spread(self.top_log_prob[..., 0])
        if q:
            columns["target"] = np.tile(self.targets.reshape(-1), layers)
            columns["log_prob"] = self.log_prob.reshape(-1)
            columns["rank"] = self.rank.reshape(-1)
        return pd.DataFrame(columns)

    def first_layer(self, k: int = 1) -> Float[np.ndarray, "t q"]:
        """Return the first layer at which each target is among the k most probable words; NaN where it never is.

        Raises:
            DataError: k is below 1.
        """
        if k < 1:
            raise DataError(f"k must be at least 1, got {k}")
        among = (self.rank >= 1) & (self.rank <= k)
        first = np.array(self.layers, dtype=np.float64)[among.argmax(0)]
        return np.where(among.any(0), first, np.nan)

    def answers(self) -> Float[np.ndarray, "l n"]:
        """Return the log-probability of each row's whole answer at each layer: a sum over its tokens, teacher forced.

        Every token of the answer is read at the token before it, so the reading must be of all tokens with the target
        "next". NaN for rows whose answer, or the token before it, the store does not have.

        Raises:
            DataError: the reading has other targets.
        """
        if self.targets.shape[1] != 1 or "next token" not in self.label:
            raise DataError('answers are read off a reading with targets="next" of all tokens')
        part = np.zeros(len(self.row), dtype=bool)
        same = self.row[1:] == self.row[:-1]
        part[:-1] = (self.token_roles[1:] == ROLES["answer"]) & same
        first = np.ones(len(self.row), dtype=bool)
        first[1:] = ~same
        headless = self.row[first & (self.token_roles == ROLES["answer"])]
        sums = np.full((len(self.layers), len(self.ids)), np.nan)
        sums[:, np.setdiff1d(self.row[part], headless)] = 0.0  # NaN stays NaN, whatever is added
        values = np.where(self.targets[:, 0] >= 0, self.log_prob[..., 0], np.nan)
        for i, line in enumerate(sums):
            np.add.at(line, self.row[part], values[i, part])
        return sums

    def by_layer(
        self,
        groups: pd.Series | None = None,
        clusters: tuple[pd.Series, pd.Series] | pd.Series | None = None,
        *,
        replicates: int = 1000,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Return the mean probability of the first target by layer, for groups of rows, with 95 % intervals.

        Failures of the study build their confidence late (arXiv 2508.18297): group the rows by success and failure, by
        text and visual, or both.

        Args:
            groups: group of each row, by row id; rows without one are left out. One group of all where left out.
            clusters: what rows share, by row id, for the bootstrap: question and image, or one of them; rows are their
                own clusters where left out.
            replicates: of the crossed bootstrap.
            seed: of the bootstrap.

        Returns:
            group, layer, probability, ci_low, ci_high, n.

        Raises:
            DataError: the reading has no targets, or not one token a row; or a row has no cluster; or groups name a row
                twice, or none of the rows.
        """
        if not self.targets.shape[1] or len(self.row) != len(set(self.row.tolist())):
            raise DataError("means over rows want one token a row and a target: read with `position` and `targets`")
        ids = [self.ids[i] for i in self.row.tolist()]
        group = pd.Series("all", index=ids) if groups is None else _grouped(groups, ids)
        pair = clusters if isinstance(clusters, tuple) else (clusters, None)
        whole = np.zeros(len(ids), dtype=np.int64)
        question = np.array(ids, dtype=str) if pair[0] is None else by_id(pair[0], ids, "clusters").to_numpy(dtype=str)
        image = whole if pair[1] is None else by_id(pair[1], ids, "clusters").to_numpy(dtype=str)
        weights = stats.crossed_weights(question, image, replicates=replicates, seed=seed)
        lines: list[tuple[object, ...]] = []
        for name in dict.fromkeys(group.dropna()):
            some = (group == name).to_numpy() & (self.targets[:, 0] >= 0)
            means = stats.layer_means(self.probability[:, some, 0].astype(np.float64), weights[:, some])
            lines += [(name, layer, m.value, m.low, m.high, m.n) for layer, m in zip(self.layers, means, strict=True)]
        return pd.DataFrame(lines, columns=["group", "layer", "probability", "ci_low", "ci_high", "n"])

    def of(self, id: str) -> LensReading:
        """Return the reading of one row.

        Raises:
            DataError: there is no such row, or it has no tokens.
        """
        if id not in self.ids:
            raise DataError(f"the reading has no row {id}")
        some = self.row == self.ids.index(id)
        if not some.any():
            raise DataError(f"row {id} has no tokens to show: it could not be run, or lacks the position read")
        return self._lines(some, (id,))

    def _lines(self, some: Bool[np.ndarray, " t"], ids: tuple[str, ...]) -> LensReading:
        first = {name: getattr(self, name)[some] for name in _BY_TOKEN}
        second = {name: getattr(self, name)[:, some] for name in _BY_LAYER}
        first["row"] = np.zeros(len(first["row"]), dtype=np.int64)
        return LensReading(
            layers=self.layers,
            label=self.label,
            ids=ids,
            **first,
            **second,
            kl=None if self.kl is None else self.kl[:, some],
        )

    def plot(self, id: str | None = None, words: Model | Sequence[str] | None = None) -> go.Figure:
        """Draw one row as a heatmap, layer by token, with the most probable words on hover; see `plotting.heatmap`.

        Args:
            id: of the row; the first with tokens where left out.
            words: the model, for its tokenizer, or the vocabulary as text; numbers of tokens are shown without.

        Raises:
            DataError: there is no such row, or it has no tokens; or it has neither targets nor top words.
            ConfigError: plotly is not installed.
        """
        from gapprobe.lens.plotting import heatmap

        if id is None and not len(self.row):
            raise DataError("the reading has no tokens to draw")
        return heatmap(self.of(self.ids[self.row[0]] if id is None else id), words)

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file; `load_lens_reading` reads it.

        Raises:
            OutputError: the folder cannot be written to.
        """
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in (*_BY_TOKEN, *_BY_LAYER)}
        if self.kl is not None:
            tensors["kl"] = np.ascontiguousarray(self.kl)
        about = {"format": FORMAT, "label": self.label, "layers": json.dumps(self.layers), "ids": json.dumps(self.ids)}
        write_bytes(Path(path), save(tensors, about))


def _grouped(groups: pd.Series, ids: Sequence[str]) -> pd.Series:
    """Return the group of every row, NaN for none."""
    groups = groups.set_axis(groups.index.map(str))
    if not groups.index.is_unique:
        raise DataError("groups: an id stands twice in the index; give one value a row")
    found = groups.reindex(list(ids))
    if len(found) and found.isna().all():
        raise DataError(f"groups: none of the {len(found)} rows has one, {ids[0]} for instance; give them by row id")
    return found


_BY_TOKEN = ("row", "token_ids", "token_positions", "token_roles", "targets")
_BY_LAYER = ("log_prob", "rank", "entropy", "top_words", "top_log_prob")
_DTYPES = {"token_roles": np.uint8} | dict.fromkeys(("log_prob", "entropy", "top_log_prob", "kl"), np.float32)


def load_lens_reading(path: str | Path) -> LensReading:
    """Read what `LensReading.save` wrote.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    try:
        with safe_open(str(path), "numpy") as file:
            about = cast(Mapping[str, str] | None, file.metadata()) or {}
            names = set(file.keys())
            tensors = {name: file.get_tensor(name) for name in names & {f.name for f in fields(LensReading)}}
        if about.get("format") != FORMAT:
            raise DataError(f"{path} holds no lens reading ({FORMAT})")
        layers, ids = (tuple(json.loads(about[name])) for name in ("layers", "ids"))
        _check(tensors, layers, ids)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a lens reading: {error}") from error
    return LensReading(layers=layers, label=about.get("label", ""), ids=ids, kl=tensors.pop("kl", None), **tensors)


def _check(tensors: Mapping[str, np.ndarray], layers: tuple[object, ...], ids: tuple[object, ...]) -> None:
    """Raise ValueError where arrays do not belong together."""
    if missing := {*_BY_TOKEN, *_BY_LAYER} - set(tensors):
        raise ValueError(f"{sorted(missing)[0]} is missing")
    if not all(isinstance(layer, int) for layer in layers) or not all(isinstance(i, str) for i in ids):
        raise ValueError("layers must be numbers and ids words")
    if tensors["targets"].ndim != 2 or tensors["top_words"].ndim != 3:
        raise ValueError("targets and top_words have other axes")
    n_l, t, q, k = len(layers), *tensors["targets"].shape, tensors["top_words"].shape[2]
    shapes = dict.fromkeys(_BY_TOKEN, (t,)) | {"targets": (t, q), "log_prob": (n_l, t, q), "rank": (n_l, t, q)}
    shapes |= {"entropy": (n_l, t), "kl": (n_l, t), "top_words": (n_l, t, k), "top_log_prob": (n_l, t, k)}
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name] or tensor.dtype != _DTYPES.get(name, np.int64):
            raise ValueError(f"{name} has shape {tensor.shape} and type {tensor.dtype}")
    if t and not 0 <= int(tensors["row"].min()) <= int(tensors["row"].max()) < len(ids):
        raise ValueError("row names rows that are not there")


def join(parts: Sequence[LensReading]) -> LensReading:
    """Put readings of other rows, otherwise alike, one behind the other."""
    first = parts[0]
    starts = np.cumsum([0] + [len(part.ids) for part in parts])
    by_token = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _BY_TOKEN}
    by_token["row"] = np.concatenate([part.row + start for part, start in zip(parts, starts, strict=False)])
    by_layer = {name: np.concatenate([getattr(part, name) for part in parts], axis=1) for name in _BY_LAYER}
    kls = [part.kl for part in parts if part.kl is not None]
    ids = tuple(i for part in parts for i in part.ids)
    kl = np.concatenate(kls, axis=1) if kls else None
    return LensReading(layers=first.layers, label=first.label, ids=ids, **by_token, **by_layer, kl=kl)
