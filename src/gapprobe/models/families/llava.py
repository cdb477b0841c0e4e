"""LLaVA-1.5 and its relatives: a CLIP tower, a small projector, a decoder."""

from gapprobe.models.families.base import Family

FAMILY = Family(
    name="llava",
    architectures=("LlavaForConditionalGeneration",),
    language_models=("llama", "mistral"),
    blocks="model.language_model.layers",
    final_norm="model.language_model.norm",
    unembedding="lm_head",
    layout="square",
    vision="model.vision_tower.encoder.layers",
    bridge="model.multi_modal_projector",
)
