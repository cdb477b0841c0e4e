"""What users give as labels, looked up and checked: a column of a store's table or a series, true or false."""

import numpy as np
import pandas as pd
from jaxtyping import Bool

from gapprobe.errors import DataError
from gapprobe.store.columns import column_of


def target_of(table: pd.DataFrame, target: pd.Series | str) -> pd.Series:
    """Return labels by row id; of a column only the rows that have one, since a row that could not be run has none.

    Raises:
        DataError: there is no such column.
    """
    return column_of(table, target).dropna() if isinstance(target, str) else target


def binary(labels: pd.Series) -> Bool[np.ndarray, " n"]:
    """Return labels as truth values.

    Raises:
        DataError: one that is neither true nor false (nor 0 nor 1): a word or a count would all too easily be "true".
    """
    known = labels.isin([True, False])
    if not known.all() or pd.api.types.is_string_dtype(labels.dtype):
        odd = (labels if known.all() else labels[~known]).tolist()[0]
        raise DataError(f"labels {str(labels.name)!r} must be true or false, or 1 and 0; one of them is {odd!r}")
    return labels.to_numpy(dtype=bool, copy=True)
