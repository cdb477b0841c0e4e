"""Qwen2-Audio: a Whisper tower, one linear map, a decoder; 40 ms of sound to a token."""

from gapprobe.models.families.base import Family

FAMILY = Family(
    name="qwen2_audio",
    architectures=("Qwen2AudioForConditionalGeneration",),
    language_models=("qwen2",),
    blocks="model.language_model.layers",
    final_norm="model.language_model.norm",
    unembedding="lm_head",
    modality="audio",
    layout="sound",
    placeholder="audio_token_id",
    prompt="<|audio_bos|>{image}<|audio_eos|>{text}",
    processor_parts=("feature_extractor",),
    vision="model.audio_tower.layers",
    bridge="model.multi_modal_projector",
)
