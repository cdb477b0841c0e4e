"""Every probe keeps the contract, and the check catches each way of breaking it."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from gapprobe.errors import DataError
from gapprobe.probes.adapters import from_sklearn
from gapprobe.probes.base import LinearFits, check_problems, find_probe, known_probes
from gapprobe.probes.modules import from_module
from gapprobe.testing import check_probe


class Nearest:
    """A probe as a user would write it: the nearer of two class means."""

    name = "nearest"
    strengths = (1.0,)
    calibrated = False

    def fit(self, x, y, weights, strengths, seed):
        del strengths, seed
        check_problems(x, y, weights)
        coef, intercept = [], []
        for labels, own in zip(y, weights, strict=True):
            positive, negative = own * labels, own * ~labels
            high = positive @ x.double() / positive.sum()
            low = negative @ x.double() / negative.sum()
            coef.append(high - low)
            intercept.append(-(high - low) @ (high + low) / 2)
        return LinearFits(torch.stack(coef), torch.stack(intercept))


class Line(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.map = nn.Linear(d, 1)

    def forward(self, x):
        return self.map(x)[:, 0]


@pytest.mark.parametrize("name", known_probes())
def test_every_known_probe_keeps_the_contract(name):
    check_probe(find_probe(name))


def test_a_users_probe_keeps_the_contract():
    check_probe(Nearest(), tolerance=0.0)


def test_a_scikit_learn_estimator_keeps_the_contract():
    check_probe(from_sklearn(LogisticRegression(), strength="C"))


def test_a_module_keeps_the_contract():
    check_probe(from_module(Line, name="line", steps=100, lr=0.02))


class Scores:
    """Scores that are computed from those of a good probe."""

    def __init__(self, fits, change):
        self.fits, self.change = fits, change

    def scores(self, x):
        return self.change(self.fits.scores(x))


def changed(change):
    """Return `fit` of a probe whose scores are changed."""
    return lambda self, *args: Scores(Nearest.fit(self, *args), change)


def peeks(self, x, y, weights, strengths, seed):
    good = Nearest.fit(self, x, y, weights, strengths, seed)
    return LinearFits(good.coef, good.intercept + x.double().mean())


def leaks(self, x, y, weights, strengths, seed):
    good = Nearest.fit(self, x, y, weights, strengths, seed)
    return LinearFits(good.coef, good.intercept + len(y))


def writes(self, x, y, weights, strengths, seed):
    good = Nearest.fit(self, x, y, weights, strengths, seed)
    x -= x.mean()
    return good


def narrow(self, x, y, weights, strengths, seed):
    if x.dtype == torch.float16:
        raise RuntimeError("no Half")
    return Nearest.fit(self, x, y, weights, strengths, seed)


def lenient(self, x, y, weights, strengths, seed):
    try:
        return Nearest.fit(self, x, y, weights, strengths, seed)
    except DataError:
        return LinearFits(torch.zeros(len(y), x.shape[1]).double(), torch.zeros(len(y)).double())


def raises(self, x, y, weights, strengths, seed):
    try:
        return Nearest.fit(self, x, y, weights, strengths, seed)
    except DataError as error:
        raise KeyError("labels") from error


def lopsided(self, x, y, weights, strengths, seed):
    good = Nearest.fit(self, x, y, weights, strengths, seed)
    return LinearFits(good.coef * torch.sign(good.coef[:, :1]) * torch.sign(good.coef[:1, :1]), good.intercept)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"name": ""}, "name must be a text"),
        ({"strengths": ()}, "strengths must be a tuple"),
        ({"strengths": (0.0,)}, "strengths must be a tuple of numbers above 0"),
        ({"calibrated": None}, "calibrated must be True or False"),
        ({"fit": None}, "is no probe: it needs name"),
        ({"fit": lambda *_: 3}, "object with a method scores"),
        ({"fit": changed(lambda s: s[:, :1])}, r"scores must be \[p n\]"),
        ({"fit": changed(lambda s: s.float())}, "must be float64, got torch.float32"),
        ({"fit": changed(lambda s: s / 0)}, "scores are not finite at strength 1"),
        ({"fit": changed(lambda s: s + torch.rand(s.shape))}, "same seed must give the same scores"),
        ({"fit": changed(lambda s: s * 0)}, "misses a planted direction at strength 1: area 0.50"),
        ({"fit": writes}, "changes x"),
        ({"fit": narrow}, "does not take x of torch.float16: no Half"),
        ({"fit": lenient}, "must refuse a problem whose rows are all True"),
        ({"fit": raises}, r"one class raises KeyError\('labels'\), not DataError"),
        ({"fit": lopsided}, "flipped labels must turn scores round"),
        ({"fit": peeks}, "rows of weight 0 leave a trace"),
        ({"fit": leaks}, "problem 0 is not fitted as if it were alone"),
    ],
)
def test_a_broken_probe_is_caught(broken, message):
    probe = type("Broken", (Nearest,), broken)()
    with pytest.raises(AssertionError, match=message):
        check_probe(probe)
