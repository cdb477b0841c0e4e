"""Probes made of what others wrote: scikit-learn estimators, and torch modules trained as one ensemble.

Neither is certified: how near a fit comes to its optimum is the estimator's, or the training's, own affair.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from gapprobe.errors import ConfigError, DataError
from gapprobe.kernels.moments import standard
from gapprobe.probes.base import ROOM, check_problems, chunks

SURE = 1e-12  # probabilities of others are taken to be no nearer to 0 and 1: log-odds must be finite
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
SPARSE = 0.8  # members that have stopped are let go once so few are left: a copy costs as much as a step


@dataclass(frozen=True)
class EstimatorFits:
    """Fitted estimators.

    Attributes:
        estimators: one a problem.
        mean: of every problem's rows, or zeros.
        scale: deviation of every problem's rows, or ones.
    """

    estimators: Sequence[Any]
    mean: Float64[Tensor, "p d"]
    scale: Float64[Tensor, "p d"]

    def scores(self, x: Float[Tensor, "n d"]) -> Float64[Tensor, "p n"]:
        """Return decision functions, or else log-odds, or a regressor's predictions."""
        out = self.mean.new_empty(len(self.estimators), len(x))
        for own, estimator, mean, scale in zip(out, self.estimators, self.mean, self.scale, strict=True):
            own.copy_(torch.from_numpy(np.asarray(_score(estimator, _array(x, mean, scale)), dtype=np.float64)))
        return out


def _array(x: Float[Tensor, "n d"], mean: Float64[Tensor, " d"], scale: Float64[Tensor, " d"]) -> np.ndarray:
    """Return standardised rows, float64 where X is and float32 where it is narrower."""
    z = (x.double() - mean) / scale
    return (z if x.dtype == torch.float64 else z.float()).numpy()


def _score(estimator: Any, z: np.ndarray) -> np.ndarray:
    if hasattr(estimator, "decision_function"):
        return estimator.decision_function(z)
    if hasattr(estimator, "predict_proba"):
        positive = np.clip(estimator.predict_proba(z)[:, 1].astype(np.float64), SURE, 1 - SURE)
        return np.log(positive) - np.log1p(-positive)
    return estimator.predict(z)


@dataclass(frozen=True)
class EstimatorProbe:
    """A scikit-learn estimator as a probe: a clone of it for every problem.

    Attributes:
        estimator: never fitted itself.
        name: of the probe.
        strengths: tried by a sweep.
        calibrated: whether scores are log-odds.
        strength: the parameter that a strength sets, if any.
        standardise: whether rows are standardised by a problem's own first.
        jobs: problems fitted side by side, in threads.
    """

    estimator: Any
    name: str
    strengths: tuple[float, ...]
    calibrated: bool
    strength: str | None = None
    standardise: bool = True
    jobs: int | None = None

    def fit(
        self,
        x: Float[Tensor, "n d"],
        y: Bool[Tensor, "p n"],
        weights: Float64[Tensor, "p n"],
        strengths: Float64[Tensor, " p"],
        seed: int,
    ) -> EstimatorFits:
        """Fit a clone to the rows of weight above 0 of every problem; `seed` goes to each unset `random_state`.

        Raises:
            DataError: a problem of one class, features that are not finite, or one that the estimator refuses.
        """
        from joblib import Parallel, delayed
        from sklearn.base import clone, is_regressor
        from sklearn.utils.validation import has_fit_parameter

        check_problems(x, y, weights, strengths)
        mean = x.new_zeros(len(y), x.shape[1], dtype=torch.float64)
        scale = torch.ones_like(mean)
        if self.standardise and len(y):
            rows, group = torch.unique(weights > 0, dim=0, return_inverse=True)
            mean, scale = (part[group] for part in standard(x, rows))
        weighted = has_fit_parameter(self.estimator, "sample_weight")
        if not weighted and _uneven(weights):
            warnings.warn(f"{self.name}: its fit takes no sample_weight, so rows count alike", stacklevel=2)

        def one(i: int) -> Any:
            used = weights[i] > 0
            estimator: Any = clone(self.estimator)
            settings: dict[str, float] = {
                key: seed
                for key, value in estimator.get_params().items()
                if value is None and (key == "random_state" or key.endswith("__random_state"))
            }
            if self.strength is not None:
                settings[self.strength] = float(strengths[i])
            estimator.set_params(**settings)
            labels = y[i][used].numpy()
            target = 2.0 * labels - 1.0 if is_regressor(estimator) else labels
            extra = {"sample_weight": weights[i][used].numpy()} if weighted else {}
            try:
                return estimator.fit(_array(x[used], mean[i], scale[i]), target, **extra)
            except ValueError as error:
                raise DataError(f"{self.name} cannot fit problem {i}: {error}") from error

        fitted = Parallel(n_jobs=self.jobs, prefer="threads")(delayed(one)(i) for i in range(len(y)))
        return EstimatorFits(list(fitted), mean, scale)


