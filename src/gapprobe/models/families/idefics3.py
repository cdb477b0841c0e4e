"""Idefics3, and SmolVLM, the same in small: a SigLIP-like tower for tiles of the picture and then the whole of it."""

from dataclasses import replace

from gapprobe.models.families.base import Family

_IDEFICS = Family(
    name="idefics3",
    architectures=("Idefics3ForConditionalGeneration",),
    language_models=("llama",),
    blocks="model.text_model.layers",
    final_norm="model.text_model.norm",
    unembedding="lm_head",
    layout="idefics",
    vision="model.vision_model.encoder.layers",
    bridge="model.connector",
)
FAMILIES = (_IDEFICS, replace(_IDEFICS, name="smolvlm", architectures=("SmolVLMForConditionalGeneration",)))
