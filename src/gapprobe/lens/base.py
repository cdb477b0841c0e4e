"""What a lens is: a map from a layer's residual stream to the last layer's, where the decoder's own end reads words.

One's own is a class with `name` and `translate`, given as an instance or made known by `register_lens` or the entry
point group `gapprobe.lenses`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, cast, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from gapprobe.errors import ConfigError
from gapprobe.registry import Registry


@runtime_checkable
class Lens(Protocol):
    """A kind of lens. The last layer is never translated.

    More that a lens may have, and need not: `fingerprint`, a string that is another one whenever it would translate
    otherwise; results are kept (`folder`) under it, and not without. `weights`, the fingerprint of the model weights
    that it was made for ("" for any), and `last`, the number of the last layer that it leads to: a store of others is
    refused.
    """

    @property
    def name(self) -> str:
        """What users type, and what stands in tables and figures."""
        ...

    def translate(self, x: Float[Tensor, "n d"], layer: int) -> Float[Tensor, "n d"]:
        """Return what the last layer would hold, before the final norm, by what this layer holds.

        Args:
            x: residuals after the layer, float32.
            layer: 0 is the embeddings, l the residual stream after block l.

        Raises:
            DataError: the lens knows no such layer.
        """
        ...


L = TypeVar("L", bound=Callable[..., Lens])
_LENSES: Registry[Lens] = Registry("lens", "gapprobe.lenses")


def register_lens(kind: L) -> L:
    """Make a lens known by its name, as a decorator of its class; it is made without arguments.

    Raises:
        ConfigError: another class has the name.
    """
    _LENSES.add(kind)
    return kind


@register_lens
class LogitLens:
    """The residual stream as it is (nostalgebraist 2020, "interpreting GPT: the logit lens")."""

    name = "logit"
    fingerprint = "the residual stream as it is"

    def translate(self, x: Float[Tensor, "n d"], layer: int) -> Float[Tensor, "n d"]:
        """Return x."""
        del layer
        return x


def known_lenses() -> tuple[str, ...]:
    """Return the names of all lenses: ours, and those of installed packages (entry points `gapprobe.lenses`)."""
    return _LENSES.names()


def find_lens(lens: str | Lens) -> Lens:
    """Return a lens by its name; a lens is returned as it is.

    Raises:
        ConfigError: no lens has that name, or what was given is none.
    """
    found = _LENSES.find(lens)() if isinstance(lens, str) else lens
    if not isinstance(cast(object, found), Lens):  # whatever the annotation says
        raise ConfigError(f"{found!r} is no lens: it needs name and translate(x, layer); see gapprobe.lens.base.Lens")
    return found
