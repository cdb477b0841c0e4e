"""Another library's numbers: TransformerLens on the same trained LLaVA."""

import numpy as np
import torch

import gapprobe as gp
from gapprobe.demo import FOLDER

TEXT = "Question: What is four doubled? Answer:"
ROUNDING = 2e-5  # of float32 logits of about 10


def test_transformer_lens_reads_the_same_off_a_llava(tmp_path):
    model = gp.load_model(FOLDER / "models" / "llava", attention="eager")
    store = gp.capture(model, [gp.Example(TEXT)], tmp_path / "acts", positions=["last_input"], progress=False)
    words = torch.tensor([model.first_token("eight"), model.first_token("four")])
    ours = gp.logit_lens(store, model, words[None].numpy(), position="last_input", top_k=1)
    inputs = model.encode([TEXT])["input_ids"]
    bridge = gp.to_transformer_lens(model)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(inputs)
        stack = cache.accumulated_resid(layer=None, incl_mid=False)[:, 0, -1]
        log_probs = torch.log_softmax(bridge.unembed(bridge.ln_final(stack[None]))[0].double(), -1)
    np.testing.assert_allclose(ours.log_prob[:, 0], log_probs[:, words], atol=ROUNDING)
    np.testing.assert_array_equal(ours.top_words[:, 0, 0], log_probs.argmax(-1))
    ranks = 1 + (log_probs[:, None] > log_probs[:, words, None]).sum(-1)
    np.testing.assert_array_equal(ours.rank[:, 0], ranks)

    # Its direct logit attribution divides every layer by the last one's length, where a lens takes the layer's own.
    bridge.enable_compatibility_mode(disable_warnings=True)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(inputs)
        whole = cache.accumulated_resid(layer=None, incl_mid=False)
        attributed = cache.logit_attrs(whole, tokens=words[:1], incorrect_tokens=words[1:])[:, 0, -1]
    x = torch.cat([store.layer(layer, position="last_input") for layer in store.header.layers]).double()
    length = (x.square().mean(1) + model.unembedding().eps).sqrt().numpy()
    difference = ours.log_prob[:, 0, 0] - ours.log_prob[:, 0, 1]
    np.testing.assert_allclose(attributed, difference * length / length[-1], atol=ROUNDING)
