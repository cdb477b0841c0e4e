"""Torch modules as probes: the problems of a fold are trained side by side, as one ensemble.

They are not certified: how near a fit comes to its optimum is the training's own affair.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn
from torch.func import functional_call, vmap

from gapprobe.errors import ConfigError
from gapprobe.kernels.moments import standard
from gapprobe.probes.base import ROOM, check_problems, chunks

FEW = 128  # features below which sums over them are too short to be taken one by one
SPARSE = 0.8  # members that have stopped are let go once so few are left: a copy costs as much as a step
ELEMENTWISE = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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
        run = _ensemble(self.module, self.parameters, self.buffers)
        group = torch.unique(torch.cat([self.mean, self.scale], dim=1), dim=0, return_inverse=True)[1]
        rows = max(1, min(len(x), 1 << 12))
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

    An `nn.Sequential` of `nn.Linear`, functions of single numbers (`ELEMENTWISE`) and `nn.Flatten(0)` at its end is
    trained about twice as fast as other modules: the first layers of all strengths of a fold are one product.

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
            seen = _Seen(x, rows[own], mean[own], scale[own])
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
        seen: "_Seen",
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
        decay = (1 / (strengths * total[..., 0])).to(self.dtype).flatten()
        judged = weights.where(held, 0.0)
        judged = judged / judged.sum(2, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        # Shares of rows, negative for negatives.
        sign = 2.0 * y.double() - 1.0
        teaching, judging = ((sign * part).to(self.dtype).flatten(0, 1) for part in (taught / total, judged))
        # Rows that no member of a group counts are left out of its products, unless dropout would then draw something
        # else for a row where neighbours have more rows.
        taught_by, judged_by = taught.any(1) | draws, judged.any(1)
        run = _ensemble(module, start, dict(module.named_buffers()))

        on = torch.arange(g * s).view(g, s)  # members still trained: the others have stopped

        def batch(
            rows: Int64[Tensor, " b"], share: Float[Tensor, "p n"], counts: Bool[Tensor, "g n"]
        ) -> tuple[Float[Tensor, "h c d"], Float[Tensor, "h r c"]]:
            """Return those of some rows that count for a group, standardised, and their shares for its members."""
            groups = on[:, 0] // s
            own = counts[groups[:, None], rows]
            index = rows[own.argsort(dim=1, descending=True, stable=True)[:, : max(1, int(own.sum(1).max()))]]
            return seen(groups, index), share[on[..., None], index[:, None]]

        parameters = {key: value.repeat(g, s, *[1] * value.ndim).requires_grad_() for key, value in start.items()}
        best = {key: value.detach().flatten(0, 1).clone() for key, value in parameters.items()}
        lowest, since = torch.full((g * s,), torch.inf, dtype=self.dtype), torch.zeros(g * s, dtype=torch.int64)
        judges = torch.nonzero(held.any(0).any(0))[:, 0]
        optimiser = torch.optim.Adam(parameters.values(), lr=self.lr, fused=True)
        size, order = min(self.batch, n), torch.arange(n)
        z, share = batch(order[:size], teaching, taught_by)
        module.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for step in range(self.steps):
                at = step * size % max(size, n - n % size)
                if size < n:
                    order = torch.randperm(n, generator=draw) if at == 0 else order
                    z, share = batch(order[at : at + size], teaching, taught_by)
                optimiser.zero_grad()
                logits = run(parameters, z)
                logits.backward(share * (-n / size) * torch.sigmoid(-share.sign() * logits.detach()))
                for value in parameters.values():
                    if value.ndim > 3 and value.grad is not None:
                        value.grad.addcmul_(decay[on].view(*on.shape, *[1] * (value.ndim - 2)), value.detach())
                optimiser.step()
                if not len(judges) or not ((step + 1) % self.every == 0 or step == self.steps - 1):
                    continue
                now = torch.zeros(on.shape, dtype=self.dtype)
                module.eval()
                with torch.no_grad():
                    for part in judges.split(size):
                        held_z, held_share = batch(part, judging, judged_by)
                        losses = nn.functional.softplus(-held_share.sign() * run(parameters, held_z))
                        now += (held_share.abs() * losses).sum(2)
                module.train()
                better = (now < lowest[on]) & (since[on] < self.patience)
                lowest[on] = torch.where(better, now, lowest[on])
                since[on] = torch.where(better, 0, since[on] + 1)
                for key, value in parameters.items():
                    best[key][on[better]] = value.detach()[better]
                going = since[on] < self.patience
                width = int(going.sum(1).max())
                if not width:
                    break
                if width * int(going.any(1).sum()) <= SPARSE * on.numel():
                    # Groups stay equally wide: one that has fewer members left takes stopped ones along.
                    kept = torch.arange(on.numel()).view_as(on)
                    kept = kept.gather(1, going.argsort(dim=1, descending=True, stable=True)[:, :width])
                    kept = kept[going.any(1)]
                    on = on.flatten()[kept]
                    parameters = {key: _kept(optimiser, value, kept) for key, value in parameters.items()}
                    optimiser.param_groups[0]["params"] = list(parameters.values())
                    z, share = batch(order[at : at + size], teaching, taught_by)
        return best if len(judges) else {key: value.detach().flatten(0, 1) for key, value in parameters.items()}


def _kept(
    optimiser: torch.optim.Optimizer, value: Float[Tensor, "g s ..."], some: Int64[Tensor, "h r"]
) -> Float[Tensor, "h r ..."]:
    """Return the part of some members, and give it their part of what the optimiser remembers."""
    part = value.detach().flatten(0, 1)[some].requires_grad_()
    optimiser.state[part] = {
        key: kept.flatten(0, 1)[some] if kept.shape == value.shape else kept
        for key, kept in optimiser.state.pop(value).items()
    }
    return part


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


class _Seen:
    """Rows as groups see them: standardised by a group's own; zeros for those that it must not see."""

    def __init__(
        self,
        x: Float[Tensor, "n d"],
        used: Bool[Tensor, "g n"],
        mean: Float[Tensor, "g d"],
        scale: Float[Tensor, "g d"],
    ) -> None:
        self._x, self._used, self._mean, self._scale = x, used, mean, scale
        # Beforehand where there is room for all.
        every = torch.arange(len(used))
        rows = torch.arange(len(x)).expand(len(used), -1)
        self._whole = self._standardised(every, rows).flatten(0, 1) if used.numel() * x.shape[1] <= ROOM else None

    def __call__(self, groups: Int64[Tensor, " g"], rows: Int64[Tensor, "g b"]) -> Float[Tensor, "g b d"]:
        """Return some rows of every one of some groups."""
        if self._whole is None:
            return self._standardised(groups, rows)
        at = groups[:, None] * len(self._x) + rows
        return self._whole.index_select(0, at.flatten()).unflatten(0, at.shape)

    def _standardised(self, groups: Int64[Tensor, " g"], rows: Int64[Tensor, "g b"]) -> Float[Tensor, "g b d"]:
        z = (self._x[rows].to(self._mean.dtype) - self._mean[groups, None]) / self._scale[groups, None]
        return z.masked_fill_(~self._used[groups[:, None], rows][..., None], 0.0)


