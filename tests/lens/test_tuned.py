"""The tuned lens: what a translator does, files of ours and published ones, training that finds what was planted."""

import json

import numpy as np
import pytest
import torch

import gapprobe as gp
from gapprobe.errors import DataError
from gapprobe.kernels.logit_lens import Unembedding, read_reference
from gapprobe.lens.training import train_tuned_lens
from gapprobe.lens.tuned import TunedLens, load_tuned_lens


@pytest.fixture
def lens():
    g = torch.Generator().manual_seed(0)
    return TunedLens((0, 2), torch.randn(2, 5, 5, generator=g), torch.randn(2, 5, generator=g), 3, "llama", "f" * 64)


def test_a_translator_is_affine_and_the_last_layer_is_left_alone(lens):
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    expected = x.double() + x.double() @ lens.weight[1].double().T + lens.bias[1].double()
    torch.testing.assert_close(lens.translate(x, 2).double(), expected, rtol=1e-5, atol=1e-5)
    assert lens.translate(x, 3).equal(x)
    with pytest.raises(DataError, match=r"no translator of layer 1; it has \[0, 2\]"):
        lens.translate(x, 1)
    with pytest.raises(DataError, match="5 wide, the residuals are 4 wide"):
        lens.translate(x[:, :4], 2)


def test_a_folder_gives_it_back(lens, tmp_path):
    lens.save(tmp_path)
    again = load_tuned_lens(tmp_path)
    assert (again.layers, again.last, again.model, again.weights) == ((0, 2), 3, "llama", "f" * 64)
    assert again.fingerprint == lens.fingerprint
    assert lens.to("cpu").fingerprint == lens.fingerprint


def published(folder, bias=True, **changes):
    """Write what the published package writes: `torch.save` of a module list's state, and its configuration."""
    g = torch.Generator().manual_seed(2)
    layers = torch.nn.ModuleList([torch.nn.Linear(4, 4, bias=bias) for _ in range(3)])
    for parameter in layers.parameters():
        torch.nn.init.normal_(parameter, generator=g)
    config = {"base_model_name_or_path": "pythia", "d_model": 4, "num_hidden_layers": 3, "bias": bias}
    config |= {"base_model_revision": None, "unembed_hash": "ab", "lens_type": "linear_tuned_lens"} | changes
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(layers.state_dict(), folder / "params.pt")
    return layers


@pytest.mark.parametrize("bias", [True, False])
def test_published_lenses_are_read(tmp_path, bias):
    theirs = published(tmp_path, bias)
    ours = load_tuned_lens(tmp_path)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    for layer in range(3):
        torch.testing.assert_close(ours.translate(x, layer), x + theirs[layer](x), rtol=1e-5, atol=1e-5)
    assert ours.translate(x, 3).equal(x)


