"""The steps of a study once its model was asked: each kept, each callable on its own."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from gapprobe.study import analysis
from gapprobe.study.asking import Asking
from gapprobe.study.gallery import linking_failures
from gapprobe.study.gap import measure_gap
from gapprobe.study.judges import compare_judges
from gapprobe.study.multiple_choice import measure_choices
from gapprobe.study.outcomes import by_judge, judge_trials
from gapprobe.study.published import beside
from gapprobe.study.recipe import published_recipe
from gapprobe.study.results import Json
from gapprobe.study.selecting import measure_selective
from gapprobe.study.steps import key_of
from gapprobe.tasks.judging import JUDGES

if TYPE_CHECKING:
    import pandas as pd

    from gapprobe.models.model import Model
    from gapprobe.store.reader import Store
    from gapprobe.study.config import JudgeConfig


REPLIES = "replies"  # folder in the output folder, of models behind a server
INSIDE = ("probe", "recipe", "lens", "cosine", "selective")  # steps that read activations


class Study(Asking):
    """One study in one output folder. Every step runs what it needs first, and keeps what it finds; see `Asking`."""

    @cached_property
    def outcomes(self) -> pd.DataFrame:
        """Judge every trial in every setting; see `gapprobe.study.outcomes.judge_trials`."""
        return self._judged(self.config.judge)

    def _judged(self, judge: str) -> pd.DataFrame:
        return judge_trials(self.trials, self.row_of, self.answered(), by_judge(judge, self.questions))

    def gap(self) -> Json:
        """Measure the accuracies, which trials count, and the gap."""
        probe = self.config.probe
        return self._once("gap", lambda: measure_gap(self.outcomes, replicates=probe.replicates, seed=self.config.seed))

    def judges(self) -> Json:
        """Measure the gap by every judge, and how far they agree."""

        def compare() -> Json:
            judged = {judge: self._judged(judge) for judge in JUDGES}
            unjudged = None
            if self.config.llm_judge is not None:
                judged["model"], unjudged = self._by_model(self.config.llm_judge)
            found = compare_judges(judged, replicates=self.config.probe.replicates, seed=self.config.seed)
            return found | {"unjudged": unjudged}

        return self._once("judges", compare)

    def _by_model(self, judge: JudgeConfig) -> tuple[pd.DataFrame, int]:
        from gapprobe.chat.server import ChatServer
        from gapprobe.study.llm_judge import judge_by_model

        chat = ChatServer(judge.server, judge.model, self.out / REPLIES)
        return judge_by_model(
            self.trials,
            self.row_of,
            self.answered(),
            self.questions,
            chat,
            seed=self.config.seed,
            progress=self.progress,
        )

    def choices(self) -> Json | None:
        """Ask every question with options, and measure the gap so; None where `config.choices` is not given."""
        settings = self.config.choices
        if settings is None:
            return None
        asked = self.with_choices(settings)

        def measure() -> Json:
            return measure_choices(
                asked.trials,
                asked.choices,
                asked.row_of,
                asked.rows,
                asked.compared(),
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

    def _once(self, name: str, compute: Callable[[], Json]) -> Json:
        return self._steps.once(name, self._key(name, self.capture().header.fingerprint), compute)

    def _key(self, name: str, answers: str) -> str:
        """Return a hash of all that the result of a step depends on, `answers` among it: a hash of theirs."""
        parts = [self.fingerprint, self.images.fingerprint, self.config.model_dump_json(), answers]
        if name == "choices" and self.distractors is not None:
            parts.append(hashlib.sha256(self.distractors.read_bytes()).hexdigest())
        return key_of(importlib.metadata.version("gapprobe"), *parts)

    @property
    def step_names(self) -> tuple[str, ...]:
        """Return the names of the steps after capture."""
        asked = ("choices",) if self.config.choices else ()
        return ("gap", "judges", *asked, "probe", "recipe", "lens", "cosine", "selective", "gallery")

    def step_state(self, name: str, store: Store) -> str:
        """Return whether a step is "done" or "to do", or that data or settings have changed since it was."""
        return self._steps.state(name, self._key(name, store.header.fingerprint))

    def results(self) -> Json:
        """Run whatever is not there yet; return this study's part of results.json (docs/results.md)."""
        gap, judges, inside = self.gap(), self.judges(), self._inside()
        gallery = self._once(
            "gallery",
            lambda: {
                "gallery": linking_failures(
                    self.trials, self.outcomes, self.questions, most=self.config.gallery, seed=self.config.seed
                )
            },
        )
        rows = self.answered()
        return {
            "config": self.config.model_dump(mode="json"),
            "model": self._described(),
            "data": {
                "questions": len(self.questions.questions),
                "entities": len(self.images.by_entity),
                "images": self.images.size,
                "trials": len(self.trials),
                "dropped": [{"question": q.naming(q.entity), "reason": why} for q, why in self.questions.dropped],
            },
            "rows": _rows(rows.loc[sorted(set(self.rows.values()))]),
            **gap,
            "published": beside(self.config.published),
            "judges": judges,
            "choices": self.choices(),
            **inside,
            **gallery,
        }

    def _described(self) -> Json:
        # As the configuration spells it: where the folder lies on this machine is nobody's business.
        return describe_model(self.model) | {"source": self.config.model}

    def _inside(self) -> Json:
        """Return what the activations say, by step."""
        return {
            "layers": list(self.capture().header.layers),
            "probe": {key: value for key, value in self.probe().items() if key != "scores"},
            "recipe": self.recipe(),
            "lens": self.lens(),
            "cosine": self.cosine(),
            "selective": self.selective(),
        }

    @property
    def seconds(self) -> dict[str, float]:
        """Return the wall time of each step, from when it last ran."""
        return self._steps.seconds

    @property
    def peak_bytes(self) -> dict[str, int]:
        """Return the most memory that the process had had at the end of each step, from when it last ran."""
        return self._steps.peak_bytes


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
