"""The five settings of the study: which prompts and images one trial asks for. Nothing is run or judged here.

Source: arXiv 2508.18297, experimental settings. A trial is one question about one image of its entity. Trials share
calls: the text-only prompt, say, is the same for all images of an entity, and is run once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gapprobe.errors import ConfigError, DataError
from gapprobe.tasks.choices import Choices
from gapprobe.tasks.examples import Example, Span
from gapprobe.tasks.images import ImageFile, ImageSet, TrivialImage, size_of
from gapprobe.tasks.prompts import PromptTemplate
from gapprobe.tasks.questions import Question, QuestionSet, leaks, mentions

SETTINGS = ("identification", "full_information", "text_only", "visual", "guess_control")
TRIVIAL = ("black", "white", "noise", "none")


@dataclass(frozen=True)
class Trial:
    """One question about one image, with the calls that each setting needs.

    `text_only` and `guess_control` have one call a trivial image; both are empty when the entity's image cannot be
    read, for then the trial cannot be run at all.
    """

    question: Question
    image: ImageFile
    identification: Example
    full_information: Example
    visual: Example
    text_only: tuple[Example, ...]
    guess_control: tuple[Example, ...]

    @property
    def id(self) -> str:
        """Return a key, unique among the trials of a study."""
        return f"{self.question.id} @ {self.image.name}"

    @property
    def calls(self) -> tuple[Example, ...]:
        """Return all calls of this trial."""
        return (self.identification, self.full_information, self.visual, *self.text_only, *self.guess_control)


def build_trials(
    questions: QuestionSet,
    images: ImageSet,
    template: PromptTemplate,
    *,
    images_per_question: int,
    trivial: Sequence[str] = TRIVIAL,
    choices: Mapping[str, Choices] | None = None,
    seed: int = 0,
) -> list[Trial]:
    """Pair every question with `images_per_question` images of its entity, drawn without replacement.

    Args:
        questions: what is asked.
        images: of the entities.
        template: of the prompts.
        images_per_question: fewer where an entity has fewer.
        trivial: kinds of trivial images, of `TRIVIAL`.
        choices: options by question id. Every question but the identification is asked with them then, and those
            without any are left out.
        seed: of which images are drawn; it is the same with and without choices.

    Raises:
        ConfigError: an unknown trivial image, fewer than one image a question, or a prompt that names an entity
            which is only to be shown.
    """
    if unknown := [kind for kind in trivial if kind not in TRIVIAL]:
        raise ConfigError(f"trivial image {unknown[0]!r} is not known; choose from {', '.join(TRIVIAL)}")
    if images_per_question < 1 or not trivial:
        raise ConfigError("a study needs at least one image a question and one trivial image")
    asked_about = [q for q in questions.questions if choices is None or q.id in choices]
    for question in asked_about:
        entity = questions.entity(question.entity)
        options = choices[question.id] if choices is not None else None
        identify = () if questions.listed else (questions.identify,)
        for asked in (_asked(question.referring(questions.reference), options), *identify):
            if names := leaks(template.render(asked), entity):
                raise ConfigError(
                    f"the prompt that asks {asked!r} about a picture of {entity.name} names it ({', '.join(names)}): "
                    "reword the question, the reference, the options or the template's examples"
                )
    rng = np.random.default_rng(seed)
    trials: list[Trial] = []
    for question in questions.questions:
        candidates = images.by_entity[question.entity]
        chosen = rng.permutation(len(candidates))[:images_per_question]
        # The images of the others are drawn all the same: those of this question do not depend on them.
        options = choices.get(question.id) if choices is not None else None
        if choices is None or options is not None:
            trials += [_trial(question, candidates[i], questions, template, trivial, options) for i in sorted(chosen)]
    return trials


def _asked(question: str, options: Choices | None) -> str:
    return options.ask(question) if options else question


def _trial(
    question: Question,
    image: ImageFile,
    questions: QuestionSet,
    template: PromptTemplate,
    trivial: Sequence[str],
    options: Choices | None,
) -> Trial:
    identify = _Prompt.of(template, questions.identify, reference=questions.reference)
    told = _asked(question.naming(question.entity), options)
    shown = _asked(question.referring(questions.reference), options)
    named = _Prompt.of(template, told, entity=question.entity)
    referred = _Prompt.of(template, shown, reference=questions.reference)

    def on_image(setting: str, prompt: _Prompt) -> Example:
        asked = "" if setting == "identification" else question.id
        columns = _columns(setting, asked, question.entity, image.name)
        return Example(prompt.text, image, columns, prompt.spans)

    def on_trivial(setting: str, prompt: _Prompt, entity: str) -> tuple[Example, ...]:
        try:
            width, height = size_of(image)
        except DataError:
            return ()
        pictures = [None if kind == "none" else TrivialImage(kind, width, height) for kind in trivial]
        # The wording of a guess is one for all entities, but for the options.
        asked = question.id if entity or options else question.relation
        return tuple(
            Example(prompt.text, p, _columns(setting, asked, entity, p.name if p else "none"), prompt.spans)
            for p in pictures
        )

    return Trial(
        question,
        image,
        identification=on_image("identification", identify),
        full_information=on_image("full_information", named),
        visual=on_image("visual", referred),
        text_only=on_trivial("text_only", named, question.entity),
        guess_control=on_trivial("guess_control", referred, ""),
    )


@dataclass(frozen=True)
class _Prompt:
    """A rendered prompt, and what stretches of it are."""

    text: str
    spans: Mapping[str, Sequence[Span]]

    @classmethod
    def of(cls, template: PromptTemplate, question: str, **phrases: str) -> _Prompt:
        """Render a question; `phrases` are looked for by role."""
        text = template.render(question)
        found = {role: mentions(text, phrase) for role, phrase in phrases.items()}
        return cls(text, {**template.spans(question), **found})


def _columns(setting: str, question: str, entity: str, image: str) -> dict[str, str]:
    return {"setting": setting, "question": question, "entity": entity, "image": image}
