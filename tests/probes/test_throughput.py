"""The bench times what a sweep fits, layer by layer, on a store and without one."""

import numpy as np
import pytest
import torch

from gapprobe.cli import main
from gapprobe.errors import DataError
from gapprobe.probes.throughput import bench_probes, random_residuals
from tests.probes.planted import planted


def test_it_times_each_layer_of_a_store(store_of):
    rows, x = planted(4, image=1.0, entities=4, relations=5, images=4, layers=3)
    store = store_of(x, rows.ids)
    threads = torch.get_num_threads()
    table = bench_probes(store, layers=[1, 2], strengths=[0.1, 1.0], against_sklearn=True)
    assert torch.get_num_threads() == threads
    assert table.layer.tolist() == [1, 2]
    assert (table.fits == 10).all()
    assert (table.rows == 80).all()
    np.testing.assert_allclose(table.fits_per_second, table.fits / table.seconds)
    np.testing.assert_allclose(table.ratio, table.sklearn_seconds / table.seconds)
    assert (table[["matrix_share", "memory_share"]] > 0).all(axis=None)
    assert (table[["matrix_share", "memory_share"]] < 1).all(axis=None)
    with pytest.raises(DataError, match=r"holds layers \[0, 1, 2\], not \[7\]"):
        bench_probes(store, layers=[7])
    with pytest.raises(DataError, match="no column 'right'"):
        bench_probes(store, "right")


def test_random_residuals_have_the_spectrum_they_are_said_to_have():
    x = random_residuals(4000, 300, 0)[:, 3:].double()
    values = torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)
    slope = (values[9].log() - values[99].log()) / np.log(10.0)
    assert float(slope) == pytest.approx(1.6, abs=0.15)


def test_the_command_prints_a_line_a_layer(capsys):
    main(["bench", "probes", "--rows", "60", "--width", "12", "--layers", "1", "3"])
    out = capsys.readouterr().out
    assert "fits_per_second" in out
    assert out.count("█") >= 2