class Evil:
    def __reduce__(self):
        return (print, ("code that a file must never run",))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "holds list, not fields"),
        (lambda f: published(f, lens_type="cubic"), "lens_type is 'cubic'"),
        (lambda f: published(f, d_model=5), r"0.weight has shape \(4, 4\)"),
        (lambda f: published(f, num_hidden_layers=4), "3.weight is missing"),
        (lambda f: published(f, d_model="4"), "d_model must be a number"),
        (lambda f: published(f, layers=[7]), "different numbers from 0 to 2"),
        (lambda f: torch.save({"0.weight": Evil()}, f / "params.pt"), "cannot be read as tensors"),
        (lambda f: (f / "params.pt").write_bytes(b"junk"), "cannot be read as tensors"),
        (lambda f: torch.save({"0.weight": torch.full((4, 4), torch.nan)}, f / "params.pt"), "NaN or infinity"),
    ],
)
def test_what_is_no_lens_is_refused_by_name(tmp_path, capsys, spoil, message):
    published(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        load_tuned_lens(tmp_path)
    assert "never run" not in capsys.readouterr().out


@pytest.fixture
def planted(store_of):
    """Layers that are an affine map of the last one, so that a perfect lens exists: it diverges by 0."""
    g = torch.Generator().manual_seed(4)
    final = torch.randn(600, 6, generator=g)
    turns = [torch.linalg.qr(torch.randn(6, 6, generator=g))[0] for _ in range(2)]
    layers = torch.stack([*(final @ turn * 3 + 5 * torch.randn(6, generator=g) for turn in turns), final])
    end = Unembedding(torch.randn(17, 6, generator=g), None, "rms", None, None, 1e-5)
    return store_of(layers, [f"row {i}" for i in range(600)]), layers, end


def test_training_finds_an_affine_map_and_says_how_good_it_is_on_rows_held_out(planted):
    store, layers, end = planted
    found = train_tuned_lens(store, end, steps=400, tokens=256, rate=0.05, decay=0.0)
    assert found.lens.layers == (0, 1)
    assert len(found.held_out) == 60
    assert found.table["tokens"].tolist() == [60, 60]
    assert (found.table["kl_tuned"] < found.table["kl_logit"] / 20).all(), found.table
    rows = [int(name.split()[1]) for name in found.held_out]
    moved = torch.stack([found.lens.translate(layers[i][rows], i) for i in range(2)])
    none = torch.empty(60, 0, dtype=torch.int64)
    truth = read_reference(moved, end, none, final=layers[2][rows]).kl.mean(1)
    # A divergence is a difference of numbers near 1: float32 leaves 1e-7 of these.
    np.testing.assert_allclose(found.table["kl_tuned"], truth, rtol=1e-4, atol=1e-6)
    read = gp.logit_lens(store, end, position="last_input", rows=found.held_out, lens=found.lens)
    np.testing.assert_allclose(read.kl[:2].mean(1), truth, rtol=1e-4, atol=1e-6)
    assert read.label.startswith("tuned lens")


def test_the_same_seed_gives_the_same_bytes_and_rows_held_out_leave_no_trace(planted, tmp_path):
    store, layers, end = planted
    apart = [f"row {i}" for i in range(0, 600, 7)]
    given = {"steps": 5, "tokens": 100, "held_out": apart}
    first = train_tuned_lens(store, end, **given)
    assert train_tuned_lens(store, end, **given).lens.fingerprint == first.lens.fingerprint
    assert train_tuned_lens(store, end, **given, seed=1).lens.fingerprint != first.lens.fingerprint
    moved = layers.clone()
    moved[:, ::7] = 1e3
    other = gp.import_activations(tmp_path / "other", moved.transpose(0, 1), ids=store.ids)
    assert train_tuned_lens(other, end, **given).lens.fingerprint == first.lens.fingerprint


def test_kept_readings_of_two_lenses_are_told_apart(planted, tmp_path):
    store, _, end = planted
    g = torch.Generator().manual_seed(5)
    for _ in range(2):
        lens = TunedLens((0, 1), torch.randn(2, 6, 6, generator=g), torch.randn(2, 6, generator=g), 2)
        fresh = gp.logit_lens(store, end, position="last_input", lens=lens)
        kept = gp.logit_lens(store, end, position="last_input", lens=lens, folder=tmp_path)
        np.testing.assert_array_equal(kept.entropy, fresh.entropy)


def test_a_lens_of_another_model_is_refused(planted):
    store, _, end = planted
    lens = TunedLens((0, 1), torch.zeros(2, 6, 6), torch.zeros(2, 6), 2, weights="0" * 64)
    with pytest.raises(DataError, match="made for weights 0000"):
        gp.logit_lens(store, end, position="last_input", lens=lens)


def test_refusals(planted):
    store, _, end = planted
    for changes, message in (
        ({"layers": [2]}, "no layer to train"),
        ({"held_out": 1.0}, "share between 0 and 1"),
        ({"held_out": ["row 1", "row x"]}, "such as row x"),
        ({"rows": ["row 1"], "held_out": ["row 1"]}, "0 rows to train on and 1 held out"),
        ({"steps": 0}, "above 0"),
    ):
        with pytest.raises(DataError, match=message):
            train_tuned_lens(store, end, **changes)
