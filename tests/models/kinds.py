"""Every tiny model of the tests by name, family-language model: a family and a language model stand in the docs only
if they stand here."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from gapprobe.models.families import FAMILIES
from gapprobe.models.loading import load_model
from gapprobe.models.model import Medium, Model
from gapprobe.sound import Sound
from tests.models import tiny
from tests.models.zoo import plain, qwen, tiled

BUILDERS: dict[str, Callable[[], tuple[PreTrainedModel, Any]]] = {
    **{kind: partial(tiny.build, kind) for kind in tiny.KINDS},
    **plain.BUILDERS,
    **qwen.BUILDERS,
    **tiled.BUILDERS,
}
KINDS = tuple(sorted(BUILDERS))
_MODALITY = {family.name: family.modality for family in FAMILIES}
WITH_MEDIA = tuple(kind for kind in KINDS if _MODALITY[kind.split("-")[0]] != "text")
WITH_IMAGE = tuple(kind for kind in KINDS if _MODALITY[kind.split("-")[0]] == "image")


def media(model: Model) -> list[Medium] | None:
    """Return two pictures (or sounds) of different size, None for a model that reads text alone."""
    if model.family.modality == "audio":
        random = np.random.default_rng(0)
        return [Sound(random.normal(0, 0.3, size).astype(np.float32), 16000) for size in (9000, 5000)]
    return [tiny.picture(0), tiny.picture(1, 30, 60)] if model.family.modality == "image" else None


def fresh(kind: str, *, dtype: torch.dtype = torch.float32) -> Model:
    """Return a tiny model through `load_model`, for a test that changes it."""
    model, processor = BUILDERS[kind]()
    return load_model(model.to(dtype), processor=processor)


@cache
def loaded(kind: str) -> Model:
    """Return `fresh(kind)`, made once for all tests: never change it."""
    return fresh(kind)
