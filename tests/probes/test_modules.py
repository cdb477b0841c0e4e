"""An ensemble of linear modules against certified logistic regression, and members against themselves alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from gapprobe.errors import ConfigError
from gapprobe.kernels import logistic
from gapprobe.probes import ensembles, modules, training
from gapprobe.probes.modules import from_module
from tests.probes.problems import Line, drawn


def test_linear_modules_are_logistic_regression():
    x, y, weights, strengths = drawn()
    probe = from_module(Line, name="line", steps=2000, lr=0.02, held_out=0.0)
    ours = probe.fit(x, y, weights, strengths, 0).scores(x)
    theirs = logistic.fit(x, y, weights, strengths, tolerance=1e-10).logits(x)
    # Adam in float32 with a constant rate ends in steps of about the rate times its rounding.
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


# Float64 in what follows: Adam's steps over sums in another order stay within 1e-12 of each other, and anything else (a
# row, a draw, a look, a member's state) shows.
SAME = {"rtol": 0.0, "atol": 1e-9}


def exactly(make, **settings):
    return replace(from_module(make, name="m", **settings), dtype=torch.float64)


def dropping(d):
    return nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Dropout(0.1), Line(8))


def plain(d):
    return nn.Sequential(nn.Linear(d, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))


@pytest.mark.parametrize("make", [dropping, plain])
@pytest.mark.parametrize("batch", [1000, 16])
def test_members_do_not_depend_on_their_neighbours(batch, make):
    x, y, weights, strengths = drawn()
    probe = exactly(make, steps=60, lr=0.01, batch=batch)
    together = probe.fit(x, y, weights, strengths, 3).scores(x)
    assert torch.equal(together, probe.fit(x, y, weights, strengths, 3).scores(x))
    assert not torch.equal(together, probe.fit(x, y, weights, strengths, 4).scores(x))
    for i in range(3):
        one = slice(i, i + 1)
        alone = probe.fit(x, y[one], weights[one], strengths[one], 3).scores(x)
        torch.testing.assert_close(together[i], alone[0], **SAME)
    spoiled, other = x.clone(), y.clone()
    unused = ~(weights[0] > 0)
    spoiled[unused] = 1e5
    other[0, unused] = ~other[0, unused]
    again = probe.fit(spoiled, other[:1], weights[:1], strengths[:1], 3).scores(x)
    torch.testing.assert_close(together[:1], again, **SAME)


def test_rows_of_no_weight_leave_no_trace_however_large():
    x, y, weights, strengths = drawn()
    probe = from_module(dropping, name="m", steps=20)
    before = probe.fit(x, y[:1], weights[:1], strengths[:1], 3).scores(x)
    spoiled = x.clone()
    spoiled[~(weights[0] > 0)] = 1e38  # standardised it is more than float32 can hold
    assert torch.equal(probe.fit(spoiled, y[:1], weights[:1], strengths[:1], 3).scores(x), before)


class Wrapped(nn.Module):
    """Hides that a module is a sequence of layers."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("make", [plain, lambda d: Wrapped(plain(d))])
@pytest.mark.parametrize("room", [0, modules.ROOM])  # to standardise all rows beforehand
@pytest.mark.parametrize("batch", [1000, 60])
def test_members_that_stop_early_are_let_go_and_the_others_train_on_as_before(make, batch, room, monkeypatch):
    monkeypatch.setattr(modules, "ROOM", room)
    x, y, weights, _ = drawn(1, n=150)
    # Two problems share rows and labels, four share rows, one is alone: they stop at different steps.
    y, weights = y[[0, 1, 2, 0, 0, 2, 0]], weights[[0, 1, 0, 0, 1, 0, 2]]
    strengths = torch.tensor([1e-3, 1e-3, 1e-3, 30.0, 30.0, 30.0, 0.1]).double()
    probe = exactly(make, steps=200, lr=0.02, batch=batch, held_out=0.3, patience=2)
    together = probe.fit(x, y, weights, strengths, 0).scores(x)
    for i in range(7):
        one = slice(i, i + 1)
        alone = probe.fit(x, y[one], weights[one], strengths[one], 0).scores(x)
        torch.testing.assert_close(together[i], alone[0], **SAME)


@pytest.mark.parametrize("room", [0, modules.ROOM])
def test_a_group_whose_members_have_all_stopped_is_let_go(room, monkeypatch):
    monkeypatch.setattr(modules, "ROOM", room)
    groups = []
    batch = training._Perceptron._batch
    monkeypatch.setattr(
        training._Perceptron,
        "_batch",
        lambda own, *told: (groups.append(own._group.unique().tolist()), batch(own, *told))[1],
    )
    x, y, weights, _ = drawn(1, n=150)
    # Units that are drawn to nothing soon learn no more: the first group stops first.
    y, weights, strengths = y[[0, 2, 0, 2]], weights[[1, 1, 0, 0]], torch.tensor([1e-3, 1e-3, 30.0, 30.0]).double()
    probe = exactly(plain, steps=200, lr=0.02, batch=60, held_out=0.3, patience=2)
    together = probe.fit(x, y, weights, strengths, 0).scores(x)
    assert [0, 1] in groups
    assert [1] in groups
    for i in range(4):
        one = slice(i, i + 1)
        torch.testing.assert_close(
            together[i], probe.fit(x, y[one], weights[one], strengths[one], 0).scores(x)[0], **SAME
        )


def tied(d):
    middle = nn.Linear(d, d)
    return nn.Sequential(middle, nn.Tanh(), middle, nn.Linear(d, 1), nn.Flatten(0))


def hooked(d):
    made = plain(d)
    made[0].register_forward_hook(lambda *told: told[2] * 2)
    return made


