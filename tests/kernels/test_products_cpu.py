"""Compiled products of a few rows with many: exact on whole numbers, as near as float32 allows on others."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gapprobe.kernels import products, products_cpu

LEFT = (torch.float32, torch.float64)
RIGHT = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PAIRS = [(left, right) for left in LEFT for right in RIGHT if right.itemsize <= left.itemsize]
SIZES = st.tuples(st.integers(0, 15), st.integers(0, 150), st.integers(0, 150))
# Longer than a chunk, deeper than a block, more rows than a panel; and such as fill the last of each.
EACH = [(3, 5, 7, 9), (2, 260, 184, 64), (1, 1, 1, 1), (0, 3, 4, 5), (2, 0, 3, 4), (2, 3, 4, 0)]
LARGE = [(3, 7, 2500), (2, 200, 65), (101, 9, 40), (6, 64, 1024), (48, 128, 64), (1, 65, 1537), (7, 129, 129)]


def numbers(g, rows, columns, dtype, *, whole):
    """Return a matrix whose rows lie apart, with NaN in between: nobody may read these."""
    room = torch.full((rows, columns + 3), torch.nan, dtype=dtype)
    drawn = torch.randint(-9, 10, (rows, columns), generator=g) if whole else torch.randn(rows, columns, generator=g)
    room[:, :columns] = drawn.to(dtype)
    return room[:, :columns]


def both(p, n, d, left, right, *, whole, centred, seed=0):
    """Yield a product, what it is in float64, and the sum of its terms' sizes."""
    g = torch.Generator().manual_seed(seed)
    x = numbers(g, n, d, right, whole=whole)
    centre = numbers(g, 1, d, left, whole=whole)[0] if centred else None
    # What is taken off is rounded once, in the precision of the result.
    wide = (x.to(left) if centre is None else x.to(left) - centre).double()
    w = numbers(g, p, d, left, whole=whole)
    yield products.dots(w, x, centre), w.double() @ wide.T, w.double().abs() @ wide.abs().T
    for r in (numbers(g, p, n, left, whole=whole), numbers(g, n, p, left, whole=whole).T):
        room = numbers(g, p, d, left, whole=whole)
        start = room.double().clone()
        found = products.add_combined(r, x, room, centre)
        assert found.data_ptr() == room.data_ptr() or not room.numel()
        yield found, start + r.double() @ wide, start.abs() + r.double().abs() @ wide.abs()


@pytest.mark.parametrize(("left", "right"), PAIRS)
@settings(deadline=None)  # the first call compiles
@given(sizes=SIZES, centred=st.booleans(), seed=st.integers(0, 99))
def test_products_of_whole_numbers_are_exact(left, right, sizes, centred, seed):
    for found, true, _ in both(*sizes, left, right, whole=True, centred=centred, seed=seed):
        assert found.dtype == left
        assert found.double().equal(true)


@pytest.mark.parametrize(("left", "right"), PAIRS)
@pytest.mark.parametrize("sizes", LARGE)
def test_large_products_of_whole_numbers_are_exact(left, right, sizes):
    for found, true, _ in both(*sizes, left, right, whole=True, centred=left == torch.float64):
        assert found.double().equal(true)


@pytest.mark.parametrize("right", RIGHT[:3])
@settings(deadline=None)  # the first call compiles
@given(sizes=st.tuples(st.integers(1, 15), st.integers(1, 150), st.integers(1, 2500)), seed=st.integers(0, 99))
def test_products_err_no_more_than_their_sums_can(right, sizes, seed):
    """Sums of k products err by at most k roundings of the terms' sizes, whatever the order (Higham 2002, eq. 3.5).

    One more where the sum is added to what is there.
    """
    for found, true, terms in both(*sizes, torch.float32, right, whole=False, centred=False, seed=seed):
        assert bool(((found - true).abs() <= (max(sizes) + 1) * 2.0**-24 * terms).all())


def test_long_sums_err_less_than_torch():
    """A chain of 20,000 roundings is no sum: blocks are added up by themselves."""
    g = torch.Generator().manual_seed(0)
    r, x = torch.randn(5, 20_000, generator=g), torch.randn(20_000, 64, generator=g)
    true = r.double() @ x.double()
    ours, theirs = ((found - true).norm() for found in (products.combined(r, x), r @ x))
    assert float(ours) <= 2 * float(theirs)


def test_a_row_does_not_hang_on_its_company_nor_on_threads(monkeypatch):
    g = torch.Generator().manual_seed(1)
    w, r, x = torch.randn(13, 300, generator=g), torch.randn(13, 90, generator=g), torch.randn(90, 300, generator=g)
    forth, back = products.dots(w, x), products.combined(r, x)
    for some in (slice(0, 1), slice(5, 11), slice(4, 13, 3)):
        assert products.dots(w[some], x).equal(forth[some])
        assert products.combined(r[some], x).equal(back[some])
        assert products.dots(w, x[some]).equal(forth[:, some])
    assert products.combined(r, x[:, 100:250]).equal(back[:, 100:250])
    monkeypatch.setattr(products_cpu, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert products.dots(w, x).equal(forth)
    assert products.combined(r, x).equal(back)


@pytest.mark.parametrize("dtype", LEFT)
@pytest.mark.parametrize("sizes", EACH)
def test_products_of_several_pairs_are_each_pairs_own(dtype, sizes, monkeypatch):
    g, p, n, d = sizes
    draw = torch.Generator().manual_seed(0)
    w, r, x = (torch.randn(g, *shape, generator=draw, dtype=dtype) for shape in ((p, d), (p, n), (n, d)))
    monkeypatch.setattr(products_cpu, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    forth = products_cpu.add_each_dots(w, x, w.new_ones(g, p, n))
    back = products_cpu.add_each_combined(r, x, w.new_ones(g, p, d))
    for i in range(g):
        assert forth[i].equal(1 + products.dots(w[i], x[i])) or d == 0
        assert back[i].equal(products.add_combined(r[i], x[i], w.new_ones(p, d)))
    assert d or forth.eq(1).all()


def test_what_is_no_number_is_passed_on():
    x = torch.ones(4, 20)
    x[2, 19] = torch.nan
    x[1, 0] = torch.inf
    assert products.dots(torch.ones(1, 20), x)[0].tolist()[:2] == [20.0, torch.inf]
    assert products.dots(torch.ones(1, 20), x)[0].isnan().tolist() == [False, False, True, False]
    assert products.combined(torch.ones(1, 4), x)[0].isnan().nonzero().flatten().tolist() == [19]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="asks for instructions of an x86 processor")
def test_processors_with_shorter_vectors_have_tiles_of_their_own(tmp_path):
    """They are tested in a process that is told of no longer ones."""
    features = "+sse4.2,+avx,+avx2,+fma,+bmi,+bmi2,+f16c,+popcnt,+lzcnt"
    told = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    others = ["-k", "not processors", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *others, __file__], env=dict(os.environ) | told, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
