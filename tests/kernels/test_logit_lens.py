"""The lens against its float64 definition and PyTorch's own norms; ties, odd shapes, shards, broken rows."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gapprobe.kernels import compiled, lens_cpu, lens_parts, lens_torch, logit_lens
from gapprobe.kernels.logit_lens import Reading, Unembedding, read, read_reference, reference

EPS = torch.finfo(torch.float32).eps
SMALL = ((1, 4), (0, 9), (1, 30), (1, 200), (0, 4), (0, 60))  # layers, rows, width, words, targets, best words


def unembedding(seed, v, d, norm, *, bias=False, cap=None, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    gain = None if norm == "none" else draw(d)
    shift = draw(d) if norm == "layer" else None
    return Unembedding(draw(v, d), draw(v) if bias else None, norm, gain, shift, 1e-5, cap)


def naive(x, head, targets, final):
    """The same precision, all logits at once, by PyTorch: log-probabilities, entropy, divergence."""

    def log_p(rows):
        h = lens_parts.normed(rows.float(), head)
        logits = h @ head.weight.float().T + (0 if head.bias is None else head.bias.float())
        return torch.log_softmax(lens_parts.capped(logits, head.cap), -1)

    all_of, last = log_p(x), log_p(final)
    picked = all_of.gather(2, targets.clamp(min=0).expand(len(x), -1, -1))
    return picked, -(all_of.exp() * all_of).sum(2), (last.exp() * (last - all_of)).sum(2)


def sizes(x, head):
    """Return for every row the largest sum of absolute terms of a logit: what its rounding is relative to."""
    h = lens_parts.normed(x.double(), head).abs()
    return (h @ head.weight.double().abs().T + (0 if head.bias is None else head.bias.double().abs())).amax(-1)


def assert_is_the_definition(x, head, targets, top_k, final, ours: Reading | None = None, rounding=EPS):
    """Hold a reading against the reference: it may err by what PyTorch errs by, and by one rounding of the logits.

    A rounding e of the logits moves log-probabilities by 2 e at most, the entropy by e E|log p + H|, and the divergence
    by 2 e + e E|log p_final - log p|, expectations by the distribution that is asked about. The exponential, its
    argument, the product with it and the sum each round once more, relative to one and to what is summed up.
    """
    truth = read_reference(x, head, targets, top_k=len(head.weight), final=final)
    ours = read(x, head, targets, top_k=top_k, final=final) if ours is None else ours
    theirs = naive(x, head, targets, final)
    some = (targets >= 0).expand(truth.log_prob.shape)
    assert ours.log_prob.isnan().equal(~some)
    assert (ours.rank == 0).equal(~some)
    slack = rounding * torch.maximum(sizes(x, head), sizes(final, head))
    log_p = logit_lens.log_softmax_reference(x, head)
    last = logit_lens.log_softmax_reference(final[None], head)
    spread = (log_p.exp() * (log_p + truth.entropy[..., None]).abs()).sum(2)
    apart = (last.exp() * (last - log_p).abs()).sum(2)

    def near(name, mine, their, right, allowed):
        if right.numel():
            allowed = allowed + 4 * EPS * (1 + right.abs())
            worst = (their - right).abs()
            worst = worst[worst.isfinite()].max() if worst.isfinite().any() else 0.0
            assert ((mine - right).abs() <= worst + allowed).all(), name

    near(
        "log_prob",
        ours.log_prob[some],
        theirs[0][some],
        truth.log_prob[some],
        2 * slack[..., None].expand_as(some)[some],
    )
    near("entropy", ours.entropy, theirs[1], truth.entropy, slack * spread)
    near("kl", ours.kl, theirs[2], truth.kl, slack * (2 + apart))
    assert not (ours.log_prob > 0).any()
    assert (ours.kl >= 0).all()
    near("top", ours.top_log_prob, ours.top_log_prob, truth.top_log_prob[..., :top_k], 4 * slack[..., None])
    # Words and ranks are settled where the nearest other logit is further away than both roundings.
    ordered = truth.top_log_prob
    gap = torch.full((*ordered.shape[:2], ordered.shape[2] + 1), torch.inf, dtype=ordered.dtype)
    gap[..., 1:-1] = ordered[..., :-1] - ordered[..., 1:]
    clear = torch.minimum(gap[..., :-1], gap[..., 1:]) > 4 * slack[..., None]
    assert ours.top_words[clear[..., :top_k]].equal(truth.top_words[..., :top_k][clear[..., :top_k]])
    at = (truth.rank - 1).clamp(min=0)
    settled = some & clear.gather(2, at)
    assert ours.rank[settled].equal(truth.rank[settled])
    return settled


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    layers=st.integers(1, 3),
    n=st.integers(0, 25),
    v=st.sampled_from([1, 2, 15, 255, 1536, 1537, 5003]),
    d=st.sampled_from([1, 3, 64, 123]),
    q=st.integers(0, 3),
    k=st.sampled_from([0, 1, 5, 200]),
    norm=st.sampled_from(["rms", "layer", "none"]),
    bias=st.booleans(),
    cap=st.sampled_from([None, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_lens_is_its_definition(seed, layers, n, v, d, q, k, norm, bias, cap, dtype):
    g = torch.Generator().manual_seed(seed)
    head = unembedding(seed, v, d, norm, bias=bias, cap=cap, dtype=dtype)
    x = (torch.randn(layers, n, d, generator=g) * 3).to(dtype)
    targets = torch.randint(-1, v, (n, q), generator=g)
    final = (torch.randn(n, d, generator=g) * 3).to(dtype)
    assert_is_the_definition(x, head, targets, min(k, v), final)


def test_a_vocabulary_that_no_block_divides():
    g = torch.Generator().manual_seed(0)
    head = unembedding(0, 49_157, 123, "rms")
    x, targets = torch.randn(2, 9, 123, generator=g), torch.randint(0, 49_157, (9, 2), generator=g)
    targets[:3, 0] = torch.tensor([0, 49_156, 49_152])
    settled = assert_is_the_definition(x, head, targets, 10, torch.randn(9, 123, generator=g))
    assert settled.float().mean() > 0.5


def test_one_token_and_none():
    head = unembedding(1, 999, 20, "layer", bias=True)
    one = read(torch.ones(4, 1, 20), head, torch.zeros(1, 1, dtype=torch.int64), top_k=3, final=torch.ones(1, 20))
    assert (one.rank.shape, one.top_words.shape, one.kl.shape) == ((4, 1, 1), (4, 1, 3), (4, 1))
    empty = torch.zeros(0, 2, dtype=torch.int64)
    none = read(torch.ones(4, 0, 20), head, empty, top_k=3, final=torch.ones(0, 20))
    assert (none.rank.shape, none.top_words.shape, none.kl.shape) == ((4, 0, 2), (4, 0, 3), (4, 0))


def test_the_reference_of_one_target_is_pytorchs():
    g = torch.Generator().manual_seed(5)
    head, x, targets = unembedding(5, 77, 9, "none"), torch.randn(6, 9, generator=g), torch.arange(6) * 11
    logits = x.double() @ head.weight.double().T
    found = reference(x, head, targets)
    expected = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(found.log_prob, expected.log_prob(targets))
    assert found.rank.equal(1 + (logits > logits.gather(1, targets[:, None])).sum(1))
    whole = read_reference(x[None], head, targets[:, None], top_k=4, final=x)
    torch.testing.assert_close(whole.entropy[0], expected.entropy())
    assert whole.top_words[0].equal(logits.topk(4).indices)
    other = read_reference(x[None], head, targets[:, None], final=x.flip(0)).kl[0]
    torch.testing.assert_close(
        other, torch.distributions.kl_divergence(torch.distributions.Categorical(logits=logits.flip(0)), expected)
    )


def same(a, b):
    """Tell whether two readings are the same bytes, NaN included."""
    return all(
        (x is None and y is None)
        or (x.shape == y.shape and x.contiguous().view(torch.uint8).equal(y.contiguous().view(torch.uint8)))
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_how_rows_and_layers_are_cut_does_not_show_in_any_byte(monkeypatch, dtype):
    g = torch.Generator().manual_seed(2)
    head = unembedding(2, 4001, 72, "rms", bias=True, dtype=dtype)
    x, final = torch.randn(3, 37, 72, generator=g).to(dtype), torch.randn(37, 72, generator=g).to(dtype)
    targets = torch.randint(-1, 4001, (37, 2), generator=g)
    whole = read(x, head, targets, top_k=7, final=final)
    assert same(whole, read(x, head, targets, top_k=7, final=final))
    monkeypatch.setattr(logit_lens, "ROW_BLOCK", 50)
    assert same(whole, read(x, head, targets, top_k=7, final=final))
    for i in (0, 20, 36):
        alone = read(x[:, i : i + 1], head, targets[i : i + 1], top_k=7, final=final[i : i + 1])
        assert same(alone, Reading(*(piece[:, i : i + 1] for piece in vars(whole).values())))
    layer = read(x[1:2], head, targets, top_k=7, final=final)
    assert same(layer, Reading(*(piece[1:2] for piece in vars(whole).values())))


def test_how_words_are_cut_shows_in_rounding_only(monkeypatch):
    head, g = unembedding(0, 301, 17, "rms", bias=True), torch.Generator().manual_seed(1)
    x, targets = torch.randn(2, 29, 17, generator=g), torch.randint(0, 301, (29, 2), generator=g)
    whole = read(x, head, targets, top_k=40, final=x[0])
    monkeypatch.setattr(lens_torch, "WORD_BLOCK", 48)
    monkeypatch.setattr(lens_cpu, "_PARTS", 2)
    cut = read(x, head, targets, top_k=40, final=x[0])
    assert cut.rank.equal(whole.rank)
    assert cut.top_words.equal(whole.top_words)
    for name in ("log_prob", "entropy", "top_log_prob", "kl"):
        torch.testing.assert_close(getattr(cut, name), getattr(whole, name), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("cuts", [[0, 301], [0, 5, 5, 6, 200, 301], [0, 100, 200, 300, 301]], ids=str)
def test_shards_of_the_vocabulary_make_the_whole(cuts):
    head, g = unembedding(0, 301, 17, "layer", bias=True), torch.Generator().manual_seed(1)
    x, targets = torch.randn(2, 29, 17, generator=g), torch.randint(-1, 301, (29, 3), generator=g)
    targets[:4, 0] = torch.tensor([0, 5, 300, 199])
    shards = [
        dataclasses.replace(head, weight=head.weight[a:b], bias=head.bias[a:b])
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    whole, cut = read(x, head, targets, top_k=9, final=x[1]), read(x, shards, targets, top_k=9, final=x[1])
    assert cut.rank.equal(whole.rank)
    assert cut.top_words.equal(whole.top_words)
    for name in ("log_prob", "entropy", "top_log_prob", "kl"):
        torch.testing.assert_close(getattr(cut, name), getattr(whole, name), rtol=2e-6, atol=2e-6, equal_nan=True)


def test_equal_shards_cover_the_vocabulary_in_order():
    head = unembedding(0, 10, 3, "none", bias=True)
    parts = head.shards(3)
    assert [len(part.weight) for part in parts] == [3, 3, 4]
    assert torch.cat([part.weight for part in parts]).equal(head.weight)
    assert torch.cat([part.bias for part in parts]).equal(head.bias)
    assert parts[1].weight.data_ptr() == head.weight[3:].data_ptr()


def test_words_that_tie_share_the_better_rank_and_stand_in_order(monkeypatch):
    head = Unembedding(torch.tensor([[1.0], [2.0], [2.0], [-1.0]]))
    found = read(torch.ones(1, 4, 1), head, torch.arange(4)[:, None], top_k=4)
    assert found.rank[0, :, 0].tolist() == [3, 1, 1, 4]
    assert found.top_words[0, 0].tolist() == [1, 2, 0, 3]
    # Words with the same vector, as tokens that no training text had, in one tile and in others.
    monkeypatch.setattr(lens_torch, "WORD_BLOCK", 64)
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(300, 40, generator=g)
    twins = torch.tensor([7, 8, 30, 100, 180, 299])
    weight[twins] = weight[7].clone()
    x = torch.randn(2, 23, 40, generator=g)
    x[:, :10] = weight[7] + 0.1 * x[:, :10]
    found = read(x, Unembedding(weight), twins.expand(23, 6), top_k=8)
    assert (found.rank == found.rank[..., :1]).all()
    truth = read_reference(x, Unembedding(weight), twins.expand(23, 6))
    assert found.rank[:, :10].eq(1).all()
    assert found.rank[..., 0].equal(truth.rank.amin(2))
    assert found.top_words[:, :10, :6].equal(twins.expand(2, 10, 6))


def test_the_best_words_may_come_last_or_be_all_alike(monkeypatch):
    monkeypatch.setattr(lens_torch, "WORD_BLOCK", 32)
    none, head = torch.zeros(16, 0, dtype=torch.int64), Unembedding(torch.arange(3000.0)[:, None])
    better = read(torch.full((1, 16, 1), 0.01), head, none, top_k=4).top_words
    assert better.equal(torch.arange(2999, 2995, -1).expand(1, 16, 4))
    alike = read(torch.zeros(1, 16, 1), head, none, top_k=4).top_words
    assert alike.equal(torch.arange(4).expand(1, 16, 4))


def test_all_words_alike():
    found = read(torch.ones(1, 2, 3), Unembedding(torch.ones(5000, 3)), torch.tensor([[4999], [0]]), top_k=20)
    assert found.rank.eq(1).all()
    assert found.top_words.equal(torch.arange(20).expand(1, 2, 20))
    torch.testing.assert_close(found.entropy, torch.full((1, 2), 5000.0).log())


def test_a_target_met_in_another_rounding_is_counted_against_its_own_tile(monkeypatch):
    # Summed in another order than tiles are: without a second walk half of the ranks are off.
    def aim(walker, targets):
        return torch.einsum("n d, q d -> n q", walker._h.flip(1), walker.shard.weight[targets[0]].flip(1))[None]

    monkeypatch.setattr(lens_torch.TorchWalker, "aim", aim)
    g = torch.Generator().manual_seed(4)
    weight = torch.randn(200, 576, generator=g)
    weight[100:] = weight[:100]
    x, head = torch.randn(1, 40, 576, generator=g), Unembedding(weight)
    targets = torch.full((40, 1), 17)
    truth = read_reference(x, head, targets % 100)
    walker = lens_torch.TorchWalker(x, head, 0)
    tile = walker.layered(walker.logits(slice(0, 200), walker.room(200)))[..., 17:18]
    assert not walker.aim(targets).equal(tile)  # or nothing is tested
    tile = (own := lens_cpu.CpuWalker(x, head, 0)).layered(own.logits(slice(0, 200), own.room(200)))[..., 17:18]
    assert not own.aim(targets).equal(tile)
    assert read(x, head, targets).rank.equal(truth.rank)


@given(st.integers(0, 400))
@settings(max_examples=25, deadline=None)
def test_the_compiled_walk_is_the_plain_one(seed):
    g = torch.Generator().manual_seed(seed)
    layers, rows, width, words, q, k = (int(torch.randint(a, b, (), generator=g)) for a, b in SMALL)
    head = unembedding(seed, words, width, "rms", bias=bool(seed % 2), cap=20.0 if seed % 3 else None)
    x = torch.randn(layers, rows, width, generator=g)
    targets, k = torch.randint(-1, words + 5, (rows, q), generator=g), min(k, words)
    own, plain = lens_cpu.CpuWalker(x, head, 2), lens_torch.TorchWalker(x, head, 2)
    plain.multiply = own.multiply  # the products' last bits are compared elsewhere: here the walks alone
    aims = own.aim(targets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lens_torch, "WORD_BLOCK", 48)
        patch.setattr(lens_cpu, "_PARTS", 2)
        found, wanted = (each.walk(targets, aims, k, crossed=True) for each in (own, plain))
    for name in ("top", "own", "above", "best"):
        assert getattr(found, name).equal(getattr(wanted, name)), name
    for name in ("total", "weighted", "crossed"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("k", [1, 2, 7, 90])
def test_the_heap_keeps_the_largest(k):
    numbers = np.random.default_rng(k).permutation(1000).astype(np.int64)
    heap = np.full(k, lens_parts.NO_KEY)
    for number in numbers:
        if number > heap[0]:
            lens_cpu.sift(heap, number)
    assert sorted(heap) == list(range(1000 - k, 1000))


def test_threads_do_not_show_in_any_byte(monkeypatch):
    g = torch.Generator().manual_seed(2)
    head, x = unembedding(2, 401, 72, "rms"), torch.randn(3, 37, 72, generator=g)
    targets = torch.randint(-1, 401, (37, 2), generator=g)
    whole = read(x, head, targets, top_k=7, final=x[0])
    monkeypatch.setattr(compiled, "WORTH_A_THREAD", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        assert same(whole, read(x, head, targets, top_k=7, final=x[0]))
    finally:
        torch.set_num_threads(threads)


def test_norms_are_pytorchs():
    g = torch.Generator().manual_seed(2)
    x, targets = torch.randn(1, 11, 32, generator=g), torch.randint(0, 50, (11, 1), generator=g)
    for norm in ("rms", "layer"):
        head = unembedding(3, 50, 32, norm)
        if norm == "rms":
            h = torch.nn.functional.rms_norm(x, (32,), head.gain, head.eps)
        else:
            h = torch.nn.functional.layer_norm(x, (32,), head.gain, head.shift, head.eps)
        expected = torch.log_softmax(h @ head.weight.T, dim=2).gather(2, targets[None])
        torch.testing.assert_close(read(x, head, targets).log_prob, expected, rtol=1e-5, atol=1e-5)


def test_a_gain_stored_as_an_offset_and_a_cap_are_gemmas():
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    g = torch.Generator().manual_seed(6)
    norm = Gemma2RMSNorm(24, eps=1e-6)
    torch.nn.init.normal_(norm.weight, std=0.3)
    weight, x = torch.randn(90, 24, generator=g), 5 * torch.randn(1, 8, 24, generator=g)
    head = Unembedding(weight, None, "rms", 1.0 + norm.weight.detach(), None, 1e-6, 30.0)
    logits = 30.0 * torch.tanh((norm(x).detach() @ weight.T) / 30.0)
    targets = torch.arange(8)[:, None]
    expected = logits.log_softmax(2).gather(2, targets[None])
    torch.testing.assert_close(read(x, head, targets).log_prob, expected, rtol=1e-5, atol=1e-5)


def test_the_final_layer_is_at_no_distance_from_itself():
    g = torch.Generator().manual_seed(7)
    x = 4 * torch.randn(3, 50, 64, generator=g)
    found = read(x, unembedding(7, 5000, 64, "rms"), torch.zeros(50, 0, dtype=torch.int64), final=x[2])
    assert found.kl[2].eq(0).all()
    assert found.kl[:2].gt(0).all()


def test_huge_logits_do_not_overflow():
    head = Unembedding(torch.tensor([[3e4], [-3e4], [2e4]]))
    got = read(torch.ones(1, 3, 1), head, torch.arange(3)[:, None]).log_prob[0, :, 0]
    torch.testing.assert_close(got, torch.tensor([0.0, -6e4, -1e4]))


def test_keys_sort_by_value_then_against_the_word():
    values = torch.tensor([-torch.inf, -3.5, -1e-40, 0.0, -0.0, 1e-40, 2.0, 2.0, torch.inf])
    words = torch.tensor([3, 2**32 - 1, 5, 1, 0, 9, 8, 7, 0])
    made = lens_parts.keys(values, words)
    assert (made.diff() > 0).all()
    back = lens_parts.unlocked(made)
    assert back[0].equal(values)
    assert back[1].equal(words)


def test_memory_does_not_hold_the_vocabulary(monkeypatch):
    monkeypatch.setattr(logit_lens, "ROW_BLOCK", 64)
    monkeypatch.setattr(lens_torch, "WORD_BLOCK", 64)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            # Views of the inputs cost nothing; what is made must stay within the two tiles of a block.
            if isinstance(out, torch.Tensor) and not func.is_view:
                largest = max(largest, out.numel())
            return out

    head = unembedding(4, 4000, 8, "rms")
    x, targets = torch.randn(1, 300, 8), torch.zeros(300, 1, dtype=torch.int64)
    with Watch():
        read(x, head, targets, top_k=2, final=x[0])
    assert largest <= 2 * 64 * 64


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


def test_what_cannot_be_read_is_refused_by_name():
    head, x = Unembedding(torch.ones(7, 4)), torch.ones(2, 2, 4)
    zeros = torch.zeros(2, 1, dtype=torch.int64)
    unchecked = inspect.unwrap(read)
    with pytest.raises(ValueError, match="target 7 of row 1"):
        read(x, head, torch.tensor([[0], [7]]))
    with pytest.raises(ValueError, match="target -2 of row 0"):
        read(x, head, torch.tensor([[-2], [0]]))
    with pytest.raises(ValueError, match="different models"):
        read(torch.ones(2, 2, 3), head, zeros)
    with pytest.raises(ValueError, match="as many lines of targets"):
        unchecked(x, head, torch.tensor([[0]]))
    with pytest.raises(ValueError, match="has no words"):
        read(x, Unembedding(torch.ones(0, 4)), zeros)
    with pytest.raises(ValueError, match="top_k is 8, the vocabulary has 7"):
        read(x, head, zeros, top_k=8)
    with pytest.raises(ValueError, match=r"final layer has shape \(1, 4\)"):
        unchecked(x, head, zeros, final=torch.ones(1, 4))
    broken = x.clone()
    broken[1, 0, 2] = torch.nan
    with pytest.raises(ValueError, match=r"layer 1 of the call has rows that are not finite: 0 \(1 of 2\)"):
        read(broken, head, zeros)
    broken[1, :, 2] = torch.inf
    with pytest.raises(ValueError, match=r"the final layer has rows that are not finite: 0, 1 \(2 of 2\)"):
        read(x, head, zeros, final=broken[1])
    weight = torch.ones(7, 4)
    weight[3, 1] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite; is the unembedding"):
        read(x, Unembedding(weight), zeros)
