"""A probe's direction out of a sweep and into an intervention: raw residual coordinates, with where it comes from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gapprobe.errors import DataError
from gapprobe.files import write_bytes
from gapprobe.kernels import logistic
from gapprobe.probes.base import LinearFits, Probe, find_probe
from gapprobe.probes.labels import binary, target_of
from gapprobe.probes.tokens import Position, Tokens
from gapprobe.store.reader import Store

KIND = "gapprobe direction"


@dataclass(frozen=True)
class Direction:
    """Where a linear probe points in the residual stream of one layer.

    The probe's log-odds of a residual x are `vector @ x + intercept`: the standardisation is folded back in. What moves
    a residual is `unit`, in multiples of `spread`, the deviation of the rows' own residuals along it.

    Attributes:
        vector: weight of every raw feature.
        intercept: free term.
        spread: standard deviation of the rows along `unit`.
        mean: mean of the rows along `unit`.
        layer: of the residual stream, as in the store: 0 is the embeddings, l the stream after block l.
        about: provenance: store, model, position, probe, strength, rows, positives.
    """

    vector: Float[Tensor, " d"]
    intercept: float
    spread: float
    mean: float
    layer: int
    about: dict[str, str | int | float]

    @property
    def unit(self) -> Float[Tensor, " d"]:
        """Return the direction with length 1."""
        return self.vector / self.vector.norm()

    def scores(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
        """Return the probe's log-odds of residuals."""
        return x.double() @ self.vector.double() + self.intercept

    def steer(self, x: Float[Tensor, "*n d"], amount: float) -> Float[Tensor, "*n d"]:
        """Move residuals by `amount` of the rows' own deviations along the direction; positive is towards the label."""
        return x + (amount * self.spread * self.unit).to(x)

    def ablate(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Put residuals at the rows' mean along the direction: what it said of a row is gone."""
        unit = self.unit.to(x)
        return x + (self.mean - x @ unit)[..., None] * unit

    def hook(self, amount: float | None = None) -> tuple[str, Callable[..., Tensor]]:
        """Return a TransformerLens hook, name and function, that steers by `amount` or, without one, ablates."""
        name = "blocks.0.hook_resid_pre" if self.layer == 0 else f"blocks.{self.layer - 1}.hook_resid_post"

        def changed(resid: Tensor, hook: object = None) -> Tensor:
            del hook
            return self.ablate(resid) if amount is None else self.steer(resid, amount)

        return name, changed

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: `vector`, `intercept`, `spread`, `mean`, and the provenance as metadata."""
        names = ("intercept", "spread", "mean")
        numbers = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in names}
        about = {"kind": KIND, "layer": str(self.layer), "about": json.dumps(self.about, sort_keys=True)}
        write_bytes(Path(path), save({"vector": self.vector.double(), **numbers}, about))


def load_direction(path: str | Path) -> Direction:
    """Read a direction that `Direction.save` wrote.

    Raises:
        DataError: there is no such file, or it holds something else.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            if about.get("kind") != KIND:
                raise DataError(f"{path} holds no direction: save one with Direction.save")
            numbers = {name: float(file.get_tensor(name)) for name in ("intercept", "spread", "mean")}
            vector = file.get_tensor("vector")
            layer, told = int(about["layer"]), dict(json.loads(about["about"]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{path} cannot be read as a direction: {error}") from error
    if vector.ndim != 1 or not bool(torch.isfinite(vector).all()):
        raise DataError(f"{path} holds no direction: its vector has shape {tuple(vector.shape)}, or is not finite")
    return Direction(vector, layer=layer, about=told, **numbers)


def probe_direction(
    store: Store,
    target: pd.Series | str,
    *,
    layer: int,
    position: str = "last_input",
    probe: str | Probe = "logistic",
    strength: float | None = None,
    seed: int = 0,
) -> Direction:
    """Fit a linear probe on all rows of one layer, classes balanced, and return its direction.

    Which layer and strength to take is what `sweep_probes(...).best()` says; how good they are too, on rows held out.

    Args:
        store: activations.
        target: label of each row to use, indexed by id, or a column of `store.rows`.
        layer: of the store.
        position: token whose residual is read, or many pooled to one, as "mean(image)" does.
        probe: a probe whose fits are linear.
        strength: the probe's middle one where left out.
        seed: of the probe.

    Raises:
        DataError: the probe is not linear, labels of one class, a layer or column that the store lacks.
    """
    target = target_of(store.rows, target)
    if layer not in store.header.layers:
        raise DataError(f"the store holds layers {list(store.header.layers)}, not {layer}")
    found, place = find_probe(probe, ("rows",)), Position(store, position, [str(i) for i in target.index])
    chosen = found.strengths[len(found.strengths) // 2] if strength is None else strength
    x = place.layer(layer)
    if isinstance(x, Tokens):
        raise DataError(f"rows have several tokens at {position!r}: pool them, position='mean({position})'")
    y = torch.from_numpy(binary(target))[None]
    mask = torch.ones_like(y)
    fits = found.fit(x, y, logistic.balanced(y, mask), torch.tensor([chosen], dtype=torch.float64), seed)
    if not isinstance(fits, LinearFits):
        raise DataError(f"the probe {found.name!r} has no direction: it is not linear in the residual")
    vector = fits.coef[0]
    along = x.double() @ (vector / vector.norm())
    about: dict[str, str | int | float] = {
        "store": store.header.fingerprint,
        "model": json.dumps(store.header.model, sort_keys=True, default=str),
        "position": position,
        "probe": found.name,
        "strength": chosen,
        "target": str(target.name),
        "rows": len(target),
        "positives": int(y.sum()),
    }
    return Direction(
        vector, float(fits.intercept[0]), float(along.std(correction=0)), float(along.mean()), layer, about
    )
