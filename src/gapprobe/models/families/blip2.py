"""BLIP-2: queries that read the picture alone stand before the prompt of a decoder (OPT) or an encoder (T5)."""

from gapprobe.models.families.base import Family

FAMILIES = (
    Family(
        name="blip2",
        architectures=("Blip2ForConditionalGeneration",),
        language_models=("opt",),
        blocks="language_model.model.decoder.layers",
        final_norm="language_model.model.decoder.final_layer_norm",
        middle="final_layer_norm",
        mlp="fc2",
        unembedding="language_model.lm_head",
        generator="language_model",
        prompt="{text}",  # the processor puts the image tokens in front
        vision="vision_model.encoder.layers",
        bridge="language_projection",
        queries="qformer",
    ),
    Family(
        name="blip2_t5",
        architectures=("Blip2ForConditionalGeneration",),
        language_models=("t5",),
        blocks="language_model.decoder.block",
        final_norm="language_model.decoder.final_layer_norm",
        middle="",  # a T5's blocks keep their parts in lists, at other places in the encoder than in the decoder
        attention="",
        mlp="",
        unembedding="language_model.lm_head",
        encoder="language_model.encoder.block",
        encoder_norm="language_model.encoder.final_layer_norm",
        generator="language_model",
        prompt="{text}",
        vision="vision_model.encoder.layers",
        bridge="language_projection",
        queries="qformer",
    ),
)
