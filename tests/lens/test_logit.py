"""The lens over a store: conventions, targets, resuming, refusals, and the same numbers as the kernel's definition."""

import inspect
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import gapprobe as gp
from gapprobe.demo import FOLDER
from gapprobe.errors import ConfigError, DataError, StoreError
from gapprobe.kernels.logit_lens import Unembedding, read_reference, reference
from gapprobe.lens import logit
from gapprobe.lens.logit import _targets, logit_lens
from gapprobe.store.format import ROLES, StoredRow
from gapprobe.store.reader import open_store
from gapprobe.store.writer import StoreWriter

WEIGHTS = "f" * 64
IDS = tuple(f"row-{i}" for i in range(9))
PROMPT = "Question: {} Answer:"


@pytest.fixture
def head():
    g = torch.Generator().manual_seed(0)
    return Unembedding(torch.randn(31, 8, generator=g), None, "rms", torch.rand(8, generator=g), None, 1e-5)


@pytest.fixture
def residuals():
    return torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    return gp.load_model(FOLDER / "models" / "llava")


@pytest.fixture(scope="module")
def answered(model, tmp_path_factory):
    """All tokens of a few rows of a trained model, told and shown."""
    images = gp.load_images(FOLDER / "digits.parquet", ["four"]).by_entity["four"][:3]
    told = [gp.Example(PROMPT.format(f"What is {word} doubled?")) for word in ("two", "three", "four")]
    shown = [gp.Example(PROMPT.format("What is the number in the image doubled?"), image) for image in images]
    folder = tmp_path_factory.mktemp("lens") / "acts"
    return gp.capture(model, [*told, *shown], folder, positions=["all", "last_input"], progress=False)


def test_every_layer_is_its_definition_with_and_without_the_norm(store_of, head, residuals):
    store = store_of(residuals, IDS)
    rows, targets = [IDS[5], IDS[0], IDS[7]], np.array([3, 30, 0])
    bare = Unembedding(head.weight)
    for norm, end in ((True, head), (False, bare)):
        result = logit_lens(store, head, targets, rows=rows, position="last_input", norm=norm, weights=WEIGHTS)
        assert result.layers == (0, 1, 2, 3)
        assert result.ids == tuple(rows)
        assert ("no final norm" in result.label) is not norm
        for layer in range(4):
            truth = reference(residuals[layer][[5, 0, 7]], end, torch.from_numpy(targets))
            np.testing.assert_allclose(result.log_prob[layer, :, 0], truth.log_prob, rtol=1e-5)
            np.testing.assert_array_equal(result.rank[layer, :, 0], truth.rank)
            np.testing.assert_allclose(result.probability[layer, :, 0], np.exp(truth.log_prob), rtol=1e-4)


def test_words_entropy_and_divergence_from_the_last_layer(store_of, head, residuals):
    store = store_of(residuals, IDS)
    found = logit_lens(store, head, np.array([[1, 2]] * 9), position="last_input", layers=[0, 2], top_k=3)
    truth = read_reference(residuals[[0, 2]], head, torch.tensor([[1, 2]] * 9), top_k=3, final=residuals[3])
    np.testing.assert_array_equal(found.top_words, truth.top_words)
    for name in ("log_prob", "entropy", "top_log_prob", "kl"):
        np.testing.assert_allclose(getattr(found, name), getattr(truth, name), rtol=2e-5, atol=2e-6)
    with_last = logit_lens(store, head, position="last_input", top_k=1)
    assert not with_last.kl[3].any()
    assert logit_lens(store, head, position="last_input", divergence=False).kl is None


def test_a_choice_of_layers_and_no_rows(store_of, head, residuals):
    store = store_of(residuals, IDS)
    result = logit_lens(store, head, np.zeros(0, dtype=np.int64), rows=[], position="last_input", layers=[2])
    assert result.log_prob.shape == (1, 0, 1)
    assert result.table.empty


def test_targets_by_row_id(store_of, head, residuals):
    store = store_of(residuals, IDS)
    with pytest.raises(DataError, match="need the model, for its tokenizer"):
        logit_lens(store, head, pd.Series("eight", index=IDS), position="last_input")
    given = pd.Series([[1, 2], [3]] + [[4]] * 7, index=IDS)
    found = logit_lens(store, head, given[::-1], position="last_input")
    np.testing.assert_array_equal(found.targets[:3], [[1, 2], [3, -1], [4, -1]])
    assert np.isnan(found.log_prob[:, 1, 1]).all()
    assert (found.rank[:, 1, 1] == 0).all()


