"""The text of a prompt, from a template that is data. No model or image is known here."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from gapprobe.errors import ConfigError
from gapprobe.tasks.examples import Span


@dataclass(frozen=True)
class PromptTemplate:
    """An instruction, solved examples with a stop marker, the question and an answer cue.

    Source: arXiv 2508.18297, prompt design. `solved` and `query` hold the slots `{question}`, `{answer}`, `{stop}`.
    """

    instruction: str
    examples: tuple[tuple[str, str], ...]
    solved: str
    query: str
    separator: str
    stop: str

    def render(self, question: str) -> str:
        """Return the whole prompt that asks `question`."""
        solved = [self.solved.format(question=q, answer=a, stop=self.stop) for q, a in self.examples]
        return self.separator.join([self.instruction, *solved, self.query.format(question=question)])

    def spans(self, question: str) -> dict[str, tuple[Span, ...]]:
        """Return what stretches of `render(question)` are: all before the question is system, all behind it its cue."""
        asked = self.query.format(question=question)
        end = len(self.render(question))
        start = end - len(asked) + asked.index(question)
        return {"system": ((0, start),), "answer_cue": ((start + len(question), end),)}


def load_template(path: Path) -> PromptTemplate:
    """Read a prompt template from TOML.

    Raises:
        ConfigError: the file is missing, is not TOML, or lacks a field.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        examples = tuple((e["question"], e["answer"]) for e in data["examples"])
        return PromptTemplate(
            data["instruction"], examples, data["solved"], data["query"], data["separator"], data["stop"]
        )
    except FileNotFoundError as error:
        raise ConfigError(f"prompt file {path} does not exist") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt file {path} is not valid TOML: {error}") from error
    except (KeyError, TypeError) as error:
        raise ConfigError(f"prompt file {path} lacks the field {error}") from error
