"""SmolVLM: the architecture of Idefics3 in small, with a processor that also takes videos."""

from gapprobe.models.families.base import Family

FAMILY = Family(
    name="smolvlm",
    architectures=("SmolVLMForConditionalGeneration",),
    language_models=("llama",),
    blocks="model.text_model.layers",
    final_norm="model.text_model.norm",
    unembedding="lm_head",
    layout="idefics",
    vision="model.vision_model.encoder.layers",
    bridge="model.connector",
)
