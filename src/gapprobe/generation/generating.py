"""From entities and pages to a question file: propose, filter, write, and a report of what each filter dropped.

Every reply is kept by what was asked, so a stopped run goes on where it was and a changed filter asks only what is new.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from gapprobe.chat.base import Chat
from gapprobe.errors import ConfigError, DataError
from gapprobe.files import write_bytes
from gapprobe.generation.asking import (
    Distractors,
    Failed,
    Proposed,
    ask_for_article,
    ask_for_distractors,
    ask_for_pairs,
    structured,
)
from gapprobe.generation.filters import FILTERS, Judge, Pair
from gapprobe.generation.pages import DumpPages, Pages, passages
from gapprobe.tasks.questions import SLOT, Entity, Question

READ = 5  # dropped pairs of each filter that the report shows
_LONGEST_RELATION = 60


@dataclass(frozen=True)
class Dropped:
    """A pair that a filter took out, or a reply that gave none."""

    stage: str
    reason: str
    entity: str
    question: str = ""
    answer: str = ""
    said: str = ""


@dataclass
class Generated:
    """What came of it.

    Attributes:
        entities: all that were asked for.
        questions: that passed all filters, in the order of the entities.
        dropped: all others, by stage in the order of the stages.
        distractors: wrong answers by question id, where they were asked for.
        counts: pairs that entered each stage.
        notes: what else a reader must know: entities without a page, say.
        seed: of the samples in the report.
    """

    entities: tuple[Entity, ...]
    questions: list[Question] = field(default_factory=list[Question])
    dropped: list[Dropped] = field(default_factory=list[Dropped])
    distractors: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    counts: dict[str, int] = field(default_factory=dict[str, int])
    notes: list[str] = field(default_factory=list[str])
    seed: int = 0


def generate_questions(
    entities: Sequence[Entity],
    chat: Chat,
    pages: Pages | None = None,
    *,
    reference: str = "the object in the image",
    own_article: bool = True,
    most_passages: int = 10,
    with_distractors: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Generated:
    """Have a language model write questions about entities, and keep those that pass the filters.

    Source: arXiv 2508.18297, question generation.

    Args:
        entities: names, with the aliases that would give them away.
        chat: the language model.
        pages: about the entities; none if left out.
        reference: stands in place of an entity's name when it is only shown.
        own_article: have the model write an article too, and read that.
        most_passages: of an entity, from its page and from the article each.
        with_distractors: have wrong answers written for the multiple-choice form.
        seed: of requests.
        progress: show bars.

    Raises:
        ConfigError: no entity, two of one name, or neither pages nor articles.
        ModelError: the language model cannot be asked.
    """
    by_name = {entity.name: entity for entity in entities}
    if not entities or len(by_name) < len(entities):
        raise ConfigError("give at least one entity, each once" if entities else "give at least one entity")
    if pages is None and not own_article:
        raise ConfigError("there is nothing to read: give pages, or have the model write articles")
    found = Generated(tuple(entities), seed=seed)
    pairs = _proposed(entities, chat, pages, found, own_article, most_passages, seed, progress)
    judge = Judge(chat, by_name, reference, seed, progress)
    for stage, judged in FILTERS.items():
        found.counts[stage] = len(pairs)
        reasons = judged(pairs, judge)
        found.dropped += [
            Dropped(stage, why, p.entity, p.question, p.answer) for p, why in zip(pairs, reasons, strict=True) if why
        ]
        pairs = [pair for pair, why in zip(pairs, reasons, strict=True) if not why]
    found.counts["kept"] = len(pairs)
    asked = [pair.as_question(by_name[pair.entity]) for pair in pairs]
    found.questions = [replace(question, relation=relation_of(question)) for question in asked]
    if with_distractors:
        requests = [ask_for_distractors(q.naming(q.entity), q.answer, seed) for q in found.questions]
        for question, given in zip(
            found.questions, structured(chat, requests, Distractors, progress=progress), strict=True
        ):
            if isinstance(given, Failed):
                found.dropped.append(
                    Dropped("distractors", given.why, question.entity, question.text, question.answer, given.said)
                )
            else:
                found.distractors[question.id] = list(dict.fromkeys(filter(None, given.distractors)))
    return found


def _proposed(
    entities: Sequence[Entity],
    chat: Chat,
    pages: Pages | None,
    found: Generated,
    own_article: bool,
    most: int,
    seed: int,
    progress: bool,
) -> list[Pair]:
    read: list[tuple[Entity, str, str]] = []
    if isinstance(pages, DumpPages):
        pages.want(entities)
    for entity in entities if pages is not None else ():
        try:
            some = passages(pages.read(entity), entity, most) if pages is not None else []
        except DataError as error:
            found.notes.append(f"{entity.name}: {error}")
            continue
        if not some:
            found.notes.append(f"{entity.name}: no page, or none that names it")
        read += [(entity, "page", passage) for passage in some]
    if own_article:
        requests = [ask_for_article(entity.name.replace("_", " "), seed) for entity in entities]
        articles = dict(chat.ask(requests, progress=progress))
        for i, entity in enumerate(entities):
            if articles[i].error:
                found.notes.append(f"{entity.name}: no article: {articles[i].error}")
            read += [(entity, "model", passage) for passage in passages(articles[i].text, entity, most)]
    found.counts["passages"] = len(read)
    order = {entity.name: place for place, entity in enumerate(entities)}
    read.sort(key=lambda item: order[item[0].name])
    requests = [ask_for_pairs(entity.name.replace("_", " "), passage, seed) for entity, _, passage in read]
    pairs: list[Pair] = []
    for (entity, source, passage), given in zip(
        read, structured(chat, requests, Proposed, progress=progress), strict=True
    ):
        if isinstance(given, Failed):
            found.dropped.append(Dropped("proposal", given.why, entity.name, said=given.said))
        else:
            pairs += [Pair(entity.name, pair.question, pair.answer, source, passage) for pair in given.pairs]
    return pairs


def read_entities(path: Path) -> list[Entity]:
    """Read entities from a CSV with the column `entity` and, if there is one, `aliases`, separated by `|`.

    Raises:
        ConfigError: the file is missing, is no CSV in UTF-8, or lacks the column.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [(row["entity"].strip(), row.get("aliases") or "") for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"entities {path} cannot be read: {error}") from error
    except (KeyError, AttributeError) as error:
        raise ConfigError(f"entities {path} need the column entity") from error
    return [Entity(name, tuple(filter(None, map(str.strip, other.split("|"))))) for name, other in rows if name]


