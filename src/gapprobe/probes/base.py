"""What a probe is: a rule that learns from rows of X and scores rows of X, many problems at a time.

A problem is one fold, target, strength and set of labels; all problems of a call share X. Three ways in: a class with
`fit` as below; a scikit-learn estimator (`from_sklearn`); a `torch.nn.Module` (`from_module`).
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from einops import einsum
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from gapprobe.errors import ConfigError, DataError
from gapprobe.kernels.moments import blocks
from gapprobe.probes.tokens import Tokens, finite_rows
from gapprobe.registry import Registry

ROOM = 1 << 26  # numbers that problems fitted side by side hold, at most
READS = ("rows", "tokens", "pairs")


@runtime_checkable
class Fits(Protocol):
    """Problems that were fitted."""

    def scores(self, x: Any) -> Float64[Tensor, "p n"]:
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

    A kind may have one attribute more, `reads`: what `fit` and `scores` get as x. "rows", which is what a kind without
    it reads, is a tensor [n d]; "tokens" is `Tokens`, all tokens of n rows; "pairs" is a tensor [n e] whose first half
    is a row and whose second half the row that contrasts it. And `room`: bytes that a fit takes beside X, at most,
    where that is more than a few numbers a row and feature of each problem (`Need`): ensembles, and rows by rows.
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
        x: Any,
        y: Bool[Tensor, "p n"],
        weights: Float64[Tensor, "p n"],
        strengths: Float64[Tensor, " p"],
        seed: int,
    ) -> Fits:
        """Fit every problem.

        Args:
            x: what the kind `reads`, raw, shared by all problems: standardise by a problem's own rows where that
                matters.
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
        out = self.intercept[:, None].repeat(1, len(x))
        for block in blocks(*x.shape):  # a float64 copy of all of a layer would be its largest array
            out[:, block] += einsum(self.coef, x[block].double(), "p d, n d -> p n")
        return out


P = TypeVar("P", bound=Callable[..., Probe])
_PROBES: Registry[Probe] = Registry("probe", "gapprobe.probes")


def register_probe(kind: P) -> P:
    """Make a probe known by its name, as a decorator of its class.

    Raises:
        ConfigError: another class has the name.
    """
    _PROBES.add(kind)
    return kind


def known_probes() -> tuple[str, ...]:
    """Return the names of all probes: ours, and those of installed packages (entry points `gapprobe.probes`)."""
    _ours()
    return _PROBES.names()


def reads(probe: Probe) -> str:
    """Return what a probe reads: one of `READS`.

    Raises:
        ConfigError: it says something else.
    """
    told = getattr(probe, "reads", "rows")
    if told not in READS:
        raise ConfigError(f"the probe {probe.name!r} reads {told!r}; `reads` must be one of {', '.join(READS)}")
    return told


def find_probe(probe: str | Probe, reading: Collection[str] = READS) -> Probe:
    """Return a probe by its name; a probe is returned as it is.

    Args:
        probe: name or probe.
        reading: what the caller can give it to read.

    Raises:
        ConfigError: no probe has that name, what was given is none, or it reads something else.
    """
    found = _named(probe)
    if reads(found) not in reading:
        raise ConfigError(
            f"the probe {found.name!r} reads {reads(found)}, and here there are only {' or '.join(reading)}; "
            "gp.sweep_probes can give it what it reads"
        )
    return found


def _named(probe: str | Probe) -> Probe:
    if not isinstance(probe, str):
        if not isinstance(cast(object, probe), Probe):  # whatever the annotation says
            raise ConfigError(f"{probe!r} is no probe: it needs name, strengths, calibrated and fit(); see gp.Probe")
        return probe
    _ours()
    return _PROBES.find(probe)()


@cache
def _ours() -> None:
    """Import every file of `kinds`: a probe is one file there, and is found by itself."""
    package = import_module("gapprobe.probes.kinds")
    for module in iter_modules(package.__path__):
        import_module(f"gapprobe.probes.kinds.{module.name}")


def chunks(problems: int, numbers_each: int, room: int = ROOM) -> Iterator[slice]:
    """Cut problems into parts whose numbers fit into memory side by side."""
    size = max(1, room // max(1, numbers_each))
    return (slice(start, start + size) for start in range(0, problems, size))


def check_problems(
    x: Float[Tensor, "n d"] | Tokens,
    y: Bool[Tensor, "p n"],
    weights: Float[Tensor, "p n"],
    strengths: Float[Tensor, " p"] | None = None,
) -> None:
    """Refuse what no kind can fit.

    Raises:
        DataError: features that are not finite, weights that are negative or not finite, strengths that are not above
            0, or a problem without a row of each class.
    """
    finite = finite_rows(x)
    if not bool(finite.all()):
        raise DataError(f"row {int(torch.nonzero(~finite)[0, 0])} of x holds NaN or infinity")
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise DataError("weights must be finite and not negative")
    if strengths is not None and not bool((strengths > 0).all()):
        raise DataError(f"strengths must be above 0, got {float(strengths.min()):g}")
    for label, rows in ((True, y & (weights > 0)), (False, ~y & (weights > 0))):
        missing = torch.nonzero(~rows.any(1))
        if len(missing):
            raise DataError(f"problem {int(missing[0])} has no row of class {label}; a probe needs both classes")
