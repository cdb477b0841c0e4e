"""Qwen2-VL: pictures in their own shape, four patches to a token, positions in three dimensions."""

from gapprobe.models.families.base import Family

FAMILY = Family(
    name="qwen2_vl",
    architectures=("Qwen2VLForConditionalGeneration",),
    language_models=("qwen2_vl_text",),
    blocks="model.language_model.layers",
    final_norm="model.language_model.norm",
    unembedding="lm_head",
    layout="qwen",
    prompt="<|vision_start|>{image}<|vision_end|>{text}",
    vision="model.visual.blocks",
    bridge="model.visual.merger",
)
