"""The cosines' kernel under Triton's interpreter, against the float64 definition and PyTorch's own float32.

Interpreted kernels live in a process of their own: Triton settles at its import whether it interprets or compiles.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from gapprobe.kernels import cosine

pytest.importorskip("triton")

# Products are added up in another order than torch's; beyond that, one rounding.
ORDER, ROUNDING = 4.0, 2.0**-23
SHAPES = [(1, 1), (3, 2), (5, 130), (9, 1030), (4, 1024), (7, 2100)]


def interpret(left, right, mean, std):
    """Launch the kernel on tensors of the CPU: what the child process is asked for."""
    from gapprobe.kernels import cosine_triton

    return cosine_triton.sums(left, right, mean, std)


@pytest.fixture(scope="module")
def interpreted():
    """Return a function that runs the kernel in a process that interprets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        pool.submit(int).result()  # the process starts now, with this environment
    with pool:
        yield lambda *tensors: pool.submit(interpret, *tensors).result()


@pytest.fixture
def on_gpu(interpreted, monkeypatch):
    """Have `cosine.paired` ask the interpreted kernel, as it asks the compiled one on a GPU."""
    from gapprobe.kernels import cosine_triton

    monkeypatch.setattr(cosine, "on_gpu", lambda _: True)
    monkeypatch.setattr(cosine_triton, "sums", interpreted)


def numbers(n, d, dtype, massive=0.0):
    g = torch.Generator().manual_seed(n + 10 * d)
    left, right = torch.randn(2, n, d, generator=g) + torch.randn(d, generator=g)
    left[:, d // 2] += massive
    right[:, d // 2] += massive
    left, right = left.to(dtype), right.to(dtype)
    both = torch.cat([left, right]).double()
    return left, right, both.mean(0), both.std(0, correction=0)


def plain(left, right, mean=None, std=None):
    a, b = left.float(), right.float()
    if mean is not None:
        a, b = a - mean.float(), b - mean.float()
    if std is not None:
        a, b = a * cosine.inverse(std).float(), b * cosine.inverse(std).float()
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("massive", [0.0, 1e3])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_no_cosine_errs_more_than_plain_torch_does(n, d, dtype, massive):
    left, right, mean, std = numbers(n, d, dtype, massive)
    for count in range(3):
        setting = (mean, std)[:count]
        ours = list(vars(cosine.paired(left, right, *setting)).values())[count]
        truth = cosine.reference(left, right, *setting)
        allowed = ORDER * (plain(left, right, *setting) - truth).abs().nan_to_num(0.0).amax() + ROUNDING
        assert ours.isnan().equal(truth.isnan())
        assert ((ours - truth).abs().nan_to_num(0.0) <= allowed).all()


@pytest.mark.usefixtures("on_gpu")
def test_centring_nearly_equal_rows_keeps_the_digits_that_differ():
    g = torch.Generator().manual_seed(3)
    left, right = torch.randn(40, generator=g) * 100 + 1e-3 * torch.randn(2, 30, 40, generator=g)
    mean = torch.cat([left, right]).double().mean(0)
    truth = cosine.reference(left, right, mean)
    # A mean rounded to float32 is off by up to 4e-6 where rows differ by 1e-3; in two parts nothing of that is left.
    assert (plain(left, right, mean) - truth).abs().max() > 1e-5
    assert (cosine.paired(left, right, mean).centred - truth).abs().max() <= ORDER * ROUNDING


def test_all_variants_come_from_one_launch_and_equal_those_alone(interpreted):
    left, right, mean, std = numbers(6, 300, torch.bfloat16)
    every = interpreted(left, right, mean, std)
    assert every.shape == (3, 3, 6)
    # Fewer variants walk in wider steps, so sums are added up in another order.
    for some in (interpreted(left, right, None, None), interpreted(left, right, mean, None)):
        torch.testing.assert_close(every[: len(some)], some, rtol=300 * 2.0**-24, atol=0)


def test_equal_bytes_in_equal_bytes_out(interpreted):
    tensors = numbers(6, 700, torch.float16)
    assert interpreted(*tensors).equal(interpreted(*tensors))


def test_rows_with_a_stride_are_read_as_they_are(interpreted):
    left, right, mean, std = numbers(6, 90, torch.float32)
    apart = [torch.full((6, 200), torch.nan)[:, 50:140].copy_(x) for x in (left, right)]
    assert interpreted(*apart, mean, std).equal(interpreted(left, right, mean, std))


def test_no_rows_are_no_work(interpreted):
    assert interpreted(torch.ones(0, 5), torch.ones(0, 5), None, None).shape == (1, 3, 0)