def relation_of(question: Question) -> str:
    """Return what groups questions that are alike but for their entity: the words around it."""
    plain = re.sub(r"\W+", " ", question.text.replace(SLOT, "_").casefold()).strip()
    if len(plain) <= _LONGEST_RELATION:
        return plain
    return f"{plain[:_LONGEST_RELATION].rstrip()} {sha256(plain.encode()).hexdigest()[:8]}"


def write_generated(found: Generated, out: Path) -> None:
    """Write `questions.csv`, `dropped.csv`, `distractors.csv` if there are any, and `report.md` into a folder."""
    aliases = {entity.name: "|".join(entity.aliases) for entity in found.entities}
    header = ("entity", "aliases", "relation", "question", "answer")
    lines = [(q.entity, aliases[q.entity], q.relation, q.text, q.answer) for q in found.questions]
    write_bytes(out / "questions.csv", _csv(header, lines))
    header = ("stage", "reason", "entity", "question", "answer", "said")
    gone = [(d.stage, d.reason, d.entity, d.question, d.answer, d.said) for d in found.dropped]
    write_bytes(out / "dropped.csv", _csv(header, gone))
    if found.distractors:
        wrong = [(id_, text) for id_, texts in found.distractors.items() for text in texts]
        write_bytes(out / "distractors.csv", _csv(("question", "distractor"), wrong))
    write_bytes(out / "report.md", report(found).encode())


def report(found: Generated) -> str:
    """Return what each filter dropped, with some to read, as Markdown."""
    lines = [
        "# Questions",
        "",
        f"{len(found.questions):,} questions about {len({q.entity for q in found.questions}):,} of "
        f"{len(found.entities):,} entities, from {found.counts.get('passages', 0):,} passages.",
        "",
        "| stage | pairs in | dropped |",
        "|---|---|---|",
    ]
    stages = ["proposal", *FILTERS, "distractors"]
    by_stage = {stage: [d for d in found.dropped if d.stage == stage] for stage in stages}
    for stage in stages:
        entered = {"proposal": "", "distractors": ""}.get(stage, f"{found.counts.get(stage, 0):,}")
        if stage in FILTERS or by_stage[stage]:
            lines.append(f"| {stage} | {entered} | {len(by_stage[stage]):,} |")
    lines += [f"| kept | {len(found.questions):,} | |", ""]
    rng = np.random.default_rng(found.seed)
    for stage, gone in by_stage.items():
        if not gone:
            continue
        lines += [f"## Dropped: {stage}", ""]
        for i in sorted(rng.permutation(len(gone))[:READ].tolist()):
            told = gone[i]
            what = f"{told.question} — {told.answer}" if told.question else told.said[:300]
            lines.append(f"- {_quoted(told.entity)}: {_quoted(what)} ({_quoted(told.reason)})")
        lines.append("")
    if found.notes:
        lines += ["## Notes", "", *(f"- {_quoted(note)}" for note in found.notes), ""]
    lines += ["## Kept", ""]
    for i in sorted(rng.permutation(len(found.questions))[: 2 * READ].tolist()):
        question = found.questions[i]
        lines.append(f"- {_quoted(question.naming(question.entity))} — {_quoted(question.answer)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Return a text of a model as Markdown shows it, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", " ".join(text.split()))


def _csv(header: Sequence[str], rows: Sequence[Sequence[str]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace")
