"""The attention probe's objective is what it says, token by token, and it finds the token that knows."""

import pytest
import torch
from sklearn.datasets import load_digits

from gapprobe.errors import ConfigError
from gapprobe.kernels.standardised import Standardised
from gapprobe.probes.base import find_probe
from gapprobe.probes.kinds.attention import Attention, AttentionFits, objective
from gapprobe.probes.tokens import Tokens
from gapprobe.stats import auc


def ragged(n, d, seed=0, longest=6):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=g)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Tokens(torch.randn(int(offsets[-1]), d, generator=g, dtype=torch.float64) * 3 + 1, offsets), g


def attended(queries, values, x):
    """Return one row's score, written for reading: queries and values [h d], tokens [t d]."""
    return sum(torch.softmax(x @ q, 0) @ (x @ v) for q, v in zip(queries, values, strict=True))


def test_loss_and_gradient_are_the_readable_ones():
    x, g = ragged(40, 5)
    heads, p = 2, 3
    weights = torch.rand(p, 40, generator=g).double() * (torch.rand(p, 40, generator=g) < 0.7)
    sign = torch.where(torch.rand(p, 40, generator=g) < 0.5, 1.0, -1.0).double()
    decay = torch.tensor([0.0, 0.1, 1.0]).double()
    parameters = torch.randn(p, 2 * heads, 6, generator=g, dtype=torch.float64).requires_grad_()
    losses = []
    for own, w, s, penalty in zip(parameters, weights, sign, decay, strict=True):
        used = x.values[(w > 0)[x.row]]
        z = (x.values - used.mean(0)) / used.std(0, correction=0)
        coef, free = own[:, :-1], own[heads:, -1].sum()
        scores = torch.stack([attended(coef[:heads], coef[heads:], z[x.row == i]) for i in range(40)]) + free
        losses.append((w * torch.log1p(torch.exp(-s * scores))).sum() + penalty * coef.square().sum() / 2)
    expected = torch.stack(losses)
    slopes = torch.autograd.grad(expected.sum(), parameters)[0]
    features = Standardised(x.values, (weights > 0)[:, x.row])
    z = Tokens((x.values - features.centre) / features.spread, x.offsets)
    view = features.view(torch.arange(p), torch.float64)
    loss, gradient = objective(parameters.detach(), z, view, sign, weights, decay)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, slopes, rtol=1e-11, atol=1e-12)


def test_scores_and_attention_are_those_of_each_row_alone():
    x, g = ragged(30, 4)
    queries, values = torch.randn(2, 3, 2, 4, generator=g, dtype=torch.float64)
    fits = AttentionFits(queries, values, torch.tensor([0.5, 0.0, -1.0]).double())
    expected = torch.stack(
        [
            torch.stack([attended(q, v, x[i : i + 1].values) + b for i in range(30)])
            for q, v, b in zip(queries, values, fits.intercept, strict=True)
        ]
    )
    torch.testing.assert_close(fits.scores(x), expected, rtol=1e-12, atol=1e-12)
    looks = fits.attention(x)
    of_rows = torch.zeros(3, 2, 30).double().index_add_(2, x.row, looks)
    torch.testing.assert_close(of_rows, torch.ones_like(of_rows))
    last = x[29:]
    torch.testing.assert_close(looks[1, 0, -len(last.values) :], torch.softmax(last.values @ queries[1, 0], 0))


def test_logits_of_any_size_are_finite():
    x, _ = ragged(6, 2)
    fits = AttentionFits(torch.full((1, 1, 2), 1e5).double(), torch.ones(1, 1, 2).double(), torch.zeros(1).double())
    assert bool(torch.isfinite(fits.scores(x)).all())


def needles(n, seed=0):
    """One token of each row is marked by its first feature; its second feature knows the label, all others lie."""
    x, g = ragged(n, 6, seed, longest=9)
    y = torch.rand(n, generator=g) < 0.5
    at = x.offsets[:-1] + (torch.rand(n, generator=g) * x.lengths).long()
    values = torch.randn(len(x.values), 6, generator=g)
    values[:, 1] *= 3.0
    values[at, 0] += 5.0
    values[at, 1] = torch.where(y, 1.5, -1.5) + torch.randn(n, generator=g)
    return Tokens(values, x.offsets), y, at


