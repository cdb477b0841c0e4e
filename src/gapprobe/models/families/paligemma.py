"""PaliGemma 1 and 2: a SigLIP tower, one linear map, a Gemma that reads picture and prompt in both directions."""

from gapprobe.models.families.base import Family

FAMILY = Family(
    name="paligemma",
    architectures=("PaliGemmaForConditionalGeneration",),
    language_models=("gemma", "gemma2"),
    blocks="model.language_model.layers",
    final_norm="model.language_model.norm",
    unembedding="lm_head",
    layout="square",
    prompt="{image}{text}",  # the processor adds <bos> between the two and a line break
    bare="{bos}{text}\n",
    token_types=True,
    vision="model.vision_tower.encoder.layers",
    bridge="model.multi_modal_projector",
)
