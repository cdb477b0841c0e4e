"""Compiled steps of perceptrons against torch's gradients and its Adam, one member after the other."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gapprobe.kernels import perceptron_cpu
from gapprobe.kernels.perceptron_cpu import CHUNK, TILE, Batch, Shape

LR = 0.01
PLAIN = Shape((5, 8, 1), (True, True), (True, False))
SHAPES = st.integers(0, 3).flatmap(
    lambda hidden: st.tuples(
        st.tuples(st.integers(1, 150), *[st.integers(1, 20)] * hidden, st.just(1)),
        st.tuples(*[st.booleans()] * (hidden + 1)),
        st.tuples(*[st.booleans()] * hidden, st.just(False)),
    )
)


def drawn(shape, n=60, groups=2, each=3, dtype=torch.float64, seed=0):
    """Return parameters of members, their penalties, and rows for them; those that do not count are NaN."""
    g = torch.Generator().manual_seed(seed)
    p = groups * each
    z = torch.randn(groups, n, shape.widths[0], generator=g, dtype=torch.float64)
    counts = torch.rand(groups, n, generator=g) < 0.7
    share = torch.randn(p, n, generator=g, dtype=torch.float64) / n
    share *= counts.repeat_interleave(each, 0) & (torch.rand(p, n, generator=g) < 0.8)
    state = torch.zeros(3, p, shape.size, dtype=torch.float64)
    state[0] = torch.randn(p, shape.size, generator=g, dtype=torch.float64) / shape.widths[0] ** 0.5
    decay = torch.rand(p, generator=g, dtype=torch.float64) / 10
    z, share, state, decay = (part.to(dtype) for part in (z, share, state, decay))
    z[~counts] = torch.nan
    rows = torch.randperm(n, generator=g)[: max(1, n - n // 4)]
    return state, decay, Batch(z, counts, share, rows, torch.arange(p), torch.arange(groups).repeat_interleave(each))


def line(shape, numbers):
    """Return a member as torch's own module."""
    layers, at = [], 0
    for (inputs, made), biased, rectified in zip(pairwise(shape.widths), shape.biased, shape.rectified, strict=True):
        layer = nn.Linear(inputs, made, bias=biased, dtype=numbers.dtype)
        for value in layer.parameters():
            value.data = numbers[at : at + value.numel()].view_as(value).clone()
            at += value.numel()
        layers += [layer, nn.ReLU()] if rectified else [layer]
    return nn.Sequential(*layers, nn.Flatten(0))


def by_torch(shape, state, batch, decay, steps):
    """Train with torch, given the same rows at every step; return parameters, means of gradients, and first losses."""
    ends, means, losses = [], [], []
    for member, group in zip(batch.members, batch.group, strict=True):
        module = line(shape, state[0, member])
        adam = torch.optim.Adam(module.parameters(), lr=LR)
        rows = batch.rows[batch.counts[group, batch.rows]]
        z, share = batch.z[group, rows], batch.share[member, rows]
        for step in range(steps):
            adam.zero_grad()
            # torch's softplus is the identity from 20 on.
            loss = (share.abs() * torch.logaddexp(-share.sign() * module(z), torch.zeros_like(share))).sum()
            weights = sum(value.square().sum() for value in module.parameters() if value.ndim > 1)
            (loss + decay[member] * weights / 2).backward()
            adam.step()
            if step == 0:
                losses.append(loss.detach())
        ends.append(torch.cat([value.detach().flatten() for value in module.parameters()]))
        means.append(torch.cat([adam.state[value]["exp_avg"].flatten() for value in module.parameters()]))
    return torch.stack(ends), torch.stack(means), torch.stack(losses)


def trained(shape, state, batch, decay, steps):
    state = state.clone()
    for step in range(steps):
        perceptron_cpu.step(shape, state, batch, decay, LR, step + 1)
    return state


@settings(deadline=None)  # the first call compiles
@given(shape=SHAPES, n=st.integers(1, 90), seed=st.integers(0, 99))
def test_steps_are_those_of_torch(shape, n, seed):
    shape = Shape(*shape)
    state, decay, batch = drawn(shape, n, seed=seed)
    ours = trained(shape, state, batch, decay, 3)
    ends, means, losses = by_torch(shape, state, batch, decay, 3)
    torch.testing.assert_close(perceptron_cpu.loss(shape, state, batch), losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours[1], means, rtol=1e-11, atol=1e-12)
    # A gradient of nothing but rounding may still become a step of Adam: it divides by the gradient's size.
    sure = ours[2] > 1e-20
    torch.testing.assert_close(ours[0][sure], ends[sure], rtol=0, atol=1e-9)


