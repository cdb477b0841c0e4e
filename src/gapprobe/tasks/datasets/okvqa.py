"""OKVQA: questions about pictures, not about entities, so only for probes out of their domain (arXiv 2508.18297)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from gapprobe.errors import ConfigError
from gapprobe.tasks.prompts import PromptTemplate

QUESTIONS = "OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "mscoco_val2014_annotations.json"
PICTURES = "val2014"


def read_okvqa(folder: Path, template: PromptTemplate) -> pd.DataFrame:
    """Return OKVQA's validation questions as a table that `load_examples` reads: one line a question.

    The gold answer is the most frequent raw answer, of equals the first, and nothing is filtered, as published.

    Args:
        folder: with both json files and the folder `val2014` of COCO's pictures, as OKVQA is published.
        template: of the prompt, the same as the study's.

    Returns:
        `id`, `text` (the prompt), `image` (path), `question`, `gold`, `answers` (all different ones, by " | ").

    Raises:
        ConfigError: a file is missing or has another form, a question has no answer, or a picture is not there.
    """
    questions, annotations = (
        _items(folder / name, key) for name, key in ((QUESTIONS, "questions"), (ANNOTATIONS, "annotations"))
    )
    answers: dict[int, list[str]] = {}
    lines: list[dict[str, object]] = []
    try:
        for item in annotations:
            answers[int(item["question_id"])] = [str(a["raw_answer"]).strip() for a in item["answers"]]
        for item in questions:
            id_, picture, asked = int(item["question_id"]), int(item["image_id"]), str(item["question"]).strip()
            given = [answer for answer in answers.get(id_, []) if answer]
            if not given:
                raise ConfigError(f"{folder / ANNOTATIONS} has no answer to question {id_}")
            counts = Counter(given)
            # Made of a number, the name cannot lead out of the folder.
            image = folder / PICTURES / f"COCO_val2014_{picture:012d}.jpg"
            if not image.is_file():
                raise ConfigError(f"question {id_} is about {image}, which is not there")
            lines.append(
                {
                    "id": id_,
                    "text": template.render(asked),
                    "image": str(image.resolve()),
                    "question": asked,
                    "gold": max(counts, key=lambda answer: counts[answer]),
                    "answers": " | ".join(counts),
                }
            )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder}: the questions or annotations have another form than OKVQA's: {error}") from error
    if not lines:
        raise ConfigError(f"{folder / QUESTIONS} holds no questions")
    return pd.DataFrame(lines)


def _items(path: Path, key: str) -> list[Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read as OKVQA's {key}: {error}") from error
    if not isinstance(found, list):
        raise ConfigError(f"{path}: {key} is no list")
    return found
