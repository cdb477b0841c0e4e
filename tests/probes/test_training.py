"""Which members are trained on, and how far."""

import pytest
import torch
from torch import nn

from gapprobe.probes.training import Purpose, Seen, trainer
from tests.probes.problems import Line, drawn


@pytest.mark.parametrize(
    ("make", "rounding"),
    # torch's products of fewer members may be summed in another order, compiled steps are not.
    [(Line, 1e-12), (lambda d: nn.Sequential(nn.Linear(d, 1), nn.Flatten(0)), 0.0)],
)
def test_members_that_are_let_go_stay_where_they_are_and_the_others_go_on(make, rounding):
    torch.manual_seed(0)
    x, y, _, _ = drawn(p=1)
    used = torch.ones(2, len(x), dtype=torch.bool)
    module = make(x.shape[1]).double()
    start = {key: value.detach().clone() for key, value in module.named_parameters()}
    seen = Seen(x, used, x.new_zeros(2, x.shape[1]), x.new_ones(2, x.shape[1]), beforehand=True)
    members = trainer(module, start, seen, torch.tensor([[0.1, 0.2], [0.3, 0.4]]).double(), lr=0.01)
    purpose = Purpose((2.0 * y.double() - 1).expand(4, -1) / len(x), used)
    rows = torch.arange(len(x))
    every = torch.ones(4, dtype=torch.bool)
    members.step(rows, purpose)
    before = members.loss(rows, purpose)
    members.keep(torch.tensor([False, True, False, False]))
    assert members.on.tolist() == [1]
    torch.testing.assert_close(members.loss(rows, purpose), before[1:2], rtol=0, atol=rounding)
    one = {key: value.clone() for key, value in members.parameters(every[:1]).items()}
    members.step(rows, purpose)
    assert float(members.loss(rows, purpose)) < float(before[1])
    assert all(not value.equal(one[key]) for key, value in members.parameters(every[:1]).items())
