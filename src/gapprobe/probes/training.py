"""What trains the members of an ensemble: a step, a loss, and which of them go on."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from gapprobe.probes.ensembles import plain_layers, side_by_side

SPARSE = 0.8  # members that have stopped are let go once so few are left: a copy costs as much as a step


@dataclass(frozen=True)
class Purpose:
    """What rows are for.

    Attributes:
        share: of the rows in the loss of every member there was, sum of |share| log(1 + exp(-sign(share) f)).
        counts: those that a group is shown; the share of others is 0.
    """

    share: Float[Tensor, "p n"]
    counts: Bool[Tensor, "g n"]


class Seen:
    """Rows as groups see them: standardised by a group's own; zeros for those that it must not see."""

    def __init__(
        self,
        x: Float[Tensor, "n d"],
        used: Bool[Tensor, "g n"],
        mean: Float[Tensor, "g d"],
        scale: Float[Tensor, "g d"],
        beforehand: bool,
    ) -> None:
        self._x, self._used, self._mean, self._scale = x, used, mean, scale
        every, rows = torch.arange(len(used)), torch.arange(len(x))
        self.whole = self._standardised(every, rows.expand(len(used), -1)) if beforehand else None

    def __call__(self, groups: Int64[Tensor, " g"], rows: Int64[Tensor, "g b"]) -> Float[Tensor, "g b d"]:
        """Return some rows of every one of some groups."""
        if self.whole is None:
            return self._standardised(groups, rows)
        at = groups[:, None] * len(self._x) + rows
        return self.whole.flatten(0, 1).index_select(0, at.flatten()).unflatten(0, at.shape)

    def _standardised(self, groups: Int64[Tensor, " g"], rows: Int64[Tensor, "g b"]) -> Float[Tensor, "g b d"]:
        z = (self._x[rows].to(self._mean.dtype) - self._mean[groups, None]) / self._scale[groups, None]
        return z.masked_fill_(~self._used[groups[:, None], rows][..., None], 0.0)


class Trainer(ABC):
    """Members in training.

    Attributes:
        on: those that are still trained, counted group by group.
    """

    def __init__(self, seen: Seen, decay: Float[Tensor, "g s"]) -> None:
        self._seen = seen
        self.on = torch.arange(decay.numel())

    @abstractmethod
    def step(self, rows: Int64[Tensor, " b"], purpose: Purpose) -> None:
        """Take a step of Adam down the loss on some rows, and the penalty."""

    @abstractmethod
    def loss(self, rows: Int64[Tensor, " b"], purpose: Purpose) -> Float[Tensor, " m"]:
        """Return the loss on some rows, which are not learnt from."""

    @abstractmethod
    def parameters(self, some: Bool[Tensor, " m"]) -> dict[str, Float[Tensor, "k ..."]]:
        """Return the parameters by name of some of those on."""

    @abstractmethod
    def keep(self, going: Bool[Tensor, " p"]) -> None:
        """Let go of members, or of some of them; `going` is told of all that there ever were."""


def trainer(
    module: nn.Module, start: Mapping[str, Tensor], seen: Seen, decay: Float[Tensor, "g s"], lr: float
) -> Trainer:
    """Return what trains copies of a module that start alike.

    Args:
        module: whose own parameters are of no account.
        start: parameters by name.
        seen: rows.
        decay: times a member's weights: the penalty's gradient. Vectors cost nothing.
        lr: of Adam.
    """
    shape = _shape(module, start)
    return _Autograd(module, start, seen, decay, lr) if shape is None else _Perceptron(shape, start, seen, decay, lr)