def _uneven(weights: Float64[Tensor, "p n"]) -> bool:
    highest = weights.amax(1, keepdim=True)
    return bool(((weights > 0) & (weights < highest * (1 - 1e-9))).any())


def from_sklearn(
    estimator: Any,
    *,
    strength: str | None = None,
    strengths: Sequence[float] | None = None,
    name: str | None = None,
    standardise: bool = True,
    jobs: int | None = None,
) -> EstimatorProbe:
    """Return a scikit-learn classifier or regressor as a probe.

    Args:
        estimator: anything with scikit-learn's `fit`, `get_params` and one of `decision_function`, `predict_proba` and,
            for regressors, which get labels of -1 and 1, `predict`.
        strength: parameter that a probe's strength sets, such as "C", or "svc__C" in a pipeline; None for none. Larger
            is freer elsewhere, but the number is handed on as it is: of "alpha", say which `strengths` to try.
        strengths: what a sweep tries; by default 1e-4 to 10, or one where `strength` is None.
        name: in tables; the class's by default.
        standardise: standardise rows by each problem's own first.
        jobs: problems fitted side by side; -1 for as many as there are cores.

    Raises:
        ConfigError: an estimator that cannot score, or does not have that parameter.
    """
    from sklearn.base import is_regressor

    name = name or type(estimator).__name__
    if not (hasattr(estimator, "fit") and hasattr(estimator, "get_params")):
        raise ConfigError(f"{estimator!r} is no scikit-learn estimator: it has no fit, or no get_params")
    decides = hasattr(estimator, "decision_function")
    if not (decides or hasattr(estimator, "predict_proba") or is_regressor(estimator)):
        raise ConfigError(f"{name} gives no scores: it has neither decision_function nor predict_proba")
    if strength is not None and strength not in estimator.get_params():
        raise ConfigError(f"{name} has no parameter {strength!r}; it has {', '.join(estimator.get_params())}")
    tried = tuple(strengths) if strengths is not None else STRENGTHS if strength is not None else (1.0,)
    calibrated = not decides and hasattr(estimator, "predict_proba")
    return EstimatorProbe(estimator, name, tried, calibrated, strength, standardise, jobs)


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
    parameters: Mapping[str, Float32[Tensor, "p ..."]]
    buffers: Mapping[str, Tensor]
    mean: Float32[Tensor, "p d"]
    scale: Float32[Tensor, "p d"]

    @torch.no_grad()
    def scores(self, x: Float[Tensor, "n d"]) -> Float64[Tensor, "p n"]:
        """Return the members' outputs."""
        out = self.mean.new_empty(len(self.mean), len(x), dtype=torch.float64)
        run = vmap(lambda parameters, z: functional_call(self.module, (parameters, dict(self.buffers)), (z,)))
        rows = max(1, min(len(x), 1 << 12))
        for start in range(0, len(x), rows):
            part = x[start : start + rows].float()
            for some in chunks(len(self.mean), part.numel()):
                z = (part - self.mean[some, None]) / self.scale[some, None]
                out[some, start : start + rows] = run({k: v[some] for k, v in self.parameters.items()}, z).double()
        return out


