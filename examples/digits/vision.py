"""Stage 1: the vision tower, a small CLIP vision transformer trained to tell digits (and blank images) apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from examples.digits.data import NAMES, load_digits, sample_images, to_pixels
from examples.digits.language import cosine_rate

HEADS = 4


@dataclass(frozen=True)
class VisionOptions:
    """Size and training of the vision tower."""

    layers: int = 4
    width: int = 128
    mlp_width: int = 256
    steps: int = 1000
    batch: int = 96
    blank: int = 6
    rate: float = 1e-3


def train_vision(folder: Path, seed: int, options: VisionOptions) -> dict[str, Any]:
    """Train the tower and save it to `folder`; return its accuracy on the test images."""
    torch.manual_seed(seed)
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=options.width,
            intermediate_size=options.mlp_width,
            num_hidden_layers=options.layers,
            num_attention_heads=HEADS,
            image_size=28,
            patch_size=7,
            hidden_act="gelu",
            projection_dim=options.width,
        )
    )
    head = train_classifier(model, seed, options, f"seed {seed}: vision tower")
    model.eval().save_pretrained(folder)
    return {"accuracy": test_accuracy(model, head)}


def train_classifier(model: nn.Module, seed: int, options: VisionOptions, title: str) -> nn.Linear:
    """Train a vision model (any that returns `pooler_output`) with a new linear head over it; return the head."""
    train, _ = load_digits()
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(options.width, len(NAMES) + 1)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_rate(step, options.steps))
    model.train()
    bar = tqdm(range(options.steps), desc=title)
    for step in bar:
        pixels, labels = sample_images(train, options.batch - options.blank, options.blank, generator)
        loss = nn.functional.cross_entropy(head(model(pixel_values=pixels).pooler_output), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    return head


@torch.no_grad()
def test_accuracy(model: nn.Module, head: nn.Linear) -> float:
    """Return the share of test digits that the classifier names."""
    _, test = load_digits()
    guess = head(model(pixel_values=to_pixels(test.images)).pooler_output).argmax(-1)
    return (guess == test.labels).float().mean().item()