def test_a_residual_that_is_not_finite_is_skipped_and_the_others_are_read(store_of, head, residuals, tmp_path):
    whole = logit_lens(store_of(residuals, IDS), head, np.arange(9), position="last_input", top_k=2)
    spoilt = residuals.clone()
    spoilt[1, 4, 3] = torch.inf
    spoilt[3, 6, 0] = torch.nan
    store = gp.import_activations(tmp_path / "spoilt", spoilt.transpose(0, 1), ids=IDS, allow_nonfinite=True)
    found = logit_lens(store, head, np.arange(9), position=store.header.positions[0], top_k=2)
    assert found.skipped == 2
    lost = np.zeros((4, 9), dtype=bool)
    lost[1, 4] = lost[3, 6] = True
    for name in ("log_prob", "rank", "entropy", "top_words", "top_log_prob"):
        ours, theirs = getattr(found, name), getattr(whole, name)
        np.testing.assert_array_equal(ours[~lost], theirs[~lost], err_msg=name)
    assert np.isnan(found.log_prob[lost]).all()
    assert (found.rank[lost] == 0).all()
    assert (found.top_words[lost] == -1).all()
    assert found.kl is not None
    lost[:, 6] = True  # without the last layer there is nothing to compare with
    np.testing.assert_array_equal(np.isnan(found.kl), lost)


def test_the_last_layer_says_what_the_model_said(answered, model):
    """The oracle is the model: what it generated is the best word of its last layer at the last input token."""
    found = logit_lens(answered, model, "generated", position="last_input", top_k=2)
    first = np.array([tokens[0] for tokens in answered.rows["answer_token_ids"]])
    np.testing.assert_array_equal(found.targets[:, 0], first)
    np.testing.assert_array_equal(found.top_words[-1, :, 0], first)
    assert (found.rank[-1] == 1).all()
    said = np.array([logs[0] for logs in answered.rows["answer_logprobs"]])
    np.testing.assert_allclose(found.log_prob[-1, :, 0], said, atol=1e-5)


def test_next_tokens_of_all_tokens_and_whole_answers_by_teacher_forcing(answered, model):
    found = logit_lens(answered, model, "next", top_k=1)
    batch = answered.batch()
    np.testing.assert_array_equal(found.token_ids, batch.token_ids)
    ends = batch.offsets[1:].numpy() - 1
    inside = np.setdiff1d(np.arange(len(found.row)), ends)
    np.testing.assert_array_equal(found.targets[inside, 0], found.token_ids[inside + 1])
    assert (found.targets[ends] == -1).all()
    sums = found.answers()
    for i in range(len(found.ids)):
        mine = (found.row == i) & (found.token_roles == ROLES["answer"])
        before = np.flatnonzero(mine) - 1
        np.testing.assert_allclose(sums[:, i], found.log_prob[:, before, 0].sum(1), rtol=1e-6)
    # What the model itself gave its answer, token by token.
    said = np.array([logs.sum() for logs in answered.rows["answer_logprobs"]])
    np.testing.assert_allclose(sums[-1], said, atol=1e-5)


def test_answers_in_words_are_read_at_their_first_token(answered, model):
    gold = pd.Series("eight", index=answered.ids)
    found = logit_lens(answered, model, gold, position="last_input")
    column = logit_lens(answered, model, "answer", position="last_input")
    assert column.targets[:, 0].tolist() == [model.first_token(answer) for answer in answered.rows["answer"]]
    assert (found.targets == model.first_token("eight")).all()
    assert "first token of the answer" in found.label
    told = found.by_layer(pd.Series(["told"] * 3 + ["shown"] * 3, index=answered.ids), replicates=50)
    assert list(told.groupby("group", sort=False)["n"].first()) == [3, 3]
    line = told[(told["group"] == "shown") & (told["layer"] == 6)].iloc[0]
    assert line["probability"] == pytest.approx(float(found.probability[6, 3:, 0].mean()), rel=1e-6)
    assert line["ci_low"] <= line["probability"] <= line["ci_high"]


