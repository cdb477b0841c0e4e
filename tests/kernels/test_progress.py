"""Which problems have arrived: by torch and by a compiled loop, against the rule written for one problem."""

import pytest
import torch

from gapprobe.kernels.line_search import Place
from gapprobe.kernels.losses import Point
from gapprobe.kernels.progress import PATIENCE, Progress
from gapprobe.kernels.progress_cpu import CpuProgress

KINDS = [Progress, CpuProgress]


def place(value, curved):
    none = torch.zeros(len(value), curved.shape[1], 1, dtype=value.dtype)
    return Place(none, Point(none, none), value, curved)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [1, 3])
def test_a_problem_has_arrived_where_little_is_left(kind, dtype, classes):
    g = torch.Generator().manual_seed(0)
    weights, gradient = torch.randn(2, 40, classes, 9, generator=g, dtype=torch.float64)
    gradient *= torch.logspace(-6, 0, 40, dtype=torch.float64)[:, None, None]
    value = 0.1 + torch.rand(40, generator=g, dtype=torch.float64)
    curved = torch.rand(40, classes, generator=g, dtype=torch.float64)
    curved[3] = 0.0
    curved[20:] *= 1e6  # then an intercept's own curvature leaves nothing to gain, but it moves the gradient
    gradient[20:, :, :-1] *= 1e-3
    found = kind(weights.to(dtype)).arrived(
        weights.to(dtype), gradient.to(dtype), place(value.to(dtype), curved.to(dtype)), 1e-5
    )
    for i in range(40):
        left = float((gradient[i, :, :-1] ** 2).sum()) / 2
        left += sum(
            float(gradient[i, k, -1] ** 2 * (1 + 1 / max(float(curved[i, k]), 1e-20))) / 2 for k in range(classes)
        )
        whole = float(value[i]) + float((weights[i, :, :-1] ** 2).sum()) / 2
        if abs(left / (1e-5 * whole) - 1) > 1e-4:  # nearer than that to the goal float32 may tell either
            assert bool(found[i]) == (left <= 1e-5 * whole), i
    assert 5 < int(found.sum()) < 35


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_problem_that_comes_no_nearer_is_given_up(kind, dtype):
    weights = torch.ones(3, 1, 5, dtype=dtype)
    curved, progress = torch.ones(3, 1, dtype=dtype), kind(weights)
    done = []
    for step in range(PATIENCE[dtype] + 3):
        # The first stands still, the second's gradient shrinks, the third's value falls.
        gradient = torch.ones(3, 1, 5, dtype=dtype)
        gradient[1] *= 0.9**step
        value = torch.tensor([10.0, 10.0, 10.0 - 0.01 * step], dtype=dtype)
        done.append(progress.arrived(weights, gradient, place(value, curved), 0.0).tolist())
    assert done.index([True, False, False]) == PATIENCE[dtype] + 1
    assert done[PATIENCE[dtype]] == [False, False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_who_comes_back_to_where_it_was_is_no_nearer(kind):
    weights, curved = torch.ones(1, 1, 5), torch.ones(1, 1)
    progress, patience = kind(weights), PATIENCE[torch.float32]
    for step in range(patience + 2):
        # Loss and gradient go up and down, never below where they were at first.
        up = 1.0 + step % 2
        done = progress.arrived(weights, up * torch.ones(1, 1, 5), place(torch.tensor([10.0 * up]), curved), 0.0)
        assert bool(done) == (step > patience)


@pytest.mark.parametrize("kind", KINDS)
def test_those_that_are_kept_go_on_as_before(kind):
    g = torch.Generator().manual_seed(1)
    on = torch.tensor([True, False, True, True, False])
    weights, curved = torch.randn(5, 2, 7, generator=g), torch.rand(5, 2, generator=g)
    whole, part = kind(weights), kind(weights)
    for step in range(PATIENCE[torch.float32] + 2):
        gradient, value = torch.randn(5, 2, 7, generator=g), torch.rand(5, generator=g)
        all_of_them = whole.arrived(weights, gradient, place(value, curved), 1e-3)
        if step < 3:
            part.arrived(weights, gradient, place(value, curved), 1e-3)
        else:
            if step == 3:
                part.keep(on)
            found = part.arrived(weights[on], gradient[on], place(value[on], curved[on]), 1e-3)
            assert found.equal(all_of_them[on])
