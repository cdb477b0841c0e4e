"""Tiny models of families that cut a picture into tiles, or lay it out as one square of tokens.

Their image processors cut a wide picture and a nearly square one into different numbers of tiles.
"""

from collections.abc import Callable

import torch
from tokenizers import processors
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    GenerationConfig,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)

from gapprobe.models.loading import without_video
from tests.models.tiny import LAYERS, PATCH, SIDE, WIDTH, _unsettle, tokenizer

CONTEXT = 512
TOWER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TILE = {"height": SIDE, "width": SIDE}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'image' %}IMAGE"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{% for p in m.content %}"
    "{% if p.type == 'image' %}<start_of_image>{% else %}{{ p.text | trim }}{% endif %}{% endfor %}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
IDEFICS = (
    "{{ start }}{% for m in messages %}{{ m.role | capitalize }}{% if m.content[0].type == 'image' %}:{% else %}: "
    "{% endif %}{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def paligemma(language: str = "gemma") -> tuple[PreTrainedModel, ProcessorMixin]:
    """One square picture in front, then <s>, the text and a line break; the whole prompt sees itself."""
    torch.manual_seed(0)
    words = tokenizer()
    images = SiglipImageProcessorPil(size=TILE, image_seq_length=(SIDE // PATCH) ** 2)
    processor = PaliGemmaProcessor(images, words)  # adds 1152 words for places and segments
    text = _language(language, len(words))
    config = PaliGemmaConfig(
        vision_config=_siglip(SIDE), text_config=text, image_token_index=3, projection_dim=WIDTH, hidden_size=WIDTH
    )
    return _finished(PaliGemmaForConditionalGeneration(config)), processor


def gemma3() -> tuple[PreTrainedModel, ProcessorMixin]:
    """One square picture whose patches are pooled two by two; its tokens see each other, also in windowed blocks."""
    torch.manual_seed(0)
    side, tokens = 2 * SIDE, 16
    words = tokenizer(
        model_specific_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        }
    )
    words.add_special_tokens({"extra_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    images = Gemma3ImageProcessorPil(size={"height": side, "width": side})
    processor = Gemma3Processor(images, words, chat_template=GEMMA, image_seq_length=tokens)
    config = Gemma3Config(
        text_config=_language("gemma3_text", len(words)),
        vision_config=_siglip(side),
        mm_tokens_per_image=tokens,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
        image_token_index=words.image_token_id,
    )
    model = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():  # it starts at zero, which would make all pictures alike
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.1)
    return _finished(model), processor


def idefics3() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Tiles in rows, then the whole picture; the names of the tiles are ordinary text to this tokenizer."""
    torch.manual_seed(0)
    words = tokenizer()
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    chat = IDEFICS.replace("{{ start }}", "{{ bos_token }}")
    processor = Idefics3Processor(images, words, image_seq_len=(SIDE // PATCH // 2) ** 2, chat_template=chat)
    config = Idefics3Config(
        vision_config=TOWER | {"image_size": SIDE, "patch_size": PATCH},
        text_config=_language("llama", len(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    return _finished(Idefics3ForConditionalGeneration(config)), processor


def smolvlm() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Idefics3 with names of tiles that are tokens of their own, and a processor for videos too."""
    torch.manual_seed(0)
    words = _without_bos()
    places = [f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)]
    around = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|im_start|>"]
    words.add_special_tokens({"extra_special_tokens": ["<image>", *around, *places]})
    images = SmolVLMImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    chat = IDEFICS.replace("{{ start }}", "<|im_start|>")
    tokens = (SIDE // PATCH // 2) ** 2
    processor = without_video(SmolVLMProcessor)(images, words, None, image_seq_len=tokens, chat_template=chat)
    config = SmolVLMConfig(
        vision_config=TOWER | {"image_size": SIDE, "patch_size": PATCH},
        text_config=_language("llama", len(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    return _finished(SmolVLMForConditionalGeneration(config)), processor


def internvl(language: str = "qwen2") -> tuple[PreTrainedModel, ProcessorMixin]:
    """Tiles in rows, then the whole picture unless it is the only tile, all in one run of tokens."""
    torch.manual_seed(0)
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = _without_bos(model_specific_special_tokens=named)
    words.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    images = GotOcr2ImageProcessorPil(size=TILE, crop_to_patches=True, min_patches=1, max_patches=6)
    tokens = (SIDE // PATCH // 2) ** 2
    chat = CHATML.replace("IMAGE", "<IMG_CONTEXT>\n")
    processor = without_video(InternVLProcessor)(images, words, image_seq_length=tokens, chat_template=chat)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(image_size=SIDE, patch_size=PATCH, **TOWER),
        text_config=_language(language, len(words)),
        image_token_id=words.context_image_token_id,
        image_seq_length=tokens,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config)
    with torch.no_grad():  # both start at zero, which would hide a wrong order of the patches
        model.model.vision_tower.embeddings.position_embeddings.normal_()
        model.model.vision_tower.embeddings.cls_token.normal_()
    return _finished(model), processor


def llava_onevision() -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA-NeXT's layout from a tower without class token, and a processor for videos too."""
    torch.manual_seed(0)
    words = _without_bos(model_specific_special_tokens={"image_token": "<image>", "video_token": "<video>"})
    words.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    grid = [[height, width] for height in (SIDE, 2 * SIDE) for width in (SIDE, 2 * SIDE)]
    images = LlavaOnevisionImageProcessorPil(size=TILE, image_grid_pinpoints=grid)
    processor = without_video(LlavaOnevisionProcessor)(
        images,
        words,
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("IMAGE", "<image>\n"),
    )
    config = LlavaOnevisionConfig(
        vision_config=_siglip(SIDE),
        text_config=_language("qwen2", len(words)),
        image_token_index=words.image_token_id,
        video_token_index=words.video_token_id,
        image_grid_pinpoints=grid,
    )
    return _finished(LlavaOnevisionForConditionalGeneration(config)), processor


def _siglip(side: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(image_size=side, patch_size=PATCH, vision_use_head=False, **TOWER)


def _language(name: str, words: int) -> PreTrainedConfig:
    settings = {
        "vocab_size": words,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if name.startswith("gemma"):
        settings["head_dim"] = 8
    if name in ("gemma2", "gemma3_text"):  # blocks that see a window only take turns with others
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        settings |= {"query_pre_attn_scalar": 8, "sliding_window": 16, "layer_types": kinds}
    kind = {
        "gemma": GemmaConfig,
        "gemma2": Gemma2Config,
        "gemma3_text": Gemma3TextConfig,
        "llama": LlamaConfig,
        "qwen2": Qwen2Config,
    }[name]
    return kind(**settings)


def _without_bos(**settings: object) -> PreTrainedTokenizerFast:
    """Return tiny's tokenizer without anything in front, as Qwen's and SmolLM's have it."""
    words = tokenizer(**settings)
    words.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return words


def _finished(model: PreTrainedModel) -> PreTrainedModel:
    _unsettle(model)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return model.eval()


BUILDERS: dict[str, Callable[[], tuple[PreTrainedModel, ProcessorMixin]]] = {
    "paligemma-gemma": paligemma,
    "paligemma2-gemma2": lambda: paligemma("gemma2"),
    "gemma3-gemma3_text": gemma3,
    "idefics3-llama": idefics3,
    "smolvlm-llama": smolvlm,
    "internvl-qwen2": internvl,
    "internvl-llama": lambda: internvl("llama"),
    "llava_onevision-qwen2": llava_onevision,
}
