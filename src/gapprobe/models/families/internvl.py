"""InternVL in the form of transformers: tiles and a thumbnail in one run of tokens."""

from gapprobe.models.families.base import Family

FAMILY = Family(
    name="internvl",
    architectures=("InternVLForConditionalGeneration",),
    language_models=("qwen2", "llama"),
    blocks="model.language_model.layers",
    final_norm="model.language_model.norm",
    unembedding="lm_head",
    layout="internvl",
    vision="model.vision_tower.encoder.layer",
    bridge="model.multi_modal_projector",
)
