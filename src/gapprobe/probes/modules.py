"""Torch modules as probes: the problems of a fold are trained side by side, as one ensemble.

They are not certified: how near a fit comes to its optimum is the training's own affair.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from gapprobe.errors import ConfigError
from gapprobe.kernels.moments import standard
from gapprobe.probes.base import ROOM, check_problems, chunks
from gapprobe.probes.ensembles import side_by_side
from gapprobe.probes.training import Purpose, Seen, trainer


@dataclass(frozen=True)
class ModuleFits:
    """A trained ensemble.

    Attributes:
        module: what its members' parameters belong to, in evaluation mode.
        parameters: of all members, by name, stacked.
        buffers: shared by all members.
        mean: of every problem's rows.
        scale: deviation of every problem's rows.
    """

    module: nn.Module
    parameters: Mapping[str, Float[Tensor, "p ..."]]
    buffers: Mapping[str, Tensor]
    mean: Float[Tensor, "p d"]
    scale: Float[Tensor, "p d"]

    @torch.no_grad()
    def scores(self, x: Float[Tensor, "n d"]) -> Float64[Tensor, "p n"]:
        """Return the members' outputs."""
        out = self.mean.new_empty(len(self.mean), len(x), dtype=torch.float64)
        run = side_by_side(self.module, self.parameters, self.buffers)
        group = torch.unique(torch.cat([self.mean, self.scale], dim=1), dim=0, return_inverse=True)[1]
        rows = max(1, min(len(x), 1 << 9))
        for members in _rectangles(group, rows * x.shape[1]):
            own, first = {key: value[members] for key, value in self.parameters.items()}, members[:, 0]
            for start in range(0, len(x), rows):
                part = x[start : start + rows].to(self.mean.dtype)
                told = run(own, (part - self.mean[first, None]) / self.scale[first, None])
                out[members.flatten(), start : start + rows] = told.flatten(0, 1).double()
        return out


