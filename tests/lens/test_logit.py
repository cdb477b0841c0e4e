"""The lens over a store: conventions, refusals, and the same numbers as the kernel's definition."""

import numpy as np
import pytest
import torch

from gapprobe.errors import DataError, StoreError
from gapprobe.kernels.logit_lens import Unembedding, reference
from gapprobe.lens.logit import logit_lens

WEIGHTS = "f" * 64
IDS = tuple(f"row-{i}" for i in range(9))


@pytest.fixture
def head():
    g = torch.Generator().manual_seed(0)
    return Unembedding(torch.randn(31, 8, generator=g), None, "rms", torch.rand(8, generator=g), None, 1e-5)


@pytest.fixture
def residuals():
    return torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(1))


def test_every_layer_is_its_definition_with_and_without_the_norm(store_of, head, residuals):
    store = store_of(residuals, IDS)
    rows, targets = [IDS[5], IDS[0], IDS[7]], np.array([3, 30, 0])
    bare = Unembedding(head.weight)
    for norm, end in ((True, head), (False, bare)):
        result = logit_lens(store, head, rows, targets, position="last_input", weights=WEIGHTS, norm=norm)
        assert result.layers == (0, 1, 2, 3)
        assert result.normed is norm
        for layer in range(4):
            truth = reference(residuals[layer][[5, 0, 7]], end, torch.from_numpy(targets))
            np.testing.assert_allclose(result.log_prob[layer], truth.log_prob, rtol=1e-5)
            np.testing.assert_array_equal(result.rank[layer], truth.rank)
            np.testing.assert_allclose(result.probability[layer], np.exp(truth.log_prob), rtol=1e-4)


def test_a_choice_of_layers_and_no_rows(store_of, head, residuals):
    store = store_of(residuals, IDS)
    result = logit_lens(
        store, head, [], np.zeros(0, dtype=np.int64), position="last_input", weights=WEIGHTS, layers=[2]
    )
    assert result.log_prob.shape == (1, 0)


def test_refusals(store_of, head, residuals):
    store = store_of(residuals, IDS)
    given = {"position": "last_input", "weights": WEIGHTS}
    with pytest.raises(StoreError, match="read it with the model that made it"):
        logit_lens(store, head, IDS, np.zeros(9, dtype=np.int64), position="last_input", weights="0" * 64)
    with pytest.raises(DataError, match="row row-2: target 31 is no token, the vocabulary has 31"):
        logit_lens(store, head, IDS, np.array([0, 0, 31, 0, 0, 0, 0, 0, 0]), **given)
    with pytest.raises(DataError, match="9 rows and 2 target tokens"):
        logit_lens(store, head, IDS, np.zeros(2, dtype=np.int64), **given)
    with pytest.raises(StoreError):
        logit_lens(store, head, IDS, np.zeros(9, dtype=np.int64), **given, layers=[9])
