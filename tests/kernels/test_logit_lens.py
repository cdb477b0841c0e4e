"""The blocked lens against its float64 definition, PyTorch's own norms, and odd shapes."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gapprobe.kernels import logit_lens
from gapprobe.kernels.logit_lens import Unembedding, reference, token_standing


def unembedding(seed, v, d, norm, *, bias=False, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    gain = None if norm == "none" else draw(d)
    shift = draw(d) if norm == "layer" else None
    return Unembedding(draw(v, d), draw(v) if bias else None, norm, gain, shift, 1e-5)


def naive(x, head, targets):
    """The same precision, all logits at once: the error it makes is the bound for ours."""
    h = logit_lens._normed(x.float(), head)
    logits = h @ head.weight.float().T + (0 if head.bias is None else head.bias.float())
    return torch.log_softmax(logits, dim=1).gather(1, targets[:, None])[:, 0]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 40),
    v=st.sampled_from([1, 2, 255, 2048, 2049, 5003]),
    d=st.sampled_from([1, 3, 64, 123]),
    norm=st.sampled_from(["rms", "layer", "none"]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_lens_is_its_definition(seed, n, v, d, norm, bias, dtype):
    g = torch.Generator().manual_seed(seed)
    head = unembedding(seed, v, d, norm, bias=bias, dtype=dtype)
    x = (torch.randn(n, d, generator=g) * 3).to(dtype)
    targets = torch.randint(0, v, (n,), generator=g)
    truth, ours = reference(x, head, targets), token_standing(x, head, targets)
    if n == 0:
        assert ours.log_prob.shape == (0,)
        return
    error = (ours.log_prob - truth.log_prob).abs().max()
    allowed = (naive(x, head, targets) - truth.log_prob).abs().max()
    h = logit_lens._normed(x.double(), head)
    logits = h @ head.weight.double().T + (0 if head.bias is None else head.bias.double())
    distance = (logits - logits.gather(1, targets[:, None])).abs()
    distance.scatter_(1, targets[:, None], torch.inf)
    scale = (h.abs() @ head.weight.double().abs().T).amax(1)
    assert error <= allowed + torch.finfo(torch.float32).eps * scale.max()
    assert ours.log_prob.max() <= 0
    clear = distance.amin(1) > 1e-6 * scale
    assert torch.equal(ours.rank[clear], truth.rank[clear])


def test_blocks_of_rows_and_words_do_not_show(monkeypatch):
    head, g = unembedding(0, 301, 17, "rms", bias=True), torch.Generator().manual_seed(1)
    x, targets = torch.randn(29, 17, generator=g), torch.randint(0, 301, (29,), generator=g)
    whole = token_standing(x, head, targets)
    monkeypatch.setattr(logit_lens, "ROW_BLOCK", 7)
    monkeypatch.setattr(logit_lens, "WORD_BLOCK", 13)
    cut = token_standing(x, head, targets)
    torch.testing.assert_close(cut.log_prob, whole.log_prob, rtol=1e-6, atol=1e-6)
    assert torch.equal(cut.rank, whole.rank)


def test_norms_are_pytorchs():
    g = torch.Generator().manual_seed(2)
    x, targets = torch.randn(11, 32, generator=g), torch.randint(0, 50, (11,), generator=g)
    for norm in ("rms", "layer"):
        head = unembedding(3, 50, 32, norm)
        if norm == "rms":
            h = torch.nn.functional.rms_norm(x, (32,), head.gain, head.eps)
        else:
            h = torch.nn.functional.layer_norm(x, (32,), head.gain, head.shift, head.eps)
        expected = torch.log_softmax(h @ head.weight.T, dim=1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(token_standing(x, head, targets).log_prob, expected, rtol=1e-5, atol=1e-5)


def test_rank_one_is_the_most_probable_and_ties_do_not_count():
    head = Unembedding(torch.tensor([[1.0], [2.0], [2.0], [-1.0]]))
    x = torch.ones(4, 1)
    assert token_standing(x, head, torch.arange(4)).rank.tolist() == [3, 1, 1, 4]


def test_huge_logits_do_not_overflow():
    head = Unembedding(torch.tensor([[3e4], [-3e4], [2e4]]))
    got = token_standing(torch.ones(3, 1), head, torch.arange(3)).log_prob
    torch.testing.assert_close(got, torch.tensor([0.0, -6e4, -1e4]))


def test_memory_does_not_hold_the_vocabulary(monkeypatch):
    monkeypatch.setattr(logit_lens, "ROW_BLOCK", 64)
    monkeypatch.setattr(logit_lens, "WORD_BLOCK", 64)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            # Views of the inputs cost nothing; what is made must stay within a block.
            if isinstance(out, torch.Tensor) and not func.is_view:
                largest = max(largest, out.numel())
            return out

    head = unembedding(4, 4000, 8, "rms")
    x, targets = torch.randn(300, 8), torch.zeros(300, dtype=torch.int64)
    with Watch():
        token_standing(x, head, targets)
    assert largest <= 64 * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batch"}, "unknown norm 'batch'"),
        ({"norm": "rms", "shift": torch.ones(4)}, "has no shift"),
        ({"norm": "none", "gain": torch.ones(4)}, "belong to a norm"),
        ({"norm": "rms", "gain": torch.ones(5)}, r"gain has shape \(5,\)"),
        ({"bias": torch.ones(4)}, r"bias has shape \(4,\)"),
    ],
)
def test_an_unembedding_that_does_not_fit_is_refused(change, message):
    # The shape checks that run in tests would refuse some of these first; users run without them.
    bare = object.__new__(Unembedding)
    fields = {"bias": None, "norm": "none", "gain": None, "shift": None, "eps": 1e-6}
    for name, value in ({"weight": torch.ones(7, 4)} | fields | change).items():
        object.__setattr__(bare, name, value)
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(Unembedding.__post_init__)(bare)


def test_bad_targets_and_widths_are_refused():
    head = Unembedding(torch.ones(7, 4))
    unchecked = inspect.unwrap(token_standing)
    with pytest.raises(ValueError, match="target 7 of row 1"):
        token_standing(torch.ones(2, 4), head, torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="different models"):
        token_standing(torch.ones(2, 3), head, torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="as many targets"):
        unchecked(torch.ones(2, 4), head, torch.tensor([0]))
