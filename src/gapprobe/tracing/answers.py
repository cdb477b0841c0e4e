"""Greedy answers: generated, ended, and cut where the answer stops. Residuals and files are no matter here."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from gapprobe.models.model import Model


@dataclass(frozen=True)
class Answer:
    """What the model said: the text before the stop marker, stripped, and the tokens that make it up."""

    text: str
    token_ids: tuple[int, ...]


def generate(model: Model, inputs: dict[str, Tensor], *, max_new_tokens: int, stop: str | None) -> list[Answer]:
    """Return the greedy answer of each row of a batch.

    The model's own generation settings (sampling, penalties) are left out of account; its end tokens are not. The image
    token is never generated: it is no word, and it could not be read back.
    """
    tokenizer = model.tokenizer
    generator = cast(Any, model.part(model.family.generator) if "pixel_values" not in inputs else model.hf)
    ends = _end_tokens(model)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(ends) or None,
        pad_token_id=model.pad_token_id,
        suppress_tokens=[model.image_token_id],
    )
    width = inputs["input_ids"].shape[1]
    criteria = StoppingCriteriaList([_AtMarker(tokenizer, stop, width)] if stop else [])
    # `generate` works out positions of its own, step by step.
    asked = {name: tensor for name, tensor in inputs.items() if name != "position_ids"}
    with torch.no_grad(), _only(config, generator, model.part(model.family.generator)):
        sequences: Tensor = generator.generate(**asked, generation_config=config, stopping_criteria=criteria)
    return [cut(tokenizer, row[width:].tolist(), ends, stop) for row in sequences]


def cut(tokenizer: PreTrainedTokenizerBase, tokens: list[int], ends: frozenset[int], stop: str | None) -> Answer:
    """Return the answer in generated `tokens`: what stands before the first end token and the first stop marker.

    The answer's tokens are the fewest from the start that hold its text, so neither a marker's tokens nor white space
    behind the answer belong to them; a token that holds the answer's end and the marker's start does.
    """
    end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    tokens = tokens[:end]
    text = _decode(tokenizer, tokens)
    if stop and stop in text:
        text = text[: text.index(stop)]
    text = text.rstrip()
    if not text.strip():
        return Answer("", ())
    size = next(k for k in range(1, len(tokens) + 1) if _decode(tokenizer, tokens[:k]).startswith(text))
    return Answer(text.strip(), tuple(tokens[:size]))


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    decode = cast(Any, tokenizer).decode
    return str(decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _end_tokens(model: Model) -> frozenset[int]:
    config = cast(Any, model.part(model.family.generator)).generation_config
    own: int | list[int] | None = config.eos_token_id if config is not None else None
    last: int | None = cast(Any, model.tokenizer).eos_token_id
    return frozenset(end for end in [*(own if isinstance(own, list) else [own]), last] if end is not None)


@contextmanager
def _only(config: GenerationConfig, *modules: Any) -> Generator[None]:
    """Put `config` in place of the modules' generation settings, which otherwise fill whatever a caller leaves open."""
    before = [module.generation_config for module in modules]
    for module in modules:
        module.generation_config = config
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.generation_config = own


class _AtMarker(StoppingCriteria):
    """Ends a row once the marker stands in what was generated; saves time, changes no answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str, width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width

    def __call__(self, input_ids: Tensor, *_: object, **__: object) -> torch.BoolTensor:
        done = [self.stop in _decode(self.tokenizer, row) for row in input_ids[:, self.width :].tolist()]
        return cast(torch.BoolTensor, torch.tensor(done, device=input_ids.device))