@pytest.mark.parametrize(
    "make",
    [
        plain,
        lambda d: nn.Sequential(nn.Linear(d, 1), nn.Flatten(0)),
        lambda d: nn.Sequential(nn.Linear(d, 8, bias=False), nn.GELU(), nn.Linear(8, 1, bias=False), nn.Flatten(0)),
        lambda d: nn.Sequential(nn.Linear(d, 8), nn.ELU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0)),
        lambda d: nn.Sequential(nn.ELU(inplace=True), nn.Linear(d, 1), nn.Flatten(0)),
        lambda d: nn.Sequential(nn.Linear(d, 8), nn.ReLU(), nn.Linear(8, 1), nn.ReLU(), nn.Flatten(0)),
        lambda d: nn.Sequential(nn.Linear(d, 8), nn.LayerNorm(8), nn.Linear(8, 1), nn.Flatten(0)),
        lambda d: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(d, 1)), nn.Flatten(0)),
        tied,
        hooked,
    ],
)
@pytest.mark.parametrize("few", [1, 1000])  # features that are summed one by one from here on
def test_layers_side_by_side_are_the_module(make, few, monkeypatch):
    monkeypatch.setattr(ensembles, "FEW", few)
    x, y, weights, _ = drawn()
    y, weights, strengths = y[[0, 1, 1]], weights[[0, 0, 1]], torch.tensor([0.1, 1.0, 10.0]).double()
    scores = [
        exactly(made, steps=40).fit(x, y, weights, strengths, 0).scores(x)
        for made in (make, lambda d: Wrapped(make(d)))
    ]
    torch.testing.assert_close(*scores, **SAME)


PERCEPTRONS = [
    plain,
    lambda d: nn.Sequential(nn.Linear(d, 1, bias=False), nn.Flatten(0)),
    lambda d: nn.Sequential(
        *(nn.Linear(d, 8), nn.ReLU(inplace=True), nn.Linear(8, 6, bias=False), nn.Identity(), nn.Linear(6, 5)),
        *(nn.ReLU(), nn.Linear(5, 1), nn.Flatten(0)),
    ),
]


@pytest.mark.parametrize("make", PERCEPTRONS)
@pytest.mark.parametrize("room", [0, modules.ROOM])  # to standardise all rows beforehand
def test_perceptrons_are_trained_by_a_way_of_their_own_to_the_same_end(make, room, monkeypatch):
    monkeypatch.setattr(modules, "ROOM", room)
    assert training._shape(make(5), dict(make(5).named_parameters())) is not None
    x, y, weights, _ = drawn(2, n=150)
    y, weights, strengths = y[[0, 1, 1, 2]], weights[[0, 0, 1, 0]], torch.tensor([0.1, 1.0, 10.0, 30.0]).double()
    scores = [
        exactly(made, steps=80, lr=0.02, batch=40, held_out=0.3, patience=2).fit(x, y, weights, strengths, 0).scores(x)
        for made in (make, lambda d: Wrapped(make(d)))
    ]
    torch.testing.assert_close(*scores, **SAME)


@pytest.mark.parametrize("make", [plain, lambda d: Wrapped(plain(d))])
def test_members_that_blow_up_keep_what_they_had_before(make):
    """At such a rate the loss is no number any more: what was best until then is returned."""
    x, y, weights, strengths = drawn()
    scores = from_module(make, name="m", steps=60, lr=1e15).fit(x, y, weights, strengths, 0).scores(x)
    assert bool(scores.isfinite().all())


def test_problems_are_cut_into_parts_that_there_is_room_for():
    group = torch.tensor([2, 0, 1, 2, 2, 0, 1, 3])
    for held in (1, 2, 5, 100):
        parts = list(modules._rectangles(group, modules.ROOM // held))
        assert sorted(i for part in parts for i in part.flatten().tolist()) == list(range(8))
        for part in parts:
            assert part.numel() <= held
            assert bool((group[part] == group[part[:, :1]]).all())
    assert [tuple(part.shape) for part in parts] == [(1, 1), (2, 2), (1, 3)]


def test_rows_that_there_is_no_room_to_standardise_beforehand_are_standardised_batch_by_batch(monkeypatch):
    x, y, weights, strengths = drawn()
    probe = from_module(Line, name="line", steps=30, batch=16)
    before = probe.fit(x, y, weights, strengths, 0).scores(x)
    monkeypatch.setattr(modules, "ROOM", 0)
    torch.testing.assert_close(probe.fit(x, y, weights, strengths, 0).scores(x), before, rtol=0, atol=0)


def test_training_leaves_the_random_numbers_of_others_alone():
    x, y, weights, strengths = drawn()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    from_module(Line, name="line", steps=3).fit(x, y, weights, strengths, 0)
    assert torch.equal(torch.rand(3), expected)


def test_early_stopping_keeps_the_best_member():
    """Labels of pure noise: what is learnt of them can only hurt the rows held out."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 40, generator=g), torch.rand(1, 80, generator=g) < 0.5
    weights, one = torch.ones(1, 80).double(), torch.tensor([1e3]).double()
    fits = [from_module(Line, name="l", steps=500, lr=0.05, held_out=h).fit(x, y, weights, one, 0) for h in (0.0, 0.3)]
    sizes = [float(fit.parameters["map.weight"].norm()) for fit in fits]
    assert sizes[1] < sizes[0] / 3


def test_modules_of_another_shape_are_refused():
    x, y, weights, strengths = drawn()
    with pytest.raises(ConfigError, match=r"it made \(2, 1\) of 2 rows"):
        from_module(lambda d: nn.Linear(d, 1), name="m").fit(x, y, weights, strengths, 0)
    with pytest.raises(ConfigError, match="needs steps"):
        from_module(Line, name="m", steps=0)
