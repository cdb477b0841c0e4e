"""Qwen3-VL: between the first blocks more of the picture is added to its tokens (DeepStack), outside of any block."""

from gapprobe.models.families.base import Family

FAMILY = Family(
    name="qwen3_vl",
    architectures=("Qwen3VLForConditionalGeneration",),
    language_models=("qwen3_vl_text",),
    blocks="model.language_model.layers",
    final_norm="model.language_model.norm",
    unembedding="lm_head",
    layout="qwen",
    prompt="<|vision_start|>{image}<|vision_end|>{text}",
    vision="model.visual.blocks",
    # To block 0; what is added behind the first blocks comes from model.visual.deepstack_merger_list.
    bridge="model.visual.merger",
)
