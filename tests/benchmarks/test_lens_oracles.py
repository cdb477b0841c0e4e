"""The comparison with other packages' lenses: it passes what is right and stops at what is not."""

import json

import pytest
import torch

import gapprobe as gp
from benchmarks._outcome import WrongResult
from benchmarks.lens_oracles import TEXTS, compared, render
from gapprobe.demo import FOLDER


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Return our reading of two texts, and all log-probabilities by Hugging Face's own states, [n l v]."""
    model = gp.load_model(FOLDER / "models" / "llava", attention="eager")
    store = gp.capture(
        model,
        [gp.Example(text) for text in TEXTS[:2]],
        tmp_path_factory.mktemp("oracle") / "store",
        positions=["prompt"],
        max_new_tokens=0,
        progress=False,
    )
    ours = gp.logit_lens(store, model, "next", layers=store.header.layers[:-1], top_k=5, divergence=False)
    theirs = []
    for text in store.rows["text"]:
        with torch.no_grad():
            states = model.hf(**model.encode([text]), output_hidden_states=True).hidden_states[:-1]
            logits = model.hf.lm_head(model.hf.model.language_model.norm(torch.stack(states)[:, 0]))
        theirs.append(logits.log_softmax(-1).movedim(0, 1))
    return ours, torch.cat(theirs)


def test_what_hugging_face_reads_agrees(both):
    ours, theirs = both
    found = compared("hf", ours, theirs)
    assert found["ranks"] == found["ranks_same"] == ours.log_prob.size - 2 * len(ours.layers)
    assert found["words_same"] == 1.0


def test_another_reading_is_told(both):
    ours, theirs = both
    with pytest.raises(WrongResult, match="hf: log-probability differs"):
        compared("hf", ours, theirs.roll(1, dims=1))
    # One word of one token at one layer, the best one, is as improbable as the worst.
    wrong = theirs.clone()
    wrong[0, 2, theirs[0, 2].argmax()] = theirs[0, 2].min()
    with pytest.raises(WrongResult, match="hf: (entropy|best words)"):
        compared("hf", ours, wrong)


def test_the_table_has_every_oracle(both, tmp_path):
    rows = [compared("hf: plain", *both)]
    source = tmp_path / "lens-oracles-2026-01-02.json"
    source.write_text(json.dumps({"rows": rows, "requirements": {"hf": ["transformers==5"]}}))
    render(source, tmp_path)
    table = (tmp_path / "lens-oracles.md").read_text(encoding="utf-8")
    assert "hf: plain" in table
    assert "transformers==5" in table