@pytest.mark.parametrize("d", [127, 188])
def test_many_rows_are_gone_through_in_parts(d):
    shape = Shape((d, 7, 3, 1), (True,) * 3, (True, True, False))
    n = 2 * CHUNK // d + TILE
    state, decay, batch = drawn(shape, n, groups=1, each=2)
    batch = replace(batch, rows=torch.arange(n).roll(5))
    assert int(batch.counts.sum()) > CHUNK // d
    ours = trained(shape, state, batch, decay, 2)
    ends, means, losses = by_torch(shape, state, batch, decay, 2)
    torch.testing.assert_close(perceptron_cpu.loss(shape, state, batch), losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours[1], means, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(ours[0], ends, rtol=0, atol=1e-9)


@pytest.mark.parametrize("d", [40, 300])
def test_float32_is_as_near_to_float64_as_torch_is(d):
    shape = Shape((d, 32, 1), (True, True), (True, False))
    state, decay, batch = drawn(shape, 300, groups=4, each=5, dtype=torch.float32)
    wide = (state.double(), replace(batch, z=batch.z.double(), share=batch.share.double()), decay.double())
    _, true, losses = by_torch(shape, *wide, 1)
    _, theirs, their_losses = by_torch(shape, state, batch, decay, 1)
    ours = trained(shape, state, batch, decay, 1)[1]
    assert (ours - true).norm() <= (theirs - true).norm()
    found = perceptron_cpu.loss(shape, state, batch)
    assert (found - losses).norm() <= (their_losses - losses).norm()


def test_a_member_does_not_hang_on_its_company_nor_on_threads(monkeypatch):
    shape = Shape((40, 9, 1), (True, True), (True, False))
    state, decay, batch = drawn(shape, groups=3, dtype=torch.float32)
    together = trained(shape, state, batch, decay, 2)
    some = torch.tensor([1, 5, 6, 8])
    fewer = replace(batch, members=some, group=batch.group[some])
    alone = trained(shape, state, fewer, decay, 2)
    assert alone[:, some].equal(together[:, some])
    others = torch.tensor([0, 2, 3, 4, 7])
    assert alone[:, others].equal(state[:, others])
    assert perceptron_cpu.loss(shape, state, fewer)[others].eq(0).all()
    monkeypatch.setattr(perceptron_cpu, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert trained(shape, state, batch, decay, 2).equal(together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_from_the_middle_losses_are_what_they_are(dtype):
    """Logits of thousands, and such as are no numbers at all: a member that has blown up must not look perfect."""
    shape = Shape((1, 1), (False,), (False,))
    state = torch.zeros(3, 3, 1, dtype=dtype)
    state[0, :, 0] = torch.tensor([3000.0, -3000.0, torch.nan], dtype=dtype)
    every = torch.ones(1, 1, dtype=torch.bool)
    rows = (torch.zeros(1, dtype=torch.int64), torch.arange(3), torch.zeros(3, dtype=torch.int64))
    batch = Batch(torch.ones(1, 1, 1, dtype=dtype), every, torch.ones(3, 1, dtype=dtype), *rows)
    found = perceptron_cpu.loss(shape, state, batch)
    # Float32's exponential ends where its small numbers lose digits.
    torch.testing.assert_close(found[:2], torch.tensor([0.0, 3000.0], dtype=dtype), rtol=0, atol=1e-37)
    assert found[2].isnan()
    perceptron_cpu.step(shape, state, batch, torch.zeros(3, dtype=dtype), LR, 1)
    torch.testing.assert_close(state[1, :2, 0], torch.tensor([0.0, -0.1], dtype=dtype))
    assert state[0, 2, 0].isnan()


def test_what_is_no_number_stays_none_behind_a_rectified_unit():
    state, _, batch = drawn(PLAIN)
    state[0, 2, 3] = torch.nan  # of the first layer
    assert perceptron_cpu.loss(PLAIN, state, batch).isnan().tolist() == [False, False, True, False, False, False]


def test_members_whom_no_row_of_a_batch_concerns_are_drawn_to_nothing():
    state, decay, batch = drawn(PLAIN)
    batch = replace(batch, counts=torch.zeros_like(batch.counts), share=torch.zeros_like(batch.share))
    ends, _, _ = by_torch(PLAIN, state, batch, decay, 2)
    torch.testing.assert_close(trained(PLAIN, state, batch, decay, 2)[0], ends, rtol=0, atol=1e-12)
    assert perceptron_cpu.loss(PLAIN, state, batch).eq(0).all()