class _Autograd(Trainer):
    """Any module, its gradients by torch."""

    def __init__(
        self, module: nn.Module, start: Mapping[str, Tensor], seen: Seen, decay: Float[Tensor, "g s"], lr: float
    ) -> None:
        super().__init__(seen, decay)
        self._decay, self._groups = decay, torch.arange(len(decay))
        self._module, self._run = module.train(), side_by_side(module, start, dict(module.named_buffers()))
        self._own = {
            key: value.repeat(*decay.shape, *[1] * value.ndim).requires_grad_() for key, value in start.items()
        }
        self._adam = torch.optim.Adam(self._own.values(), lr=lr, fused=True)
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def step(self, rows: Int64[Tensor, " b"], purpose: Purpose) -> None:
        if self._last is None or self._last[0] is not rows:
            self._last = (rows, *self._batch(rows, purpose))
        _, z, share = self._last
        self._adam.zero_grad()
        logits = self._run(self._own, z)
        logits.backward(-share * torch.sigmoid(-share.sign() * logits.detach()))
        for value in self._own.values():
            if value.ndim > 3 and value.grad is not None:
                value.grad.addcmul_(self._decay.view(*self._decay.shape, *[1] * (value.ndim - 2)), value.detach())
        self._adam.step()

    @torch.no_grad()
    def loss(self, rows: Int64[Tensor, " b"], purpose: Purpose) -> Float[Tensor, " m"]:
        z, share = self._batch(rows, purpose)
        self._module.eval()
        losses = nn.functional.softplus(-share.sign() * self._run(self._own, z))
        self._module.train()
        return (share.abs() * losses).sum(2).flatten()

    def parameters(self, some: Bool[Tensor, " m"]) -> dict[str, Float[Tensor, "k ..."]]:
        return {key: value.detach().flatten(0, 1)[some] for key, value in self._own.items()}

    def keep(self, going: Bool[Tensor, " p"]) -> None:
        left = going[self.on].view_as(self._decay)
        width = int(left.sum(1).max())
        if width * int(left.any(1).sum()) > SPARSE * left.numel():
            return
        # Groups stay equally wide: one that has fewer members left takes stopped ones along.
        some = torch.arange(left.numel()).view_as(left)
        some = some.gather(1, left.argsort(dim=1, descending=True, stable=True)[:, :width])[left.any(1)]
        self.on, self._decay = self.on[some.flatten()], self._decay.flatten()[some]
        self._groups = self._groups[left.any(1)]
        self._own = {key: self._kept(value, some) for key, value in self._own.items()}
        self._adam.param_groups[0]["params"] = list(self._own.values())
        self._last = None

    def _batch(
        self, rows: Int64[Tensor, " b"], purpose: Purpose
    ) -> tuple[Float[Tensor, "g c d"], Float[Tensor, "g s c"]]:
        """Return those of some rows that count for a group, and their shares for its members."""
        own = purpose.counts[self._groups[:, None], rows]
        index = rows[own.argsort(dim=1, descending=True, stable=True)[:, : max(1, int(own.sum(1).max()))]]
        share = purpose.share[self.on.view_as(self._decay)[..., None], index[:, None]]
        return self._seen(self._groups, index), share

    def _kept(self, value: Float[Tensor, "g s ..."], some: Int64[Tensor, "h r"]) -> Float[Tensor, "h r ..."]:
        """Return the part of some members, and give it their part of what the optimiser remembers."""
        part = value.detach().flatten(0, 1)[some].requires_grad_()
        self._adam.state[part] = {
            key: kept.flatten(0, 1)[some] if kept.shape == value.shape else kept
            for key, kept in self._adam.state.pop(value).items()
        }
        return part


class _Perceptron(Trainer):
    """Linear layers with rectified units between them, compiled for a CPU."""

    def __init__(
        self, shape: Any, start: Mapping[str, Tensor], seen: Seen, decay: Float[Tensor, "g s"], lr: float
    ) -> None:
        super().__init__(seen, decay)
        self._shape, self._start, self._lr, self._steps = shape, start, lr, 0
        self._decay = decay.flatten()
        self._group = torch.arange(len(decay)).repeat_interleave(decay.shape[1])
        line = torch.cat([value.flatten() for value in start.values()])
        # Parameters, and what Adam remembers of their gradients.
        self._state = line.new_zeros(3, decay.numel(), len(line))
        self._state[0] = line

    def step(self, rows: Int64[Tensor, " b"], purpose: Purpose) -> None:
        from gapprobe.kernels import perceptron_cpu  # a third of a second to import

        self._steps += 1
        perceptron_cpu.step(self._shape, self._state, self._batch(rows, purpose), self._decay, self._lr, self._steps)

    def loss(self, rows: Int64[Tensor, " b"], purpose: Purpose) -> Float[Tensor, " m"]:
        from gapprobe.kernels import perceptron_cpu

        return perceptron_cpu.loss(self._shape, self._state, self._batch(rows, purpose))[self.on]

    def parameters(self, some: Bool[Tensor, " m"]) -> dict[str, Float[Tensor, "k ..."]]:
        parts = self._state[0, self.on[some]].split([value.numel() for value in self._start.values()], dim=1)
        return {
            name: part.unflatten(1, value.shape) for (name, value), part in zip(self._start.items(), parts, strict=True)
        }

    def keep(self, going: Bool[Tensor, " p"]) -> None:
        left = going[self.on]
        self.on, self._group = self.on[left], self._group[left]

    def _batch(self, rows: Int64[Tensor, " b"], purpose: Purpose) -> Any:
        from gapprobe.kernels.perceptron_cpu import Batch

        z, counts, share, group = self._seen.whole, purpose.counts, purpose.share, self._group
        if z is None:
            groups, group = torch.unique(group, return_inverse=True)
            z = self._seen(groups, rows.expand(len(groups), -1))
            counts, share, rows = counts[groups][:, rows], share[:, rows], torch.arange(len(rows))
        return Batch(z, counts, share, rows, self.on, group)


def _shape(module: nn.Module, start: Mapping[str, Tensor]) -> Any:
    """Return the `perceptron_cpu.Shape` of a module of linear layers and rectified units alone, else None."""
    layers = [(i, layer) for i, layer in enumerate(plain_layers(module, start)) if type(layer) is not nn.Identity]
    linear = [(i, layer) for i, layer in layers if isinstance(layer, nn.Linear)]
    after = [type(layer) for _, layer in layers[1:]] + [nn.Identity]
    rectified = tuple(
        kind is nn.ReLU for (_, layer), kind in zip(layers, after, strict=False) if isinstance(layer, nn.Linear)
    )
    known = all(value.dtype in (torch.float32, torch.float64) for value in start.values())
    if not known or not linear or rectified[-1] or len(layers) != len(linear) + sum(rectified):
        return None
    from gapprobe.kernels.perceptron_cpu import Shape  # a third of a second to import

    widths = (linear[0][1].in_features, *(layer.out_features for _, layer in linear))
    return Shape(widths, tuple(f"{i}.bias" in start for i, _ in linear), rectified)
