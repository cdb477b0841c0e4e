"""Which rows a probe learns from and which it is judged on: folds by group, nested. No activations are known here."""

import math
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int, Shaped

from gapprobe.errors import DataError

INNER = 5  # inner folds where the outer ones are many


@dataclass(frozen=True)
class NestedFolds:
    """Outer folds, and inner folds of every outer fold's training rows, cut by the same groups.

    Attributes:
        outer: the fold that holds each row out.
        inner: for each outer fold the inner fold that holds each training row out; -1 where the outer fold does, or
            where a row is left out of it for what it shares with rows held out.
        groups: how many groups the rows fall into.
        one_class_groups: how many of them hold one class only; the more, the more a group's identity tells the label.
    """

    outer: Int[np.ndarray, " n"]
    inner: Int[np.ndarray, "folds n"]
    groups: int
    one_class_groups: int

    @property
    def training(self) -> Bool[np.ndarray, "folds n"]:
        """Rows that each outer fold trains on."""
        return self.inner >= 0

    def inner_training(self, fold: int) -> Bool[np.ndarray, "inner n"]:
        """Rows that each inner fold of outer fold `fold` trains on."""
        held_out = np.arange(int(self.inner[fold].max()) + 1)[:, None]
        return self.training[fold] & (self.inner[fold] != held_out)


def nested_folds(
    groups: Shaped[np.ndarray, " n"] | None,
    target: Bool[np.ndarray, " n"],
    *,
    folds: int | Literal["each"],
    seed: int,
    name: str,
) -> NestedFolds:
    """Cut rows into folds so that no group is on both sides, sizes and classes as even as the groups allow.

    The training rows of each fold are cut again in the same way, into as many inner folds, or as many as there are
    groups where these are fewer.

    Args:
        groups: label of each row's group, or None for a random split by rows.
        target: class of each row.
        folds: number of outer folds, at least 2; "each" leaves out one group after the other, with five inner folds.
        seed: of the shuffling; the split's name is part of it.
        name: of the split, for messages.

    Raises:
        DataError: fewer groups than folds, a missing label, or training rows of one class only.
    """
    if folds == "each" and groups is None:
        raise DataError(f"split by {name}: leaving out one group after the other needs groups")
    codes = _codes(groups, len(target), name)
    count = int(codes.max()) + 1 if len(codes) else 0
    inner_folds = INNER if folds == "each" else folds
    folds = count if folds == "each" else folds
    if folds < 2:
        raise DataError(f"split by {name}: {folds} folds asked for, at least 2 are needed")
    if count < folds:
        raise DataError(f"split by {name}: {count} groups cannot fill {folds} folds; use fewer folds or more groups")
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    outer = _deal(codes, target, folds, rng)
    inner = np.full((folds, len(target)), -1)
    for fold in range(folds):
        training = outer != fold
        own = np.unique(codes[training], return_inverse=True)[1]
        parts = min(inner_folds, int(own.max()) + 1)
        if parts < 2:
            raise DataError(f"split by {name}: fold {fold} trains on one group only; more groups are needed")
        inner[fold, training] = _deal(own, target[training], parts, rng)
    positives, sizes = np.bincount(codes, target), np.bincount(codes)
    cut = NestedFolds(outer, inner, count, int(((positives == 0) | (positives == sizes)).sum()))
    _check_classes(cut, target, name)
    return cut


def joint_folds(
    first: Shaped[np.ndarray, " n"],
    second: Shaped[np.ndarray, " n"],
    target: Bool[np.ndarray, " n"],
    *,
    folds: int,
    seed: int,
    name: str,
) -> NestedFolds:
    """Cut rows by two kinds of groups at once: a held-out row shares neither with any training row.

    Groups of each kind are dealt to about sqrt(folds) parts; an outer fold holds out the rows of one part of each and
    trains on the rows that are in neither, so that its training rows are fewer than of a split by one kind. Inner folds
    keep the groups of the second kind together.

    Args:
        first: label of each row's group of one kind, such as the question.
        second: of the other, such as the entity.
        target: class of each row.
        folds: about how many outer folds: the next square, 4, 9, 16, …
        seed: of the shuffling; the split's name is part of it.
        name: of the split, for messages.

    Raises:
        DataError: fewer groups than parts, a missing label, or training rows of one class only.
    """
    parts = max(2, math.isqrt(max(1, folds - 1)) + 1)
    kinds = [_codes(groups, len(target), name) for groups in (first, second)]
    for codes in kinds:
        count = int(codes.max()) + 1 if len(codes) else 0
        if count < parts:
            raise DataError(f"split by {name}: {count} groups cannot fill {parts} parts; use fewer folds")
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    dealt = [_deal(codes, target, parts, rng) for codes in kinds]
    outer = dealt[0] * parts + dealt[1]
    inner = np.full((parts * parts, len(target)), -1)
    for fold in range(parts * parts):
        training = (dealt[0] != fold // parts) & (dealt[1] != fold % parts)
        own = np.unique(kinds[1][training], return_inverse=True)[1]
        count = int(own.max()) + 1 if len(own) else 0
        if count < 2:
            raise DataError(f"split by {name}: fold {fold} trains on {count} groups; more are needed")
        inner[fold, training] = _deal(own, target[training], min(INNER, count), rng)
    positives, sizes = np.bincount(kinds[1], target), np.bincount(kinds[1])
    cut = NestedFolds(outer, inner, len(sizes), int(((positives == 0) | (positives == sizes)).sum()))
    _check_classes(cut, target, name)
    return cut


def _codes(groups: Shaped[np.ndarray, " n"] | None, n: int, name: str) -> Int[np.ndarray, " n"]:
    if groups is None:
        return np.arange(n)
    missing = [i for i, label in enumerate(groups) if label is None or label != label]
    if missing:
        raise DataError(f"split by {name}: {len(missing)} rows have no label, the first is row {missing[0]}")
    return np.unique(groups.astype(str), return_inverse=True)[1]


def _deal(
    codes: Int[np.ndarray, " n"], target: Bool[np.ndarray, " n"], folds: int, rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """Deal groups, largest first, each to the fold that has least of what the group brings."""
    content = np.stack([np.bincount(codes, ~target), np.bincount(codes, target)], axis=1)  # [groups, class]
    share = content / np.maximum(content.sum(0), 1) ** 2
    shuffled = rng.permutation(len(content))
    order = shuffled[np.argsort(-content[shuffled].sum(1), kind="stable")]
    held = np.zeros((folds, 2))
    chosen = np.empty(len(content), dtype=np.int64)
    for group in order:
        # Ties go to the smallest fold, so no fold stays empty.
        fold = np.lexsort((held.sum(1), held @ share[group]))[0]
        chosen[group] = fold
        held[fold] += content[group]
    return chosen[codes]


def _check_classes(cut: NestedFolds, target: Bool[np.ndarray, " n"], name: str) -> None:
    for fold in range(len(cut.inner)):
        for rows in (cut.training[fold], *cut.inner_training(fold)):
            if target[rows].all() or not target[rows].any():
                raise DataError(
                    f"split by {name}: the {int(rows.sum())} training rows of a fold hold one class only; "
                    f"{int(target.sum())} of {len(target)} rows are positive, which is too few or too clustered for "
                    f"{len(cut.inner)} nested folds: use fewer folds or more rows"
                )
