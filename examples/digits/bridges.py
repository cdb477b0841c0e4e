"""Stages 3 and 4: the two bridges, trained on captions and identification only, between two frozen towers.

LLaVA's is a two-layer projector over the image patches, InstructBLIP's a Q-Former that reads the instruction. Saving
and processors live in `folders.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPVisionModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    InstructBlipVisionModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from examples.digits.corpus import CAPTIONS, load_facts
from examples.digits.data import NAMES, NOTHING, load_digits, sample_images
from examples.digits.folders import IMAGE_TOKEN_ID, QUERIES, save_instructblip, save_llava
from examples.digits.language import cosine_rate
from examples.digits.vision import VisionOptions, test_accuracy, train_classifier

PATCHES = 16


@dataclass(frozen=True)
class BridgeOptions:
    """Training of a bridge. The visual accuracy, and so the gap, grows with `steps`: see README.md."""

    steps: int = 200
    batch: int = 56
    blank: int = 8
    rate: float = 1.5e-3
    vision_steps: int = 300  # InstructBLIP only: its vision model has no first LayerNorm and must settle


def train_llava(folder: Path, vision: Path, language: Path, seed: int, options: BridgeOptions) -> dict[str, Any]:
    """Train the projector and save the whole model to `folder`; return the last training loss."""
    torch.manual_seed(seed)
    tower, speaker = CLIPVisionModel.from_pretrained(vision), LlamaForCausalLM.from_pretrained(language)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(language)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=speaker.config,
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=PATCHES,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(speaker.model.state_dict())
    model.lm_head.load_state_dict(speaker.lm_head.state_dict())
    projector = model.model.multi_modal_projector
    _scale_to_words(projector.linear_2, speaker)

    def inputs(text: list[int], n: int) -> dict[str, Tensor]:
        row = [tokenizer.bos_token_id, *[IMAGE_TOKEN_ID] * PATCHES, *text]
        return {"input_ids": torch.tensor([row] * n)}

    loss = _train(model, [projector], inputs, tokenizer, seed, options, f"seed {seed}: LLaVA bridge")
    save_llava(model, tokenizer, folder)
    return {"loss": loss}


def train_instructblip(folder: Path, vision: Path, language: Path, seed: int, options: BridgeOptions) -> dict[str, Any]:
    """Train the Q-Former and save the whole model to `folder`; return its vision accuracy and last loss."""
    torch.manual_seed(seed)
    speaker = LlamaForCausalLM.from_pretrained(language)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(language)
    tower = vision_from_clip(CLIPVisionModel.from_pretrained(vision))
    settle = replace(VisionOptions(), steps=options.vision_steps, rate=5e-4)
    head = train_classifier(tower, seed, settle, f"seed {seed}: InstructBLIP vision")
    width = speaker.config.hidden_size
    config = InstructBlipConfig(
        vision_config=tower.config,
        qformer_config=InstructBlipQFormerConfig(
            vocab_size=speaker.config.vocab_size,
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=128,
            cross_attention_frequency=1,
            encoder_hidden_size=tower.config.hidden_size,
        ),
        text_config=speaker.config,
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN_ID,
        tie_word_embeddings=False,
    )
    model = InstructBlipForConditionalGeneration(config)
    model.vision_model.load_state_dict(tower.state_dict())
    model.language_model.load_state_dict(speaker.state_dict())
    words = speaker.get_input_embeddings().weight.detach()
    model.qformer.embeddings.word_embeddings.weight.data.copy_(words)
    _scale_to_words(model.language_projection, speaker)

    def inputs(text: list[int], n: int) -> dict[str, Tensor]:
        asked = [tokenizer.bos_token_id, *text]
        row = [IMAGE_TOKEN_ID] * QUERIES + asked
        return {"input_ids": torch.tensor([row] * n), "qformer_input_ids": torch.tensor([asked] * n)}

    trained = [model.qformer, model.language_projection]
    loss = _train(model, trained, inputs, tokenizer, seed, options, f"seed {seed}: Q-Former", [model.query_tokens])
    save_instructblip(model, tokenizer, folder)
    return {"vision_accuracy": test_accuracy(tower, head), "loss": loss}


def vision_from_clip(clip: CLIPVisionModel) -> InstructBlipVisionModel:
    """Return InstructBLIP's vision model with the weights of a CLIP tower.

    It has one matrix for queries, keys and values, and no LayerNorm before the first block: the gain of CLIP's is
    folded into the embeddings, which is near enough for a short training to mend.
    """
    c = clip.config
    tower = InstructBlipVisionModel(
        InstructBlipVisionConfig(
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            image_size=c.image_size,
            patch_size=c.patch_size,
            hidden_act=c.hidden_act,
            layer_norm_eps=c.layer_norm_eps,
            initializer_range=0.02,  # the default, 1e-10, is of no use to a model that is trained from here
        )
    )
    body = getattr(clip, "vision_model", clip)
    old, new = body.embeddings, tower.embeddings
    spread = old.position_embedding.weight.detach().std(-1).mean() + 1e-6
    gain = (body.pre_layrnorm.weight / spread.clamp(min=0.05)).detach()
    new.patch_embedding.weight.data.copy_(old.patch_embedding.weight * gain[:, None, None, None])
    new.patch_embedding.bias.data.zero_()
    new.class_embedding.data.copy_((old.class_embedding * gain)[None, None])
    new.position_embedding.data.copy_((old.position_embedding.weight * gain + body.pre_layrnorm.bias)[None])
    for source, target in zip(body.encoder.layers, tower.encoder.layers, strict=True):
        parts = [getattr(source.self_attn, f"{letter}_proj") for letter in "qkv"]
        target.self_attn.qkv.weight.data.copy_(torch.cat([part.weight for part in parts]))
        target.self_attn.qkv.bias.data.copy_(torch.cat([part.bias for part in parts]))
        target.self_attn.projection.load_state_dict(source.self_attn.out_proj.state_dict())
        for name in ("layer_norm1", "layer_norm2", "mlp"):
            getattr(target, name).load_state_dict(getattr(source, name).state_dict())
    tower.post_layernorm.load_state_dict(body.post_layernorm.state_dict())
    return tower


def _scale_to_words(linear: nn.Linear, speaker: LlamaForCausalLM) -> None:
    """Make a fresh layer's outputs as long as word embeddings, for inputs of unit variance."""
    words = speaker.get_input_embeddings().weight.detach().square().mean().sqrt()
    nn.init.normal_(linear.weight, std=float(words) / linear.in_features**0.5)
    nn.init.zeros_(linear.bias)