def test_blocks_of_rows_change_nothing_and_a_stopped_call_goes_on(answered, model, monkeypatch, tmp_path):
    whole = logit_lens(answered, model, "next", top_k=4)
    monkeypatch.setattr(logit, "BLOCK", 100_000)
    asked = []
    batch = type(answered).batch

    def counted(self, rows, *rest):
        asked.append(tuple(rows))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return batch(self, rows, *rest)

    monkeypatch.setattr(type(answered), "batch", counted)
    with pytest.raises(KeyboardInterrupt):
        logit_lens(answered, model, "next", top_k=4, folder=tmp_path)
    parts = logit_lens(answered, model, "next", top_k=4, folder=tmp_path)
    assert len(asked) > 3
    assert len(set(asked)) == len(asked) - 1  # only the block in hand is read again
    for name, value in vars(whole).items():
        np.testing.assert_array_equal(getattr(parts, name), value, err_msg=name)
    before = len(asked)
    logit_lens(answered, model, "next", top_k=4, folder=tmp_path)
    assert len(asked) == before
    logit_lens(answered, model, "next", top_k=4, folder=tmp_path, norm=False)
    assert len(asked) > before  # another convention is another result


def test_kept_results_are_of_one_store_one_end_and_read_anew_where_they_are_damaged(
    store_of, head, residuals, tmp_path
):
    given = {"position": "last_input", "folder": tmp_path / "kept"}
    one = logit_lens(store_of(residuals, IDS), head, np.arange(9), **given)
    # Another store of the same header and ids, another end of the same shape: other numbers.
    shutil.rmtree(tmp_path / "store")
    store = store_of(-residuals, IDS)
    other = logit_lens(store, head, np.arange(9), **given)
    np.testing.assert_array_equal(other.log_prob, logit_lens(store, head, np.arange(9), position="last_input").log_prob)
    assert not np.allclose(one.log_prob, other.log_prob)
    scaled = replace(head, gain=head.gain * 2)
    np.testing.assert_array_equal(
        logit_lens(store, scaled, np.arange(9), **given).log_prob,
        logit_lens(store, scaled, np.arange(9), position="last_input").log_prob,
    )
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == 3
    for spoil in (b"", b"no safetensors", files[0].read_bytes()[:-5]):
        for file in files:
            file.write_bytes(spoil)
        again = logit_lens(store, head, np.arange(9), **given)
        np.testing.assert_array_equal(again.log_prob, other.log_prob)


def test_an_answer_without_the_token_before_it_has_no_probability(tmp_path, store_of, head, residuals):
    """Row a keeps prompt and answer; row b the answer alone, whose first token cannot be read; row c no answer."""
    header = store_of(residuals, IDS).header
    answer, asked = ROLES["answer"], ROLES["question"]
    with StoreWriter(tmp_path / "answers", header) as writer:
        for name, roles in (("a", [asked, answer, answer]), ("b", [answer, answer]), ("c", [asked, asked])):
            n = len(roles)
            tokens, codes = torch.arange(n), torch.zeros(n, dtype=torch.uint8)
            x = torch.randn(4, n, 8, generator=torch.Generator().manual_seed(n))
            row = StoredRow(name, {}, x, tokens, torch.arange(n), torch.tensor(roles, dtype=torch.uint8), codes)
            writer.append([row])
    found = logit_lens(open_store(tmp_path / "answers"), head, "next")
    sums = found.answers()
    np.testing.assert_allclose(sums[:, found.ids.index("a")], found.log_prob[:, :2, 0].sum(1), rtol=1e-6)
    assert np.isnan(sums[:, [found.ids.index("b"), found.ids.index("c")]]).all()


def test_a_lens_says_what_it_was_made_for(store_of, head, residuals):
    store = store_of(residuals, IDS)
    for name, value, message in (
        ("weights", "0" * 64, "made for weights 0000"),
        ("last", 7, "leads to layer 7, the model's last is 3"),
    ):
        lens = Halved()
        setattr(lens, name, value)
        with pytest.raises(DataError, match=message):
            logit_lens(store, head, lens=lens, position="last_input")
    lens.last, lens.weights = 3, WEIGHTS
    logit_lens(store, head, lens=lens, position="last_input", weights=WEIGHTS)


def test_the_next_token_is_the_one_at_the_next_position_of_the_same_row(tmp_path, store_of, head, residuals):
    """Of the first row a token in the middle was not kept; the second goes on counting where the first ends."""
    header = store_of(residuals, IDS).header
    with StoreWriter(tmp_path / "gaps", header) as writer:
        for name, ids, positions in (("a", [5, 6, 7], [3, 4, 6]), ("b", [8, 9], [7, 8])):
            tokens = torch.tensor(ids)
            x, codes = torch.randn(4, len(ids), 8), torch.zeros(len(ids), dtype=torch.uint8)
            writer.append([StoredRow(name, {}, x, tokens, torch.tensor(positions), codes, codes)])
    found = logit_lens(open_store(tmp_path / "gaps"), head, "next")
    assert found.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert found.targets[:, 0].tolist() == [6, -1, -1, 9, -1]


