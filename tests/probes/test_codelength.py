"""The code length of labels: what fits it one by one gives, and what is known of its ends."""

import inspect
import math

import numpy as np
import pytest
import torch

from gapprobe.errors import DataError
from gapprobe.kernels import logistic
from gapprobe.probes.codelength import online_code
from gapprobe.probes.controls import control_task


def planted(strength, n=600, d=8):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d))
    y = rng.random(n) < 1 / (1 + np.exp(-strength * x[:, 0]))
    return torch.from_numpy(x).float(), y


def test_it_is_the_sum_of_blocks_fitted_one_by_one():
    x, y = planted(3.0)
    code = online_code(x, y, portions=(0.1, 0.3, 0.6), strength=1.0, seed=2)
    order = np.random.default_rng(2).permutation(600)
    sent, labels = x[order], torch.from_numpy(y[order])
    expected = 60.0
    for start, stop in ((60, 180), (180, 360), (360, 600)):
        fit = logistic.fit(sent[:start], labels[None, :start], torch.ones(1, start), 1.0)
        odds = fit.logits(sent[start:stop])[0]
        expected -= float(
            torch.nn.functional.logsigmoid(torch.where(labels[start:stop], odds, -odds)).sum()
        ) / math.log(2)
    assert code.bits == pytest.approx(expected, rel=1e-3)
    assert code.blocks == (60, 120, 180, 240)
    assert sum(code.bits_by_block) == pytest.approx(code.bits)


def test_labels_that_residuals_tell_cost_less_and_noise_costs_a_bit_each():
    told, noise = online_code(*planted(8.0)), online_code(*planted(0.0))
    assert told.compression > 2.0
    assert noise.compression < 1.0
    assert told.uniform == 600


def test_blocks_before_both_classes_were_seen_cost_a_bit_a_label():
    x, _ = planted(1.0, n=50)
    y = np.zeros(50, dtype=bool)
    assert online_code(x, y).bits == 50.0


def test_what_gives_no_code_is_refused():
    x, y = planted(1.0)
    with pytest.raises(DataError, match="599 labels for 600 rows"):
        inspect.unwrap(online_code)(x, y[1:])  # without the shape checks that run in tests
    with pytest.raises(DataError, match="portions must rise"):
        online_code(x, y, portions=(0.5, 0.2))
    with pytest.raises(DataError, match="no log-odds"):
        online_code(x, y, probe="mean_difference")


def test_a_control_task_labels_types_and_says_nothing_of_the_target():
    rng = np.random.default_rng(0)
    types, target = np.repeat(np.arange(300), 4), rng.random(1200) < 0.3
    labels = control_task(types, target, 0)
    assert (labels.reshape(300, 4) == labels.reshape(300, 4)[:, :1]).all()
    assert labels.mean() == pytest.approx(target.mean(), abs=0.06)
    np.testing.assert_array_equal(labels, control_task(types, target, 0))
    assert (labels != control_task(types, target, 1)).any()
