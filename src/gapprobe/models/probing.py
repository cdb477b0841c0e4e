"""A family for an architecture that has none: its parts told by their shape. Right only if `check_model` says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from gapprobe.errors import ModelError
from gapprobe.models.families.base import Family, Modality
from gapprobe.models.norms import read_norm

PLACEHOLDERS = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")
TOWERS = ("vision", "visual", "audio", "image", "qformer")


def probe_family(hf: PreTrainedModel, where: str) -> Family:
    """Return where an unknown model seems to keep its parts.

    The blocks are the one list of as many modules as the language model has layers, outside the towers; the final norm
    is the one norm of the right width beside them; the unembedding is what transformers takes for it.

    Raises:
        ModelError: a part is not there, or there are several that it could be.
    """
    config = cast(Any, hf.config)
    text = config.get_text_config(decoder=True)
    layers, width = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
    if not isinstance(layers, int) or not isinstance(width, int):
        raise ModelError(f"{where}: its configuration names no number of layers or no width of a language model")
    lists = [
        path
        for path, module in hf.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers and not any(name in path for name in TOWERS)
    ]
    # A T5's block is itself a list.
    lists = [path for path in lists if not any(path.startswith(other + ".") for other in lists)]
    both = bool(config.is_encoder_decoder or getattr(text, "is_encoder_decoder", False))
    encoders = [path for path in lists if both and "encoder" in path]
    blocks = _only([path for path in lists if path not in encoders], f"list of {layers} decoder blocks", where)
    encoder = _only(encoders, "list of encoder blocks", where) if both else ""
    head = hf.get_output_embeddings()
    heads = [path for path, module in hf.named_modules() if module is head and isinstance(module, nn.Linear)]
    inner = [
        path for path, module in hf.named_children() if isinstance(module, PreTrainedModel) and module.can_generate()
    ]
    placeholders = [name for name in PLACEHOLDERS if getattr(config, name, None) is not None]
    modality: Modality = "text"
    if placeholders:
        modality = "audio" if placeholders[0].startswith("audio") else "image"
    return Family(
        name=f"probed:{type(hf).__name__}",
        architectures=(type(hf).__name__,),
        language_models=(str(text.model_type),),
        modality=modality,
        blocks=blocks,
        final_norm=_norm_beside(hf, blocks, width, where),
        unembedding=_only(heads, "unembedding", where),
        encoder=encoder,
        encoder_norm=_norm_beside(hf, encoder, width, where) if both else "",
        generator=inner[0] if len(inner) == 1 else "",
        placeholder=placeholders[0] if placeholders else "",
        # Who has a Q-Former has a processor that puts the image tokens in front.
        prompt="{text}" if hasattr(hf, "qformer") else "{image}\n{text}",
        queries="qformer" if hasattr(hf, "qformer") else "",
        processor_parts=("image_processor",) if modality == "image" else (),
    )


def _norm_beside(hf: PreTrainedModel, blocks: str, width: int, where: str) -> str:
    home, dot, _ = blocks.rpartition(".")
    beside = hf.get_submodule(home) if home else hf
    norms = [home + dot + name for name, module in beside.named_children() if _is_norm(module, width)]
    return _only(norms, f"norm of width {width} beside {blocks}", where)


def _is_norm(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    sized = isinstance(weight, torch.Tensor) and weight.shape == (width,)
    return sized and read_norm(module, width) is not None


def _only(paths: Sequence[str], what: str, where: str) -> str:
    if len(paths) == 1:
        return paths[0]
    found = f"{len(paths)} of them ({', '.join(paths[:4])})" if paths else "none"
    raise ModelError(f"{where}: gapprobe does not know this architecture, and looking for its {what} found {found}")
