"""What a study asks its model, and the stores in which the answers are kept: its own calls, and what is asked beside.

Nothing is judged or measured here.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gapprobe.errors import ConfigError
from gapprobe.study.config import ChoicesConfig, StudyConfig
from gapprobe.study.multiple_choice import Compared, compare_options, read_distractors
from gapprobe.study.steps import Steps, claim, key_of, peak_memory
from gapprobe.tasks.choices import Choices, make_choices
from gapprobe.tasks.examples import Example
from gapprobe.tasks.images import ImageFile, ImageSet, load_images
from gapprobe.tasks.prompts import PromptTemplate, load_template
from gapprobe.tasks.questions import QuestionSet, load_questions
from gapprobe.tasks.settings import Trial, build_trials

if TYPE_CHECKING:
    import pandas as pd

    from gapprobe.models.model import Model
    from gapprobe.store.reader import Store
    from gapprobe.tracing.answers import Decoding

POSITIONS = ("last_input", "last_output")
Call = tuple[str, str | None]


@dataclass(frozen=True)
class AskedWithChoices:
    """The questions of a study asked with options.

    Attributes:
        trials: in the multiple-choice form.
        choices: options by question id; questions that cannot be asked so have none.
        rows: the answers, as `Asking.answered` gives them.
        row_of: the row id of a call.
        compared: reads how probable the options were.
    """

    trials: Sequence[Trial]
    choices: Mapping[str, Choices]
    rows: pd.DataFrame
    row_of: Callable[[Example], str]
    compared: Callable[[], Compared]


class Asking:
    """One study's questions, images and prompts, and its model's answers in one output folder.

    Args:
        config: from `load_config`.
        out: output folder; several studies may share one.
        progress: show progress bars.

    Raises:
        ConfigError: questions, prompts or images cannot be used.
    """

    def __init__(self, config: StudyConfig, out: Path, *, progress: bool = True) -> None:
        self.config = config
        self.out = out
        self.progress = progress
        questions = load_questions(config.path(config.questions), config.reference, config.identify)
        self.questions: QuestionSet = questions.listing() if config.list_classes else questions
        self.template: PromptTemplate = load_template(config.path(config.prompts))
        asked_about = list(dict.fromkeys(q.entity for q in self.questions.questions))
        self.images: ImageSet = load_images(config.path(config.images), asked_about)
        self.trials: list[Trial] = self._trials(None)
        self._steps = Steps(out / "steps" / config.name)

    def _trials(self, choices: Mapping[str, Choices] | None) -> list[Trial]:
        return build_trials(
            self.questions,
            self.images,
            self.template,
            images_per_question=self.config.images_per_question,
            trivial=self.config.trivial_images,
            choices=choices,
            seed=self.config.seed,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of what the model is asked: settings, questions and prompts.

        Images are not part of it: one that is mended or added makes rows of its own in the same store.
        """
        files = [self.config.path(p).read_bytes() for p in (self.config.questions, self.config.prompts)]
        return key_of(self.config.asked, *(hashlib.sha256(f).hexdigest() for f in files))

    @cached_property
    def model(self) -> Model:
        """Load the model, once."""
        from gapprobe.models.loading import load_model

        config = self.config
        return load_model(config.model_source, dtype=config.dtype, device=config.device, revision=config.revision)

    def claim(self) -> None:
        """Make the output folder this study's.

        Raises:
            OutputError: it is somebody else's, or holds another study of this name.
        """
        claim(self.out, {self.config.name: self.fingerprint})

    def capture(self) -> Store:
        """Ask the model everything and keep answers and residual streams; goes on where an earlier run stopped."""
        return self._store

    @cached_property
    def _store(self) -> Store:
        return self._capture("", self.calls, self._decoding, self.config.layers, POSITIONS)

    def _capture(
        self,
        what: str,
        calls: Sequence[Example],
        decoding: Decoding,
        layers: str | Sequence[int],
        positions: Sequence[str],
    ) -> Store:
        """Run calls into a store beside the others; `what` tells it from the store of the study's own calls.

        No study's name has a plus, so that no two stores are called the same.
        """
        from gapprobe.tracing.run import capture

        self.claim()
        start = time.perf_counter()
        store = capture(
            self.model,
            calls,
            self.store_folder.with_name(f"{self.config.name}+{what}" if what else self.config.name),
            layers=layers,
            positions=positions,
            batch_size=self.config.batch_size,
            max_new_tokens=decoding.max_new_tokens,
            stop=decoding.stop,
            temperature=decoding.temperature,
            seed=decoding.seed,
            dtype=str(self.model.hf.dtype).removeprefix("torch."),
            progress=self.progress,
        )
        self._steps.note(f"capture {what}".strip(), round(time.perf_counter() - start, 3), peak_memory())
        return store

    def answered(self) -> pd.DataFrame:
        """Return what came of the study's own calls, asking what is not asked yet.

        Returns:
            A table by row id with the columns `answer` and, of calls that could not be run, `error` and `error_kind`.
        """
        return self.capture().rows

    @property
    def store_folder(self) -> Path:
        """Return where the study's own calls are kept."""
        return self.out / "store" / self.config.name

    @property
    def calls(self) -> list[Example]:
        """Return every different call of all trials, once."""
        return list(self._calls.values())

    @cached_property
    def _calls(self) -> dict[Call, Example]:
        return {call_of(example): example for trial in self.trials for example in trial.calls}

    @cached_property
    def _decoding(self) -> Decoding:
        from gapprobe.tracing.answers import Decoding

        return Decoding(self.config.max_new_tokens, (self.template.stop,))

    @cached_property
    def rows(self) -> dict[Call, str]:
        """Return the id of the row of every call."""
        return self._ids(self._calls, POSITIONS, self._decoding)

    def _ids(self, calls: Mapping[Call, Example], positions: Sequence[str], decoding: Decoding) -> dict[Call, str]:
        """Return the ids that capture gives to the rows of `calls`."""
        return dict(zip(calls, self._row_ids(list(calls.values()), positions, decoding), strict=True))

    def _row_ids(self, calls: Sequence[Example], positions: Sequence[str], decoding: Decoding) -> list[str]:
        from gapprobe.tracing.plan import row_ids
        from gapprobe.tracing.positions import parse_positions

        return row_ids(calls, parse_positions(positions), decoding)

    def row_of(self, example: Example) -> str:
        """Return the id of the row that holds a call."""
        return self.rows[call_of(example)]

    def with_choices(self, settings: ChoicesConfig) -> AskedWithChoices:
        """Ask every question that has distractors with options, in a store of its own.

        Raises:
            ConfigError: no question can be asked so, or the file of distractors cannot be read.
        """
        choices, trials = self._with_options(settings)
        calls = {call_of(example): example for trial in trials for example in trial.calls}
        last = (self.model.n_layers,)
        store = self._capture("choices", list(calls.values()), self._decoding, last, ("last_input",))
        ids = self._ids(calls, ("last_input",), self._decoding)

        def row_of(example: Example) -> str:
            return ids[call_of(example)]

        def compared() -> Compared:
            return compare_options(trials, choices, row_of, store, self.model)

        return AskedWithChoices(trials, choices, store.rows, row_of, compared)

    def _with_options(self, settings: ChoicesConfig) -> tuple[dict[str, Choices], list[Trial]]:
        choices = make_choices(
            self.questions.questions,
            None if self.distractors is None else read_distractors(self.distractors),
            entities=self.questions.entities,
            options=settings.options,
            leave_out=True,
            seed=self.config.seed,
        )
        if not choices:
            raise ConfigError(
                f"no question has {settings.options - 1} distractors: give some, or ask for fewer options"
            )
        return choices, self._trials(choices)

    @property
    def distractors(self) -> Path | None:
        """Return the file of wrong answers, if the configuration names one."""
        given = self.config.choices and self.config.choices.distractors
        return self.config.path(given) if given else None

    def outside(self, examples: Sequence[Example]) -> tuple[Store, list[str]]:
        """Ask calls that belong to no trial, and keep what the study's own calls keep, in a store of their own.

        Returns:
            The store, and the id of each call's row.
        """
        store = self._capture("outside", examples, self._decoding, self.config.layers, POSITIONS)
        return store, self._row_ids(examples, POSITIONS, self._decoding)

    def answers(self, what: str, calls: Sequence[Example]) -> list[str | None]:
        """Return greedy answers to calls beside the study's, in a store of their own; None for one that failed."""
        store = self._capture(what, calls, self._decoding, (0,), ("last_input",))
        told = store.rows["answer"][store.rows["error"].isna()].to_dict()
        ids = self._ids({call_of(call): call for call in calls}, ("last_input",), self._decoding)
        return [told.get(ids[call_of(call)]) for call in calls]

    def drawn(self, images: Sequence[ImageFile], count: int) -> list[ImageFile]:
        """Return up to `count` of an entity's images, drawn by the study's seed, in their own order."""
        order = np.random.default_rng(self.config.seed).permutation(len(images))[:count]
        return [images[i] for i in sorted(order)]

    def samples(self) -> dict[str, list[str]] | None:
        """Return further answers to every visual call, by its row, drawn as `config.samples` says; None if not at all.

        A call that could not be run has none. Every draw is a store of its own, so that a killed run goes on.
        """
        if self.config.samples is None:
            return None
        from gapprobe.tracing.answers import Decoding

        calls = {call_of(trial.visual): trial.visual for trial in self.trials}
        found: dict[str, list[str]] = {self.rows[call]: [] for call in calls}
        temperature = self.config.samples.temperature
        for draw in range(self.config.samples.count):
            decoding = Decoding(
                self.config.max_new_tokens,
                (self.template.stop,),
                temperature=temperature,
                seed=self.config.seed + draw,
            )
            rows = self._capture(
                f"draw-{draw}-at-{temperature:g}", list(calls.values()), decoding, (0,), ("last_input",)
            ).rows
            answers = rows["answer"][rows["error"].isna()].to_dict()
            for call, drawn in self._ids(calls, ("last_input",), decoding).items():
                if drawn in answers:
                    found[self.rows[call]].append(answers[drawn])
        return found


def call_of(example: Example) -> Call:
    """Return what tells one call of a study from another: the prompt, and the name of the image."""
    return example.text, example.image.name if example.image else None
