"""LLaVA-NeXT (1.6): LLaVA that looks at the whole picture first, and then at tiles of it."""

from gapprobe.models.families.base import Family

FAMILY = Family(
    name="llava_next",
    architectures=("LlavaNextForConditionalGeneration",),
    language_models=("llama", "mistral"),
    blocks="model.language_model.layers",
    final_norm="model.language_model.norm",
    unembedding="lm_head",
    layout="anyres",
    vision="model.vision_tower.encoder.layers",
    bridge="model.multi_modal_projector",
)
