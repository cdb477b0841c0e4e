"""Which rows of one store, or of two, belong together, and what is known of each pair. No residual is read here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from gapprobe.errors import DataError, StoreError
from gapprobe.store.columns import column_of
from gapprobe.store.reader import Store

# What tells the trials of a study apart, where no key is given.
KEYS = (("trial",), ("question", "image"))


@dataclass(frozen=True)
class Pairs:
    """Row `left[i]` of one store belongs to row `right[i]` of the other; `lonely` rows found no partner."""

    left: tuple[str, ...]
    right: tuple[str, ...]
    lonely: int = 0


def listed(store: Store, other: Store, left: Sequence[str], right: Sequence[str]) -> Pairs:
    """Take pairs as given.

    Raises:
        DataError: the two lists differ in length, or are empty.
        StoreError: a store lacks a row.
    """
    if len(left) != len(right) or not left:
        raise DataError(f"{len(left)} rows on the left and {len(right)} on the right: cosine wants pairs, at least one")
    for each, ids in ((store, left), (other, right)):
        if missing := sorted(set(ids) - set(each.ids)):
            raise StoreError(f"{each.path} has no row {missing[0]!r:.80} ({len(missing)} of {len(ids)} are missing)")
    return Pairs(tuple(left), tuple(right))


def same_ids(store: Store, other: Store) -> Pairs:
    """Pair the rows of two stores that have the same id, in the order of the first.

    Raises:
        DataError: there is none.
    """
    there = set(other.ids)
    ids = tuple(id_ for id_ in store.ids if id_ in there)
    if not ids:
        raise DataError(f"{store.path} and {other.path} share no row id; give `pair` and `key`, or two lists of ids")
    return Pairs(ids, ids, len(store) + len(other) - 2 * len(ids))


def by_key(store: Store, other: Store, pair: tuple[str, str], key: str | Sequence[str] | None, setting: str) -> Pairs:
    """Pair rows of two settings that have the same key, in the order of the first; rows that could not be run are out.

    Raises:
        DataError: a column is missing, a setting has no rows or a key twice, or no key is in both.
    """
    if key is None:
        fits = (names for names in KEYS if all(name in each.rows for name in names for each in (store, other)))
        key = next(fits, None)
        if key is None:
            raise DataError("the store's table has neither `trial` nor `question` and `image`: name a pair `key`")
    names = [key] if isinstance(key, str) else list(key)
    sides = [_keyed(each, names, setting, value) for each, value in zip((store, other), pair, strict=True)]
    left, right = sides
    shared = left.index.intersection(right.index, sort=False)
    if not len(shared):
        raise DataError(f"no {_told(names)} stands in both {pair[0]!r} and {pair[1]!r}; name another pair `key`")
    lonely = len(left) + len(right) - 2 * len(shared)
    return Pairs(tuple(left.loc[shared]), tuple(right.loc[shared]), lonely)


def _keyed(store: Store, names: Sequence[str], setting: str, value: str) -> pd.Series:
    """Return the ids of a setting's rows by their key."""
    table = store.rows
    for name in (setting, *names):
        column_of(table, name)
    here = table[setting] == value
    if not here.any():
        there = ", ".join(map(str, table[setting].dropna().unique()[:10]))
        raise DataError(f"{store.path} has no row whose {setting!r} is {value!r}; there are: {there}")
    if "error" in table:
        here &= table["error"].isna()
    rows = table[here.fillna(False).astype(bool)].dropna(subset=list(names))
    keys = pd.MultiIndex.from_frame(rows[list(names)])
    if keys.has_duplicates:
        twice = ", ".join(map(str, keys[keys.duplicated()][0]))
        raise DataError(
            f"{store.path}: {_told(names)} {twice} stands at several rows whose {setting!r} is {value!r}; "
            "add columns to the pair `key` until each row has its own"
        )
    return pd.Series(rows.index.to_numpy(dtype=object), index=keys)


def _told(names: Sequence[str]) -> str:
    return " and ".join(repr(name) for name in names)