@dataclass(frozen=True)
class ModuleProbe:
    """A torch module as a probe: all problems are members of one ensemble, trained side by side on one X.

    A member's objective is its rows' weighted mean of log(1 + exp(-y f)) and |parameters|^2 / (2 strength n), n its
    total weight: a linear module is then logistic regression with C the strength. Vectors (biases, gains) cost nothing.
    All members start alike and see the same rows in the same order, so a member does not depend on its neighbours.

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
            module = self.make(x.shape[1]).float()
        self._check_output(module, x)
        start = {key: value.detach().clone() for key, value in module.named_parameters()}
        rows, group = torch.unique(weights > 0, dim=0, return_inverse=True)
        mean, scale = (
            (part[group].float() for part in standard(x, rows)) if len(y) else (x.new_zeros(0, x.shape[1]),) * 2
        )
        size = sum(value.numel() for value in start.values())
        parts = [
            self._train(module, start, x, y[some], weights[some], strengths[some], mean[some], scale[some], seed)
            for some in chunks(len(y), 6 * size + 3 * min(self.batch, len(x)) * x.shape[1])
        ]
        merged = {
            key: torch.cat([part[key] for part in parts]) if parts else value.new_zeros(0, *value.shape)
            for key, value in start.items()
        }
        return ModuleFits(module.eval(), merged, dict(module.named_buffers()), mean, scale)

    def _check_output(self, module: nn.Module, x: Float[Tensor, "n d"]) -> None:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            out = module.eval()(torch.zeros(2, x.shape[1], device=x.device))
        if out.shape != (2,):
            raise ConfigError(f"{self.name}: forward must map [b d] to [b]; it made {tuple(out.shape)} of 2 rows")

    def _train(
        self,
        module: nn.Module,
        start: Mapping[str, Tensor],
        x: Float[Tensor, "n d"],
        y: Bool[Tensor, "p n"],
        weights: Float64[Tensor, "p n"],
        strengths: Float64[Tensor, " p"],
        mean: Float32[Tensor, "p d"],
        scale: Float32[Tensor, "p d"],
        seed: int,
    ) -> dict[str, Tensor]:
        p, n = y.shape
        draw = torch.Generator().manual_seed(seed)
        held = held_out_rows(y, weights > 0, self.held_out, draw)
        taught = weights.where(~held, 0.0)
        total = taught.sum(1, keepdim=True)
        share, decay = (taught / total).float(), (1 / (strengths * total[:, 0])).float()
        judged = weights.where(held, 0.0)
        judged = (judged / judged.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)).float()
        buffers = dict(module.named_buffers())
        sign = 2.0 * y.float() - 1.0

        def loss(parameters: dict[str, Tensor], z: Tensor, sign: Tensor, share: Tensor, decay: Tensor) -> Tensor:
            logits = functional_call(module, (parameters, buffers), (z,))
            size = torch.stack([value.square().sum() for value in parameters.values() if value.ndim > 1] or [decay * 0])
            return (share * nn.functional.softplus(-sign * logits)).sum() + decay * size.sum() / 2

        gradients = vmap(grad(loss), randomness="same")
        losses = vmap(loss, randomness="same")

        used, group = torch.unique(weights > 0, dim=0, return_inverse=True)
        first = torch.stack([torch.nonzero(group == i)[0, 0] for i in range(len(used))])

        def standardised(rows: Int64[Tensor, " b"]) -> Float32[Tensor, "g b d"]:
            z = (x[rows].float() - mean[first, None]) / scale[first, None]
            return z.masked_fill_(~used[:, rows, None], 0.0)  # of other rows nothing is seen

        # Members with the same rows share them, standardised once where there is room for all.
        whole = standardised(torch.arange(n)) if used.numel() * x.shape[1] <= ROOM else None

        def seen(rows: Int64[Tensor, " b"], share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            z = standardised(rows) if whole is None else whole[:, rows]
            return z[group[on]], sign[on][:, rows], share[on][:, rows]

        parameters = {key: value.expand(p, *value.shape).clone() for key, value in start.items()}
        best = {key: value.clone() for key, value in parameters.items()}
        on = torch.arange(p)  # members still trained: the others have stopped
        lowest, since = torch.full((p,), torch.inf), torch.zeros(p, dtype=torch.int64)
        judges = torch.nonzero(held.any(0))[:, 0]
        optimiser = torch.optim.Adam(parameters.values(), lr=self.lr)
        size, order = min(self.batch, n), torch.arange(n)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for step in range(self.steps):
                at = step * size % max(size, n - n % size)
                if size < n and at == 0:
                    order = torch.randperm(n, generator=draw)
                rows = order[at : at + size]
                z, signs, own = seen(rows, share)
                module.train()
                slopes = gradients(parameters, z, signs, own * (n / size), decay[on])
                for key, value in parameters.items():
                    value.grad = slopes[key]
                optimiser.step()
                last = step == self.steps - 1
                if not len(judges) or not ((step + 1) % self.every == 0 or last):
                    continue
                module.eval()
                now = lowest.new_zeros(len(on))
                with torch.no_grad():
                    for part in judges.split(size):
                        now += losses(parameters, *seen(part, judged), decay[on] * 0)
                better = (now < lowest[on]) & (since[on] < self.patience)
                lowest[on] = torch.where(better, now, lowest[on])
                since[on] = torch.where(better, 0, since[on] + 1)
                for key, value in parameters.items():
                    best[key][on[better]] = value[better]
                going = since[on] < self.patience
                if not bool(going.any()):
                    break
                if int(going.sum()) <= SPARSE * len(on):
                    on = on[going]
                    parameters = {key: _kept(optimiser, value, going) for key, value in parameters.items()}
                    optimiser.param_groups[0]["params"] = list(parameters.values())
        return best if len(judges) else parameters


def _kept(optimiser: torch.optim.Optimizer, value: Float32[Tensor, "p ..."], some: Bool[Tensor, " p"]) -> Tensor:
    """Return the part of some members, and give it their part of what the optimiser remembers."""
    part = value[some]
    optimiser.state[part] = {
        key: kept[some] if kept.shape == value.shape else kept for key, kept in optimiser.state.pop(value).items()
    }
    return part


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
