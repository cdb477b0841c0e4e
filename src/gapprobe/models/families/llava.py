"""LLaVA: a vision tower, a small projector, a decoder. 1.5 and its relatives, NeXT (1.6) and OneVision."""

from dataclasses import replace

from gapprobe.models.families.base import Family

_LLAVA = Family(
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
FAMILIES = (
    _LLAVA,
    # The whole picture first, then tiles of it.
    replace(_LLAVA, name="llava_next", architectures=("LlavaNextForConditionalGeneration",), layout="anyres"),
    replace(
        _LLAVA,
        name="llava_onevision",
        architectures=("LlavaOnevisionForConditionalGeneration",),
        language_models=("qwen2",),
        layout="anyres",
    ),
)
