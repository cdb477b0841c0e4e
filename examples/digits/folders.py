"""Writing the trained models as ordinary Hugging Face folders: weights in bfloat16, processor, generation settings."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    GenerationConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from examples.digits.data import MEAN, STD
from examples.digits.tokenizer import SPECIALS, wrap

IMAGE_TOKEN_ID = SPECIALS.index("<image>")
QUERIES = 8
PATCH = 7
SIZE = {"height": 28, "width": 28}
# The image, then the text; no roles, because the language model has never read any.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image> {% elif part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def save_llava(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a LLaVA model with its processor and chat template."""
    images = CLIPImageProcessorPil(
        size=SIZE, do_center_crop=False, crop_size=SIZE, image_mean=[MEAN] * 3, image_std=[STD] * 3, do_convert_rgb=True
    )
    speaker = wrap(tokenizer.backend_tokenizer, padding_side="left")
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=speaker,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    _save(model, folder)
    processor.save_pretrained(folder)


def save_instructblip(
    model: InstructBlipForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write an InstructBLIP model with its processor, whose Q-Former reads with a copy of the same tokenizer.

    No padding side is saved: on reload it would also be applied to the Q-Former, whose positions count from the left.
    """
    images = BlipImageProcessorPil(size=SIZE, image_mean=[MEAN] * 3, image_std=[STD] * 3, do_convert_rgb=True)
    core = tokenizer.backend_tokenizer
    processor = InstructBlipProcessor(images, wrap(core), wrap(core), num_query_tokens=QUERIES)
    _save(model, folder)
    processor.save_pretrained(folder)


def _save(model: PreTrainedModel, folder: Path) -> None:
    text = model.config.text_config
    for config in (text, model.config.vision_config):
        config._name_or_path = ""  # else the path of the training run would be written into the folder
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=10,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )
    model.eval().to(torch.bfloat16).save_pretrained(folder)
