"""What other packages' lenses read, each run in an environment of its own: `lens_oracles` starts this file.

    python lens_elsewhere.py nnterp FOLDER     (FOLDER: a LLaVA, and texts.json)
    python lens_elsewhere.py tuned-lens FOLDER (FOLDER: a Llama in `language`, and tokens.json)

It imports nothing of gapprobe: an oracle that shared our code would be none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def by_nnterp(folder: Path) -> None:
    """Write probabilities of the word after each text, [texts, blocks, words], by `nnterp.interventions.logit_lens`."""
    from nnterp import StandardizedTransformer
    from nnterp.interventions import logit_lens
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    hf = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    # Its check of names runs a text alone and looks for the unembedding in one place.
    model = StandardizedTransformer(hf, tokenizer=tokenizer, check_renaming=False)
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    # One at a time: padded rows would not be told their positions.
    save_file({"probabilities": torch.cat([logit_lens(model, [text]) for text in texts])}, folder / "found.safetensors")


def by_tuned_lens(folder: Path) -> None:
    """Write log-probabilities at every layer and token, [tokens, layers, words], of a lens with random translators.

    The lens is saved, for us to read.
    """
    from transformers import LlamaForCausalLM
    from tuned_lens.nn.lenses import LogitLens, TunedLens
    from tuned_lens.plotting import PredictionTrajectory

    model = LlamaForCausalLM.from_pretrained(
        folder / "language", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    torch.manual_seed(0)
    tuned = TunedLens.from_model(model)
    for translator in tuned.layer_translators:
        torch.nn.init.normal_(translator.weight, std=0.02)
        torch.nn.init.normal_(translator.bias, std=0.1)
    tuned.save(folder / "lens")
    tokens = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    for name, lens in (("tuned", tuned), ("logit", LogitLens.from_model(model))):
        with torch.no_grad():
            read = [PredictionTrajectory.from_lens_and_model(lens, model, row).log_probs for row in tokens]
        found = torch.cat([torch.from_numpy(each).movedim(0, 1) for each in read]).contiguous()
        save_file({"log_probabilities": found}, folder / f"{name}.safetensors")


if __name__ == "__main__":
    {"nnterp": by_nnterp, "tuned-lens": by_tuned_lens}[sys.argv[1]](Path(sys.argv[2]))
