"""Qwen2.5-VL: Qwen2-VL with a tower that attends within windows of the picture."""

from gapprobe.models.families.base import Family

FAMILY = Family(
    name="qwen2_5_vl",
    architectures=("Qwen2_5_VLForConditionalGeneration",),
    language_models=("qwen2_5_vl_text",),
    blocks="model.language_model.layers",
    final_norm="model.language_model.norm",
    unembedding="lm_head",
    layout="qwen",
    prompt="<|vision_start|>{image}<|vision_end|>{text}",
    vision="model.visual.blocks",
    # Tower and merger hold a picture window by window; only behind the merger do its rows run line by line.
    bridge="model.visual.merger",
)
