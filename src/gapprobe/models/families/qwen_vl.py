"""Qwen-VL: pictures in their own shape, four patches to a token, positions in three dimensions."""

from dataclasses import replace

from gapprobe.models.families.base import Family

_QWEN2 = Family(
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
FAMILIES = (
    _QWEN2,
    # Its tower and merger hold a picture window by window; only behind the merger do its rows run line by line.
    replace(
        _QWEN2,
        name="qwen2_5_vl",
        architectures=("Qwen2_5_VLForConditionalGeneration",),
        language_models=("qwen2_5_vl_text",),
    ),
    # Behind its first blocks, outside of them, more of the picture is added (DeepStack, from deepstack_merger_list).
    replace(
        _QWEN2,
        name="qwen3_vl",
        architectures=("Qwen3VLForConditionalGeneration",),
        language_models=("qwen3_vl_text",),
    ),
)
