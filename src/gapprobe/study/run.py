"""The study, step by step: capture, outcomes, probe, lens, cosine, selective; each kept, each callable on its own."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gapprobe.errors import ConfigError
from gapprobe.files import write_json
from gapprobe.study import analysis
from gapprobe.study.config import StudyConfig
from gapprobe.study.gallery import linking_failures
from gapprobe.study.gap import measure_gap
from gapprobe.study.headline import headline
from gapprobe.study.judges import compare_judges
from gapprobe.study.multiple_choice import measure_choices, read_distractors
from gapprobe.study.outcomes import by_judge, judge_trials
from gapprobe.study.published import beside
from gapprobe.study.recipe import published_recipe
from gapprobe.study.results import SCHEMA, Json
from gapprobe.study.selecting import measure_selective
from gapprobe.study.steps import Steps, claim, key_of, peak_memory
from gapprobe.tasks.choices import Choices, make_choices
from gapprobe.tasks.examples import Example
from gapprobe.tasks.images import ImageFile, ImageSet, load_images
from gapprobe.tasks.judging import JUDGES
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


class Study:
    """One study in one output folder. Every step runs what it needs first, and keeps what it finds.

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
        self.questions: QuestionSet = load_questions(config.path(config.questions), config.reference, config.identify)
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
        from gapprobe.tracing.plan import row_ids
        from gapprobe.tracing.positions import parse_positions

        ids = row_ids(list(calls.values()), parse_positions(positions), decoding)
        return dict(zip(calls, ids, strict=True))

    def row_of(self, example: Example) -> str:
        """Return the id of the row that holds a call."""
        return self.rows[call_of(example)]

    @cached_property
    def outcomes(self) -> pd.DataFrame:
        """Judge every trial in every setting; see `gapprobe.study.outcomes.judge_trials`."""
        return self._judged(self.config.judge)

    def _judged(self, judge: str) -> pd.DataFrame:
        return judge_trials(self.trials, self.row_of, self.capture().rows, by_judge(judge, self.questions))

    def gap(self) -> Json:
        """Measure the accuracies, which trials count, and the gap."""
        probe = self.config.probe
        return self._once("gap", lambda: measure_gap(self.outcomes, replicates=probe.replicates, seed=self.config.seed))

    def judges(self) -> Json:
        """Measure the gap by every judge, and how far they agree."""

        def compare() -> Json:
            return compare_judges(
                {judge: self._judged(judge) for judge in JUDGES},
                replicates=self.config.probe.replicates,
                seed=self.config.seed,
            )

        return self._once("judges", compare)

    def choices(self) -> Json | None:
        """Ask every question with options, and measure the gap so; None where `config.choices` is not given."""
        settings = self.config.choices
        if settings is None:
            return None
        choices = make_choices(
            self.questions.questions,
            None if self._distractors is None else read_distractors(self._distractors),
            entities=self.questions.entities,
            options=settings.options,
            leave_out=True,
            seed=self.config.seed,
        )
        if not choices:
            raise ConfigError(
                f"no question has {settings.options - 1} distractors: give some, or ask for fewer options"
            )
        trials = self._trials(choices)
        calls = {call_of(example): example for trial in trials for example in trial.calls}
        model = self.model
        store = self._capture("choices", list(calls.values()), self._decoding, (model.n_layers,), ("last_input",))
        ids = self._ids(calls, ("last_input",), self._decoding)

        def measure() -> Json:
            return measure_choices(
                trials,
                choices,
                lambda example: ids[call_of(example)],
                store,
                model,
                self.questions,
                judge=self.config.judge,
                replicates=self.config.probe.replicates,
                seed=self.config.seed,
            )

        return self._once("choices", measure)

    def probe(self) -> Json:
        """Fit the failure probes at every layer, with controls, and selective prediction's scores."""
        return self._once("probe", lambda: analysis.probe(self.capture(), self.outcomes, self.config, self.progress))

    def recipe(self) -> Json:
        """Fit the published probe as published, and measure what of its accuracy is leakage."""
        return self._once("recipe", lambda: published_recipe(self.capture(), self.outcomes, self.config, self.progress))

    def lens(self) -> Json:
        """Read the answer's probability at every layer, told and shown."""
        return self._once("lens", lambda: analysis.lens(self.capture(), self.outcomes, self.model, self.config))

    def cosine(self) -> Json:
        """Compare the visual with the full-information state at every layer."""
        return self._once("cosine", lambda: analysis.cosine(self.capture(), self.outcomes, self.config))

    def selective(self) -> Json:
        """Measure selective prediction by perplexity, by the probe, and by both."""
        scores = self.probe()["scores"]

        def measure() -> Json:
            return measure_selective(self.capture(), self.outcomes, scores, self.samples(), self.config)

        return self._once("selective", measure)

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

    def _once(self, name: str, compute: Callable[[], Json]) -> Json:
        return self._steps.once(name, self._key(name, self.capture()), compute)

    def _key(self, name: str, store: Store) -> str:
        """Return a hash of all that the result of a step depends on."""
        parts = [self.fingerprint, self.images.fingerprint, self.config.model_dump_json(), store.header.fingerprint]
        if name == "choices" and self._distractors is not None:
            parts.append(hashlib.sha256(self._distractors.read_bytes()).hexdigest())
        return key_of(importlib.metadata.version("gapprobe"), *parts)

    @property
    def _distractors(self) -> Path | None:
        given = self.config.choices and self.config.choices.distractors
        return self.config.path(given) if given else None

    @property
    def step_names(self) -> tuple[str, ...]:
        """Return the names of the steps after capture."""
        asked = ("choices",) if self.config.choices else ()
        return ("gap", "judges", *asked, "probe", "recipe", "lens", "cosine", "selective", "gallery")

    def step_state(self, name: str, store: Store) -> str:
        """Return whether a step is "done" or "to do", or that data or settings have changed since it was."""
        return self._steps.state(name, self._key(name, store))

    def results(self) -> Json:
        """Run whatever is not there yet; return this study's part of results.json (docs/results.md)."""
        gap, judges, probe, lens = self.gap(), self.judges(), self.probe(), self.lens()
        cosine, selective = self.cosine(), self.selective()
        gallery = self._once(
            "gallery",
            lambda: {
                "gallery": linking_failures(
                    self.trials, self.outcomes, self.questions, most=self.config.gallery, seed=self.config.seed
                )
            },
        )
        store = self.capture()
        return {
            "config": self.config.model_dump(mode="json"),
            # As the configuration spells it: where the folder lies on this machine is nobody's business.
            "model": describe_model(self.model) | {"source": self.config.model},
            "data": {
                "questions": len(self.questions.questions),
                "entities": len(self.images.by_entity),
                "images": self.images.size,
                "trials": len(self.trials),
                "dropped": [{"question": q.naming(q.entity), "reason": why} for q, why in self.questions.dropped],
            },
            "rows": _rows(store.rows.loc[sorted(set(self.rows.values()))]),
            **gap,
            "published": beside(self.config.published),
            "judges": judges,
            "choices": self.choices(),
            "layers": list(store.header.layers),
            "probe": {key: value for key, value in probe.items() if key != "scores"},
            "recipe": self.recipe(),
            "lens": lens,
            "cosine": cosine,
            "selective": selective,
            **gallery,
        }

    @property
    def seconds(self) -> dict[str, float]:
        """Return the wall time of each step, from when it last ran."""
        return self._steps.seconds

    @property
    def peak_bytes(self) -> dict[str, int]:
        """Return the most memory that the process had had at the end of each step, from when it last ran."""
        return self._steps.peak_bytes


