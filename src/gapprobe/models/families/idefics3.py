"""Idefics3: a SigLIP-like tower for tiles of the picture and then the whole of it, and Llama."""

from gapprobe.models.families.base import Family

FAMILY = Family(
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
