"""BLIP-2 and InstructBLIP: queries that have read the picture stand before the prompt."""

from dataclasses import replace

from gapprobe.models.families.base import Family

_OPT = Family(
    name="blip2",
    architectures=("Blip2ForConditionalGeneration",),
    language_models=("opt",),
    blocks="language_model.model.decoder.layers",
    final_norm="language_model.model.decoder.final_layer_norm",
    unembedding="language_model.lm_head",
    middle="final_layer_norm",
    mlp="fc2",
    generator="language_model",
    prompt="{text}",  # the processor puts the image tokens in front
    vision="vision_model.encoder.layers",
    bridge="language_projection",
    queries="qformer",
)
_T5 = replace(
    _OPT,
    name="blip2_t5",
    language_models=("t5",),
    blocks="language_model.decoder.block",
    final_norm="language_model.decoder.final_layer_norm",
    encoder="language_model.encoder.block",
    encoder_norm="language_model.encoder.final_layer_norm",
    middle="",  # a T5's blocks keep their parts in lists, at other places in the encoder than in the decoder
    attention="",
    mlp="",
)


def _instruct(family: Family, name: str) -> Family:
    """Return the row of InstructBLIP with the same language model inside."""
    return replace(
        family,
        name=name,
        architectures=("InstructBlipForConditionalGeneration",),
        processor_parts=("image_processor", "qformer_tokenizer"),
    )


_LLAMA = replace(
    _OPT,
    language_models=("llama",),
    blocks="language_model.model.layers",
    final_norm="language_model.model.norm",
    middle=Family.middle,
    mlp=Family.mlp,
)
FAMILIES = (
    _OPT,
    _T5,
    _instruct(_LLAMA, "instructblip"),
    _instruct(_OPT, "instructblip_opt"),
    _instruct(_T5, "instructblip_t5"),
)
