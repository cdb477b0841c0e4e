"""The lens under Triton's interpreter, against its float64 definition and what torch makes of the same rows.

Interpreted kernels live in a process of their own: Triton settles at its import whether it interprets or compiles.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from gapprobe.kernels import logit_lens
from gapprobe.kernels.logit_lens import Reading, Unembedding, read, read_reference
from tests.kernels.test_logit_lens import EPS, assert_is_the_definition, same, unembedding
from tests.kernels.test_products import prepare

pytest.importorskip("triton")

# Norms are float32 here: half a rounding for every doubling of the width in the sum of squares, of which a root takes
# half, and one each for root, product and gain; float16 leaves out 2^-22, two more.
ROUNDING = 8 * EPS
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def interpret():
    """Have the child process take its tensors for those of a GPU."""
    prepare()
    logit_lens.on_gpu = lambda _: True


def call(x, head, targets, top_k, final):
    """Read: what the child process is asked for."""
    return read(x, head, targets, top_k=top_k, final=final)


@pytest.fixture(scope="module")
def interpreted():
    """Return `read` in a process that interprets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=interpret)
        pool.submit(int).result()  # the process starts now, with this environment
    with pool:
        yield lambda x, head, targets, top_k=0, final=None: pool.submit(call, x, head, targets, top_k, final).result()


def numbers(seed, layers, n, v, d, q, dtype):
    g = torch.Generator().manual_seed(seed)
    x = (3 * torch.randn(layers, n, d, generator=g)).to(dtype)
    return x, torch.randint(-1, v, (n, q), generator=g), (3 * torch.randn(n, d, generator=g)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("layers", "n", "v", "d", "q", "k", "norm", "bias", "cap"),
    [
        (1, 1, 1, 1, 1, 1, "none", False, None),
        (2, 3, 130, 5, 0, 5, "rms", False, None),
        (3, 30, 301, 40, 2, 16, "rms", True, 30.0),
        (17, 5, 2100, 64, 1, 10, "layer", True, None),
        (1, 70, 257, 123, 3, 0, "none", True, None),
    ],
)
def test_the_kernel_is_its_definition(interpreted, layers, n, v, d, q, k, norm, bias, cap, dtype):
    head = unembedding(n, v, d, norm, bias=bias, cap=cap, dtype=dtype)
    x, targets, final = numbers(n, layers, n, v, d, q, dtype)
    ours = interpreted(x, head, targets, min(k, v), final)
    assert_is_the_definition(x, head, targets, min(k, v), final, ours, ROUNDING)
    # Without a divergence rows stand in another order; the rest is the same to the byte.
    alone = interpreted(x, head, targets, min(k, v))
    for name, piece in vars(alone).items():
        assert piece is None if name == "kl" else piece.nan_to_num().equal(getattr(ours, name).nan_to_num()), name


def test_ties(interpreted):
    weight = torch.randn(300, 40, generator=torch.Generator().manual_seed(3))
    twins = torch.tensor([7, 8, 30, 100, 180, 299])
    weight[twins] = weight[7].clone()
    x = torch.randn(1, 9, 40, generator=torch.Generator().manual_seed(4))
    x[:, :5] = weight[7] + 0.1 * x[:, :5]
    found = interpreted(x, Unembedding(weight), twins.expand(9, 6), 8)
    truth = read_reference(x, Unembedding(weight), twins.expand(9, 6))
    assert (found.rank == truth.rank.amin(2, keepdim=True)).all()
    assert found.top_words[:, :5, :6].equal(twins.expand(1, 5, 6))
    alike = interpreted(torch.ones(1, 2, 3), Unembedding(torch.ones(500, 3)), torch.tensor([[499], [0]]), 12)
    assert alike.rank.eq(1).all()
    assert alike.top_words.equal(torch.arange(12).expand(1, 2, 12))


def test_how_rows_are_cut_does_not_show_in_any_byte(interpreted):
    head = unembedding(2, 300, 33, "rms", bias=True, dtype=torch.float16)
    x, targets, final = numbers(2, 3, 70, 300, 33, 2, torch.float16)
    whole = interpreted(x, head, targets, 5, final)
    assert same(whole, interpreted(x, head, targets, 5, final))
    for rows in (slice(0, 1), slice(40, 69)):
        some = interpreted(x[:, rows], head, targets[rows], 5, final[rows])
        assert same(some, Reading(*(piece[:, rows] for piece in vars(whole).values())))


def test_shards_and_lines_with_a_stride(interpreted):
    head = unembedding(1, 301, 17, "layer", bias=True)
    x, targets, final = numbers(1, 2, 12, 301, 17, 2, torch.float32)
    whole, cut = interpreted(x, head, targets, 9, final), interpreted(x, head.shards(3), targets, 9, final)
    assert cut.rank.equal(whole.rank)
    assert cut.top_words.equal(whole.top_words)
    torch.testing.assert_close(cut.log_prob, whole.log_prob, rtol=2e-6, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(cut.kl, whole.kl, rtol=2e-6, atol=2e-6)
    apart = torch.full((301, 40), torch.nan)[:, :17].copy_(head.weight)
    spread = Unembedding(apart, head.bias, "layer", head.gain, head.shift, head.eps)
    assert same(interpreted(x, spread, targets, 9, final), whole)


def test_the_final_layer_is_at_no_distance_from_itself(interpreted):
    head = unembedding(7, 400, 64, "rms", dtype=torch.float16)
    x, targets, _ = numbers(7, 20, 4, 400, 64, 1, torch.float16)
    found = interpreted(x, head, targets, 3, x[17])
    assert found.kl[17].eq(0).all()
    assert found.kl[:17].gt(0).all()


def test_more_words_than_the_kernel_keeps_and_no_rows_are_torchs(interpreted):
    head = unembedding(8, 200, 16, "rms")
    x, targets, final = numbers(8, 2, 6, 200, 16, 1, torch.float32)
    assert same(interpreted(x, head, targets, 17, final), read(x, head, targets, top_k=17, final=final))
    none = interpreted(x[:, :0], head, targets[:0], 5, final[:0])
    assert (none.rank.shape, none.top_words.shape, none.kl.shape) == ((2, 0, 1), (2, 0, 5), (2, 0))
