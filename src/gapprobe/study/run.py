"""The study, step by step: capture, outcomes, probe, lens, cosine, selective; each kept, each callable on its own."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from gapprobe.errors import ConfigError
from gapprobe.files import write_json
from gapprobe.study import analysis
from gapprobe.study.config import StudyConfig
from gapprobe.study.gallery import linking_failures
from gapprobe.study.gap import measure_gap
from gapprobe.study.headline import headline
from gapprobe.study.outcomes import judge_trials
from gapprobe.study.results import SCHEMA, Json
from gapprobe.study.steps import Steps, claim, key_of
from gapprobe.tasks.examples import Example
from gapprobe.tasks.images import ImageSet, load_images
from gapprobe.tasks.prompts import PromptTemplate, load_template
from gapprobe.tasks.questions import QuestionSet, load_questions
from gapprobe.tasks.settings import Trial, build_trials

if TYPE_CHECKING:
    import pandas as pd

    from gapprobe.models.model import Model
    from gapprobe.store.reader import Store

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
        self.trials: list[Trial] = build_trials(
            self.questions,
            self.images,
            self.template,
            images_per_question=config.images_per_question,
            trivial=config.trivial_images,
            seed=config.seed,
        )
        self._steps = Steps(out / "steps" / config.name)

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
        from gapprobe.tracing.run import capture

        self.claim()
        start = time.perf_counter()
        store = capture(
            self.model,
            list(self._calls.values()),
            self.out / "store" / self.config.name,
            layers=self.config.layers,
            positions=POSITIONS,
            batch_size=self.config.batch_size,
            max_new_tokens=self.config.max_new_tokens,
            stop=self.template.stop,
            dtype=str(self.model.hf.dtype).removeprefix("torch."),
            progress=self.progress,
        )
        self._steps.seconds["capture"] = round(time.perf_counter() - start, 3)
        return store

    @cached_property
    def _calls(self) -> dict[Call, Example]:
        """Return every different call of all trials, once."""
        return {call_of(example): example for trial in self.trials for example in trial.calls}

    @cached_property
    def _ids(self) -> dict[Call, str]:
        from gapprobe.tracing.answers import Decoding
        from gapprobe.tracing.plan import row_ids
        from gapprobe.tracing.positions import parse_positions

        decoding = Decoding(self.config.max_new_tokens, (self.template.stop,))
        ids = row_ids(list(self._calls.values()), parse_positions(POSITIONS), decoding)
        return dict(zip(self._calls, ids, strict=True))

    def row_of(self, example: Example) -> str:
        """Return the id of the row that holds a call."""
        return self._ids[call_of(example)]

    @cached_property
    def outcomes(self) -> pd.DataFrame:
        """Judge every trial in every setting; see `gapprobe.study.outcomes.judge_trials`."""
        return judge_trials(self.trials, self.row_of, self.capture().rows, self.questions, self.config.judge)

    def gap(self) -> Json:
        """Measure the accuracies, which trials count, and the gap."""
        probe = self.config.probe
        return self._once("gap", lambda: measure_gap(self.outcomes, replicates=probe.replicates, seed=self.config.seed))

    def probe(self) -> Json:
        """Fit the failure probes at every layer, with controls, and selective prediction's scores."""
        return self._once("probe", lambda: analysis.probe(self.capture(), self.outcomes, self.config, self.progress))

    def lens(self) -> Json:
        """Read the answer's probability at every layer, told and shown."""
        return self._once("lens", lambda: analysis.lens(self.capture(), self.outcomes, self.model, self.config))

    def cosine(self) -> Json:
        """Compare the visual with the full-information state at every layer."""
        return self._once("cosine", lambda: analysis.cosine(self.capture(), self.outcomes, self.config))

    def selective(self) -> Json:
        """Measure selective prediction by perplexity, by the probe, and by both."""
        scores = self.probe()["scores"]
        return self._once("selective", lambda: analysis.selective(self.capture(), self.outcomes, scores, self.config))

    def _once(self, name: str, compute: Callable[[], Json]) -> Json:
        store = self.capture()
        parts = (
            importlib.metadata.version("gapprobe"),
            self.fingerprint,
            self.images.fingerprint,
            self.config.model_dump_json(),
            store.header.fingerprint,
        )
        return self._steps.once(name, key_of(*parts), compute)

    def results(self) -> Json:
        """Run whatever is not there yet; return this study's part of results.json (docs/results.md)."""
        gap, probe, lens = self.gap(), self.probe(), self.lens()
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
            "rows": _rows(store.rows.loc[sorted(set(self._ids.values()))]),
            **gap,
            "layers": list(store.header.layers),
            "probe": {key: value for key, value in probe.items() if key != "scores"},
            "lens": lens,
            "cosine": cosine,
            "selective": selective,
            **gallery,
        }

    @property
    def seconds(self) -> dict[str, float]:
        """Return the wall time of each step, from when it last ran."""
        return self._steps.seconds


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
            {"family": study.config.name, "step": step, "seconds": seconds}
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
