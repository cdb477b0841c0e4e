"""The families of models that can be traced: a file for each make, found by itself. Nothing is loaded here.

A family stands here only if the tests run `check_model` for every language model that it lists. To add a family, add a
file with a `FAMILY` (or several `FAMILIES`) and a line in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules

from gapprobe.models.families.base import Family


def _found() -> Iterator[Family]:
    for module in sorted(iter_modules(__path__), key=lambda module: module.name):
        home = import_module(f"{__name__}.{module.name}")
        yield from getattr(home, "FAMILIES", ())
        if hasattr(home, "FAMILY"):
            yield home.FAMILY


FAMILIES: tuple[Family, ...] = tuple(_found())


def family_of(architecture: str, language_model: str) -> Family | None:
    """Return the family of an architecture with a language model inside (its `model_type`), or None."""
    return next((f for f in FAMILIES if architecture in f.architectures and language_model in f.language_models), None)
