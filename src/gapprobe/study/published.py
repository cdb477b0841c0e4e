"""What the paper measured, to stand beside what a study of the same model and data measures."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources

from gapprobe.study.results import Json


@cache
def published() -> dict[str, tuple[float, float]]:
    """Return the shares right [visual, text-only] of arXiv 2508.18297 by "model/data", good to about a point."""
    table = tomllib.loads((resources.files("gapprobe.study") / "published.toml").read_text(encoding="utf-8"))
    return {
        f"{model}/{data}": (visual / 100, text / 100)
        for model, sets in table.items()
        for data, (visual, text) in sets.items()
    }


def beside(name: str | None) -> Json | None:
    """Return the published accuracies and gap that results.json gives beside a study's own; None for no name."""
    if name is None:
        return None
    visual, text = published()[name]
    return {"name": name, "text_only": text, "visual": visual, "gap": round(text - visual, 2)}
