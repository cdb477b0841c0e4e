"""Where in a model a state is read: the residual stream, the parts of a block, the tower, the bridge, the queries."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from torch import Tensor

from gapprobe.errors import ConfigError
from gapprobe.models.families.base import Site
from gapprobe.models.model import Model

SITES: tuple[Site, ...] = get_args(Site)
# Their tokens are those of the picture as the tower sees it, not those of the prompt.
IN_TOWER: tuple[Site, ...] = ("vision", "bridge", "queries")

_IN_BLOCK: tuple[Site, ...] = ("middle", "attention", "mlp")


@dataclass(frozen=True)
class Tap:
    """One module to read: what goes into it or what comes out of it."""

    module: Any
    reads: Literal["input", "output"]
    first: int | None = None
    """How many tokens count, from the first; all by default."""

    def read(self) -> Tensor:
        """Return the state, inside a trace: waits until the module is run."""
        if self.reads == "input":
            return self.module.input
        found = self.module.output
        # T5 and some versions of transformers return a block's hidden states in a tuple, a Q-Former in an object.
        state = found if isinstance(found, Tensor) else found[0]
        return state if self.first is None else state[:, : self.first]


def layers_of(model: Model, site: str) -> range:
    """Return the numbers of the layers that a site has.

    Raises:
        ConfigError: the site is not known, or the model's family has it not.
    """
    if site not in SITES:
        raise ConfigError(f"site {site!r} must be one of {', '.join(SITES)}")
    if site == "residual":
        return range(model.n_layers + 1)
    path = getattr(model.family, site)
    home = model.part(model.family.blocks)[0] if site in _IN_BLOCK else model.hf  # pyright: ignore[reportIndexIssue] (a list of blocks)
    if not path or not _has(home, path):
        raise ConfigError(f"{model.source}: the family {model.family.name} has no site {site!r}")
    if site in ("bridge", "queries"):
        return range(1)
    if site == "vision":
        return range(len(model.part(model.family.vision)) + 1)  # pyright: ignore[reportArgumentType] (a list of blocks)
    return range(1, model.n_layers + 1)


def taps(model: Model, site: Site, blocks: str) -> Callable[[int], Tap]:
    """Return what to read for each layer of a site; `blocks` is the path of the text blocks meant (T5 has two)."""
    traced = model.traced
    if site in ("bridge", "queries"):
        module = operator.attrgetter(getattr(model.family, site))(traced)
        # Behind an InstructBLIP's queries stands the text that they read.
        first = int(cast(Any, model.hf.config).num_query_tokens) if site == "queries" else None
        return lambda _: Tap(module, "output", first)
    home = operator.attrgetter(model.family.vision if site == "vision" else blocks)(traced)
    if site in ("residual", "vision"):
        return lambda layer: Tap(home[layer - 1], "output") if layer else Tap(home[0], "input")
    part = operator.attrgetter(getattr(model.family, site))
    return lambda layer: Tap(part(home[layer - 1]), "input" if site == "middle" else "output")


def _has(home: Any, path: str) -> bool:
    try:
        operator.attrgetter(path)(home)
    except AttributeError:
        # The names of a family that was probed are guesses.
        return False
    return True
