"""Small, randomly initialised models of the Qwen families, with processors, built in code.

torchvision is not needed: the image processors are those for PIL, and the processors are built without their video
half, which is all that asks for it.
"""

import json
from collections.abc import Callable
from typing import Any, cast

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gapprobe.models.loading import without_video
from tests.models.tiny import LAYERS, TEXTS, WIDTH, _unsettle

PATCH, MERGE, CONTEXT, MELS = 7, 2, 512, 16
SECONDS = 1  # of sound that the audio tower reads: 100 frames, 50 states, 25 tokens
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
AUDIO_TOKENS = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
SYSTEM = (
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)
# What Qwen2-VL's published template makes of one picture and a text; Qwen3-VL is given it without system prompt.
CHAT = (
    "{% for m in messages %}<SYSTEM><|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen2_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return Qwen2-VL and its processor."""
    words = _tokenizer(VISION_TOKENS)
    tower = {"depth": 2, "embed_dim": 24, "hidden_size": WIDTH, "mlp_ratio": 2, "num_heads": 2}
    config = Qwen2VLConfig(
        text_config=_language(words),
        vision_config=tower | {"patch_size": PATCH, "spatial_merge_size": MERGE},
        **_vision_ids(words),
    )
    processor = without_video(Qwen2VLProcessor)(
        image_processor=_images(PATCH), tokenizer=words, chat_template=CHAT.replace("<SYSTEM>", SYSTEM)
    )
    return _finished(Qwen2VLForConditionalGeneration, config, words), processor


def qwen2_5_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return Qwen2.5-VL and its processor; a window is two tokens wide, so that most pictures have several."""
    words = _tokenizer(VISION_TOKENS)
    tower = {"depth": 3, "hidden_size": 24, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDTH}
    config = Qwen2_5_VLConfig(
        text_config=_language(words),
        vision_config=tower
        | {"patch_size": PATCH, "spatial_merge_size": MERGE, "window_size": 2 * MERGE * PATCH}
        | {"fullatt_block_indexes": [1]},
        **_vision_ids(words),
    )
    processor = without_video(Qwen2_5_VLProcessor)(
        image_processor=_images(PATCH), tokenizer=words, chat_template=CHAT.replace("<SYSTEM>", SYSTEM)
    )
    return _finished(Qwen2_5_VLForConditionalGeneration, config, words), processor


def qwen3_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return Qwen3-VL and its processor; two of the three blocks are followed by more picture."""
    words = _tokenizer(VISION_TOKENS)
    patch = PATCH + 1  # the published ones differ from the other families too
    tower = {"depth": 3, "hidden_size": 24, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDTH}
    config = Qwen3VLConfig(
        text_config=_language(words) | {"head_dim": 8},
        vision_config=tower
        | {"patch_size": patch, "spatial_merge_size": MERGE}
        | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        **_vision_ids(words),
    )
    processor = without_video(Qwen3VLProcessor)(
        image_processor=_images(patch), tokenizer=words, chat_template=CHAT.replace("<SYSTEM>", "")
    )
    return _finished(Qwen3VLForConditionalGeneration, config, words), processor


def qwen2_audio() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return Qwen2-Audio and its processor, which brings the published chat template."""
    words = _tokenizer(AUDIO_TOKENS)
    sound = WhisperFeatureExtractor(feature_size=MELS, sampling_rate=16000, hop_length=160, chunk_length=SECONDS)
    tower = {"d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    config = Qwen2AudioConfig(
        audio_config=tower
        | {"model_type": "qwen2_audio_encoder", "num_mel_bins": MELS, "max_source_positions": sound.nb_max_frames // 2},
        text_config=_language(words) | {"model_type": "qwen2", "rope_parameters": None},
        audio_token_index=words.convert_tokens_to_ids("<|AUDIO|>"),
    )
    processor = Qwen2AudioProcessor(feature_extractor=sound, tokenizer=words)
    return _finished(Qwen2AudioForConditionalGeneration, config, words), processor


def _tokenizer(special: tuple[str, ...]) -> Qwen2Tokenizer:
    """Return Qwen's own tokenizer, which has no BOS, with a vocabulary of about 300."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(TEXTS, trainer)
    bpe = json.loads(core.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[*CHAT_TOKENS, *special],
    )


def _vision_ids(words: Qwen2Tokenizer) -> dict[str, Any]:
    start, end, image, video = words.convert_tokens_to_ids(list(VISION_TOKENS))
    return {
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "image_token_id": image,
        "video_token_id": video,
    }


def _language(words: Qwen2Tokenizer) -> dict[str, Any]:
    return {
        "vocab_size": len(words),
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        # Half a head's eight dimensions, shared between time, height and width.
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }


def _images(patch: int) -> Qwen2VLImageProcessorPil:
    """Return an image processor that makes four to sixteen tokens of a picture."""
    side = MERGE * patch
    size = {"shortest_edge": 4 * side**2, "longest_edge": 16 * side**2}
    return Qwen2VLImageProcessorPil(size=size, patch_size=patch, merge_size=MERGE)


def _finished(kind: Callable[[Any], Any], config: PreTrainedConfig, words: Qwen2Tokenizer) -> PreTrainedModel:
    torch.manual_seed(0)
    model = cast(PreTrainedModel, kind(config))
    _unsettle(model)
    model.generation_config = GenerationConfig(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    return model.eval()


BUILDERS: dict[str, Callable[[], tuple[PreTrainedModel, ProcessorMixin]]] = {
    "qwen2_vl-qwen2_vl_text": qwen2_vl,
    "qwen2_5_vl-qwen2_5_vl_text": qwen2_5_vl,
    "qwen3_vl-qwen3_vl_text": qwen3_vl,
    "qwen2_audio-qwen2": qwen2_audio,
}
