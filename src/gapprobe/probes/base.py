"""What a probe is: a rule that learns from rows of X and scores rows of X, many problems at a time.

A problem is one fold, target, strength and set of labels; all problems of a call share X. Three ways in: a class with
`fit` as below; a scikit-learn estimator (`from_sklearn`); a `torch.nn.Module` (`from_module`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from pkgutil import iter_modules
from typing import Protocol, TypeVar, cast, runtime_checkable

import torch
from einops import einsum
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from gapprobe.errors import ConfigError, DataError

ENTRY_POINTS = "gapprobe.probes"


@runtime_checkable
class Fits(Protocol):
    """Problems that were fitted."""

    def scores(self, x: Float[Tensor, "n d"]) -> Float64[Tensor, "p n"]:
        """Return how positive each row looks to each problem; log-odds, where `Probe.calibrated`."""
        ...


@runtime_checkable
class Probe(Protocol):
    """A kind of probe.

    Attributes:
        name: what users type, and what stands in tables.
        strengths: what a sweep tries where the user says nothing: inverse strengths of the penalty, as in scikit-learn
            (larger is freer), or one number where there is nothing to choose.
        calibrated: whether scores are log-odds.
    """

    # Properties here: a kind has class attributes, an adapter's probe has its own.
    @property
    def name(self) -> str:
        """What users type."""
        ...

    @property
    def strengths(self) -> tuple[float, ...]:
        """What a sweep tries."""
        ...

    @property
    def calibrated(self) -> bool:
        """Whether scores are log-odds."""
        ...

    def fit(
        self,
        x: Float[Tensor, "n d"],
        y: Bool[Tensor, "p n"],
        weights: Float64[Tensor, "p n"],
        strengths: Float64[Tensor, " p"],
        seed: int,
    ) -> Fits:
        """Fit every problem.

        Args:
            x: features, raw, shared by all problems: standardise by a problem's own rows where that matters.
            y: labels of every problem.
            weights: of every problem's rows; a row of weight 0 must leave no trace, not even in a standardisation.
            strengths: of every problem.
            seed: of whatever is random.

        Raises:
            DataError: a problem that cannot be fitted.
        """
        ...


@dataclass(frozen=True)
class LinearFits:
    """Fits that are a direction and a threshold, in raw coordinates.

    Attributes:
        coef: weight of each raw feature.
        intercept: free term.
    """

    coef: Float64[Tensor, "p d"]
    intercept: Float64[Tensor, " p"]

    def scores(self, x: Float[Tensor, "n d"]) -> Float64[Tensor, "p n"]:
        """Return coef . x + intercept."""
        return einsum(self.coef, x.double(), "p d, n d -> p n") + self.intercept[:, None]


P = TypeVar("P", bound=Callable[..., Probe])
_KINDS: dict[str, Callable[..., Probe]] = {}


def register_probe(kind: P) -> P:
    """Make a probe known by its name, as a decorator of its class.

    Raises:
        ConfigError: another class has the name.
    """
    name = str(getattr(kind, "name", ""))
    if not name:
        raise ConfigError(f"{kind!r} has no `name`: give the class one, users will type it")
    known = _KINDS.setdefault(name, kind)
    if known is not kind and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ConfigError(f"two probes are called {name!r}: {known!r} and {kind!r}; rename one")
    _KINDS[name] = kind
    return kind


def known_probes() -> tuple[str, ...]:
    """Return the names of all probes: ours, and those of installed packages (entry points `gapprobe.probes`)."""
    _ours()
    return tuple(sorted({*_KINDS, *(point.name for point in metadata.entry_points(group=ENTRY_POINTS))}))


def find_probe(probe: str | Probe) -> Probe:
    """Return a probe by its name; a probe is returned as it is.

    Raises:
        ConfigError: no probe has that name, or what was given is none.
    """
    if not isinstance(probe, str):
        if not isinstance(cast(object, probe), Probe):  # whatever the annotation says
            raise ConfigError(f"{probe!r} is no probe: it needs name, strengths, calibrated and fit(); see gp.Probe")
        return probe
    _ours()
    if probe not in _KINDS:
        for point in metadata.entry_points(group=ENTRY_POINTS):
            if point.name == probe:
                register_probe(point.load())
    if probe not in _KINDS:
        raise ConfigError(f"no probe is called {probe!r}; there are {', '.join(known_probes())}")
    return _KINDS[probe]()


@cache
def _ours() -> None:
    """Import every file of `kinds`: a probe is one file there, and is found by itself."""
    package = import_module("gapprobe.probes.kinds")
    for module in iter_modules(package.__path__):
        import_module(f"gapprobe.probes.kinds.{module.name}")


def chunks(problems: int, numbers_each: int, room: int = 1 << 26) -> Iterator[slice]:
    """Cut problems into parts whose numbers fit into memory side by side."""
    size = max(1, room // max(1, numbers_each))
    return (slice(start, start + size) for start in range(0, problems, size))


def check_problems(
    x: Float[Tensor, "n d"],
    y: Bool[Tensor, "p n"],
    weights: Float[Tensor, "p n"],
    strengths: Float[Tensor, " p"] | None = None,
) -> None:
    """Refuse what no kind can fit.

    Raises:
        DataError: features that are not finite, weights that are negative or not finite, strengths that are not above
            0, or a problem without a row of each class.
    """
    if not bool(torch.isfinite(x).all()):
        raise DataError(f"row {int(torch.nonzero(~torch.isfinite(x))[0, 0])} of x holds NaN or infinity")
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise DataError("weights must be finite and not negative")
    if strengths is not None and not bool((strengths > 0).all()):
        raise DataError(f"strengths must be above 0, got {float(strengths.min()):g}")
    for label, rows in ((True, y & (weights > 0)), (False, ~y & (weights > 0))):
        missing = torch.nonzero(~rows.any(1))
        if len(missing):
            raise DataError(f"problem {int(missing[0])} has no row of class {label}; a probe needs both classes")
