"""Leakage that was planted is counted, to the row; where there is none, none is found."""

import inspect

import numpy as np
import pytest
import torch

from gapprobe.errors import DataError
from gapprobe.probes.leakage import leakage_report


def test_what_was_planted_is_counted():
    g = torch.Generator().manual_seed(0)
    folds = np.arange(40) % 4
    x = torch.randn(40, 30, generator=g) + 50.0  # a common offset: raw cosines are all near 1
    x[1] = x[0]  # another fold: two rows that give each other away
    x[6] = x[2]  # the same fold: no leak
    x[11] = x[8] * 1.0 + 1e-4 * torch.randn(30, generator=g)
    entity = np.arange(40) // 2  # pairs of neighbours: always in two folds
    report = leakage_report(folds, {"entity": entity, "fold": folds}, x).set_index("shared")
    assert report.rows.to_dict() == {"entity": 40, "fold": 0, "duplicate": 2, "near duplicate": 4}
    assert report.share["entity"] == 1.0
    assert report.largest["entity"] == 1
    # Counted one by one.
    values = np.arange(40) % 7
    counted = [sum(values[i] == values[j] and folds[i] != folds[j] for j in range(40)) for i in range(40)]
    line = leakage_report(folds, {"v": values}).iloc[0]
    assert (line.rows, line.largest) == (sum(c > 0 for c in counted), max(counted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_residuals_of_every_precision_are_read(dtype):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[3] = x[0]
    report = leakage_report(np.arange(6), None, x).set_index("shared")
    assert report.rows.to_dict() == {"duplicate": 2, "near duplicate": 2}


def test_columns_of_another_length_are_refused():
    with pytest.raises(DataError, match="entity has 3 rows, the folds have 4"):
        # Without the shape checks that run in tests: users run without them.
        inspect.unwrap(leakage_report)(np.arange(4), {"entity": np.arange(3)})