@dataclass(frozen=True)
class ModuleProbe:
    """A torch module as a probe: all problems are members of one ensemble, trained side by side on one X.

    A member's objective is its rows' weighted mean of log(1 + exp(-y f)) and |parameters|^2 / (2 strength n), n its
    total weight: a linear module is then logistic regression with C the strength. Vectors (biases, gains) cost nothing.
    All members start alike and see the same rows in the same order, so a member does not depend on its neighbours.

    An `nn.Sequential` of `nn.Linear`, functions of single numbers (`ensembles.ELEMENTWISE`) and `nn.Flatten(0)` at its
    end is trained about twice as fast as other modules: the first layers of all strengths of a fold are one product.
    With nothing but `nn.ReLU` between its linear layers it is faster again, two to three times where layers are narrow:
    its steps are compiled (`kernels/perceptron_cpu`).

    Attributes:
        make: makes a module for a width d: forward maps [b d] to [b], row by row (no batch norm).
        name: of the probe.
        strengths: tried by a sweep.
        steps: of Adam, at most.
        lr: its learning rate.
        batch: rows a step; all where they are fewer.
        held_out: share of a member's rows, of each class, that say when to stop; 0 for never.
        every: steps between looks at them.
        patience: looks without a better loss before a member stops. It keeps its best parameters.
        dtype: of training. Rounding that moves a unit across its kink can change a float32 member's log-odds by a
            hundredth; float64 tells that from a mistake.
        calibrated: whether scores are log-odds.
    """

    make: Callable[[int], nn.Module]
    name: str
    strengths: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    steps: int = 500
    lr: float = 3e-3
    batch: int = 512
    held_out: float = 0.1
    every: int = 10
    patience: int = 10
    dtype: torch.dtype = torch.float32
    calibrated: bool = field(default=True, init=False)
    room: ClassVar[int] = 8 * ROOM  # members trained side by side, and what autograd holds of them

    def fit(
        self,
        x: Float[Tensor, "n d"],
        y: Bool[Tensor, "p n"],
        weights: Float64[Tensor, "p n"],
        strengths: Float64[Tensor, " p"],
        seed: int,
    ) -> ModuleFits:
        """Train every problem; `seed` decides on the start, the order of rows, dropout and what is held out.

        Raises:
            DataError: a problem of one class, a strength not above 0, or features that are not finite.
            ConfigError: a module whose output is not one number a row.
        """
        check_problems(x, y, weights, strengths)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.make(x.shape[1]).to(self.dtype)
        draws = self._draws(module, x.shape[1])
        start = {key: value.detach().clone() for key, value in module.named_parameters()}
        rows, group = torch.unique(weights > 0, dim=0, return_inverse=True)
        mean, scale = (
            (part.to(self.dtype) for part in standard(x, rows))
            if len(y)
            else (x.new_zeros(0, x.shape[1], dtype=self.dtype),) * 2
        )
        size = sum(value.numel() for value in start.values())
        found = {key: value.new_empty(len(y), *value.shape) for key, value in start.items()}
        for members in _rectangles(group, 6 * size + 3 * min(self.batch, len(x)) * x.shape[1]):
            own = group[members[:, 0]]
            beforehand = members.shape[0] * x.numel() <= ROOM or self.batch >= len(x)
            seen = Seen(x, rows[own], mean[own], scale[own], beforehand)
            part = self._train(module, start, seen, y[members], weights[members], strengths[members], seed, draws)
            for key, value in part.items():
                found[key][members.flatten()] = value
        return ModuleFits(module.eval(), found, dict(module.named_buffers()), mean[group], scale[group])

    def _draws(self, module: nn.Module, d: int) -> bool:
        """Try the module on two rows; return whether it draws random numbers in training, as dropout does."""
        rows = torch.zeros(2, d, dtype=self.dtype)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            before = torch.get_rng_state()
            module.train()(rows)
            draws = not torch.equal(before, torch.get_rng_state())
            out = module.eval()(rows)
        if out.shape != (2,):
            raise ConfigError(f"{self.name}: forward must map [b d] to [b]; it made {tuple(out.shape)} of 2 rows")
        return draws

    def _train(
        self,
        module: nn.Module,
        start: Mapping[str, Tensor],
        seen: Seen,
        y: Bool[Tensor, "g s n"],
        weights: Float64[Tensor, "g s n"],
        strengths: Float64[Tensor, "g s"],
        seed: int,
        draws: bool,
    ) -> dict[str, Tensor]:
        """Train s members of every group g of those that share their rows; return parameters, group by group."""
        g, s, n = y.shape
        draw = torch.Generator().manual_seed(seed)
        held = held_out_rows(y.flatten(0, 1), weights.flatten(0, 1) > 0, self.held_out, draw).view_as(y)
        taught = weights.where(~held, 0.0)
        total = taught.sum(2, keepdim=True)
        decay = (1 / (strengths * total[..., 0])).to(self.dtype)
        judged = weights.where(held, 0.0)
        judged = judged / judged.sum(2, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        # Shares of rows, negative for negatives; those of a batch stand for all.
        sign, size = 2.0 * y.double() - 1.0, min(self.batch, n)
        teaching, judging = (
            (sign * part).to(self.dtype).flatten(0, 1) for part in (taught / total * (n / size), judged)
        )
        # Dropout must draw the same for a row whatever rows a member's neighbours have: it is shown all.
        members = trainer(module, start, seen, decay, self.lr)
        teach, judge = Purpose(teaching, taught.any(1) | draws), Purpose(judging, judged.any(1))
        best = {key: value.repeat(g * s, *[1] * value.ndim) for key, value in start.items()}
        lowest, since = torch.full((g * s,), torch.inf, dtype=self.dtype), torch.zeros(g * s, dtype=torch.int64)
        judges = torch.nonzero(held.any(0).any(0))[:, 0]
        order = rows = torch.arange(n)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for step in range(self.steps):
                at = step * size % max(size, n - n % size)
                if size < n:
                    order = torch.randperm(n, generator=draw) if at == 0 else order
                    rows = order[at : at + size]
                members.step(rows, teach)
                if not len(judges) or not ((step + 1) % self.every == 0 or step == self.steps - 1):
                    continue
                now, on = torch.stack([members.loss(some, judge) for some in judges.split(size)]).sum(0), members.on
                better = (now < lowest[on]) & (since[on] < self.patience)
                lowest[on] = torch.where(better, now, lowest[on])
                since[on] = torch.where(better, 0, since[on] + 1)
                for key, value in members.parameters(better).items():
                    best[key][on[better]] = value
                going = since < self.patience
                if not bool(going.any()):
                    break
                members.keep(going)
        return best if len(judges) else members.parameters(torch.ones(g * s, dtype=torch.bool))


def _rectangles(group: Int64[Tensor, " p"], each: int) -> Iterator[Int64[Tensor, "g s"]]:
    """Cut problems into parts for which there is room: groups with equally many members, a group's beside each other.

    Args:
        group: of every problem.
        each: numbers that one holds.
    """
    order, counts = group.argsort(stable=True), group.bincount()
    for count in counts.unique().tolist():
        members = order[(counts == count)[group[order]]].view(-1, count)
        for some in chunks(len(members), count * each):
            for few in chunks(count, each):
                yield members[some, few]


def held_out_rows(
    y: Bool[Tensor, "p n"], used: Bool[Tensor, "p n"], share: float, draw: torch.Generator
) -> Bool[Tensor, "p n"]:
    """Choose a share of every problem's rows of each class, by one draw a row that all problems share."""
    lot = torch.rand(y.shape[1], generator=draw).expand(y.shape)
    held = torch.zeros_like(used)
    for label in (used & y, used & ~y):
        rank = lot.masked_fill(~label, torch.inf).argsort(1).argsort(1)
        held |= label & (rank < (label.sum(1, keepdim=True) * share).floor())
    return held


def from_module(
    make: Callable[[int], nn.Module],
    *,
    name: str,
    strengths: Sequence[float] = ModuleProbe.strengths,
    steps: int = ModuleProbe.steps,
    lr: float = ModuleProbe.lr,
    batch: int = ModuleProbe.batch,
    held_out: float = ModuleProbe.held_out,
    patience: int = ModuleProbe.patience,
) -> ModuleProbe:
    """Return a torch module as a probe; see `ModuleProbe` for its objective and for every argument.

    Raises:
        ConfigError: no steps, no rows a step, or a share held out that is no share.
    """
    if steps < 1 or batch < 1 or not 0 <= held_out < 1:
        raise ConfigError(f"{name}: needs steps and batch of 1 at least and 0 <= held_out < 1")
    return ModuleProbe(make, name, tuple(strengths), steps, lr, batch, held_out, patience=patience)
