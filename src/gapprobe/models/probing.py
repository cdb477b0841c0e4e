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
    decoders = lists
    if config.is_encoder_decoder or getattr(text, "is_encoder_decoder", False):
        decoders = [path for path in lists if "encoder" not in path]
    blocks = _only(decoders, f"list of {layers} decoder blocks", where)
    beside = hf.get_submodule(blocks.rpartition(".")[0]) if "." in blocks else hf
    prefix = blocks.rpartition(".")[0] + "." if "." in blocks else ""
    norms = [prefix + name for name, module in beside.named_children() if _is_norm(module, width)]
    head = hf.get_output_embeddings()
    heads = [path for path, module in hf.named_modules() if module is head and isinstance(module, nn.Linear)]
    encoders = [path for path in lists if path not in decoders]
    has_media = [name for name in PLACEHOLDERS if getattr(config, name, None) is not None]
    modality: Modality = "text" if not has_media else "audio" if has_media[0].startswith("audio") else "image"
    return Family(
        name=f"probed:{type(hf).__name__}",
        architectures=(type(hf).__name__,),
        language_models=(str(text.model_type),),
        modality=modality,
        blocks=blocks,
        final_norm=_only(norms, f"norm of width {width} beside {blocks}", where),
        unembedding=_only(heads, "unembedding", where),
        encoder=_only(encoders, "list of encoder blocks", where) if encoders else "",
        placeholder=has_media[0] if has_media else "",
        processor_parts=() if modality == "text" else ("image_processor",) if modality == "image" else (),
    )


def _is_norm(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    sized = isinstance(weight, torch.Tensor) and weight.shape == (width,)
    return sized and read_norm(module, width) is not None


def _only(paths: Sequence[str], what: str, where: str) -> str:
    if len(paths) == 1:
        return paths[0]
    found = f"{len(paths)} of them ({', '.join(paths[:4])})" if paths else "none"
    raise ModelError(f"{where}: gapprobe does not know this architecture, and looking for its {what} found {found}")
