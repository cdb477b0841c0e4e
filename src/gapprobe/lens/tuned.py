"""Tuned lens: an affine translator a layer, trained so that what is read there is what the model says at its end.

Source: Belrose et al. 2023, arXiv 2303.08112, eq. 8, in the residual form of the published code: x + W x + b.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float, Float32
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from gapprobe.errors import DataError
from gapprobe.files import write_bytes, write_json

CONFIG, PARAMETERS, PUBLISHED = "config.json", "params.safetensors", "params.pt"
KIND = "linear_tuned_lens"


@dataclass(frozen=True, eq=False)
class TunedLens:
    """Translators of some layers.

    Attributes:
        layers: the layers that have one.
        weight: W of each, x + W x + b.
        bias: b of each.
        last: the model's last layer, which needs none.
        model: name of the model, recorded.
        weights: fingerprint of the weights it was trained for; "" where it is not known, as for published lenses.
    """

    layers: tuple[int, ...]
    weight: Float32[Tensor, "l d d"]
    bias: Float32[Tensor, "l d"]
    last: int
    model: str = ""
    weights: str = ""

    name = "tuned"

    def translate(self, x: Float[Tensor, "n d"], layer: int) -> Float32[Tensor, "n d"]:
        """Return x + W x + b.

        Raises:
            DataError: the lens has no translator of this layer, or was made for another width.
        """
        x = x.float()
        if layer == self.last:
            return x
        if layer not in self.layers:
            raise DataError(f"the tuned lens has no translator of layer {layer}; it has {list(self.layers)}")
        if x.shape[1] != self.bias.shape[1]:
            raise DataError(f"the tuned lens is {self.bias.shape[1]} wide, the residuals are {x.shape[1]} wide")
        i = self.layers.index(layer)
        return x + torch.addmm(self.bias[i], x, self.weight[i].T)

    @property
    def fingerprint(self) -> str:
        """Return a hash of the translators."""
        return hashlib.sha256(save(self._tensors(), {"layers": str([*self.layers, self.last])})).hexdigest()

    def to(self, device: str | torch.device) -> TunedLens:
        """Return the same on another device."""
        parts = (self.weight.to(device), self.bias.to(device))
        return TunedLens(self.layers, *parts, self.last, self.model, self.weights)

    def save(self, folder: str | Path) -> None:
        """Write `config.json`, with the published fields and ours, and `params.safetensors`, named as published.

        Raises:
            OutputError: the folder cannot be written to.
        """
        config = {
            "base_model_name_or_path": self.model,
            "d_model": self.bias.shape[1],
            "num_hidden_layers": self.last,
            "bias": True,
            "lens_type": KIND,
            "layers": list(self.layers),
            "weights": self.weights,
        }
        # The parameters first: a folder with a config is complete.
        write_bytes(Path(folder) / PARAMETERS, save(self._tensors()))
        write_json(Path(folder) / CONFIG, config)

    def _tensors(self) -> dict[str, Tensor]:
        parts = {f"{layer}.weight": w for layer, w in zip(self.layers, self.weight, strict=True)}
        parts |= {f"{layer}.bias": b for layer, b in zip(self.layers, self.bias, strict=True)}
        return {name: part.cpu().contiguous() for name, part in parts.items()}


def load_tuned_lens(folder: str | Path) -> TunedLens:
    """Read a lens that `TunedLens.save` or the published tuned-lens package wrote (`config.json` and `params.pt`).

    A published `params.pt` is a pickle: only tensors are taken out of it, by torch's restricted reader, never code.

    Raises:
        DataError: a file is missing, or holds something else; it is named.
    """
    folder = Path(folder)
    config = _config(folder / CONFIG)
    last, width = (_count(config, key, folder) for key in ("num_hidden_layers", "d_model"))
    given: object = config.get("layers", list(range(last)))
    if not isinstance(given, list):
        raise DataError(f"{folder / CONFIG}: layers is no list")
    layers = [layer for layer in cast(list[object], given) if isinstance(layer, int) and 0 <= layer < last]
    if len(layers) < len(cast(list[object], given)) or len(set(layers)) < len(layers) or not layers:
        raise DataError(f"{folder / CONFIG}: layers must be different numbers from 0 to {last - 1}, got {given!r:.80}")
    state = _state(folder)
    weight: list[Tensor] = []
    bias: list[Tensor] = []
    for layer in layers:
        weight.append(_part(state, f"{layer}.weight", (width, width), folder))
        bias.append(_part(state, f"{layer}.bias", (width,), folder) if config.get("bias", True) else torch.zeros(width))
    names = (str(config.get(key) or "") for key in ("base_model_name_or_path", "weights"))
    return TunedLens(tuple(layers), torch.stack(weight), torch.stack(bias), last, *names)


def _config(path: Path) -> Mapping[str, object]:
    try:
        found: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a tuned lens' configuration: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is no tuned lens' configuration: it holds {type(found).__name__}, not fields")
    config = cast(dict[str, object], found)
    if config.get("lens_type", KIND) != KIND:
        raise DataError(f"{path}: lens_type is {config['lens_type']!r:.80}, known is {KIND}")
    return config


def _count(config: Mapping[str, object], key: str, folder: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or not 0 < value < 1 << 24:
        raise DataError(f"{folder / CONFIG}: {key} must be a number above 0, got {value!r:.80}")
    return value


def _part(state: Mapping[str, Tensor], name: str, shape: tuple[int, ...], folder: Path) -> Float32[Tensor, ...]:
    part = state.get(name)
    if part is None or tuple(part.shape) != shape or not part.is_floating_point():
        told = "is missing" if part is None else f"has shape {tuple(part.shape)} and type {part.dtype}"
        raise DataError(f"{folder}: {name} {told}; by its configuration it is floats of shape {shape}")
    if not bool(torch.isfinite(part).all()):
        raise DataError(f"{folder}: {name} holds NaN or infinity")
    return part.float()


def _state(folder: Path) -> Mapping[str, Tensor]:
    ours, published = folder / PARAMETERS, folder / PUBLISHED
    if ours.exists():
        try:
            return load_file(ours)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{ours} cannot be read: {error}") from error
    try:
        found: object = torch.load(published, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken or hostile pickle makes the restricted reader raise
        raise DataError(f"{published} cannot be read as tensors: {str(error).splitlines()[0]:.200}") from error
    if not isinstance(found, dict):
        raise DataError(f"{published} holds {type(found).__name__}, not tensors by name")
    return {str(k): v for k, v in cast(dict[object, object], found).items() if isinstance(v, Tensor)}
