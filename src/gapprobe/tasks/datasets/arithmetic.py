"""MNIST's questions, which come from a rule and not from a text.

Source: arXiv 2508.18297: about ten questions a digit, "what is <digit> (+ or *) r?", r in [0, 100).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import numpy as np

from gapprobe.errors import ConfigError
from gapprobe.tasks.datasets.classes import DIGITS

BELOW = 100
OPERATIONS = {"plus": "+", "times": "*"}


def arithmetic_questions(
    entities: Sequence[str] = DIGITS, *, per_digit: int = 10, seed: int = 0
) -> list[dict[str, str]]:
    """Return questions about the ten digits: entity, aliases, question, answer, relation.

    All digits are asked the same, so that a question without its picture tells nothing of the digit. An operand is
    drawn once an operation; those that give every digit one answer, or an answer that is the digit's own name (times 0
    and 1, plus 0), are left out: the published range holds them, and the filter on answers would drop them.

    Args:
        entities: what the digits from 0 to 9 are called, in this order.
        per_digit: questions a digit, half of each operation.
        seed: of the operands.

    Raises:
        ConfigError: other than ten names, or more questions than there are operands.
    """
    if len(entities) != len(DIGITS):
        raise ConfigError(f"there are ten digits, and {len(entities)} names")
    if not 1 <= per_digit <= BELOW:
        raise ConfigError(f"per_digit is {per_digit}; it must be from 1 to {BELOW}")
    rng = np.random.default_rng(seed)
    asked: list[tuple[str, int]] = []
    for operation, count in (("plus", (per_digit + 1) // 2), ("times", per_digit // 2)):
        first = 1 if operation == "plus" else 2
        asked += [(operation, int(r)) for r in np.sort(rng.choice(np.arange(first, BELOW), count, replace=False))]
    return [
        {
            "entity": entity,
            "aliases": str(number) if entity != str(number) else DIGITS[number],
            "question": f"What is {{entity}} {OPERATIONS[operation]} {r}?",
            "answer": str(number + r if operation == "plus" else number * r),
            "relation": f"{operation}-{r}",
        }
        for operation, r in asked
        for number, entity in enumerate(entities)
    ]


def as_csv(questions: Sequence[dict[str, str]]) -> bytes:
    """Return questions as the CSV that `load_questions` reads."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(questions[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(questions)
    return text.getvalue().encode()
