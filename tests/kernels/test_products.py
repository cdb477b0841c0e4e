"""The products under Triton's interpreter, against their float64 references and torch's own float32.

A kernel may err by what torch's float32 errs by, times `ORDER` because it adds up in another order, and by one rounding
and what 16 bits leave out, of the sum of the terms' absolute values.
Interpreted kernels live in a process of their own: Triton settles at its import whether it interprets or compiles.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from gapprobe.kernels import products
from gapprobe.kernels.standardised import Standardised

pytest.importorskip("triton")

ORDER = 4.0
ROUNDING = 2.0**-23
# What is left out of a float32 factor in 16 bits, relative to itself.
LOST = {torch.float32: 0.0, torch.float16: 2.0**-22, torch.bfloat16: 2.0**-17}
SHAPES = [(1, 1, 1), (5, 3, 2), (17, 130, 33), (40, 300, 71), (70, 129, 200), (3, 1100, 65)]
EMPTY = [(0, 5, 3), (3, 0, 4), (3, 5, 0)]


def call(kernel, *tensors):
    """Launch a kernel of `products_triton` on tensors of the CPU: what the child process is asked for."""
    from gapprobe.kernels import products_triton

    with torch.no_grad():
        return getattr(products_triton, kernel)(*tensors)


def prepare():
    """Mend what the interpreter gets wrong in `tl.dot`.

    It multiplies the bit patterns of bfloat16 (triton-lang/triton#11584). And it leaves the product to a BLAS, whose
    last bits hang on where in a tile a row stands, on some processors; on a GPU they do not. Here every entry is summed
    by itself, in the order of k.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    torch.set_num_threads(1)

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data.astype(np.float32)
        return (handle.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    def create_dot(_builder, a, b, d, *_precision):
        left, right = widened(a), widened(b)
        out = np.zeros((left.shape[0], right.shape[1]), dtype=np.float32)
        for column, row in zip(left.T, right, strict=True):
            out += column[:, None] * row
        return TensorHandle((out + d.data).astype(d.data.dtype), d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


@pytest.fixture(scope="module")
def interpreted():
    """Return a function that runs a kernel in a process that interprets."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=prepare)
        pool.submit(int).result()  # the process starts now, with this environment
    finally:
        os.environ.pop("TRITON_INTERPRET")
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
    with pool:
        yield lambda kernel, *tensors: pool.submit(call, kernel, *tensors).result()


def numbers(q, n, d, dtype, layers=()):
    g = torch.Generator().manual_seed(q + 10 * n + 100 * d)
    x = torch.randn(*layers, n, d, generator=g).to(dtype)
    weights = torch.randn(*layers, q, d + 1, generator=g) / max(1, d) ** 0.5
    turned, residual = torch.randn(2, *layers, q, n, generator=g)
    sign = (torch.rand(*layers, q, n, generator=g) < 0.5).float() * 2 - 1
    weight = torch.rand(*layers, q, n, generator=g) * (torch.rand(*layers, q, n, generator=g) < 0.8)
    return x, weights, turned, sign, weight, residual


def near(ours, theirs, truth, size, dtype):
    """Hold an error against torch's own; `size` is the sum of the terms' absolute values, [*l q _]."""
    if not truth.numel():
        assert ours.shape == truth.shape
        return
    allowed = ORDER * (theirs - truth).abs().amax() + (LOST[dtype] + ROUNDING) * size
    assert ((ours - truth).abs() <= allowed).all(), float(((ours - truth).abs() - allowed).max())


def sizes(x, weights, residual):
    """Return for both products the sums of absolute values: what rounding is relative to."""
    return products.logits_reference(x.abs(), weights.abs()), products.pull_reference(x.abs(), residual.abs())


@pytest.mark.parametrize("dtype", LOST, ids=str)
@pytest.mark.parametrize(("q", "n", "d"), SHAPES + EMPTY)
def test_both_products_err_no_more_than_torch_does(interpreted, q, n, d, dtype):
    x, weights, _, _, _, residual = numbers(q, n, d, dtype)
    wide, back = sizes(x, weights, residual)
    ours = interpreted("logits", x, weights)
    near(ours, products.logits(x, weights), products.logits_reference(x, weights), wide, dtype)
    ours = interpreted("pull", x, residual)
    near(ours, products.pull(x, residual), products.pull_reference(x, residual), back, dtype)


@pytest.mark.parametrize("dtype", LOST, ids=str)
@pytest.mark.parametrize(("q", "n", "d"), SHAPES[1:5] + EMPTY)
def test_a_step_is_its_definition(interpreted, q, n, d, dtype):
    x, weights, turned, sign, weight, residual = numbers(q, n, d, dtype)
    turned[..., ::3] *= 10  # shares down to 1e-15 and up to 1
    truth = products.step_reference(x, weights, turned, sign, weight)
    theirs = products.step(x, weights, turned, sign, weight)
    along, left, share, slope = interpreted("step", x, weights, turned, sign, weight)
    size = sizes(x, weights, residual)[0]
    near(along, theirs.along, truth.along, size, dtype)
    # d share = share (1 - share) d along; d slope by its terms.
    near(share, theirs.share, truth.share, size * truth.share + 4 * truth.share, dtype)
    near(left, theirs.residual, truth.residual, size * truth.residual + 4 * truth.residual, dtype)
    terms = (truth.residual * (size + 4) * (1 + truth.along.abs())).sum(-1)
    near(slope, theirs.slope, truth.slope, terms, dtype)
    if q and n and d:
        torch.testing.assert_close(share.double(), truth.share, rtol=1e-3, atol=0)  # small shares keep their digits


@pytest.mark.parametrize("dtype", LOST, ids=str)
def test_layers_are_a_batch(interpreted, dtype):
    x, weights, turned, sign, weight, residual = numbers(5, 140, 37, dtype, layers=(3,))
    wanted = [
        [interpreted("step", *parts) for parts in zip(x, weights, turned, sign, weight, strict=True)],
        [interpreted("pull", *parts) for parts in zip(x, residual, strict=True)],
    ]
    ours = interpreted("step", x, weights, turned, sign, weight)
    for mine, theirs in zip(ours, zip(*wanted[0], strict=True), strict=True):
        assert mine.equal(torch.stack(theirs))
    assert interpreted("pull", x, residual).equal(torch.stack(wanted[1]))
    for mine, truth in zip(
        (products.logits(x, weights), products.pull(x, residual)),
        (products.logits_reference(x, weights), products.pull_reference(x, residual)),
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-4)


def test_equal_bytes_in_equal_bytes_out(interpreted):
    x, weights, turned, sign, weight, residual = numbers(20, 1300, 40, torch.float16)
    for kernel, parts in (("step", (x, weights, turned, sign, weight)), ("pull", (x, residual))):
        once, again = interpreted(kernel, *parts), interpreted(kernel, *parts)
        for a, b in zip(*((out,) if torch.is_tensor(out) else out for out in (once, again)), strict=True):
            assert a.equal(b)


def test_rows_with_a_stride_are_read_as_they_are(interpreted):
    x, weights, _, _, _, residual = numbers(4, 50, 19, torch.float32)
    apart = torch.full((50, 40), torch.nan)[:, :19].copy_(x)
    assert interpreted("logits", apart, weights).equal(interpreted("logits", x, weights))
    assert interpreted("pull", apart, residual).equal(interpreted("pull", x, residual))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e20])
def test_two_numbers_of_16_bits_make_a_float32(dtype, magnitude):
    from gapprobe.kernels import products_triton

    rows = torch.randn(2, 3, 37, generator=torch.Generator().manual_seed(0)) * magnitude
    rows[0, 0] = 0.0
    rows[1, 1, 5] *= 1e-3
    high, low, scale = products_triton.split(rows, dtype)
    assert high.shape == low.shape == (2, 3, 48)
    assert not high[..., 37:].any()
    assert not low[..., 37:].any()
    assert (torch.frexp(scale).mantissa == 0.5).all()
    back = scale[..., None].double() * (high.double() + low.double())
    lost = LOST[dtype] * rows.abs() + 2.0**-39 * rows.abs().amax(-1, keepdim=True)
    assert ((back[..., :37] - rows).abs() <= lost).all()


def test_torch_serves_where_there_is_no_gpu(monkeypatch):
    x, weights, _, _, _, residual = numbers(3, 30, 8, torch.float32)
    assert not products.on_gpu(x)
    monkeypatch.setattr(products, "ROWS", 7)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(products.logits(x, weights).double(), products.logits_reference(x, weights), **close)
    torch.testing.assert_close(products.pull(x, residual).double(), products.pull_reference(x, residual), **close)


def test_a_view_on_a_gpu_asks_these_products(monkeypatch):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = Standardised(x, torch.ones(2, 50, dtype=torch.bool))
    view = features.view(torch.arange(2), torch.float32)
    weights, residual = torch.randn(2, 1, 7), torch.randn(2, 1, 50)
    plain = view.logits(weights), view.pull(residual)
    asked = []
    monkeypatch.setattr(products, "on_gpu", lambda _: True)
    monkeypatch.setattr(products, "logits", lambda *a: asked.append("logits") or products.logits_by_torch(*a))
    monkeypatch.setattr(products, "pull", lambda *a: asked.append("pull") or products.pull_by_torch(*a))
    torch.testing.assert_close(view.logits(weights), plain[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(view.pull(residual), plain[1], rtol=1e-5, atol=1e-5)
    assert asked == ["logits", "pull"]