class _Shared(torch.autograd.Function):
    """The first layer of all members of a group, which share their rows; compiled, as `products_cpu` is."""

    @staticmethod
    def forward(
        ctx: Any, weight: Float[Tensor, "g r d"], bias: Float[Tensor, "g r"] | None, z: Float[Tensor, "g b d"]
    ) -> Float[Tensor, "g r b"]:
        """Return weight @ z.T + bias."""
        from gapprobe.kernels import products_cpu  # a third of a second to import

        ctx.save_for_backward(z)
        ctx.biased = bias is not None
        b = z.shape[1]
        out = z.new_zeros(*weight.shape[:2], b) if bias is None else bias[..., None].repeat(1, 1, b)
        if z.shape[2] < FEW:
            return products_cpu.add_each_combined(weight.contiguous(), z.mT.contiguous(), out)
        return products_cpu.add_each_dots(weight.contiguous(), z.contiguous(), out)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[Tensor, Tensor | None, None]:
        """Return the gradient by weight and bias."""
        from gapprobe.kernels import products_cpu

        (z,), slope = ctx.saved_tensors, slopes[0].contiguous()
        out = z.new_zeros(*slope.shape[:2], z.shape[2])
        products_cpu.add_each_combined(slope, z.contiguous(), out)
        return out, slope.sum(2) if ctx.biased else None, None


def _ensemble(
    module: nn.Module, names: Collection[str], buffers: Mapping[str, Tensor]
) -> Callable[[Mapping[str, Tensor], Tensor], Tensor]:
    """Return what maps stacked parameters [g s ...] and rows [g b d], shared by s members, to outputs [g s b]."""
    layers = _layers(module, names)

    def side_by_side(parameters: Mapping[str, Tensor], z: Float[Tensor, "g b d"]) -> Float[Tensor, "g s b"]:
        h = z.mT  # rows last: the products of all members of a group are one, and nothing is copied
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.Linear):
                weight, bias = parameters[f"{i}.weight"], parameters.get(f"{i}.bias")
                if h.ndim == 3:
                    own = None if bias is None else bias.flatten(1, 2)
                    if h.device.type == "cpu" and h.dtype in (torch.float32, torch.float64):
                        h = _Shared.apply(weight.flatten(1, 2), own, z)
                    else:
                        h = weight.flatten(1, 2) @ h
                        h = h if own is None else h + own[..., None]
                    h = h.unflatten(1, weight.shape[1:3])
                else:
                    h = weight @ h
                    if bias is not None:
                        h += bias[..., None]
            else:
                h = layer(h)
        return h[:, :, 0]

    one = vmap(lambda parameters, z: functional_call(module, (parameters, dict(buffers)), (z,)), randomness="same")

    def one_by_one(parameters: Mapping[str, Tensor], z: Float[Tensor, "g b d"]) -> Float[Tensor, "g s b"]:
        g, s = next(iter(parameters.values())).shape[:2]
        out = one({key: value.flatten(0, 1) for key, value in parameters.items()}, z.repeat_interleave(s, 0))
        return out.unflatten(0, (g, s))

    return side_by_side if layers else one_by_one


def _layers(module: nn.Module, names: Collection[str]) -> list[nn.Module]:
    """Return the layers of a module that is nothing but linear layers and functions of single numbers, else none."""
    if type(module) is not nn.Sequential:
        return []
    *layers, last = module
    own = {f"{i}.{key}" for i, layer in enumerate(layers) for key, _ in layer.named_parameters()}
    hooked = any(vars(part)[kind] for part in module.modules() for kind in HOOKS)
    flat = type(last) is nn.Flatten and (last.start_dim, last.end_dim) == (0, -1)
    known = all(type(layer) in (nn.Linear, *ELEMENTWISE) for layer in layers)
    first = bool(layers) and type(layers[0]) is nn.Linear
    # Names differ where two layers share their weights.
    return layers if flat and known and first and not hooked and own == set(names) else []


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
