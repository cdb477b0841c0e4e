"""A loaded model with its processor: from texts and pictures to the tensors of a batch. Nothing is run here.

All batches are padded on the left, so that every prompt ends in the same column.
"""

from __future__ import annotations

import json
import operator
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from gapprobe.errors import DataError, ModelError
from gapprobe.kernels.logit_lens import Unembedding
from gapprobe.models import fingerprint
from gapprobe.models.families.base import Family
from gapprobe.models.layouts import LAYOUTS
from gapprobe.models.norms import read_norm
from gapprobe.sound import Sound

# Stands for the user's text in a chat template, to see what the template puts around it; no template looks for it.
STAND_IN = "\ue000"
Medium = PIL.Image.Image | Sound
# Tokens by which processors put pictures, films and sound into a prompt.
MEDIA_TOKENS = ("image_token", "boi_token", "video_token", "audio_token")


@dataclass(frozen=True, eq=False)
class Model:
    """A model that can be traced. Make it with `load_model`.

    Attributes:
        hf: the Hugging Face model, in evaluation mode.
        processor: its processor, or the tokenizer of a model that only reads text; pads on the left.
        family: where the parts are.
        source: the hub id or folder as it was given, or the class of an instantiated model.
        revision: commit of a hub model, else "".
        files: the safetensors files the weights came from; none for an instantiated model.
        random_weights: the seed that the weights were drawn with, where they were not trained.
    """

    hf: PreTrainedModel = field(repr=False)
    processor: ProcessorMixin | PreTrainedTokenizerBase = field(repr=False)
    family: Family
    source: str
    revision: str = ""
    files: tuple[Path, ...] = ()
    random_weights: int | None = None
    _text_starts: dict[tuple[bool, str], int] = field(
        default_factory=dict[tuple[bool, str], int], init=False, repr=False
    )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the language model."""
        return cast(Any, getattr(self.processor, "tokenizer", self.processor))

    @property
    def text_config(self) -> Any:
        """Return the configuration of the language model."""
        return cast(Any, self.hf.config).get_text_config(decoder=True)

    @property
    def n_layers(self) -> int:
        """Return the number of decoder blocks L; the residual stream has layers 0 to L."""
        return len(cast(nn.ModuleList, self.part(self.family.blocks)))

    @property
    def width(self) -> int:
        """Return the width of the residual stream."""
        return int(self.text_config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the residual stream."""
        # The model's own word is the dtype of its first parameter, and some keep a few in float32.
        return cast(Any, self.hf).get_input_embeddings().weight.dtype

    @property
    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(p.numel() for p in self.hf.parameters())

    @property
    def attention(self) -> str:
        """Return the attention implementation of the language model, as transformers names it."""
        # transformers has no public name for it.
        return str(self.text_config._attn_implementation or cast(Any, self.hf.config)._attn_implementation)

    @property
    def media_token_id(self) -> int | None:
        """Return the vocabulary number of the token that stands for image or sound; None where there is none."""
        path = self.family.placeholder
        return int(operator.attrgetter(path)(self.hf.config)) if path else None

    @property
    def media_token(self) -> str:
        """Return the token that stands for image or sound in a prompt."""
        processor = cast(Any, self.processor)
        if self.family.modality == "audio":
            return str(processor.audio_token)
        # Gemma 3 puts the tokens of the picture behind a token of their beginning.
        return str(getattr(processor, "boi_token", None) or processor.image_token)

    @cached_property
    def _media_tokens(self) -> frozenset[str]:
        """Return all tokens by which the processor puts pictures, films and sound into a prompt."""
        found = {str(token) for name in MEDIA_TOKENS if (token := getattr(self.processor, name, None))}
        if self.media_token_id is not None:
            # Gemma 3's processor puts others in the place of the one that a prompt holds.
            found.add(str(cast(Any, self.tokenizer).convert_ids_to_tokens(self.media_token_id)))
        return frozenset(found)

    @property
    def pad_token_id(self) -> int:
        """Return the token that pads, always masked."""
        return int(cast(Any, self.tokenizer).pad_token_id)

    @property
    def starts(self) -> tuple[int, ...]:
        """Return the tokens that the decoder of an encoder-decoder reads before its answer; none of other models."""
        return (int(self.text_config.decoder_start_token_id),) if self.family.encoder else ()

    @cached_property
    def traced(self) -> Any:
        """Return the nnsight wrapper around `hf`."""
        # nnsight takes a second to import and adds a method to every object of the process.
        from nnsight import NNsight

        with warnings.catch_warnings():
            # It renames the Q-Former's submodules called "output", which no family names.
            warnings.filterwarnings("ignore", message=".*has a submodule named 'output'")
            return NNsight(self.hf)

    def part(self, path: str) -> nn.Module:
        """Return the module at a dotted path of the family's row; "" is the whole model."""
        return cast(nn.Module, operator.attrgetter(path)(self.hf)) if path else self.hf

    def greedy(self, steps: int, **more: Any) -> GenerationConfig:
        """Return generation settings that take the most probable token, so many times, and nothing else."""
        start = {"decoder_start_token_id": self.starts[0]} if self.starts else {}
        return GenerationConfig(
            max_new_tokens=steps, do_sample=False, pad_token_id=self.pad_token_id, use_cache=steps > 1, **start, **more
        )

    @contextmanager
    def only_asked(self, config: GenerationConfig) -> Generator[None]:
        """Put `config` in place of the model's generation settings, which else fill whatever a caller leaves open."""
        modules = [cast(Any, module) for module in {self.hf, self.part(self.family.generator)}]
        before = [module.generation_config for module in modules]
        for module in modules:
            module.generation_config = config
        try:
            yield
        finally:
            for module, own in zip(modules, before, strict=True):
                module.generation_config = own

    @property
    def end_tokens(self) -> frozenset[int]:
        """Return the tokens that end an answer."""
        found: list[int | None] = [cast(Any, self.tokenizer).eos_token_id]
        # What a folder says of generation does not reach a language model inside the model.
        for module in (self.hf, self.part(self.family.generator)):
            config = cast(Any, module).generation_config
            own: int | list[int] | None = config.eos_token_id if config is not None else None
            found += own if isinstance(own, list) else [own]
        return frozenset(end for end in found if end is not None)

    def describe(self) -> dict[str, str]:
        """Return what the header of a store says of the model. Reads all weights once, for their fingerprint."""
        return {
            "source": self.source,
            "revision": self.revision,
            "architecture": type(self.hf).__name__,
            "family": self.family.name,
            "weights": self.weights_fingerprint,
            "config": self.config_fingerprint,
            "dtype": str(self.dtype).removeprefix("torch."),
        } | ({} if self.random_weights is None else {"random_weights": str(self.random_weights)})

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

    @staticmethod
    def has_media(inputs: dict[str, Tensor]) -> bool:
        """Return whether a batch that `encode` made has pictures or sound."""
        return any(name.startswith(("pixel_values", "input_features")) for name in inputs)

    def refuse_text(self, text: str) -> None:
        """Raise DataError for a text that cannot be a prompt: an empty one, or one that holds the image token."""
        if not text.strip():
            raise DataError("the prompt is empty")
        for token in self._media_tokens:
            if token in text:
                raise DataError(
                    f"the prompt holds the token {token}, which stands for image, film or sound: only gapprobe may "
                    "place it"
                )

    def render(self, text: str, *, with_image: bool) -> str:
        """Return the prompt with the image token and all that the chat template puts around it."""
        if self.processor.chat_template:
            if isinstance(self.processor, PreTrainedTokenizerBase):
                content: Any = text
            else:
                content = [{"type": self.family.modality}] * with_image + [{"type": "text", "text": text}]
            messages = [{"role": "user", "content": content}]
            template = cast(Any, self.processor).apply_chat_template
            return str(template(messages, add_generation_prompt=True, tokenize=False))
        if with_image:
            return self.family.prompt.format(image=self.media_token, text=text)
        return self.family.bare.format(bos=self.tokenizer.bos_token, text=text)

    def text_start(self, *, with_image: bool) -> int | None:
        """Return at which character of a rendered prompt the user's text begins; None where that cannot be told."""
        key = with_image, str(self.processor.chat_template)
        if key not in self._text_starts:
            self._text_starts[key] = self.render(STAND_IN, with_image=with_image).find(STAND_IN)
        start = self._text_starts[key]
        return None if start < 0 else start

    def refuse_medium(self, medium: Medium) -> None:
        """Raise DataError for a picture or sound that the model does not read, or not as a whole."""
        kind = "image" if isinstance(medium, PIL.Image.Image) else "audio"
        if kind != self.family.modality:
            raise DataError(f"{self.source} ({self.family.name}) reads no {kind}")
        if isinstance(medium, Sound):
            longest = int(cast(Any, self.processor).feature_extractor.chunk_length)
            # The extractor cuts what is longer, and has no token for less than three steps of 10 ms, without a word.
            if not 0.03 <= medium.seconds <= longest:
                raise DataError(f"the sound is {medium.seconds:.3f} s long; the model reads 0.03 to {longest} s")

    def encode(
        self,
        texts: Sequence[str],
        media: Sequence[Medium] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Return the tensors of one batch, all with pictures (or sounds) or all without.

        Args:
            texts: prompts without image token.
            media: a picture or sound a text, or None.
            device: where the tensors go; the model's own by default.

        Raises:
            DataError: an empty text, one that holds the image token, or as many media as not texts.
        """
        for text in texts:
            self.refuse_text(text)
        if media is not None and len(media) != len(texts):
            raise DataError(f"{len(texts)} prompts came with {len(media)} images or sounds")
        for medium in media or ():
            self.refuse_medium(medium)
        prompts = [self.render(text, with_image=media is not None) for text in texts]
        options: dict[str, Any] = {"text": prompts, "padding": True, "return_tensors": "pt"}
        if self.begun(prompts[0]):
            options["add_special_tokens"] = False
        if media is None:
            encoded = dict(cast(Any, self.tokenizer)(**options, return_token_type_ids=self.family.token_types))
            names = ("input_ids", "attention_mask", "token_type_ids")
            inputs = {name: encoded[name] for name in names if name in encoded}
        else:
            inputs = dict(cast(Any, self.processor)(**options, **self._given(media)))
            # PaliGemma's makes some, and the model would compute a loss.
            inputs.pop("labels", None)
        inputs = _padded_in_front(inputs)
        dtype, device = self.dtype, self.hf.device if device is None else device
        return {
            name: tensor.to(device, dtype if torch.is_floating_point(tensor) else tensor.dtype)
            for name, tensor in inputs.items()
        }

    def _given(self, media: Sequence[Medium]) -> dict[str, Any]:
        """Return the processor's arguments for pictures or sounds."""
        if self.family.modality == "audio":
            rate = int(cast(Any, self.processor).feature_extractor.sampling_rate)
            sounds = [medium.at(rate).samples for medium in media if isinstance(medium, Sound)]
            return {"audio": sounds, "sampling_rate": rate}
        # A list for each text: some processors do not see from a flat one which text a picture is of.
        return {"images": [[image] for image in media]}

    def boxes(self, inputs: dict[str, Tensor], row: int, medium: Medium) -> Float[np.ndarray, "k 4"] | None:
        """Return where the tokens of a row's picture lie in it, or those of a sound in time; None if nowhere.

        Left, top, right and bottom are shares of the picture; a token without a place (the end of a line) has no area.
        """
        if not self.family.layout:
            return None
        size = medium.size if isinstance(medium, PIL.Image.Image) else (len(medium.samples), 1)
        return LAYOUTS[self.family.layout](self, inputs, row, size)

    def begun(self, prompt: str) -> bool:
        """Return whether a rendered prompt begins with the token that the tokenizer would put in front."""
        bos = self.tokenizer.bos_token
        return isinstance(bos, str) and prompt.startswith(bos)

    def unfit(self, inputs: dict[str, Tensor], new_tokens: int) -> list[str | None]:
        """Return for each row of a batch why the model cannot be given it, or None: too long, or no image token."""
        lengths = inputs["attention_mask"].sum(1).tolist()
        reasons: list[str | None] = [None] * len(lengths)
        limit: int | None = getattr(self.text_config, "max_position_embeddings", None)
        if limit is not None:
            told = f"tokens and {new_tokens} for the answer, but the model reads {limit} in all"
            reasons = [f"the prompt has {n} {told}" if n + new_tokens > limit else None for n in lengths]
        if "qformer_attention_mask" in inputs:
            limit = int(cast(Any, self.hf.config).qformer_config.max_position_embeddings)
            for row, n in enumerate(inputs["qformer_attention_mask"].sum(1).tolist()):
                if n > limit:
                    reasons[row] = f"the prompt has {n} tokens for the Q-Former, which reads {limit}"
        if self.has_media(inputs):
            # A chat template may leave the picture out, and some models then pass over it without a word.
            counts = (inputs["input_ids"] == self.media_token_id).sum(1).tolist()
            wanted: int | None = getattr(self.hf.config, "num_query_tokens", None)
            for row, n in enumerate(counts):
                if n == 0 or (wanted is not None and n != wanted):
                    told = f"{wanted} are" if wanted else "one is"
                    reasons[row] = (
                        f"the prompt has {n} tokens {self.media_token} for the picture or sound; {told} needed"
                    )
        return reasons

    def unembedding(self) -> Unembedding:
        """Return the end of the decoder, final norm and unembedding, for the logit lens.

        Raises:
            ModelError: the final norm is of a kind whose arithmetic is not known.
        """
        head = cast(nn.Linear, self.part(self.family.unembedding))
        norm = self.part(self.family.final_norm)
        found = read_norm(norm, self.width)
        if found is None:
            raise ModelError(
                f"{self.source}: the final norm {type(norm).__name__} is neither a root-mean-square norm nor a "
                "LayerNorm, so the logit lens cannot apply it"
            )
        gain = found.gain
        if getattr(self.text_config, "scale_decoder_outputs", False):
            # T5 with one matrix for words in and out.
            gain = (1.0 if gain is None else gain.float()) * torch.full((self.width,), self.width**-0.5)
        cap: float | None = getattr(self.text_config, "final_logit_softcapping", None)
        return Unembedding(head.weight, head.bias, found.kind, gain, found.shift, found.eps, cap)

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


def _padded_in_front(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch with all padding in front of each row.

    BLIP's processors put their image tokens in front of what is padded already. In between, padding would move the text
    away from the picture for a T5, whose positions are relative and know nothing of a mask.
    """
    mask = inputs["attention_mask"]
    order = mask.argsort(dim=1, stable=True)
    names = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    return inputs | {name: inputs[name].gather(1, order) for name in names if name in inputs}
