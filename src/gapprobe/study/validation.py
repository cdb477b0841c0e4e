"""Which classes a model names when it sees them: a class that it does not know by sight has no gap to measure.

Source: arXiv 2508.18297: a class stays if a strong model names it in more than half of ten images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from gapprobe.errors import ConfigError
from gapprobe.tasks.examples import Example
from gapprobe.tasks.judging import JUDGES

if TYPE_CHECKING:
    from gapprobe.study.study import Study

IMAGES = 10
SHARE = 0.5


def validate_classes(study: Study, *, images: int = IMAGES, share: float = SHARE) -> pd.DataFrame:
    """Ask the study's model to identify the first images of every entity, drawn by the study's seed.

    The calls are kept in a store beside the study's own, so that a stopped run goes on.

    Args:
        study: its model should be a strong one; its questions do not matter.
        images: of each entity; fewer where there are fewer.
        share: an entity stays if it is named in more than this share of those that could be run.

    Returns:
        One line an entity: `entity`, `n` images that could be run, `named`, `share`, `kept`, and `said`, the most
        frequent wrong answer ("" if none).

    Raises:
        ConfigError: fewer than one image, or a share outside [0, 1).
    """
    if images < 1 or not 0 <= share < 1:
        raise ConfigError(f"images {images} must be at least 1 and share {share} from 0 to below 1")
    prompt = study.template.render(study.questions.identify)
    shown = {
        (entity, image.name): Example(prompt, image, {"entity": entity, "image": image.name})
        for entity, all_images in study.images.by_entity.items()
        for image in study.drawn(all_images, images)
    }
    answers = study.answers("validation", list(shown.values()))
    is_right = JUDGES[study.config.judge]
    said: dict[str, list[tuple[str, bool]]] = {entity: [] for entity in study.images.by_entity}
    for (entity, _), answer in zip(shown, answers, strict=True):
        if answer is not None:
            said[entity].append((answer, is_right(answer, study.questions.entity(entity).names)))
    return pd.DataFrame([_line(entity, given, share) for entity, given in said.items()])


def _line(entity: str, given: list[tuple[str, bool]], share: float) -> dict[str, object]:
    n, named = len(given), sum(right for _, right in given)
    wrong = pd.Series([answer for answer, right in given if not right], dtype=object).mode()
    return {
        "entity": entity,
        "n": n,
        "named": named,
        "share": named / n if n else float("nan"),
        "kept": n > 0 and named / n > share,
        "said": wrong.iloc[0] if len(wrong) else "",
    }
