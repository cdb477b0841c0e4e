"""Small, randomly initialised models of every family, with processors, built in code: no network, no torchvision.

Norms have gains far from one and weights are amplified, so that a missing gain, a shifted layer or a shifted position
changes every number.
"""

import io
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from gapprobe.tasks.images import ImageFile

WIDTH, LAYERS, QUERIES, PATCH, SIDE = 32, 3, 4, 7, 28
TEXTS = ("Question: What is the capital of France? Answer: Paris ###", "Name the object in the image. Answer: 7 ###")
CHAT = (
    "{% for m in messages %}USER: {% for p in m.content %}{% if p.type == 'image' %}<image>\n{% else %}{{ p.text }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
KINDS = ("llava-llama", "llava-mistral", "llava_next-llama", "llava_next-mistral", "instructblip-llama")


def gpt2(folder: Path, layers: int = 3, width: int = 16) -> tuple[GPT2LMHeadModel, Any]:
    """Return a random GPT-2 of transformers, and TransformerLens' bridge to it. `folder` is for the tokenizer."""
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=2, vocab_size=400, n_positions=32)
    model = GPT2LMHeadModel(config).eval()
    tokenizer().save_pretrained(folder)
    words = tokenizer().from_pretrained(folder)
    bridge = import_module("transformer_lens.model_bridge").TransformerBridge
    return model, bridge.boot_transformers("gpt2", hf_model=model, tokenizer=words, device="cpu")


def tokenizer(**settings: object) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges; it puts <s> in front."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<image>"],
        **settings,
    )


def build(kind: str, *, chat: bool = True, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return a random model of `KINDS` with its processor."""
    torch.manual_seed(seed)
    family, language = kind.split("-")
    words = tokenizer()
    text = _language(language, len(words))
    if family == "instructblip":
        model, processor = _instructblip(text, words)
    else:
        model, processor = _llava(family, text, words)
        processor.chat_template = CHAT if chat else None
    _unsettle(model)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    if hasattr(model, "language_model") and isinstance(model.language_model, PreTrainedModel):
        model.language_model.generation_config = model.generation_config
    return model.eval(), processor


def picture(seed: int, width: int = 40, height: int = 30) -> PIL.Image.Image:
    """Return an RGB picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def image(seed: int, width: int = 40, height: int = 30) -> ImageFile:
    """Return the same picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture(seed, width, height).save(buffer, format="PNG")
    return ImageFile(f"noise-{seed}.png", data=buffer.getvalue())


def _language(name: str, words: int) -> LlamaConfig | MistralConfig:
    tokens = {"vocab_size": words, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name == "mistral":
        tokens["sliding_window"] = 16
    kind = {"llama": LlamaConfig, "mistral": MistralConfig}[name]
    return kind(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        **tokens,
    )


def _llava(
    family: str, text: LlamaConfig | MistralConfig, words: PreTrainedTokenizerFast
) -> tuple[PreTrainedModel, ProcessorMixin]:
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=24,
    )
    shared = {"vision_config": vision, "text_config": text, "image_token_id": 3, "image_token_index": 3}
    size = {"height": SIDE, "width": SIDE}
    forms = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if family == "llava":
        images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
        processor = LlavaProcessor(image_processor=images, tokenizer=words, **forms)
        return LlavaForConditionalGeneration(LlavaConfig(**shared)), processor
    grid = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    images = LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size, image_grid_pinpoints=grid)
    processor = LlavaNextProcessor(image_processor=images, tokenizer=words, **forms)
    return LlavaNextForConditionalGeneration(LlavaNextConfig(image_grid_pinpoints=grid, **shared)), processor


def _instructblip(text: LlamaConfig, words: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, ProcessorMixin]:
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            initializer_range=0.02,
        ).to_dict(),
        qformer_config=InstructBlipQFormerConfig(
            vocab_size=len(words),
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            encoder_hidden_size=24,
            cross_attention_frequency=1,
            max_position_embeddings=256,
        ).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=3,
        image_token_id=3,
    )
    images = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor = InstructBlipProcessor(images, words, tokenizer(), num_query_tokens=QUERIES)
    return InstructBlipForConditionalGeneration(config), processor


def _unsettle(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name.lower() and weight.ndim == 1:
                gain = name.endswith("weight")
                weight.copy_(torch.rand_like(weight) * 2 + 0.25 if gain else torch.randn_like(weight))
            elif "query_tokens" in name or "image_newline" in name:
                weight.normal_()
            else:
                weight.mul_(4.0)
