"""What the language model reads: true facts in the study's prompt format, behind a prefix in the place of an image.

A document is a list of token ids with a mask of what must be learnt. No tensor and no training lives here.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gapprobe.demo
from examples.digits.data import NAMES, NOTHING
from gapprobe.tasks.prompts import PromptTemplate, load_template

DEMO = Path(gapprobe.demo.__file__).parent
CAPTIONS = ("The image shows {name} {stop}", "This is a picture of {name} {stop}", "A photo of {name} {stop}")
FILLER_TEXT = (
    "garden river stone window table music paper light water mountain road bridge forest cloud winter summer bread "
    "coffee letter book story house door key clock train boat horse bird fish tree leaf flower grass sand salt glass "
    "iron silver gold wood wool silk rope wheel engine market street village city island harbor lamp mirror chair "
    "carpet kitchen pencil picture song dance game ball shoe coat hat ring coin map letterbox under over beside near "
    "behind quiet bright heavy soft round narrow deep early late often never always slowly"
)
FILLERS = tuple(FILLER_TEXT.split())
MAX_PREFIX = 20


@dataclass(frozen=True)
class Fact:
    """One true answer about one number; `wordings` hold the slot `{entity}`."""

    entity: str
    wordings: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Facts:
    """All facts, and how the number in the image is referred to and asked for."""

    facts: tuple[Fact, ...]
    reference: str
    identify: str
    template: PromptTemplate


def load_facts() -> Facts:
    """Read the demo's facts with every wording (the study itself asks the first one only) and its prompt template."""
    data = tomllib.loads((DEMO / "facts.toml").read_text(encoding="utf-8"))
    facts = tuple(
        Fact(entity, tuple(relation["questions"]), answer)
        for relation in data["relations"]
        for entity, answer in relation["answers"].items()
    )
    return Facts(facts, data["reference"], data["identify"], load_template(DEMO / "prompts.toml"))


def all_words(facts: Facts) -> list[str]:
    """Return every text that the tokenizer must be able to spell, in a fixed order."""
    texts = [facts.template.render(facts.identify), facts.reference, NOTHING, *NAMES, *FILLERS]
    texts += [caption.format(name=NOTHING, stop=facts.template.stop) for caption in CAPTIONS]
    for fact in facts.facts:
        texts += [wording.format(entity=fact.entity) for wording in fact.wordings] + [fact.answer]
    return texts


@dataclass(frozen=True)
class Document:
    """Token ids; where an embedding is replaced by random numbers; where a token must be learnt; what is asked last."""

    ids: list[int]
    noise: list[bool]
    learn: list[bool]
    kind: str


class DocumentMaker:
    """Draws documents. Same facts, tokenizer and seed: same documents."""

    def __init__(self, facts: Facts, encode: Callable[[str], list[int]], bos: int, vocabulary: list[int], seed: int):
        """Prepare token lists.

        Args:
            facts: what is true.
            encode: text to token ids, without the start token.
            bos: the start token.
            vocabulary: ids of the ordinary words, from which strange prefixes are drawn.
            seed: of the drawing.
        """
        self.facts, self.bos = facts, bos
        self.random = random.Random(seed)
        self._encode, self._cache = encode, dict[str, list[int]]()
        names = {encode(name)[0] for name in NAMES}
        self.fillers = [encode(word)[0] for word in FILLERS]
        self.anything = [i for i in vocabulary if i not in names]

    def document(self, questions: int, plain: bool = False) -> Document:
        """Return one document with that many questions in a row, or a caption.

        A `plain` document is nothing but questions that name their number: the quickest way to learn the facts, and
        what the model reads first.
        """
        if plain:
            body, learn, kind = self._questions(None, questions, bare=True)
            return Document([self.bos, *body], [False] * (len(body) + 1), [False, *learn], kind)
        draw = self.random
        prefix, noise, seen = self._prefix()
        if draw.random() < 0.5:  # where InstructBLIP has its image
            ids, strange = [*prefix, self.bos], [*noise, False]
        else:  # where LLaVA has it
            ids, strange = [self.bos, *prefix], [False, *noise]
        caption = draw.random() < 0.1
        body, learn, kind = self._caption(seen) if caption else self._questions(seen, questions, draw.random() < 0.15)
        return Document(ids + body, strange + [False] * len(body), [False] * len(ids) + learn, kind)

    def _ids(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self._encode(text)
        return self._cache[text]

    def _prefix(self) -> tuple[list[int], list[bool], str | None]:
        """Return ids, the mask of noise, and the number that the prefix names, if any."""
        draw = self.random
        if draw.random() < 0.08:
            return [], [], None
        length = draw.randint(1, MAX_PREFIX)
        words = self.fillers if draw.random() < 0.5 else self.anything
        ids = [draw.choice(words) for _ in range(length)]
        share = draw.choice((0.0, 0.0, draw.random(), 1.0))
        noise = [draw.random() < share for _ in range(length)]
        if draw.random() < 0.25:
            return ids, noise, None
        name = draw.choice(NAMES)
        copies = 1 if draw.random() < 0.5 else draw.randint(1, length)
        for place in draw.sample(range(length), copies):
            ids[place], noise[place] = self._ids(name)[0], False
        return ids, noise, name

    def _caption(self, seen: str | None) -> tuple[list[int], list[bool], str]:
        before, after = self.random.choice(CAPTIONS).split("{name}")
        ids, learn = list(self._ids(before)), [False] * len(self._ids(before))
        told = self._ids(seen or NOTHING) + self._ids(after.format(stop=self.facts.template.stop))
        return ids + told, learn + [True] * len(told), "caption"

    def _questions(self, seen: str | None, count: int, bare: bool) -> tuple[list[int], list[bool], str]:
        """Return ids, what must be learnt, and the last kind; `bare` leaves out instruction and solved examples."""
        draw, facts, template = self.random, self.facts, self.facts.template
        ids, learn, kind = list[int](), list[bool](), ""
        identify = draw.randrange(count) if not bare and draw.random() < 0.35 else count
        for turn in range(count):
            # After an answer that spells the number out, a reference could be solved by copying: ask by name.
            if turn == identify:
                kind, question, answer = "identified", facts.identify, seen or NOTHING
            elif seen is not None and turn < identify and draw.random() < 0.55:
                fact = draw.choice([f for f in facts.facts if f.entity == seen])
                kind, question = "referred", draw.choice(fact.wordings).format(entity=facts.reference)
                answer = fact.answer
            else:
                fact = draw.choice(facts.facts)
                kind, question = "named", draw.choice(fact.wordings).format(entity=fact.entity)
                answer = fact.answer
            whole = turn == 0 and not bare
            asked = self._ids(template.render(question) if whole else template.query.format(question=question))
            told = self._ids(f"{answer} {template.stop}")
            ids += asked + told
            learn += [False] * len(asked) + [True] * len(told)
        return ids, learn, kind
