"""PaliGemma 1 and 2: a SigLIP tower, one linear map, a Gemma that reads picture and prompt in both directions."""

from dataclasses import replace

from gapprobe.models.families.base import Family

_FIRST = Family(
    name="paligemma",
    architectures=("PaliGemmaForConditionalGeneration",),
    language_models=("gemma",),
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
_SECOND = replace(
    _FIRST,
    name="paligemma2",
    language_models=("gemma2",),
    # What Gemma 2 adds to the stream has been through another norm.
    middle="pre_feedforward_layernorm",
    attention="post_attention_layernorm",
    mlp="post_feedforward_layernorm",
)
FAMILIES = (_FIRST, _SECOND)
