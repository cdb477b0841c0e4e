"""What a probe must beat before it says anything.

`question_only` knows a row's relation and entity and how often they succeeded; `shuffled` has labels that mean nothing;
`random_projection` sees a layer through a few random directions. The same probe at layer 0, and on a model of random
weights, need no code of their own.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from gapprobe.kernels import logistic
from gapprobe.kernels.moments import blocks
from gapprobe.probes.splits import NestedFolds

PSEUDO_ROWS = 2.0  # rows of the overall success rate that every smoothed rate starts from
EXACT = 1e-12  # gap of the fits that see questions alone
ONE = 1e-5  # log-odds nearer to each other than this are one at the optimum: a hundred times what such fits differ by


def shuffled_targets(
    target: Bool[np.ndarray, " n"], folds: Int[np.ndarray, " n"], permutations: int, seed: int
) -> Bool[np.ndarray, "m n"]:
    """Return the labels in several random orders, each label staying in its fold so that class counts are kept."""
    rng = np.random.default_rng(seed)
    out = np.repeat(target[None], permutations, axis=0)
    for permuted in out:
        for fold in np.unique(folds):
            permuted[folds == fold] = rng.permutation(permuted[folds == fold])
    return out


def control_task(types: Shaped[np.ndarray, " n"], target: Bool[np.ndarray, " n"], seed: int) -> Bool[np.ndarray, " n"]:
    """Return labels that mean nothing but are the same for all rows of a type, as often positive as `target`.

    Source: Hewitt & Liang 2019, arXiv 1909.03368. A probe that learns them remembers types; selectivity is its accuracy
    on the target less its accuracy on these, both with types on both sides of the split. Sweep both as two targets.

    Args:
        types: what a label is drawn for once, such as the entity.
        target: the labels that are studied.
        seed: of the labels.
    """
    codes = np.unique(types.astype(str), return_inverse=True)[1]
    drawn = np.random.default_rng(seed).random(int(codes.max(initial=0)) + 1) < target.mean()
    return drawn[codes]


def projected(x: Float[Tensor, "n d"], dimensions: int, seed: int) -> Float[Tensor, "n k"]:
    """Return rows seen through a random projection to `dimensions` features, Gaussian, the same for a width and a seed.

    Source: Johnson & Lindenstrauss 1984: distances between rows are kept up to about 1 / sqrt(dimensions). What a probe
    reads here, any small random view of the layer gives away: it says nothing of where the probe looks. The projection
    is of raw features, so massive dimensions weigh in it as they do in the stream.
    """
    drawn = torch.randn(x.shape[1], dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    out = x.new_empty(len(x), dimensions, dtype=torch.float64)
    for block in blocks(*x.shape):
        out[block] = x[block].double() @ drawn / dimensions**0.5
    return out


def question_scores(
    relation: Shaped[np.ndarray, " n"],
    entity: Shaped[np.ndarray, " n"],
    target: Bool[np.ndarray, " n"],
    cut: NestedFolds,
    *,
    c: float = 1.0,
) -> Float[np.ndarray, " n"]:
    """Return out-of-fold log-odds of a logistic regression that sees only the question.

    Its features are relation and entity, one-hot, and the smoothed success rates of the relation, of the entity and of
    both together. A held-out row's rates come from the training rows; a training row's rates come from the training
    rows of the other inner folds. So rates mean the same on both sides: they always come from rows that the split
    keeps apart (other images, other entities, other questions), and never from the row's own label.

    Different questions are few, and some succeed equally often: their scores are equal at the optimum, and must not be
    put in an order by what a fit has left to gain. So fits go further than a probe's, and neighbours become one.
    """
    codes = [np.unique(labels.astype(str), return_inverse=True)[1] for labels in (relation, entity)]
    codes.append(np.unique(codes[0] * (int(codes[1].max()) + 1) + codes[1], return_inverse=True)[1])
    one_hot = np.concatenate([np.eye(int(code.max()) + 1)[code] for code in codes[:2]], axis=1)
    scores = np.empty(len(target))
    for fold in range(len(cut.inner)):
        training, held_out = cut.training[fold], cut.outer == fold
        rates = _rates(codes, target, training)
        for part, sources in enumerate(cut.inner_training(fold)):
            rows = cut.inner[fold] == part
            rates[rows] = _rates(codes, target, sources)[rows]
        x = torch.from_numpy(np.concatenate([one_hot, rates], axis=1))
        y, mask = torch.from_numpy(target)[None], torch.from_numpy(training)[None]
        try:
            fits = logistic.fit(x, y, logistic.balanced(y, mask), c, tolerance=EXACT)
        except logistic.NotConvergedError:  # float64 does not reach as far: scores that are one may differ then
            fits = logistic.fit(x, y, logistic.balanced(y, mask), c)
        scores[held_out] = _tied(fits.logits(x)[0].numpy()[held_out])
    return scores


def _tied(scores: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Give scores the lowest one's value of those within `ONE` below them; no score moves further than that."""
    values, which = np.unique(scores, return_inverse=True)
    first = 0
    while first < len(values):
        end = int(np.searchsorted(values, values[first] + ONE, side="right"))
        values[first:end] = values[first]
        first = end
    return values[which]


def _rates(
    codes: list[Int[np.ndarray, " n"]], target: Bool[np.ndarray, " n"], sources: Bool[np.ndarray, " n"]
) -> Float[np.ndarray, "n 3"]:
    """Smoothed success rate of each row's groups, counted on the rows `sources`."""
    prior = target[sources].mean()
    columns: list[np.ndarray] = []
    for code in codes:
        counts = np.bincount(code, sources)
        successes = np.bincount(code, sources & target)
        columns.append(((successes + PSEUDO_ROWS * prior) / (counts + PSEUDO_ROWS))[code])
    return np.stack(columns, axis=1)
