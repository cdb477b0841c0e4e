"""The kinds hand their problems to the kernel, each with its own penalty, and the kernel's refusals on as ours."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from gapprobe.errors import DataError
from gapprobe.kernels import elastic
from gapprobe.probes.base import find_probe
from gapprobe.probes.kinds.elastic import ElasticNet, Lasso
from gapprobe.testing import check_probe


@pytest.fixture(scope="module")
def digits():
    """Threes and eights, 8 x 8 pixels."""
    found = load_digits()
    rows = np.isin(found.target, (3, 8))
    return torch.from_numpy(found.data[rows]), torch.from_numpy(found.target[rows] == 8)[None]


@pytest.mark.parametrize(("name", "l1_ratio"), [("lasso", 1.0), ("elastic_net", 0.5)])
def test_fits_are_the_kernels(name, l1_ratio, digits):
    x, y = digits
    weights, strengths = torch.ones(2, len(x)).double(), torch.tensor([0.1, 1.0]).double()
    theirs = elastic.fit(x, y.expand(2, -1), weights, strengths, l1_ratio)
    assert torch.equal(find_probe(name).fit(x, y.expand(2, -1), weights, strengths, 0).coef, theirs.coef)


def test_few_pixels_tell_an_eight_from_a_three(digits):
    """Of two pixels that are the same the elastic net weighs both alike; the lasso has no reason to."""
    x, y = digits
    taught = torch.arange(len(x)) % 2 == 0
    one = torch.tensor([0.03]).double()
    fits = Lasso().fit(x, y, taught[None].double(), one, 0)
    right = (fits.scores(x[~taught])[0] > 0) == y[0, ~taught]
    assert int((fits.coef != 0).sum()) <= 15
    assert float(right.double().mean()) > 0.9
    best = int((fits.coef[0] * x.std(0)).abs().argmax())
    twice = torch.cat([x, x[:, best : best + 1]], dim=1)
    both = ElasticNet(tolerance=1e-10).fit(twice, y, taught[None].double(), one, 0).coef[0]
    assert float(both[best]) == pytest.approx(float(both[-1]), rel=1e-4)
    assert float(both[-1]) != 0


@pytest.mark.parametrize("kind", [Lasso, ElasticNet])
def test_the_contract_is_kept(kind):
    check_probe(kind())


def test_one_class_and_a_tolerance_out_of_reach_are_refused(digits):
    x, y = digits
    weights, one = torch.ones(1, len(x)).double(), torch.ones(1).double()
    with pytest.raises(DataError, match="no row of class False"):
        Lasso().fit(x, y | True, weights, one, 0)
    with pytest.raises(DataError, match="off the optimum"):
        Lasso(tolerance=-1.0).fit(x, y, weights, one, 0)
