"""Hashes by which a store knows its model and processor again. Nothing is loaded here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


def of_files(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of one file's content; of several, that of the lines `sha256sum` prints for them by name."""
    lines: list[tuple[str, str]] = []
    for path in sorted(paths):
        with path.open("rb") as file:
            lines.append((hashlib.file_digest(file, "sha256").hexdigest(), path.name))
    if len(lines) == 1:
        return lines[0][0]
    return hashlib.sha256("".join(f"{digest}  {name}\n" for digest, name in lines).encode()).hexdigest()


def of_state(hf: PreTrainedModel) -> str:
    """Return a SHA-256 of all parameters and buffers in memory, one tensor at a time."""
    digest = hashlib.sha256()
    for name, tensor in sorted(hf.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def of_config(config: dict[str, Any]) -> str:
    """Return a SHA-256 of a configuration, without what does not change the mathematics (paths, versions, dtype)."""
    return _of_json(_without(config, {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}))


def of_processor(processor: ProcessorMixin | PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 of the image processing, the tokenizers and the chat template."""
    if isinstance(processor, PreTrainedTokenizerBase):
        template = {"chat_template": processor.chat_template}
        return _of_json(template | {"tokenizer": _tokenizer(processor)})
    parts: dict[str, Any] = {"class": type(processor).__name__, "chat_template": processor.chat_template}
    parts["scalars"] = {k: v for k, v in vars(processor).items() if isinstance(v, str | int | float | bool)}
    for name in sorted(processor.get_attributes()):
        part = getattr(processor, name)
        if hasattr(part, "get_vocab"):
            parts[name] = _tokenizer(part)
        else:
            parts[name] = part.to_dict()
    return _of_json(parts)


def _tokenizer(part: Any) -> dict[str, Any]:
    if not hasattr(part, "backend_tokenizer"):
        return {"vocabulary": part.get_vocab(), "special": str(part.special_tokens_map)}
    # Padding and truncation are what the latest call asked for, not what the tokenizer is.
    tokenizer = json.loads(part.backend_tokenizer.to_str())
    return tokenizer | {"padding": None, "truncation": None, "side": part.padding_side}


def _without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {str(k): _without(v, keys) for k, v in value.items() if k not in keys}
    return value


def _of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
