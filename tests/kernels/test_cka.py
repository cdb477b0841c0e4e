"""CKA of all pairs against its written definition, and what its estimators promise."""

from itertools import combinations

import pytest
import torch

from gapprobe.kernels import cka


def value(xs, ys, debiased):
    first, second = (torch.stack([cka.gram(x, debiased=debiased) for x in side]) for side in (xs, ys))
    own = [cka.hsic_of_each(each, debiased=debiased) for each in (first, second)]
    return cka.hsic(first, second, debiased=debiased) / torch.outer(*own).sqrt()


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_pair_is_its_definition(debiased, dtype):
    g = torch.Generator().manual_seed(0)
    base = torch.randn(30, 7, generator=g)
    xs = [base.to(dtype), (base[:, :3] @ torch.randn(3, 50, generator=g) + 3).to(dtype)]
    ys = [
        (base + torch.randn(30, 7, generator=g)).to(dtype),
        torch.randn(30, 90, generator=g).to(dtype),
        base.to(dtype),
    ]
    found = value(xs, ys, debiased)
    # The definition takes differences of products of uncentred grams, at most 1e3 each: it keeps ten digits.
    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            assert float(found[i, j]) == pytest.approx(cka.reference(x, y, debiased=debiased), abs=1e-9)
    assert float(found[0, 2]) == pytest.approx(1.0, abs=1e-12)


def test_turning_and_scaling_change_nothing():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 40, 12, generator=g, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=g, dtype=torch.float64)).Q
    plain, turned = value([x], [y], True), value([3.0 * x @ turn + 5.0], [y], True)
    torch.testing.assert_close(plain, turned)


def test_wide_noise_looks_alike_to_the_biased_estimator_only():
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(2, 30, 3000, generator=g)
    assert float(value([x], [y], False)) > 0.9
    assert abs(float(value([x], [y], True))) < 0.1


def test_the_unbiased_estimator_is_right_on_average_over_small_batches():
    # HSIC of four rows, averaged over every four of twelve, is that of the twelve: a U-statistic (Song et al. 2012).
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 12, 5, generator=g, dtype=torch.float64)
    y += x

    def hsic(rows):
        first, second = (cka.gram(each[rows], debiased=True)[None] for each in (x, y))
        return float(cka.hsic(first, second, debiased=True))

    every = [hsic(list(some)) for some in combinations(range(12), 4)]
    assert sum(every) / len(every) == pytest.approx(hsic(list(range(12))), rel=1e-9)
