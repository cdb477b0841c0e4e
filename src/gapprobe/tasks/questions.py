"""Entities and the questions asked about them: loading, the published filter (1), and naming by reference.

A question is stored with the slot `{entity}` where the entity is named, so that the name can be put in or replaced by
a reference without ever touching the inside of another word ("can", "man") or missing another casing.
"""

from __future__ import annotations

import csv
import re
import tomllib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from gapprobe.errors import ConfigError

SLOT = "{entity}"
MAX_ANSWER_WORDS = 7
# Between the words of a name: "ice cream", "ice-cream", "ice_cream" and "icecream" are one.
_BETWEEN = r"[\s_\-\u2010\u2011]"
# Plurals that no added s makes. Both ways give the entity away: Food101 has "waffles" and CIFAR100 "butterfly".
_PLURALS = (
    ("y", "ies"),
    ("f", "ves"),
    ("fe", "ves"),
    ("man", "men"),
    ("mouse", "mice"),
    ("goose", "geese"),
    ("foot", "feet"),
    ("tooth", "teeth"),
    ("child", "children"),
    ("person", "people"),
    ("", "es"),
    ("", "s"),
)


@dataclass(frozen=True)
class Entity:
    """Something that can be named or shown. `aliases` are other names that would give it away."""

    name: str
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Return the name and all aliases."""
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class Question:
    """A fact asked about one entity. `text` holds the slot `{entity}`; `relation` groups alike questions.

    `aliases` are other answers that are as right as `answer`.
    """

    entity: str
    relation: str
    text: str
    answer: str
    aliases: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """Return the answer and its aliases."""
        return (self.answer, *self.aliases)

    @property
    def id(self) -> str:
        """Return a readable key, unique among the questions of a study."""
        return f"{self.relation}/{self.entity}"

    def naming(self, name: str) -> str:
        """Return the question with `name` in the slot, its underscores, as class names have them, as spaces."""
        return self.text.replace(SLOT, name.replace("_", " "))

    def referring(self, reference: str) -> str:
        """Return the question with `reference` in the slot.

        A plural ending goes with the name, and so does an article where the reference brings its own ("a dog" becomes
        "the object in the image", not "a the object in the image"). "Dogs' ears" become "the object in the image's".
        """
        article = r"(?:\b(?:an?|the)\s+)?" if re.match(r"(the|this|that|an?)\b", reference, re.IGNORECASE) else ""

        def put(match: re.Match[str]) -> str:
            quoted = match.string[: match.start()].endswith(("'", "‘"))
            return reference + (match["owner"] or "") + ("s" if match["owner"] and not quoted else "")

        slot = rf"{article}{re.escape(SLOT)}(?:e?s(?!\w)(?P<owner>['’](?!\w))?)?"
        return re.sub(slot, put, self.text, flags=re.IGNORECASE)


@dataclass(frozen=True)
class QuestionSet:
    """All questions of a study, the entities, and how an entity is referred to when it is only shown.

    `listed` says that the identification question names all entities to choose from, and so gives none away.
    """

    entities: tuple[Entity, ...]
    questions: tuple[Question, ...]
    reference: str
    identify: str
    dropped: tuple[tuple[Question, str], ...] = ()
    listed: bool = False

    def listing(self) -> QuestionSet:
        """Return the same with an identification question that lists all entities, in the order of their names.

        Source: arXiv 2508.18297, which asks so about Food101.
        """
        names = ", ".join(sorted(entity.name.replace("_", " ") for entity in self.entities))
        return replace(self, identify=f"{self.identify} It is one of: {names}.", listed=True)

    def entity(self, name: str) -> Entity:
        """Return the entity called `name`."""
        return next(e for e in self.entities if e.name == name)


def mentions(text: str, name: str) -> list[tuple[int, int]]:
    """Return the character spans where `name` stands as a whole word in `text`, in any casing.

    A plural or possessive ending still counts as the name ("dogs", "dog's"); a longer word does not ("dogma"). So do
    hyphens, underscores and nothing in place of its spaces, and Latin letters with or without accents.
    """
    pattern = _pattern((name,))
    return [m.span() for m in pattern.finditer(_plain(text))] if pattern else []


def with_slot(text: str, entity: Entity) -> str:
    """Replace every mention of `entity` in `text`, by any of its names, with the slot `{entity}`."""
    pattern = _pattern(entity.names)
    text = unicodedata.normalize("NFC", text)
    for match in reversed(list(pattern.finditer(_plain(text))) if pattern else []):
        text = text[: match.start()] + SLOT + text[match.end() :]
    return text


def leaks(text: str, entity: Entity) -> list[str]:
    """Return the names of `entity` that still stand in `text`: a visual question must have none.

    Wider than what is replaced: "butterflies" names a butterfly, and "waffle" waffles.
    """
    plain = _plain(unicodedata.normalize("NFC", text))
    found = ((name, _pattern(_forms(name))) for name in entity.names)
    return [name for name, pattern in found if pattern and pattern.search(plain)]


def _as_written(text: str, name: str) -> bool:
    """Return whether `name` stands in `text` with the accents that it has, and no others."""

    def accents(part: str) -> list[str]:
        return [c for c in unicodedata.normalize("NFD", part) if unicodedata.combining(c)]

    text = unicodedata.normalize("NFC", text)
    return any(accents(text[start:end]) == accents(name) for start, end in mentions(text, name))


@cache
def _pattern(names: tuple[str, ...]) -> re.Pattern[str] | None:
    """Return what finds any of `names`, the longest first; None if they hold nothing to find."""
    parts = [list(filter(None, re.split(_BETWEEN, _plain(unicodedata.normalize("NFC", name))))) for name in names]
    found = sorted((f"{_BETWEEN}*".join(map(re.escape, part)) for part in parts if part), key=len, reverse=True)
    if not found:
        return None
    return re.compile(rf"(?<![^\W_])(?:{'|'.join(found)})(?=(?:'s|s|es)?(?![^\W_]))", re.IGNORECASE)


def _plain(text: str) -> str:
    """Return text of the same length with straight apostrophes and Latin letters without accents."""
    bases = (unicodedata.normalize("NFD", c)[0] for c in text)
    return "".join("'" if c == "’" else b if b.isascii() else c for c, b in zip(text, bases, strict=True))


@cache
def _forms(name: str) -> tuple[str, ...]:
    """Return a name with its plural, and the singular if it is one; some are no words, which costs nothing."""
    found = [name]
    for one, many in _PLURALS:
        for ending, other in ((one, many), (many, one)):
            stem = name[: len(name) - len(ending)]
            if name.casefold().endswith(ending) and len(stem + other) > 2:
                found.append(stem + other)
    return tuple(dict.fromkeys(found))


def reason_to_drop(question: Question, entity: Entity) -> str | None:
    """Apply the published filter (1); return why a pair must go, or None.

    Source: arXiv 2508.18297, question generation: both non-empty, answer of at most seven words that does not hold
    the entity, question that does.
    """
    if not question.text.strip() or not question.answer.strip():
        return "empty question or answer"
    if len(question.answer.split()) > MAX_ANSWER_WORDS:
        return f"answer longer than {MAX_ANSWER_WORDS} words"
    # As written: "zéro" does not name zero, though it would give it away in a question.
    if any(_as_written(answer, name) for answer in question.answers for name in entity.names):
        return "answer names the entity"
    if SLOT not in question.text:
        form = " in a form that can be replaced" if leaks(question.text, entity) else ""
        return f"question does not name the entity{form}"
    return None


def reason_to_leave_out(question: Question, entity: Entity, reference: str) -> str | None:
    """Return why a study cannot ask a question: `reason_to_drop`, or that a name is left beside the reference."""
    reason = reason_to_drop(question, entity)
    if reason is None and leaks(question.referring(reference), entity):
        reason = "the question names the entity outside its slot"
    return reason


def load_questions(path: Path, reference: str | None = None, identify: str | None = None) -> QuestionSet:
    """Read a question file, `.toml` (relations and answers by entity) or `.csv` (columns entity, question, answer).

    A CSV may also have the columns `relation` and `aliases` (separated by `|`); its questions name the entity in
    plain words, or hold the slot `{entity}`. `answer_aliases` (likewise) are other right answers, which TOML gives as a
    list in place of the answer. `reference` ("the object in the image") and `identify` ("What is the
    object in the image?") override what the file says; a CSV needs them.

    Raises:
        ConfigError: the file is missing, not readable as TOML or CSV, or lacks a field.
    """
    if not path.is_file():
        raise ConfigError(f"question file {path} does not exist; give a .toml or .csv file")
    try:
        if path.suffix == ".toml":
            entities, questions, file_reference, file_identify = _from_toml(path)
        elif path.suffix == ".csv":
            entities, questions = _from_csv(path)
            file_reference, file_identify = "the object in the image", "What is the object in the image?"
        else:
            raise ConfigError(f"question file {path} must end in .toml or .csv")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"question file {path} cannot be read: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"question file {path} lacks the field {error}; see docs/data.md for its form") from error
    return _filtered(entities, questions, reference or file_reference, identify or file_identify, path)


def _filtered(
    entities: Iterable[Entity], questions: Iterable[Question], reference: str, identify: str, path: Path
) -> QuestionSet:
    by_name = {e.name: e for e in entities}
    kept: list[Question] = []
    dropped: list[tuple[Question, str]] = []
    for question in questions:
        entity = by_name.get(question.entity)
        if entity is None:
            raise ConfigError(f"{path}: question {question.id} is about an entity that the file does not list")
        if question.id in {q.id for q in kept}:
            raise ConfigError(f"{path}: two questions share relation and entity {question.id}; rename one relation")
        reason = reason_to_leave_out(question, entity, reference)
        if reason is None:
            kept.append(question)
        else:
            dropped.append((question, reason))
    if not kept:
        raise ConfigError(f"{path}: no question is left after the filters; first reason: {dropped[:1]}")
    return QuestionSet(tuple(by_name.values()), tuple(kept), reference, identify, tuple(dropped))


def _from_toml(path: Path) -> tuple[list[Entity], list[Question], str, str]:
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    entities = [Entity(e["name"], tuple(e.get("aliases", ()))) for e in data["entities"]]
    questions: list[Question] = []
    for relation in data["relations"]:
        for entity, told in relation["answers"].items():
            answers = tuple(map(str.strip, (told,) if isinstance(told, str) else told))
            questions.append(
                Question(entity, relation["name"], relation["questions"][0], "".join(answers[:1]), answers[1:])
            )
    return entities, questions, data["reference"], data["identify"]


def _from_csv(path: Path) -> tuple[list[Entity], list[Question]]:
    entities: dict[str, Entity] = {}
    questions: list[Question] = []
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=1):
            aliases, others = (
                tuple(part.strip() for part in (row.get(column) or "").split("|") if part.strip())
                for column in ("aliases", "answer_aliases")
            )
            entity = entities.setdefault(row["entity"].strip(), Entity(row["entity"].strip(), aliases))
            text = with_slot(row["question"], entity)
            relation = (row.get("relation") or "").strip() or f"question-{number}"
            questions.append(Question(entity.name, relation, text.strip(), row["answer"].strip(), others))
    return list(entities.values()), questions
