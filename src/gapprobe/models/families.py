"""The families of models that can be traced, as data: where a model keeps its parts. Nothing is loaded here.

A row stands here only if the tests run `check_model` for every language model that it lists. To add a family, add a
row and a builder in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

from gapprobe.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Where the models of one family keep their parts. Paths are attributes, dotted, from the Hugging Face model.

    Attributes:
        name: what the store and the command line call it.
        architectures: classes of transformers, as `config.json` names them.
        language_models: `model_type` of the language models that were tested inside it.
        blocks: the list of decoder blocks.
        final_norm: the norm between the last block and the unembedding.
        unembedding: the linear map from width to vocabulary.
        generator: the module whose `generate` makes the answer, and that runs a prompt without image; "" is the model.
        hidden_states: where the outer model's output keeps its hidden states; "" is the output itself.
        prompt: the prompt with an image for a processor without chat template; slots `{image}`, the image token, and
            `{text}`.
        processor_parts: attributes that the processor must have.
    """

    name: str
    architectures: tuple[str, ...]
    language_models: tuple[str, ...]
    blocks: str
    final_norm: str
    unembedding: str
    generator: str
    hidden_states: str
    prompt: str
    processor_parts: tuple[str, ...]


FAMILIES: tuple[Family, ...] = (
    Family(
        name="llava",
        architectures=("LlavaForConditionalGeneration",),
        language_models=("llama", "mistral"),
        blocks="model.language_model.layers",
        final_norm="model.language_model.norm",
        unembedding="lm_head",
        generator="",
        hidden_states="",
        prompt="{image}\n{text}",
        processor_parts=("image_processor", "tokenizer"),
    ),
    Family(
        name="llava_next",
        architectures=("LlavaNextForConditionalGeneration",),
        language_models=("llama", "mistral"),
        blocks="model.language_model.layers",
        final_norm="model.language_model.norm",
        unembedding="lm_head",
        generator="",
        hidden_states="",
        prompt="{image}\n{text}",
        processor_parts=("image_processor", "tokenizer"),
    ),
    Family(
        name="instructblip",
        architectures=("InstructBlipForConditionalGeneration",),
        language_models=("llama",),
        blocks="language_model.model.layers",
        final_norm="language_model.model.norm",
        unembedding="language_model.lm_head",
        generator="language_model",
        hidden_states="language_model_outputs",
        prompt="{text}",  # the processor puts the image tokens in front
        processor_parts=("image_processor", "tokenizer", "qformer_tokenizer"),
    ),
)


def family_of(architecture: str, language_model: str | None, where: str) -> Family:
    """Return the row of an architecture; `language_model` (a `model_type`) is checked when it is given.

    Raises:
        ModelError: no row has the architecture, or its row was not tested with this language model.
    """
    for family in FAMILIES:
        if architecture in family.architectures:
            if language_model is None or language_model in family.language_models:
                return family
            raise ModelError(
                f"{where}: {architecture} with a language model of type {language_model!r} cannot be traced yet; "
                f"known inside {family.name}: {', '.join(family.language_models)}"
            )
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise ModelError(
        f"{where}: gapprobe does not know the architecture {architecture}; it knows {known} (`gapprobe models list`)"
    )