def call_of(example: Example) -> Call:
    """Return what tells one call of a study from another: the prompt, and the name of the image."""
    return example.text, example.image.name if example.image else None


def describe_model(model: Model) -> Json:
    """Return what results.json says of a model."""
    return {
        **model.describe(),
        "layers": model.n_layers,
        "width": model.width,
        "parameters": model.parameters,
    }


def _rows(rows: pd.DataFrame) -> Json:
    failed = rows[rows["error"].notna()]
    kinds = [
        {"kind": str(kind), "error": str(part["error"].iloc[0]), "n": len(part)}
        for kind, part in failed.groupby("error_kind", sort=True)
    ]
    return {"run": len(rows) - len(failed), "failed": len(failed), "failures": kinds}


def run_studies(configs: Sequence[StudyConfig], out: Path | str, *, progress: bool = True) -> Json:
    """Run studies into one folder and write `results.json` there; steps that are already there are not run again.

    Args:
        configs: one a study; their names must differ.
        out: the output folder; made if it is not there.
        progress: show progress bars.

    Returns:
        The results; docs/results.md describes them.

    Raises:
        ConfigError: no study, two of one name, or questions, prompts or images that cannot be used.
        OutputError: the folder is another study's, cannot be written, or has no room.
        ModelError: a model cannot be loaded or traced.
    """
    out = Path(out)
    names = [config.name for config in configs]
    if not configs or len(set(names)) < len(names):
        raise ConfigError("give at least one study, each with a name of its own" if configs else "give a configuration")
    studies = [Study(config, out, progress=progress) for config in configs]
    for study in studies:
        study.claim()
    families = {study.config.name: study.results() for study in studies}
    results: Json = {
        "schema": SCHEMA,
        "headline": headline(families),
        "study": {"title": configs[0].title, "note": configs[0].note, "names": names},
        "families": families,
        "versions": versions(),
        "machine": {"cpu": processor_name(), "cores": os.cpu_count()},
        "steps": [
            {"family": study.config.name, "step": step, "seconds": seconds, "peak_bytes": study.peak_bytes[step]}
            for study in studies
            for step, seconds in study.seconds.items()
        ],
    }
    write_json(out / "results.json", results)
    return results


def processor_name() -> str:
    """Return the processor's model where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def versions() -> dict[str, str]:
    """Return the versions of gapprobe and of the packages that its numbers depend on."""
    packages = ("gapprobe", "torch", "transformers", "nnsight", "safetensors", "numpy", "scipy", "pandas")
    return {package: importlib.metadata.version(package) for package in packages}
