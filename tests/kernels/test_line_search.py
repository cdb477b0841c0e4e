"""How far a step goes: the compiled search and the one by torch, against what float64 says of their ends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gapprobe.kernels import compiled, line_search
from gapprobe.kernels.line_search import SLOPE, Line, Place, aim, walk
from gapprobe.kernels.losses import Binary

FAINT = 2e-38  # a probability below this is not held by float32


class ByTorch(Binary):
    """The same loss, which the compiled search does not know."""


def start(seed, p, n, *, steep=1.0, far=1.0):
    """Return a loss, where it is, a direction downhill, and what the penalty adds along it.

    The penalty is that of weights in 3 dimensions; logits along the way are `far` times as large as at the start.
    """
    g = torch.Generator().manual_seed(seed)
    y = torch.rand(p, n, generator=g) < 0.5
    weight = torch.rand(p, n, generator=g) * (torch.rand(p, n, generator=g) < 0.8) * steep
    turned, along = steep * torch.randn(2, p, 1, n, generator=g)
    along *= far
    loss = Binary.of(y, weight, torch.float32)
    weights, direction = torch.randn(2, p, 3, generator=g)
    linear, quadratic = (weights * direction).sum(1), (direction * direction).sum(1)
    slope = linear - (loss.at(turned).residual * along).sum((1, 2))
    uphill = slope > 0
    along[uphill], linear[uphill], slope[uphill] = -along[uphill], -linear[uphill], -slope[uphill]
    return loss, turned, along, Line(linear, quadratic, slope)


def rise(loss, turned, along, line, t):
    """Return the slope at a step's end, in float64, and the sum of what it is made of."""
    m = turned.double() + t.double()[:, None, None] * along.double()
    terms = loss.weight.double() * torch.sigmoid(-m) * along.double()
    penalty = line.linear.double() + t.double() * line.quadratic.double()
    return penalty - terms.sum((1, 2)), penalty.abs() + terms.abs().sum((1, 2))


@pytest.mark.parametrize("kind", [Binary, ByTorch])
@settings(deadline=None)  # the first call compiles
@given(seed=st.integers(0, 1000), n=st.integers(1, 5000), steep=st.sampled_from([1.0, 30.0]), last=st.floats(1e-3, 1.0))
def test_the_slope_has_fallen_enough_at_the_end(kind, seed, n, steep, last):
    loss, turned, along, line = start(seed, 4, n, steep=steep)
    loss = kind(loss.sign, loss.weight)
    size, _ = walk(loss, Place.of(loss, turned.clone()), along, line, torch.full((4,), last))
    found, terms = rise(loss, turned, along, line, size)
    assert bool((size > 0).all())
    assert bool((found.abs() <= SLOPE * line.slope.double().abs() + 1e-5 * terms).all())


@settings(deadline=None)  # the first call compiles
@given(seed=st.integers(0, 1000), n=st.integers(1, 5000), far=st.sampled_from([0.1, 1.0, 200.0]))
def test_the_end_is_what_float64_says(seed, n, far):
    loss, turned, along, line = start(seed, 3, n, far=far)
    size, place = walk(loss, Place.of(loss, turned.clone()), along, line, torch.ones(3))
    # The logits themselves are rounded; all else is compared at the logits that the search ended at.
    wanted = turned.double() + size.double()[:, None, None] * along.double()
    spacing = 2.0**-23 * (turned.abs() + size[:, None, None] * along.abs())
    assert bool(((place.turned - wanted).abs() <= spacing).all())
    wide = Binary(loss.sign.double(), loss.weight.double())
    true, narrow = Place.of(wide, place.turned.double()), Place.of(loss, place.turned)
    for name in ("value", "curved"):
        ours, theirs = ((getattr(each, name) - getattr(true, name)).abs().view(3) for each in (place, narrow))
        rounding = 4 * 2.0**-23 * getattr(true, name).view(3) + FAINT * loss.weight.sum((1, 2))
        assert bool((ours <= 4 * theirs + rounding).all()), name
    for name in ("residual", "share"):
        exact = getattr(true.point, name)
        assert bool(((getattr(place.point, name) - exact).abs() <= 4 * 2.0**-23 * exact + FAINT).all()), name


def test_a_problem_that_stands_still_stays():
    loss, turned, along, line = start(0, 3, 40)
    along[1], line.linear[1], line.quadratic[1], line.slope[1] = 0.0, 0.0, 0.0, torch.nan
    size, place = walk(loss, Place.of(loss, turned.clone()), along, line, torch.ones(3))
    assert place.turned[1].equal(turned[1])
    assert bool(size.isfinite().all())


def test_no_problem_hangs_on_another_nor_on_threads(monkeypatch):
    loss, turned, along, line = start(5, 6, 300)
    size, place = walk(loss, Place.of(loss, turned.clone()), along, line, torch.ones(6))
    some = torch.tensor([4, 1])
    part, end = walk(
        loss.keep(some),
        Place.of(loss, turned).keep(some),
        along[some],
        Line(line.linear[some], line.quadratic[some], line.slope[some]),
        torch.ones(2),
    )
    assert part.equal(size[some])
    assert end.turned.equal(place.turned[some])
    monkeypatch.setattr(compiled, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    again, end = walk(loss, Place.of(loss, turned.clone()), along, line, torch.ones(6))
    assert again.equal(size)
    for name in ("turned", "value", "curved"):
        assert getattr(end, name).equal(getattr(place, name)), name


def test_trials_come_to_an_end():
    """A slope that nothing brings down: the objective has no bottom along the way, as float32 sees it."""
    loss, turned, along, line = start(7, 2, 50)
    line = Line(line.linear - 1e6, torch.zeros(2), line.slope)
    size, _ = walk(loss, Place.of(loss, turned.clone()), along, line, torch.ones(2))
    assert bool((size <= line_search.GROWTH * 8.0**line_search.TRIALS).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [1, 3])
def test_a_direction_points_downhill_and_what_is_known_of_it_is_so(dtype, classes):
    g = torch.Generator().manual_seed(0)
    uphill, gradient, weights = torch.randn(3, 5, classes, 40, generator=g, dtype=torch.float64)
    gradient[0] = uphill[0]
    gradient[1] = -uphill[1]  # points downhill as it is: rounding is all that is left
    gradient[2, 0, 0] = torch.nan
    direction = uphill.to(dtype).clone()
    line = aim(direction, gradient.to(dtype), weights.to(dtype))
    slope = -(gradient * uphill).sum((1, 2))
    good = slope < 0
    assert good.tolist()[:3] == [True, False, False]
    assert direction.equal((-uphill * good[:, None, None]).to(dtype))
    way, own = direction.double()[..., :-1], weights[..., :-1]
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(line.linear.double(), (own * way).sum((1, 2)), **close)
    torch.testing.assert_close(line.quadratic.double(), (way * way).sum((1, 2)), **close)
    torch.testing.assert_close(line.slope.double()[good], slope[good], **close)
    assert not bool((line.slope[~good] < 0).any())