class Halved:
    """A lens of one's own."""

    name = "halved"

    def translate(self, x, layer):
        assert layer < 3, "the last layer is never translated"
        return x / 2 if layer == 1 else x


def test_a_lens_of_ones_own(store_of, head, residuals, tmp_path):
    store = store_of(residuals, IDS)
    bare = {"position": "last_input", "norm": False}
    found = logit_lens(store, head, np.arange(9), lens=Halved(), **bare)
    truth = reference(residuals[1] / 2, Unembedding(head.weight), torch.arange(9))
    np.testing.assert_allclose(found.log_prob[1, :, 0], truth.log_prob, rtol=1e-5)
    plain = logit_lens(store, head, np.arange(9), **bare)
    np.testing.assert_array_equal(found.log_prob[[0, 2, 3]], plain.log_prob[[0, 2, 3]])
    assert found.label.startswith("halved lens")
    with pytest.raises(ConfigError, match="has no `fingerprint`"):
        logit_lens(store, head, lens=Halved(), position="last_input", folder=tmp_path)
    with pytest.raises(ConfigError, match="no lens is called 'halve'; there are logit"):
        logit_lens(store, head, lens="halve", position="last_input")


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda x: x[0], r"gives a tensor \[8\] at layer 0"),
        (lambda x: x[:, :3], r"gives a tensor \[9, 3\] at layer 0"),
        (lambda x: x * torch.nan, r"gives a tensor \[9, 8\] at layer 0, in place of finite"),
        (lambda x: x.numpy(), "gives ndarray at layer 0"),
    ],
)
def test_a_lens_that_gives_something_else_is_named(store_of, head, residuals, made, told):
    lens = Halved()
    lens.translate = lambda x, _: made(x)
    with pytest.raises(DataError, match=told):
        logit_lens(store_of(residuals, IDS), head, lens=lens, position="last_input")


def test_targets_that_are_no_numbers_of_tokens_are_refused(store_of, head, residuals):
    targets_of = inspect.unwrap(_targets)  # as users reach it, whom no type checker stops
    store = store_of(residuals, IDS)
    for wrong in (np.full(9, 1.7), np.full(9, np.nan), ["a"] * 9, np.ones(9, bool), np.ones((9, 1, 1), int)):
        with pytest.raises(DataError, match=r"are numbers of tokens, \[n\] or \[n q\], not"):
            targets_of(store, head, wrong, IDS, "last_input")


def test_refusals(store_of, head, residuals):
    store = store_of(residuals, IDS)
    given = {"position": "last_input"}
    zeros = np.zeros(9, dtype=np.int64)
    with pytest.raises(StoreError, match="read it with the model that made it"):
        logit_lens(store, head, zeros, **given, weights="0" * 64)
    with pytest.raises(StoreError, match="8 wide, the unembedding 5"):
        logit_lens(store, Unembedding(torch.zeros(3, 5)), zeros, **given)
    with pytest.raises(DataError, match="row row-2: target 31 is no token, the vocabulary has 31"):
        logit_lens(store, head, np.array([0, 0, 31, 0, 0, 0, 0, 0, 0]), **given)
    with pytest.raises(DataError, match="9 rows and 2 lines of targets"):
        logit_lens(store, head, np.zeros(2, dtype=np.int64), **given)
    with pytest.raises(DataError, match="1 rows have none, such as row-3"):
        logit_lens(store, head, pd.Series(0, index=IDS).drop("row-3"), **given)
    with pytest.raises(DataError, match="row row-0: the target 1.5 is neither"):
        logit_lens(store, head, pd.Series([1.5] * 9, index=IDS), **given)
    with pytest.raises(DataError, match="top_k is -1: ask for 0 words or more"):
        logit_lens(store, head, top_k=-1, **given)
    assert logit_lens(store, head, top_k=32, **given).top_words.shape[2] == 31
    with pytest.raises(DataError, match="leave `position` out"):
        logit_lens(store, head, "next", **given)
    with pytest.raises(DataError, match="no column 'gold'"):
        logit_lens(store, head, "gold", **given)
    with pytest.raises(DataError, match="no generated tokens"):
        logit_lens(store, head, "generated", **given)
    with pytest.raises(StoreError, match="no layer 9"):
        logit_lens(store, head, zeros, **given, layers=[9])
    with pytest.raises(StoreError, match="no position 'first'"):
        logit_lens(store, head, zeros, position="first")
