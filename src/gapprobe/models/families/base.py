"""What gapprobe must know of a family of models, as data: where a model keeps its parts. Nothing is loaded here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Modality = Literal["image", "audio", "text"]
Site = Literal["residual", "middle", "attention", "mlp", "vision", "bridge", "queries"]
Layout = Literal["", "square", "qwen", "anyres", "idefics", "internvl", "sound"]


@dataclass(frozen=True)
class Family:
    """Where the models of one family keep their parts. Paths are attributes, dotted, from the Hugging Face model.

    Attributes:
        name: what the store and the command line call it.
        architectures: classes of transformers, as `config.json` names them.
        language_models: `model_type` of the language models that were tested inside it.
        modality: what a prompt may hold beside text.
        blocks: the list of blocks of the decoder.
        final_norm: the norm between the last block and the unembedding.
        unembedding: the linear map from width to vocabulary.
        middle: of a block, the module whose input is the residual stream between attention and MLP; "" is none.
        attention: of a block, the module whose output attention adds to the residual stream; "" is not known.
        mlp: the same of the MLP.
        encoder: the list of blocks of the text encoder, where the language model has one (T5).
        encoder_norm: the norm behind them.
        generator: the module that runs a prompt without image; "" is the model.
        placeholder: attribute of the configuration with the id of the token that stands for image or sound.
        layout: how the image tokens lie over the picture, a function of `gapprobe.models.layouts`; "" is not at all.
        prompt: the prompt with an image for a processor without chat template; slots `{image}`, the image token, and
            `{text}`.
        bare: the same without an image; slots `{bos}`, what begins a text, and `{text}`.
        token_types: whether a prompt without image needs `token_type_ids` too.
        processor_parts: attributes that the processor must have, beside its tokenizer.
        vision: the list of blocks of the vision (or audio) tower.
        bridge: the module between tower and language model.
        queries: the module whose output are the states of the Q-Former's queries.
    """

    name: str
    architectures: tuple[str, ...]
    language_models: tuple[str, ...]
    blocks: str
    final_norm: str
    unembedding: str
    modality: Modality = "image"
    middle: str = "post_attention_layernorm"
    attention: str = "self_attn"
    mlp: str = "mlp"
    encoder: str = ""
    encoder_norm: str = ""
    generator: str = ""
    placeholder: str = "image_token_id"
    layout: Layout = ""
    prompt: str = "{image}\n{text}"
    bare: str = "{text}"
    token_types: bool = False
    processor_parts: tuple[str, ...] = ("image_processor",)
    vision: str = ""
    bridge: str = ""
    queries: str = ""
