"""A first look at a finished folder: accuracy in the study's settings on every row, read from the next-token argmax.

Each answer is one token of the recipe's tokenizer, so nothing has to be generated. The study itself (generation,
row filter, intervals) is `gapprobe study run`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples.digits.corpus import DEMO
from gapprobe.tasks.prompts import load_template
from gapprobe.tasks.questions import load_questions

BLANKS = ("black", "white", "noise")


@dataclass(frozen=True)
class Row:
    """An image (None: no image), the question put to it, and the answer."""

    image: Image.Image | None
    question: str
    answer: str


def blank(kind: str, seed: int = 0) -> Image.Image:
    """Return a 28×28 RGB image that shows nothing."""
    if kind == "noise":
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8))
    return Image.new("RGB", (28, 28), kind)


def measure(folder: Path, images: int = 120, batch: int = 64) -> dict[str, float]:
    """Return accuracies of a saved model, reloaded in float32, on the first test images and all questions."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    facts = load_questions(DEMO / "facts.toml")
    table = pq.read_table(DEMO / "digits.parquet").slice(0, images).to_pylist()
    shown = [(Image.open(io.BytesIO(row["image"]["bytes"])), row["entity"]) for row in table]
    pairs = [(image, q) for image, entity in shown for q in facts.questions if q.entity == entity]
    settings = {
        "identification": [Row(image, facts.identify, entity) for image, entity in shown],
        "full_information": [Row(image, q.naming(q.entity), q.answer) for image, q in pairs],
        "visual": [Row(image, q.naming(facts.reference), q.answer) for image, q in pairs],
    }
    for kind in BLANKS:
        settings[f"text_only_{kind}"] = [
            Row(blank(kind, seed), q.naming(q.entity), q.answer) for seed, q in enumerate(facts.questions)
        ]
    settings["guess_control"] = [Row(blank("black"), q.naming(facts.reference), q.answer) for q in facts.questions]
    if model.config.model_type == "llava":
        settings["text_only_none"] = [Row(None, q.naming(q.entity), q.answer) for q in facts.questions]
    figures = {name: _accuracy(model, processor, rows, batch) for name, rows in settings.items()}
    return {"images": len(shown), "parameters": sum(p.numel() for p in model.parameters()), **figures}


@torch.no_grad()
def _accuracy(model: torch.nn.Module, processor, rows: list[Row], batch: int) -> float:
    template, right = load_template(DEMO / "prompts.toml"), 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        texts = [template.render(row.question) for row in part]
        if model.config.model_type == "llava" and part[0].image is not None:
            texts = [f"<image> {text}" for text in texts]
        images = None if part[0].image is None else [row.image for row in part]
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        mask = inputs["attention_mask"]
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        logits = model(**inputs, use_cache=False).logits[torch.arange(len(part)), last]
        told = processor.tokenizer.batch_decode(logits.argmax(-1)[:, None])
        right += sum(word == row.answer.lower() for word, row in zip(told, part, strict=True))
    return right / len(rows)
