"""Studies by their configurations: opened, and run in a row into one folder."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from gapprobe.errors import ConfigError
from gapprobe.files import write_json
from gapprobe.study.config import StudyConfig
from gapprobe.study.headline import headline
from gapprobe.study.results import SCHEMA, Json
from gapprobe.study.served import ServedStudy
from gapprobe.study.study import Study


def open_study(config: StudyConfig, out: Path | str, *, progress: bool = True) -> Study:
    """Return the study of a configuration: of a model that is traced here, or of one behind a server.

    Args:
        config: from `load_config`.
        out: output folder; several studies may share one.
        progress: show progress bars.

    Raises:
        ConfigError: questions, prompts or images cannot be used.
    """
    kind = Study if config.server is None else ServedStudy
    return kind(config, Path(out), progress=progress)


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
        ModelError: a model cannot be loaded, traced or reached.
    """
    out = Path(out)
    names = [config.name for config in configs]
    if not configs or len(set(names)) < len(names):
        raise ConfigError("give at least one study, each with a name of its own" if configs else "give a configuration")
    studies = [open_study(config, out, progress=progress) for config in configs]
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
