"""An attention probe: it learns which tokens of a row to read, and what to read there.

Source: McKenzie et al. 2025, arXiv 2506.10805, attention probe (one query, one value); with several heads and values
summed as in EleutherAI 2025, blog.eleuther.ai/attention-probes, without its position bias: a position would be learnt
from how long a row is.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import softplus

from gapprobe.errors import ConfigError
from gapprobe.kernels.standardised import Standardised, View
from gapprobe.probes.base import ROOM, check_problems, chunks, register_probe
from gapprobe.probes.modules import held_out_rows
from gapprobe.probes.tokens import BLOCK, Tokens


@dataclass(frozen=True)
class AttentionFits:
    """Fitted queries and values of h heads, in raw residual coordinates.

    Attributes:
        queries: what each head looks for.
        values: what it reads there.
        intercept: free term.
    """

    queries: Float64[Tensor, "p h d"]
    values: Float64[Tensor, "p h d"]
    intercept: Float64[Tensor, " p"]

    def scores(self, x: Tokens) -> Float64[Tensor, "p n"]:
        """Return the log-odds of every row: sum_h sum_t softmax(q_h . x)_t (v_h . x_t) + b."""
        both = torch.cat([self.queries, self.values], dim=1)
        out = self.intercept.new_empty(len(both), len(x))
        for rows in x.blocks(BLOCK // max(both.shape[0] * both.shape[1], both.shape[2])):
            part = x[rows]
            told = _look(_products(part.values.double(), both), part.row, len(part))[2]
            out[:, rows] = told.sum(2).T + self.intercept[:, None]
        return out

    def attention(self, x: Tokens) -> Float64[Tensor, "p h t"]:
        """Return how much each head looks at every token; the tokens of a row share 1."""
        both = torch.cat([self.queries, self.values], dim=1)
        return rearrange(_look(_products(x.values.double(), both), x.row, len(x))[0], "t p h -> p h t")


@register_probe
class Attention:
    """score = sum_h sum_t softmax(q_h . z)_t (v_h . z_t) + b over the tokens z_t of a row, which need no pooling.

    A problem's objective is its rows' weighted mean of log(1 + exp(-y score)) and |q, v|^2 / (2 strength n), n its
    total weight, on tokens standardised by those of its own training rows. All problems are members of one ensemble
    and share the tokens; trained by Adam on batches of whole rows, stopped early as `mlp` is. Rows are never padded:
    softmax and sums go by offsets.

    Args:
        heads: queries, each with a value of its own.
        steps: of Adam, at most.
        lr: its learning rate.
        batch: rows a step; all where they are fewer.
        held_out: share of a member's rows, of each class, that say when to stop; 0 for never.
        every: steps between looks at them.
        patience: looks without a better loss before a member stops. It keeps its best parameters.

    Raises:
        ConfigError: a number of heads, steps or rows below 1, or a share that is none.
    """

    name = "attention"
    strengths = (1e-3, 1e-2, 1e-1)
    calibrated = True
    reads = "tokens"
    room = 8 * ROOM  # parameters, their moments and the logits of a batch, in float32, and what steps make of them

    def __init__(
        self,
        heads: int = 1,
        steps: int = 300,
        lr: float = 1e-2,
        batch: int = 512,
        held_out: float = 0.1,
        every: int = 10,
        patience: int = 10,
    ) -> None:
        if min(heads, steps, batch, every) < 1 or not 0 <= held_out < 1:
            raise ConfigError("attention: heads, steps, batch and every must be 1 at least, and 0 <= held_out < 1")
        self.heads, self.steps, self.lr, self.batch = heads, steps, lr, batch
        self.held_out, self.every, self.patience = held_out, every, patience

    def fit(
        self,
        x: Tokens,
        y: Bool[Tensor, "p n"],
        weights: Float64[Tensor, "p n"],
        strengths: Float64[Tensor, " p"],
        seed: int,
    ) -> AttentionFits:
        """Train every problem; `seed` decides on the queries at the start, the order of rows and what is held out.

        Raises:
            DataError: a problem of one class, a strength not above 0, or features that are not finite.
        """
        check_problems(x, y, weights, strengths)
        features = Standardised(x.values, (weights > 0)[:, x.row])
        size = 2 * self.heads * (x.values.shape[1] + 1)
        tokens = -(-len(x.values) * min(self.batch, len(x)) // len(x))  # of a batch, about
        every = torch.arange(len(y))
        found = [
            features.view(every[some], torch.float64).in_raw(
                self._train(features, x, every[some], y[some], weights[some], strengths[some], seed).double()
            )
            for some in chunks(len(y), 8 * size + 12 * self.heads * tokens)
        ]
        coef, free = (torch.cat(parts) for parts in zip(*found, strict=True))
        queries, values = coef.chunk(2, dim=1)
        return AttentionFits(queries, values, free[:, self.heads :].sum(1))  # the queries' own free terms cancel

    def _train(
        self,
        features: Standardised,
        x: Tokens,
        problems: Int64[Tensor, " p"],
        y: Bool[Tensor, "p n"],
        weights: Float64[Tensor, "p n"],
        strengths: Float64[Tensor, " p"],
        seed: int,
    ) -> Float[Tensor, "p c e"]:
        """Return queries, then values, of all heads, each with its free term as the last weight."""
        (p, n), d, draw = y.shape, x.values.shape[1], torch.Generator().manual_seed(seed)
        view = features.view(problems, torch.float32)
        shared = Tokens(features.shared[:, :d], x.offsets)
        held = held_out_rows(y, weights > 0, self.held_out, draw)
        taught = weights.where(~held, 0.0)
        total = taught.sum(1, keepdim=True)
        share, decay = (taught / total).float(), (1 / (strengths * total[:, 0])).float()
        judged = weights.where(held, 0.0)
        judged = (judged / judged.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)).float()
        sign = 2.0 * y.float() - 1.0
        start = torch.zeros(2 * self.heads, d + 1)
        # Heads that start alike stay alike. Values of 0 say nothing yet, so that no query is favoured.
        start[: self.heads, :d] = torch.randn(self.heads, d, generator=draw) / d**0.5
        parameters = start.expand(p, -1, -1).clone()
        optimiser = torch.optim.Adam([parameters], lr=self.lr)
        best, lowest = parameters.clone(), torch.full((p,), torch.inf)
        since = torch.zeros(p, dtype=torch.int64)
        judges = torch.nonzero(held.any(0))[:, 0]
        size, order = min(self.batch, n), torch.arange(n)
        for step in range(self.steps):
            at = step * size % max(size, n - n % size)
            if size < n and at == 0:
                order = torch.randperm(n, generator=draw)
            rows = order[at : at + size]
            own = share[:, rows] * (n / size)
            parameters.grad = objective(parameters, shared[rows], view, sign[:, rows], own, decay)[1]
            optimiser.step()
            if not len(judges) or not ((step + 1) % self.every == 0 or step == self.steps - 1):
                continue
            now = torch.zeros(p)
            for part in judges.split(size):
                now += objective(parameters, shared[part], view, sign[:, part], judged[:, part], decay * 0)[0]
            better = (now < lowest) & (since < self.patience)
            lowest, since = torch.where(better, now, lowest), torch.where(better, 0, since + 1)
            best[better] = parameters[better]
            if bool((since >= self.patience).all()):
                break
        return best if len(judges) else parameters


def objective(
    parameters: Float[Tensor, "p c e"],
    z: Tokens,
    view: View,
    sign: Float[Tensor, "p n"],
    share: Float[Tensor, "p n"],
    decay: Float[Tensor, " p"],
) -> tuple[Float[Tensor, " p"], Float[Tensor, "p c e"]]:
    """Return sum_i share_i log(1 + exp(-sign_i score_i)) + decay |q, v|^2 / 2 of every problem, and its gradient.

    Args:
        parameters: queries, then values, each with its free term as the last weight (e = d + 1).
        z: tokens as `Standardised.shared` has them; the view turns them into each problem's own, without a copy.
        view: of these problems.
        sign: labels, 1 or -1.
        share: weight of every row.
        decay: weight of the penalty, which leaves the free terms out.
    """
    heads, row, n = parameters.shape[1] // 2, z.row, len(z)
    raw = parameters[..., :-1] * view.scaling
    free = parameters[..., -1] - (raw * view.mean).sum(-1)
    shares, says, told = _look(_products(z.values, raw) + free, row, n)
    turned = sign * told.sum(2).T
    weights = parameters[..., :-1]
    loss = (share * softplus(-turned)).sum(1) + decay * weights.square().sum((1, 2)) / 2
    slope = (-share * sign * torch.sigmoid(-turned)).T[row, :, None] * shares
    slopes = torch.cat([slope * (says - told[row]), slope], dim=2)  # softmax: a token counts by how it differs
    total = slopes.sum(0)
    gradient = rearrange(rearrange(slopes, "t p c -> (p c) t") @ z.values, "(p c) d -> p c d", p=len(raw))
    gradient = (gradient - total[..., None] * view.mean) * view.scaling + decay[:, None, None] * weights
    total[:, :heads] = 0.0  # a query's free term changes nothing: what is left here is rounding
    return loss, torch.cat([gradient, total[..., None]], dim=2)


def _products(x: Float[Tensor, "t d"], coef: Float[Tensor, "p c d"]) -> Float[Tensor, "t p c"]:
    return (x @ coef.flatten(0, 1).T).unflatten(1, coef.shape[:2])


def _look(
    logits: Float[Tensor, "t p c"], row: Int64[Tensor, " t"], rows: int
) -> tuple[Float[Tensor, "t p h"], Float[Tensor, "t p h"], Float[Tensor, "n p h"]]:
    """Return each token's share of its row's attention, what it says, and what the row is told; sums go by row."""
    looks, says = logits.chunk(2, dim=2)
    highest = looks.new_full((rows, *looks.shape[1:]), -torch.inf)
    highest.scatter_reduce_(0, row[:, None, None].expand_as(looks), looks, "amax")
    shares = (looks - highest[row]).exp_()
    shares = shares / torch.zeros_like(highest).index_add_(0, row, shares)[row]
    return shares, says, torch.zeros_like(highest).index_add_(0, row, shares * says)
