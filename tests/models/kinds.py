"""Every tiny model of the tests by name, family-language model: a family and a language model stand in the docs only
if they stand here."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from transformers import PreTrainedModel

from gapprobe.models.families import FAMILIES
from gapprobe.models.loading import load_model
from gapprobe.models.model import Model
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
WITH_IMAGE = tuple(kind for kind in KINDS if _MODALITY[kind.split("-")[0]] == "image")


def fresh(kind: str, *, dtype: torch.dtype = torch.float32) -> Model:
    """Return a tiny model through `load_model`, for a test that changes it."""
    model, processor = BUILDERS[kind]()
    return load_model(model.to(dtype), processor=processor)


@cache
def loaded(kind: str) -> Model:
    """Return `fresh(kind)`, made once for all tests: never change it."""
    return fresh(kind)