@pytest.mark.parametrize("heads", [1, 2])
def test_it_looks_at_the_token_that_knows(heads):
    x, y, at = needles(1200)
    weights = (torch.arange(1200) < 800).double()[None]
    fits = Attention(heads=heads).fit(x, y[None], weights, torch.ones(1).double(), 0)
    area = auc(fits.scores(x)[0, 800:].numpy(), y[800:].numpy())
    blind = find_probe("logistic").fit(x.pooled("mean"), y[None], weights, torch.ones(1).double(), 0)
    pooled = auc(blind.scores(x.pooled("mean"))[0, 800:].numpy(), y[800:].numpy())
    # The token alone gives an area of 0.983: two normals three deviations apart.
    assert area > 0.93
    assert pooled < area - 0.1
    assert float(fits.attention(x)[0, 0, at[800:]].mean()) > 0.8
    by_chance = float((1.0 / x.lengths[800:]).mean())
    assert by_chance < 0.5


def test_it_reads_the_lines_of_digits():
    """A digit is eight tokens, its lines of pixels, each with its number: whether it is a 3 or an 8 takes some of them.

    Pale lines are left out, so rows differ in length.
    """
    digits = load_digits()
    keep = (digits.target == 3) | (digits.target == 8)
    lines = torch.from_numpy(digits.images[keep]).float()
    y = torch.from_numpy(digits.target[keep] == 8)
    there = lines.sum(2) > 20
    place = torch.eye(8).expand(len(lines), 8, 8)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), there.sum(1).cumsum(0)])
    x = Tokens(torch.cat([lines, place], 2)[there], offsets)
    assert len(x.lengths.unique()) > 1
    weights = (torch.arange(len(y)) % 3 > 0).double()[None]
    fits = Attention(heads=4).fit(x, y[None], weights, torch.ones(1).double(), 0)
    new = weights[0] == 0
    assert auc(fits.scores(x)[0, new].numpy(), y[new].numpy()) > 0.95


def test_rows_of_one_token_are_read_by_a_line():
    g = torch.Generator().manual_seed(0)
    values = torch.randn(300, 4, generator=g)
    y = values[:, 0] + torch.randn(300, generator=g) > 0
    x = Tokens.single(values)
    fits = Attention().fit(x, y[None], torch.ones(1, 300).double(), torch.ones(1).double(), 0)
    expected = fits.values[0, 0] @ values.double().T + fits.intercept
    torch.testing.assert_close(fits.scores(x)[0], expected, rtol=1e-12, atol=1e-12)
    line = find_probe("logistic").fit(values, y[None], torch.ones(1, 300).double(), torch.ones(1).double(), 0)
    told = torch.corrcoef(torch.stack([fits.scores(x)[0], line.scores(values)[0]]))[0, 1]
    assert float(told) > 0.99


def test_it_stops_early_where_there_is_nothing_to_learn():
    """Labels are noise: who trains to the end is sure of them, who stops early is not."""
    x, g = ragged(120, 30)
    y = torch.rand(1, 120, generator=g) < 0.5
    weights, strengths = (torch.arange(120) < 80).double()[None], torch.tensor([100.0]).double()

    def surprise(probe):
        scores = probe.fit(x, y, weights, strengths, 0).scores(x)[:, 80:]
        return float(torch.nn.functional.softplus(torch.where(y[:, 80:], -scores, scores)).mean())

    unstopped = surprise(Attention(held_out=0.0))
    assert surprise(Attention()) < unstopped / 2
    assert surprise(Attention(patience=10**6)) < unstopped / 2  # trained to the end, it goes back to its best


def test_the_order_of_tokens_says_nothing():
    x, y, _ = needles(100)
    turned = torch.cat([x[i : i + 1].values.flip(0) for i in range(100)])
    weights, strengths = torch.ones(1, 100).double(), torch.ones(1).double()
    ours, theirs = (
        Attention(steps=20).fit(rows, y[None], weights, strengths, 0).scores(rows)
        for rows in (x, Tokens(turned, x.offsets))
    )
    # Sums go in another order: float32 rounding, which twenty steps of Adam at most multiply.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=20 * 1e-4 * float(ours.std()))


@pytest.mark.parametrize("wrong", [{"heads": 0}, {"steps": 0}, {"batch": 0}, {"held_out": 1.0}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError, match="attention: heads, steps, batch and every must be 1 at least"):
        Attention(**wrong)
