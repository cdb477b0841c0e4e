"""One traced call of a model: the residual stream (or another site) of chosen tokens and layers, while it answers.

Layer 0 is what the first block reads (embeddings with the image features merged), layer l what block l returns; all of
them before the final norm. The call is the model's own `generate`: its first step reads the prompt, each later one the
token before, so that prompt and answer cost what answering costs and positions are what the model itself makes of
the padding. Nothing is chosen, picked or stored here.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from gapprobe.models.model import Model
from gapprobe.models.offload import Offload
from gapprobe.models.sites import IN_TOWER, Site, Tap, taps


@dataclass(frozen=True)
class Traced:
    """What leaves the trace, in main memory.

    Attributes:
        prompt: by layer, kept token (in the order asked for; of a site in the tower, all) and width.
        spoken: by step, layer, row and width: what the decoder read one token at a time. Of an encoder-decoder, step 0
            is the start token; of a decoder, the first generated token.
    """

    prompt: Float[Tensor, "l m d"]
    spoken: Float[Tensor, "s l n d"]


@torch.no_grad()
def trace(
    model: Model,
    inputs: dict[str, Tensor],
    keep: Int[Tensor, " m"],
    layers: Sequence[int],
    *,
    picker: LogitsProcessor | None = None,
    ending: StoppingCriteria | None = None,
    steps: int = 1,
    dtype: torch.dtype | None = None,
    site: Site = "residual",
    out: Float[Tensor, "l m d"] | None = None,
) -> Traced:
    """Let the model answer, and keep the residual stream on the way.

    Args:
        model: the model.
        inputs: what `Model.encode` returned, n rows padded to t tokens, on any device.
        keep: which tokens of the prompts, as row · t + column.
        layers: numbers of the site's layers, rising; of the residual stream 0 to `model.n_layers`.
        picker: sees the logits of each step, `[n v]`; the largest that it returns is the next token.
        ending: says after each step which rows are done.
        steps: the most steps; 1 reads the prompt and no answer.
        dtype: of what is kept; the model's own by default.
        site: what to read. Of a site in the tower all tokens are kept, of all rows one after another, and `keep` counts
            for nothing.
        out: memory for what is kept of the prompts, of `dtype`; on a GPU best pinned. New by default.
    """
    inputs = {name: tensor.to(model.hf.device) for name, tensor in inputs.items()}
    # Without image the outer model of some families cannot run; its language model alone is the same function then.
    path = "" if model.has_media(inputs) else model.family.generator
    entry = operator.attrgetter(path)(model.traced) if path else model.traced
    decoder = taps(model, site, model.family.blocks)
    encoder = taps(model, site, model.family.encoder) if model.family.encoder else None
    n, size, device = len(inputs["attention_mask"]), (len(layers), model.width), model.hf.device
    dtype = dtype or model.dtype

    def room(tokens: int) -> Tensor:
        return torch.empty(size[0], tokens, size[1], dtype=dtype, pin_memory=device.type == "cuda")

    kept = Offload(room(len(keep)) if out is None else out)
    keep, rows = keep.to(device), torch.arange(n, device=device)
    spoken: list[Offload] = []
    seen: list[Tensor] = []

    def read(states: Callable[[int], Tap], into: Offload, lines: Tensor) -> None:
        for layer in layers:
            into.take(states(layer).read(), lines)

    def step(number: int) -> None:
        if number == 0 and encoder is None:
            read(decoder, kept, keep)
        else:
            spoken.append(Offload(room(n)))
            read(decoder, spoken[-1], rows)

    config = model.greedy(steps)
    options = {
        "generation_config": config,
        "logits_processor": LogitsProcessorList([] if picker is None else [picker]),
        "stopping_criteria": StoppingCriteriaList([] if ending is None else [ending]),
    }
    with model.only_asked(config), warnings.catch_warnings():
        # How an open loop over the steps ends when the answer does.
        warnings.filterwarnings("ignore", message=".*was never reached: the loop asked for a step")
        if site in IN_TOWER:
            with entry.trace(**inputs, **options, fn="generate"):
                for layer in layers:
                    state = decoder(layer).read()
                    seen.append(state.reshape(-1, state.shape[-1]).to(dtype).cpu())
            return Traced(torch.stack(seen), torch.empty(0, size[0], n, seen[0].shape[-1], dtype=dtype))
        with entry.trace(**inputs, **options, fn="generate") as tracer:
            if encoder is not None:
                read(encoder, kept, keep)
            for number in tracer.iter[:]:
                step(number)
    done = [step.result() for step in spoken if step.full]
    return Traced(kept.result(), torch.stack(done) if done else torch.empty(0, size[0], n, size[1], dtype=dtype))
