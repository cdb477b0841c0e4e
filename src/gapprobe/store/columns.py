"""What is known of rows besides their residuals: a column of a store's table, or a series that a user gives by id."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from gapprobe.errors import DataError

Column = pd.Series | str


def column_of(table: pd.DataFrame, name: str, what: str = "") -> pd.Series:
    """Return a column of a store's table; `what` says what it was wanted for.

    Raises:
        DataError: there is none of that name.
    """
    if name not in table:
        told = f"{what}: " if what else ""
        raise DataError(f"{told}the store's table has no column {name!r}; it has {', '.join(map(str, table.columns))}")
    return table[name]


def aligned(table: pd.DataFrame, given: Column, ids: Sequence[str], what: str) -> pd.Series:
    """Return the value of every row, in the order of `ids`; `what` is named in errors.

    Raises:
        DataError: there is no such column, an id stands twice in the index, or a row has no value.
    """
    return by_id(column_of(table, given, what) if isinstance(given, str) else given, ids, what)


def by_id(column: pd.Series, ids: Sequence[str], what: str) -> pd.Series:
    """Return a series' value of every row, in the order of `ids`, which may hold an id several times.

    Raises:
        DataError: an id stands twice in the index, or a row has no value.
    """
    column = column.set_axis(column.index.map(str))  # ids are text, whatever pandas made of them
    if not column.index.is_unique:
        raise DataError(f"{what}: an id stands twice in its index; give one value a row")
    found = column.reindex(list(ids))
    missing = [i for i, absent in zip(ids, found.isna(), strict=True) if absent]
    if missing:
        raise DataError(f"{what}: {len(missing)} rows have none, such as {missing[0]}; give every row one")
    return found
