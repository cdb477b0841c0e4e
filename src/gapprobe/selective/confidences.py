"""Where confidences come from: perplexity, a probe, their mean, a stacked regression, agreement of samples.

Everything that is fitted is fitted without the row that it is for.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from gapprobe.errors import DataError
from gapprobe.kernels import logistic

Method = Literal["perplexity", "probe", "ensemble"]


def selective_scores(
    mean_log_prob: Float[np.ndarray, " n"],
    probe: Float[np.ndarray, " n"],
    correct: Bool[np.ndarray, " n"],
    folds: Int[np.ndarray, " n"],
    *,
    balanced: bool = True,
) -> Mapping[Method, Float[np.ndarray, " n"]]:
    """Return each row's probability of a right answer, by three methods, all from fits that did not see the row.

    Source: arXiv 2508.18297, selective prediction. "perplexity" is the mean log-probability of the answer's tokens
    through a logistic regression fitted on the other folds; "probe" is given; "ensemble" is the mean of the two.

    Args:
        mean_log_prob: mean natural log-probability of each answer's tokens.
        probe: out-of-fold probability from a probe; use one whose layer was chosen on training rows.
        correct: whether each answer is right.
        folds: the fold that held each row out when the probe was fitted; the regression uses the same.
        balanced: give both classes the same total weight, as published and as the probe does. The threshold of 0.5
            then lies where right and wrong answers are equally typical, whatever their numbers; without it the
            probability is meant to be calibrated to how often answers are right.

    Raises:
        DataError: NaN in a confidence, or a fold whose training rows are of one class.
    """
    _refuse_infinite({"mean log-probability": mean_log_prob, "probe's probability": probe})
    perplexity = _held_out(mean_log_prob[:, None], correct, folds, balanced)
    return {"perplexity": perplexity, "probe": probe, "ensemble": (perplexity + probe) / 2}


def stacked(
    confidences: Mapping[str, Float[np.ndarray, " n"]],
    correct: Bool[np.ndarray, " n"],
    folds: Int[np.ndarray, " n"],
    *,
    balanced: bool = False,
) -> Float[np.ndarray, " n"]:
    """Return each row's probability of a right answer from several confidences, by a regression on the other folds.

    Stacked generalisation (Wolpert 1992): logistic regression, L2 penalty with C = 1, on the standardised confidences.
    With confidences that were not fitted on these rows no row's label reaches its own stacked probability. Confidences
    that are out-of-fold themselves are allowed, with the same folds; those of the other folds come from fits that saw
    the row, which can flatter the stack a little where such fits remember single rows.

    Args:
        confidences: by name; any scale.
        correct: whether each answer is right.
        folds: a row is scored by the regression on the rows of other folds.
        balanced: see `selective_scores`; without, the probability is calibrated.

    Raises:
        DataError: no confidences, one that is not finite, or a fold whose training rows are of one class.
    """
    if not confidences:
        raise DataError("no confidences to stack; give at least one")
    _refuse_infinite(confidences)
    return _held_out(np.stack(list(confidences.values()), axis=1), correct, folds, balanced)


def self_consistency(
    answers: Sequence[str],
    samples: Sequence[Sequence[str]],
    same: Callable[[str, str], bool] = lambda a, b: a.strip().casefold() == b.strip().casefold(),
) -> Float[np.ndarray, " n"]:
    """Return, for each row, the share of sampled answers that agree with the answer given.

    Agreement as in self-consistency (Wang et al. 2023, arXiv 2203.11171), of which this is the vote of the answer.

    Args:
        answers: the answer to each row that is to be right or wrong.
        samples: further answers to each row, sampled at a temperature; any number of at least one.
        same: whether two answers are one; by default equal but for case and outer space.

    Raises:
        DataError: rows without samples, or other numbers of answers than of samples.
    """
    if len(answers) != len(samples):
        raise DataError(f"there are {len(answers)} answers and samples of {len(samples)} rows; they must match")
    empty = [i for i, row in enumerate(samples) if not row]
    if empty:
        raise DataError(f"row {empty[0]} has no samples ({len(empty)} of {len(samples)} rows); leave them out")
    shares = [np.mean([same(a, s) for s in row]) for a, row in zip(answers, samples, strict=True)]
    return np.array(shares, dtype=np.float64)


def _refuse_infinite(confidences: Mapping[str, Float[np.ndarray, " n"]]) -> None:
    for name, values in confidences.items():
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise DataError(f"{len(bad)} rows have no finite {name}, the first is row {bad[0]}; leave them out")


def _held_out(
    x: Float[np.ndarray, "n d"], correct: Bool[np.ndarray, " n"], folds: Int[np.ndarray, " n"], balanced: bool
) -> Float[np.ndarray, " n"]:
    """Probability of a right answer for each row, from a logistic regression on the rows of other folds."""
    masks = folds != np.unique(folds)[:, None]
    for mask in masks:
        if correct[mask].all() or not correct[mask].any():
            raise DataError(
                f"the {int(mask.sum())} training rows of a fold are all {'right' if correct[mask].any() else 'wrong'}"
            )
    labels = torch.from_numpy(np.repeat(correct[None], len(masks), axis=0))
    mask = torch.from_numpy(masks)
    features = torch.from_numpy(x.astype(np.float64))
    weights = logistic.balanced(labels, mask) if balanced else mask.double()
    fits = logistic.fit(features, labels, weights, tolerance=1e-12)
    probabilities = torch.sigmoid(fits.logits(features)).numpy()
    return probabilities[np.unique(folds, return_inverse=True)[1], np.arange(len(folds))]