def _wordings(tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], list[int]]]:
    """Return what is said before and after the number: the captions, then the study's identification prompt."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    facts = load_facts()
    stop = encode(facts.template.stop)
    captions = [(encode(caption.split("{name}")[0]), stop) for caption in CAPTIONS]
    return [*captions, (encode(facts.template.render(facts.identify)), stop)]


def _train(
    model: PreTrainedModel,
    parts: list[nn.Module],
    inputs: Callable[[list[int], int], dict[str, Tensor]],
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    options: BridgeOptions,
    title: str,
    extra: list[nn.Parameter] | None = None,
) -> float:
    """Train `parts` (and `extra` parameters) alone to make the model name the number in the image."""
    train, _ = load_digits()
    model.requires_grad_(False)
    parameters = [p for part in parts for p in part.parameters()] + (extra or [])
    for parameter in parameters:
        parameter.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    wordings = _wordings(tokenizer)
    names: Int[Tensor, " c"] = torch.tensor(
        [tokenizer.encode(name, add_special_tokens=False)[0] for name in (*NAMES, NOTHING)]
    )
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_rate(step, options.steps))
    bar, loss = tqdm(range(options.steps), desc=title), torch.zeros(())
    for step in bar:
        pixels, labels = sample_images(train, options.batch - options.blank, options.blank, generator)
        # Captions and identification in turn; one wording a batch, so that nothing is padded.
        turn = len(wordings) - 1 if step % 2 else int(torch.randint(len(wordings) - 1, (1,), generator=generator))
        before, after = wordings[turn]
        said = inputs(before, options.batch)
        told = torch.cat([names[labels][:, None], torch.tensor([after] * options.batch)], 1)
        said["input_ids"] = torch.cat([said["input_ids"], told[:, :-1]], 1)
        logits = model(pixel_values=pixels, use_cache=False, **said).logits[:, -told.shape[1] :]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), told.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    return loss.item()
