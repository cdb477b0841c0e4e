"""The kind hands its problems to the kernel, and the kernel's refusals on as ours."""

import pytest
import torch

from gapprobe.errors import DataError
from gapprobe.kernels import svm
from gapprobe.probes.kinds.svm import Svm


def test_fits_are_the_kernels():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=g), torch.rand(2, 50, generator=g) < 0.5
    weights, strengths = torch.rand(2, 50, generator=g).double(), torch.tensor([0.1, 1.0]).double()
    theirs = svm.fit(x, y, weights, strengths)
    assert torch.equal(Svm().fit(x, y, weights, strengths, 0).coef, theirs.coef)


def test_one_class_and_a_tolerance_out_of_reach_are_refused():
    x, y, one = torch.randn(8, 2), (torch.arange(8) % 2 == 0)[None], torch.ones(1).double()
    with pytest.raises(DataError, match="no row of class False"):
        Svm().fit(x, y | True, torch.ones(1, 8).double(), one, 0)
    with pytest.raises(DataError, match="off the optimum"):
        Svm(tolerance=0.0).fit(x, y, torch.ones(1, 8).double(), one, 0)
