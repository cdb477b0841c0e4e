"""The inverse Hessian of the last steps: compiled and by torch, against the recursion as books write it."""

import pytest
import torch

from gapprobe.kernels import compiled
from gapprobe.kernels.history import MEMORY, History
from gapprobe.kernels.history_cpu import CpuHistory

KINDS = [History, CpuHistory]


def pairs(count, p, e, dtype=torch.float64):
    """Return steps and changes of a convex function: their products are above zero."""
    g = torch.Generator().manual_seed(0)
    root = torch.randn(p, e, e, generator=g, dtype=torch.float64)
    hessian = root @ root.mT / e + torch.eye(e)
    steps = torch.randn(count, p, e, generator=g, dtype=torch.float64)
    return [(step.to(dtype), (hessian @ step[..., None])[..., 0].to(dtype)) for step in steps]


def two_loops(kept, gradient, precondition):
    """L-BFGS of one problem (Nocedal & Wright 2006, algorithm 7.4)."""
    q, first = gradient.clone(), []
    for step, change in reversed(kept):
        a = step @ q / (step @ change)
        q = q - a * change
        first.append(a)
    r = precondition(q)
    for (step, change), a in zip(kept, reversed(first), strict=True):
        r = r + step * (a - change @ r / (step @ change))
    return r


def remember(history, step, change):
    """Add a pair whose numbers come through unrounded: half of twice the step, and a change from nothing."""
    return history.add(2 * step, step.new_full((len(step),), 0.5), torch.zeros_like(change), change)


def moved(history, gradient, diagonal):
    passed, first = history.before(gradient)
    return history.after(passed * diagonal, first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 3, MEMORY, MEMORY + 1, 3 * MEMORY + 2])
def test_it_is_the_recursion_of_the_books(kind, count):
    p, e = 3, 7
    seen = pairs(count, p, e)
    g = torch.Generator().manual_seed(1)
    gradient = torch.randn(p, e, generator=g, dtype=torch.float64)
    diagonal = 0.5 + torch.rand(e, generator=g, dtype=torch.float64)
    history = kind(gradient)
    for step, change in seen:
        remember(history, step, change)
    found = moved(history, gradient, diagonal)
    for i in range(p):
        kept = [(step[i], change[i]) for step, change in seen[-MEMORY:]]
        torch.testing.assert_close(found[i], two_loops(kept, gradient[i], lambda q: diagonal * q), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("e", [1, 5, 33, 1000])
def test_compiled_loops_err_no_more_than_torch(e):
    seen = pairs(8, 4, e)
    gradient = torch.randn(4, e, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def found(kind, dtype):
        history = kind(gradient.to(dtype))
        for step, change in seen:
            remember(history, step.to(dtype), change.to(dtype))
        return moved(history, gradient.to(dtype), torch.ones(e, dtype=dtype)).double()

    true = found(History, torch.float64)
    ours, theirs = ((found(kind, torch.float32) - true).norm(dim=1) for kind in (CpuHistory, History))
    rounding = 2.0**-23 * true.norm(dim=1)
    assert bool((ours <= 4 * theirs + rounding).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, MEMORY, MEMORY + 2])
def test_a_step_has_a_length_and_a_change_two_ends(kind, count):
    p, e = 3, 40
    g = torch.Generator().manual_seed(0)
    history = kind(torch.empty(p, e))
    for _ in range(count):
        direction, before = torch.randn(2, p, e, generator=g)
        size = 0.1 + torch.rand(p, generator=g)
        after = before + direction * torch.rand(p, e, generator=g)
        after[1] = before[1] - direction[1]  # no curvature
        step, change = history.add(direction, size, before, after)
        useful = torch.tensor([1.0, 0.0, 1.0])[:, None]
        assert step.equal(direction * size[:, None] * useful)
        assert change.equal((after - before) * useful)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_without_curvature_leaves_no_trace(kind):
    """Rounding can turn the product of step and change to 0 or below: dividing by it would be the end of a fit."""
    g = torch.Generator().manual_seed(0)
    step, gradient = torch.randn(2, 3, 6, generator=g)
    change = step * torch.rand(3, 6, generator=g)
    with_it, without = kind(step), kind(step)
    for history in (with_it, without):
        remember(history, step, change)
    remember(with_it, step, torch.stack([-change[0], torch.zeros(6), 2 * step[2]]))
    remember(without, step * 0, change * 0)

    def direction(history):
        passed, first = history.before(gradient)
        return history.after(passed, first)

    torch.testing.assert_close(direction(with_it)[:2], direction(without)[:2])
    assert not torch.allclose(direction(with_it)[2], direction(without)[2])


@pytest.mark.parametrize("kind", KINDS)
def test_those_that_are_kept_go_on_as_before(kind):
    seen, on = pairs(7, 5, 9), torch.tensor([True, False, False, True, True])
    gradient = torch.randn(5, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole, part = kind(gradient), kind(gradient)
    for step, change in seen[:6]:
        remember(whole, step, change)
        remember(part, step, change)
    part.keep(on)
    remember(whole, *seen[6])
    remember(part, *(each[on] for each in seen[6]))
    ones = torch.ones(9, dtype=torch.float64)
    torch.testing.assert_close(
        moved(part, gradient[on], ones), moved(whole, gradient, ones)[on], rtol=1e-12, atol=1e-12
    )


def test_threads_do_not_show_in_any_byte(monkeypatch):
    seen = pairs(7, 6, 40, torch.float32)
    gradient = torch.randn(6, 40, generator=torch.Generator().manual_seed(4))

    def found():
        history = CpuHistory(gradient)
        for step, change in seen:
            remember(history, step, change)
        return moved(history, gradient, torch.ones(40))

    alone = found()
    monkeypatch.setattr(compiled, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert found().equal(alone)
