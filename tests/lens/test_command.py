"""`gapprobe lens` on a trained model."""

import numpy as np
import pytest

import gapprobe as gp
from gapprobe.cli import main
from gapprobe.demo import FOLDER

MODEL = FOLDER / "models" / "llava"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    words = {"two": "four", "three": "six", "four": "eight"}
    asked = [
        gp.Example(f"Question: What is {word} doubled? Answer:", columns={"gold": double, "how": "told"})
        for word, double in words.items()
    ]
    folder = tmp_path_factory.mktemp("lens") / "acts"
    gp.capture(gp.load_model(MODEL), asked, folder, positions=["all", "last_input"], progress=False)
    return folder


def test_answers_by_group(store, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--targets", "gold", "--position", "last_input", "--by", "how", "--layers", "2", "6", "--out", str(out)]
    main(["lens", str(store), str(MODEL), *more])
    assert "target: first token of the answer: 3 tokens, 2 layers" in capsys.readouterr().out
    found = gp.load_lens_reading(out / "reading.safetensors")
    straight = gp.logit_lens(
        gp.open_store(store), gp.load_model(MODEL), "gold", position="last_input", layers=[2, 6], divergence=True
    )
    np.testing.assert_array_equal(found.log_prob, straight.log_prob)
    assert "told" in (out / "by_layer.csv").read_text()
    assert "plotly" in (out / "by_layer.html").read_text()
    assert "plotly" in (out / "tokens.html").read_text()


def test_words_of_all_tokens_without_norm(store, tmp_path, capsys):
    row = gp.open_store(store).ids[1]
    main(["lens", str(store), str(MODEL), "--no-norm", "--row", row, "--top-k", "2", "--out", str(tmp_path)])
    assert "no final norm" in capsys.readouterr().out
    assert not (tmp_path / "by_layer.csv").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--by", "colour", "--targets", "next", "--position", "last_input"], "no column 'colour'; it has"),
        (["--by", "setting"], "wants --targets and --position too"),
        (["--row", "x"], "no row 'x'"),
        (["--targets", "colour"], "no column 'colour'; targets are"),
        (["--lens", "nowhere"], "no lens is called 'nowhere'"),
        (["--position", "image"], "no position 'image'"),
    ],
)
def test_what_cannot_be_is_one_line(store, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as stop:
        main(["lens", str(store), str(MODEL), "--out", str(tmp_path), *more])
    assert stop.value.code == 1
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
