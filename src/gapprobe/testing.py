"""The contract of a probe as a check: run it in the tests of your own.

def test_my_probe():
    check_probe(MyProbe())
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from gapprobe.errors import ConfigError, DataError
from gapprobe.probes.base import Fits, Probe, reads
from gapprobe.probes.tokens import Tokens
from gapprobe.stats import auc

FOUND = 0.9  # area that a planted direction must reach on fresh rows; the best rule reaches 0.997
APART = 4.0  # deviations between the planted classes: the direction is the rows' first principal one, too
ROWS, FRESH, WIDTH = 160, 120, 6
LONGEST = 4  # tokens of a row, where a probe reads tokens


@dataclass(frozen=True)
class Planted:
    """Three problems on rows whose class is planted along one direction: labels, labels flipped, labels, more freely.

    A probe that reads tokens gets rows of several, each of which shows the class; one that reads pairs gets rows beside
    rows of the other class.

    Attributes:
        x: rows to learn from, then fresh rows.
        y: labels of all problems.
        weights: uneven, 0 for a fifth of the rows to learn from, for each problem its own, and for fresh rows.
        strengths: of every problem.
    """

    x: Float[Tensor, "n d"] | Tokens
    y: Bool[Tensor, "p n"]
    weights: Float64[Tensor, "p n"]
    strengths: Float64[Tensor, " p"]

    @classmethod
    def of(cls, probe: Probe, seed: int = 0) -> "Planted":
        """Draw the rows; strengths are from the middle of the probe's own and its last."""
        g = torch.Generator().manual_seed(seed)
        n = ROWS + FRESH
        label = torch.rand(n, generator=g) < 0.5
        direction = torch.randn(WIDTH, generator=g)
        direction *= APART / direction.norm()
        shown = (label.float()[:, None] - 0.5) * direction
        x: Tensor | Tokens = torch.randn(n, WIDTH, generator=g) + shown + 1.0
        if reads(probe) == "tokens":
            lengths = torch.randint(1, LONGEST + 1, (n,), generator=g)
            values = torch.randn(int(lengths.sum()), WIDTH, generator=g) + shown.repeat_interleave(lengths, 0) + 1.0
            x = Tokens(values, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))
        elif reads(probe) == "pairs":
            x = torch.cat([x, torch.randn(n, WIDTH, generator=g) - shown + 1.0], dim=1)
        weights = 0.5 + torch.rand(3, n, generator=g).double()
        weights *= torch.rand(3, n, generator=g) < 0.8
        weights[:, ROWS:] = 0.0
        middle, last = probe.strengths[len(probe.strengths) // 2], probe.strengths[-1]
        return cls(x, torch.stack([label, ~label, label]), weights, torch.tensor([middle, middle, last]).double())

    def fit(self, probe: Probe, problems: slice = slice(None), seed: int = 0) -> Fits:
        """Fit some problems to copies: a probe that writes into its arguments is found out elsewhere."""
        x, y, weights = self.x.clone(), self.y[problems].clone(), self.weights[problems].clone()
        fits = cast(object, probe.fit(x, y, weights, self.strengths[problems].clone(), seed))  # whatever it promises
        if not isinstance(fits, Fits):
            raise AssertionError(f"probe {probe.name!r}: fit must return an object with a method scores, not {fits!r}")
        return fits

    def areas(self, scores: Float64[Tensor, "p n"]) -> list[float]:
        """Return each problem's area on fresh rows, by the planted class."""
        return [auc(own[ROWS:].numpy(), self.y[0, ROWS:].numpy()) for own in scores]


def check_probe(probe: object, *, tolerance: float = 1e-2, symmetric: bool = True) -> None:
    """Check that a probe keeps the contract of `Probe`, on small rows with a planted direction.

    Args:
        probe: to be checked.
        tolerance: by how much scores of one and the same problem may differ when its neighbours do, as a share of
            their deviation: 0 for closed forms, more for iterations that stop near the optimum.
        symmetric: whether flipped labels must turn scores round.

    Raises:
        AssertionError: naming the probe and the clause that it breaks.
    """
    probe = _attributes(probe)
    planted = Planted.of(probe)
    for check in (_scores, _unchanged, _repeatable, _found, _narrow, _one_class):
        check(probe, planted)
    if symmetric:
        _flipped(probe, planted)
    _no_trace(probe, planted, tolerance)
    _alone(probe, planted, tolerance)


def _claim(holds: bool, probe: Probe, message: str) -> None:
    if not holds:
        raise AssertionError(f"probe {getattr(probe, 'name', probe)!r}: {message}")


def _near(probe: Probe, ours: Tensor, theirs: Tensor, tolerance: float, message: str) -> None:
    off = float(((ours - theirs).abs().amax(-1) / theirs.std(-1).clamp(min=1e-300)).max())
    _claim(off <= tolerance + 1e-9, probe, f"{message}: scores are off by {off:.1e} of their deviation")


def _attributes(probe: object) -> Probe:
    if not isinstance(probe, Probe):
        raise AssertionError(f"{probe!r} is no probe: it needs name, strengths and calibrated, and a method fit")
    name, strengths, calibrated = (getattr(probe, key) for key in ("name", "strengths", "calibrated"))
    _claim(isinstance(name, str) and bool(name), probe, "name must be a text that users can type")
    try:
        reads(probe)
    except ConfigError as error:
        raise AssertionError(str(error)) from error
    numbers = isinstance(strengths, tuple) and all(float(strength) > 0 for strength in strengths)
    _claim(numbers and len(strengths) > 0, probe, "strengths must be a tuple of numbers above 0, one at least")
    _claim(isinstance(calibrated, bool), probe, "calibrated must be True or False")
    return probe


def _scores(probe: Probe, planted: Planted) -> None:
    for strength in probe.strengths:
        every = Planted(planted.x, planted.y, planted.weights, torch.full_like(planted.strengths, strength))
        fits = every.fit(probe)
        for rows in (planted.x, planted.x[:1]):
            scores = fits.scores(rows.clone())
            expected = (len(planted.y), len(rows))
            _claim(scores.shape == expected, probe, f"scores must be [p n], {expected}; got {tuple(scores.shape)}")
            _claim(scores.dtype == torch.float64, probe, f"scores must be float64, got {scores.dtype}")
            _claim(bool(torch.isfinite(scores).all()), probe, f"scores are not finite at strength {strength:g}")


def _unchanged(probe: Probe, planted: Planted) -> None:
    x, y, weights, strengths = (part.clone() for part in vars(planted).values())
    probe.fit(x, y, weights, strengths, 0).scores(x)
    for (name, before), after in zip(vars(planted).items(), (x, y, weights, strengths), strict=True):
        same = torch.equal(*(part.values if isinstance(part, Tokens) else part for part in (after, before)))
        _claim(same, probe, f"changes {name}, which all problems and callers share")


def _repeatable(probe: Probe, planted: Planted) -> None:
    once, again = (planted.fit(probe, seed=3).scores(planted.x) for _ in range(2))
    _claim(torch.equal(once, again), probe, "the same seed must give the same scores, to the last byte")


def _found(probe: Probe, planted: Planted) -> None:
    areas = planted.areas(planted.fit(probe).scores(planted.x))
    for problem in (0, 2):
        area = areas[problem]
        strength = float(planted.strengths[problem])
        _claim(area > FOUND, probe, f"misses a planted direction at strength {strength:g}: area {area:.2f} on new rows")


def _narrow(probe: Probe, planted: Planted) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        part = Planted(planted.x.to(dtype), planted.y, planted.weights, planted.strengths)
        area = _or_claim(lambda part=part: part.areas(part.fit(probe).scores(part.x))[0], probe, f"x of {dtype}")
        _claim(area > FOUND, probe, f"misses a planted direction in x of {dtype}: area {area:.2f} on new rows")


def _or_claim(call: Callable[[], float], probe: Probe, what: str) -> float:
    try:
        return call()
    except (RuntimeError, TypeError, ValueError) as error:
        raise AssertionError(f"probe {probe.name!r}: does not take {what}: {error}") from error


def _one_class(probe: Probe, planted: Planted) -> None:
    for label in (True, False):
        y = planted.y.clone()
        y[1] = y[1] | (planted.weights[1] > 0) if label else y[1] & ~(planted.weights[1] > 0)
        try:
            Planted(planted.x, y, planted.weights, planted.strengths).fit(probe)
        except DataError:
            continue
        except Exception as error:
            raise AssertionError(f"probe {probe.name!r}: one class raises {error!r}, not DataError") from error
        _claim(False, probe, f"must refuse a problem whose rows are all {label} with DataError; see check_problems")


def _flipped(probe: Probe, planted: Planted) -> None:
    area = planted.areas(planted.fit(probe).scores(planted.x))[1]
    _claim(
        area < 1 - FOUND, probe, f"flipped labels must turn scores round: area {area:.2f} by the labels as they were"
    )


def _no_trace(probe: Probe, planted: Planted, tolerance: float) -> None:
    """Spoil the rows that problem 0 leaves out, with their labels: its neighbours may change, it may not."""
    out = planted.weights[0] == 0
    x, y = planted.x.clone(), planted.y.clone()
    values, spoilt = (x.values, out[x.row]) if isinstance(x, Tokens) else (x, out)
    values[spoilt] = 100.0 - 3.0 * values[spoilt]
    y[0, out] = ~y[0, out]
    ours, theirs = planted.fit(probe), Planted(x, y, planted.weights, planted.strengths).fit(probe)
    fresh = planted.x[ROWS:]
    message = "rows of weight 0 leave a trace"
    _near(probe, theirs.scores(fresh)[:1], ours.scores(fresh)[:1], tolerance, message)


def _alone(probe: Probe, planted: Planted, tolerance: float) -> None:
    together = planted.fit(probe).scores(planted.x)
    for i in range(len(together)):
        alone = planted.fit(probe, slice(i, i + 1)).scores(planted.x)
        _near(probe, together[i : i + 1], alone, tolerance, f"problem {i} is not fitted as if it were alone")
