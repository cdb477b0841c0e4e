"""LLaVA-OneVision: LLaVA-NeXT's way of tiling with a SigLIP tower and Qwen2."""

from gapprobe.models.families.base import Family

FAMILY = Family(
    name="llava_onevision",
    architectures=("LlavaOnevisionForConditionalGeneration",),
    language_models=("qwen2",),
    blocks="model.language_model.layers",
    final_norm="model.language_model.norm",
    unembedding="lm_head",
    layout="anyres",
    vision="model.vision_tower.encoder.layers",
    bridge="model.multi_modal_projector",
)
