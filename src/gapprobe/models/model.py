"""A loaded model with its processor: from texts and images to the tensors of a batch. Nothing is run here.

All batches are padded on the left, so that every prompt ends in the same column.
"""

from __future__ import annotations

import json
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import PIL.Image
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from gapprobe.errors import DataError, ModelError
from gapprobe.kernels.logit_lens import Unembedding
from gapprobe.models import fingerprint
from gapprobe.models.families import Family

# Norms whose arithmetic is x / rms(x) * weight. Others of the same look (Gemma's adds one to the weight) are refused.
RMS_NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm"})


@dataclass(frozen=True, eq=False)
class Model:
    """A vision-language model that can be traced. Make it with `load_model`.

    Attributes:
        hf: the Hugging Face model, in evaluation mode.
        processor: its processor; pads on the left.
        family: where the parts are.
        source: the hub id or folder as it was given, or the class of an instantiated model.
        revision: commit of a hub model, else "".
        files: the safetensors files the weights came from; none for an instantiated model.
    """

    hf: PreTrainedModel = field(repr=False)
    processor: ProcessorMixin = field(repr=False)
    family: Family
    source: str
    revision: str = ""
    files: tuple[Path, ...] = ()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the language model."""
        return cast(Any, self.processor).tokenizer

    @property
    def n_layers(self) -> int:
        """Return the number of decoder blocks L; the residual stream has layers 0 to L."""
        return len(cast(nn.ModuleList, self.part(self.family.blocks)))

    @property
    def width(self) -> int:
        """Return the width of the residual stream."""
        return int(cast(Any, self.hf.config).text_config.hidden_size)

    @property
    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(p.numel() for p in self.hf.parameters())

    @property
    def attention(self) -> str:
        """Return the attention implementation of the language model, as transformers names it."""
        config = cast(Any, self.hf.config)
        # transformers has no public name for it.
        return str(config.text_config._attn_implementation or config._attn_implementation)

    @property
    def image_token(self) -> str:
        """Return the token that stands for the image in a prompt."""
        return str(cast(Any, self.processor).image_token)

    @property
    def image_token_id(self) -> int:
        """Return the vocabulary number of the image token."""
        return int(cast(Any, self.hf.config).image_token_id)

    @property
    def pad_token_id(self) -> int:
        """Return the token that pads, always masked."""
        return int(cast(Any, self.tokenizer).pad_token_id)

    @cached_property
    def traced(self) -> Any:
        """Return the nnsight wrapper around `hf`."""
        # nnsight takes a second to import and adds a method to every object of the process.
        from nnsight import NNsight

        with warnings.catch_warnings():
            # It renames the Q-Former's submodules called "output", which no family row names.
            warnings.filterwarnings("ignore", message=".*has a submodule named 'output'")
            return NNsight(self.hf)

    def part(self, path: str) -> nn.Module:
        """Return the module at a dotted path of the family's row; "" is the whole model."""
        return cast(nn.Module, operator.attrgetter(path)(self.hf)) if path else self.hf

    def describe(self) -> dict[str, str]:
        """Return what the header of a store says of the model. Reads all weights once, for their fingerprint."""
        return {
            "source": self.source,
            "revision": self.revision,
            "architecture": type(self.hf).__name__,
            "family": self.family.name,
            "weights": self.weights_fingerprint,
            "config": self.config_fingerprint,
            "dtype": str(self.hf.dtype).removeprefix("torch."),
        }

    @cached_property
    def weights_fingerprint(self) -> str:
        """Return a hash of the weights: of the safetensors files, or of the state in memory where there are none."""
        return fingerprint.of_files(self.files) if self.files else fingerprint.of_state(self.hf)

    @cached_property
    def config_fingerprint(self) -> str:
        """Return a hash of config.json, or of the configuration in memory where there is no file."""
        if not self.files:
            return fingerprint.of_config(self.hf.config.to_dict())
        return fingerprint.of_config(json.loads((self.files[0].parent / "config.json").read_text(encoding="utf-8")))

    @cached_property
    def processor_fingerprint(self) -> str:
        """Return a hash of the image processing, the tokenizers and the chat template."""
        return fingerprint.of_processor(self.processor)

    def refuse_text(self, text: str) -> None:
        """Raise DataError for a text that cannot be a prompt: an empty one, or one that holds the image token."""
        if not text.strip():
            raise DataError("the prompt is empty")
        if self.image_token in text:
            raise DataError(f"the prompt holds the image token {self.image_token}, which only gapprobe may place")

    def render(self, text: str, *, with_image: bool) -> str:
        """Return the prompt with the image token and all that the chat template puts around it."""
        if self.processor.chat_template:
            content = [{"type": "image"}] * with_image + [{"type": "text", "text": text}]
            messages = [{"role": "user", "content": content}]
            return str(cast(Any, self.processor).apply_chat_template(messages, add_generation_prompt=True))
        return self.family.prompt.format(image=self.image_token, text=text) if with_image else text

    def encode(self, texts: Sequence[str], images: Sequence[PIL.Image.Image] | None = None) -> dict[str, Tensor]:
        """Return the tensors of one batch, all with images or all without, on the model's device.

        Args:
            texts: prompts without image token.
            images: one a text, or None.

        Raises:
            DataError: an empty text, one that holds the image token, or as many images as not texts.
        """
        for text in texts:
            self.refuse_text(text)
        if images is not None and len(images) != len(texts):
            raise DataError(f"{len(texts)} prompts came with {len(images)} images")
        prompts = [self.render(text, with_image=images is not None) for text in texts]
        bos = self.tokenizer.bos_token
        options: dict[str, Any] = {"text": prompts, "padding": True, "return_tensors": "pt"}
        if isinstance(bos, str) and prompts[0].startswith(bos):
            options["add_special_tokens"] = False  # the chat template has put it there
        if images is None:
            encoded = dict(cast(Any, self.tokenizer)(**options))
            inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        else:
            inputs = dict(cast(Any, self.processor)(images=list(images), **options))
            inputs["pixel_values"] = inputs["pixel_values"].to(self.hf.dtype)
        # Without these, transformers counts padding as positions in a plain forward (it does not in `generate`).
        inputs["position_ids"] = positions_of(inputs["attention_mask"])
        return {name: tensor.to(self.hf.device) for name, tensor in inputs.items()}

    def refuse_long(self, inputs: dict[str, Tensor], new_tokens: int) -> list[str | None]:
        """Return for each row of a batch why it is too long for the model, or None."""
        config = cast(Any, self.hf.config)
        limit = int(config.text_config.max_position_embeddings)
        told = f"tokens and {new_tokens} for the answer, but the model reads {limit} in all"
        lengths = inputs["attention_mask"].sum(1).tolist()
        reasons = [f"the prompt has {n} {told}" if n + new_tokens > limit else None for n in lengths]
        if "qformer_attention_mask" in inputs:
            limit = int(config.qformer_config.max_position_embeddings)
            for row, n in enumerate(inputs["qformer_attention_mask"].sum(1).tolist()):
                if n > limit:
                    reasons[row] = f"the prompt has {n} tokens for the Q-Former, which reads {limit}"
        return reasons

    def unembedding(self) -> Unembedding:
        """Return the end of the decoder, final norm and unembedding, for the logit lens.

        Raises:
            ModelError: the final norm is of a kind whose arithmetic is not known.
        """
        head = cast(nn.Linear, self.part(self.family.unembedding))
        norm = cast(Any, self.part(self.family.final_norm))
        kind = type(norm).__name__
        if kind in RMS_NORMS:
            return Unembedding(head.weight, head.bias, "rms", gain=norm.weight, eps=float(norm.variance_epsilon))
        if isinstance(norm, nn.LayerNorm):
            return Unembedding(head.weight, head.bias, "layer", norm.weight, norm.bias, norm.eps)
        known = ", ".join([*sorted(RMS_NORMS), "LayerNorm"])
        raise ModelError(f"{self.source}: the final norm {kind} is not known to gapprobe; it knows {known}")

    def first_token(self, answer: str, prompt: str = "Answer:") -> int:
        """Return the first token of `answer` when it follows `prompt` and a space: a target for the logit lens.

        Raises:
            DataError: the answer is empty.
        """
        if not answer.strip():
            raise DataError("an empty answer has no first token")
        before = self.render(prompt, with_image=False)
        whole = before + ("" if before[-1:].isspace() else " ") + answer.strip()
        encode = cast(Any, self.tokenizer)
        short, long = encode(before)["input_ids"], encode(whole)["input_ids"]
        same = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
        return int(long[same])


def positions_of(mask: Int[Tensor, "n t"]) -> Int[Tensor, "n t"]:
    """Return position ids that count the real tokens only, wherever the padding lies."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
