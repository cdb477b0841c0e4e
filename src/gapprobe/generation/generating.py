"""From entities and pages to a question file: propose, filter, write, and a report of what each filter dropped.

Every reply is kept by what was asked, so a stopped run goes on where it was and a changed filter asks only what is new.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import pandas as pd

from gapprobe.chat.base import Chat
from gapprobe.chat.forms import Failed, structured
from gapprobe.errors import ConfigError, OutputError
from gapprobe.files import write_bytes
from gapprobe.generation.asking import Distractors, Proposed, ask_for_article, ask_for_distractors, ask_for_pairs
from gapprobe.generation.filters import FILTERS, Judge, Pair
from gapprobe.generation.pages import Pages, passages
from gapprobe.markdown import escaped
from gapprobe.tasks.questions import Entity, Question

READ = 5  # dropped pairs of each filter that the report shows


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
        counts: `passages` that were read, and pairs that entered each filter.
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
        ConfigError: no entity, two of one name, no passage to read, or neither pages nor articles.
        ModelError: the language model cannot be asked.
    """
    by_name = {entity.name: entity for entity in entities}
    if not entities or len(by_name) < len(entities):
        raise ConfigError("give at least one entity, each once" if entities else "give at least one entity")
    if most_passages < 1:
        raise ConfigError(f"most_passages is {most_passages}; it must be at least 1")
    if pages is None and not own_article:
        raise ConfigError("there is nothing to read: give pages, or have the model write articles")
    found = Generated(tuple(entities), seed=seed)
    read = [] if pages is None else _from_pages(entities, pages, most_passages, found.notes)
    if own_article:
        requests = [ask_for_article(entity.name.replace("_", " "), seed) for entity in entities]
        for i, reply in sorted(chat.ask(requests, progress=progress)):
            if reply.error:
                found.notes.append(f"{entities[i].name}: no article: {reply.error}")
            read += [(entities[i], "model", passage) for passage in passages(reply.text, entities[i], most_passages)]
    order = {name: place for place, name in enumerate(by_name)}
    read.sort(key=lambda item: order[item[0].name])
    found.counts["passages"] = len(read)
    requests = [ask_for_pairs(entity.name.replace("_", " "), passage, seed) for entity, _, passage in read]
    pairs: list[Pair] = []
    for (entity, source, passage), given in zip(
        read, structured(chat, requests, Proposed, progress=progress), strict=True
    ):
        if isinstance(given, Failed):
            found.dropped.append(Dropped("proposal", given.why, entity.name, said=given.said))
        else:
            pairs += [Pair(entity.name, pair.question, pair.answer, source, passage) for pair in given.pairs]
    judge = Judge(chat, by_name, reference, seed, progress)
    for stage, judged in FILTERS.items():
        found.counts[stage] = len(pairs)
        reasons = judged(pairs, judge)
        found.dropped += [
            Dropped(stage, why, p.entity, p.question, p.answer) for p, why in zip(pairs, reasons, strict=True) if why
        ]
        pairs = [pair for pair, why in zip(pairs, reasons, strict=True) if not why]
    found.questions = [pair.as_question(by_name[pair.entity]) for pair in pairs]
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


def _from_pages(entities: Sequence[Entity], pages: Pages, most: int, notes: list[str]) -> list[tuple[Entity, str, str]]:
    read: list[tuple[Entity, str, str]] = []
    for entity, page, problem in pages.read(entities):
        some = passages(page, entity, most)
        if not some:
            notes.append(f"{entity.name}: {problem or 'no page, or none that names it'}")
        read += [(entity, "page", passage) for passage in some]
    return read


def read_entities(path: Path) -> list[Entity]:
    """Read entities from a CSV with the column `entity` and, if there is one, `aliases`, separated by `|`.

    Raises:
        ConfigError: the file is missing, is no CSV in UTF-8, lacks the column, or lists no entity.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [(row["entity"].strip(), row.get("aliases") or "") for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"entities {path} cannot be read: {error}") from error
    except (KeyError, AttributeError) as error:
        raise ConfigError(f"entities {path} need the column entity") from error
    found = [Entity(name, tuple(filter(None, map(str.strip, other.split("|"))))) for name, other in rows if name]
    if not found:
        raise ConfigError(f"entities {path} lists none; give one a line")
    return found


def require_own(out: Path) -> None:
    """Refuse a folder whose questions are somebody's own: writing there would lose them.

    Raises:
        OutputError: it has a `questions.csv` and no `dropped.csv`, which `write_generated` always writes beside it.
    """
    if (out / "questions.csv").exists() and not (out / "dropped.csv").exists():
        raise OutputError(f"{out / 'questions.csv'} was not generated and would be lost; choose another folder")


def write_generated(found: Generated, out: Path) -> None:
    """Write `questions.csv`, `dropped.csv`, `distractors.csv` if there are any, and `report.md` into a folder."""
    aliases = {entity.name: "|".join(entity.aliases) for entity in found.entities}
    tables = {
        # First, so that a folder with questions of ours has it even if the run is killed between the two.
        "dropped": pd.DataFrame(map(asdict, found.dropped), columns=[f.name for f in fields(Dropped)]),
        "questions": pd.DataFrame(
            [(q.entity, aliases[q.entity], q.relation, q.text, q.answer) for q in found.questions],
            columns=["entity", "aliases", "relation", "question", "answer"],
        ),
    }
    if found.distractors:
        wrong = [(id_, text) for id_, texts in found.distractors.items() for text in texts]
        tables["distractors"] = pd.DataFrame(wrong, columns=["question", "distractor"])
    for name, table in tables.items():
        write_bytes(out / f"{name}.csv", table.to_csv(index=False).encode())
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
    for stage, gone in by_stage.items():
        if stage in FILTERS or gone:
            entered = f"{found.counts.get(stage, 0):,}" if stage in FILTERS else ""
            lines.append(f"| {stage} | {entered} | {len(gone):,} |")
    lines += [f"| kept | {len(found.questions):,} | |", ""]
    rng = np.random.default_rng(found.seed)
    for stage, gone in by_stage.items():
        if not gone:
            continue
        lines += [f"## Dropped: {stage}", ""]
        for i in sorted(rng.permutation(len(gone))[:READ].tolist()):
            told = gone[i]
            what = f"{told.question} — {told.answer}" if told.question else told.said[:300]
            lines.append(f"- {escaped(told.entity)}: {escaped(what)} ({escaped(told.reason)})")
        lines.append("")
    if found.notes:
        lines += ["## Notes", "", *(f"- {escaped(note)}" for note in found.notes), ""]
    lines += ["## Kept", ""]
    for i in sorted(rng.permutation(len(found.questions))[: 2 * READ].tolist()):
        question = found.questions[i]
        lines.append(f"- {escaped(question.naming(question.entity))} — {escaped(question.answer)}")
    return "\n".join(lines) + "\n"
