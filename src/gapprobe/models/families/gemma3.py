"""Gemma 3 with pictures: a SigLIP tower whose patches are pooled, blocks with and without a window."""

from gapprobe.models.families.base import Family

FAMILY = Family(
    name="gemma3",
    architectures=("Gemma3ForConditionalGeneration",),
    language_models=("gemma3_text",),
    blocks="model.language_model.layers",
    final_norm="model.language_model.norm",
    unembedding="lm_head",
    # What Gemma 3 adds to the stream has been through another norm.
    middle="pre_feedforward_layernorm",
    attention="post_attention_layernorm",
    mlp="post_feedforward_layernorm",
    layout="square",
    vision="model.vision_tower.encoder.layers",
    bridge="model.multi_modal_projector",
)
