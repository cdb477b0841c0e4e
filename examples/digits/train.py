"""The one command of the recipe: `python -m examples.digits.train --seeds 0 1 2 --out runs/digits --ship`.

Each stage is a function from inputs to a folder, done once: a finished folder is not made again, so the command can be
stopped and started at will. Nothing is trained here.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro

from examples.digits.bridges import BridgeOptions, train_instructblip, train_llava
from examples.digits.card import write_card
from examples.digits.check import measure
from examples.digits.corpus import DEMO
from examples.digits.data import write_test_images
from examples.digits.language import LanguageOptions, train_language
from examples.digits.vision import VisionOptions, train_vision

FAMILIES = ("llava", "instructblip")
LOG = "training.json"


@dataclass(frozen=True)
class Recipe:
    """Train the demo's two models from MNIST and the facts, once for every seed."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the whole pipeline: language model, vision tower, both bridges."""
    out: Path = Path("runs/digits")
    """Folder of the runs; finished stages in it are kept."""
    threads: int = 2
    """Processor threads."""
    ship: bool = False
    """Copy the models of the lowest seed that meets the bounds into the package."""
    vision: VisionOptions = field(default_factory=VisionOptions)
    language: LanguageOptions = field(default_factory=LanguageOptions)
    llava: BridgeOptions = field(default_factory=BridgeOptions)
    instructblip: BridgeOptions = field(default_factory=lambda: BridgeOptions(steps=240))


def stage(folder: Path, seed: int, options: Any, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Run `work` on a temporary folder and rename it to `folder` with a log beside the results; return the log.

    Raises:
        ValueError: the folder was made with other options.
    """
    wanted = {"seed": seed, "options": asdict(options)}
    if folder.is_dir():
        log = json.loads((folder / LOG).read_text(encoding="utf-8"))
        if {key: log[key] for key in wanted} != wanted:
            raise ValueError(f"{folder} was trained with other options; remove it or choose another --out")
        return log
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    started, used = time.perf_counter(), time.process_time()
    metrics = work(part)
    log = {
        **wanted,
        "metrics": metrics,
        "seconds": round(time.perf_counter() - started, 1),
        "processor_seconds": round(time.process_time() - used, 1),
        "threads": torch.get_num_threads(),
    }
    (part / LOG).write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")
    part.rename(folder)
    return log


def train_seed(recipe: Recipe, seed: int) -> dict[str, dict[str, Any]]:
    """Run all stages of one seed and return their logs."""
    root = recipe.out / f"seed-{seed}"
    vision, language = root / "vision", root / "language"
    logs = {
        "vision": stage(vision, seed, recipe.vision, lambda to: train_vision(to, seed, recipe.vision)),
        "language": stage(language, seed, recipe.language, lambda to: train_language(to, seed, recipe.language)),
    }

    def bridge(train: Callable[..., dict[str, Any]], options: BridgeOptions) -> Callable[[Path], dict[str, Any]]:
        return lambda to: {**train(to, vision, language, seed, options), **measure(to)}

    logs["llava"] = stage(root / "llava", seed, recipe.llava, bridge(train_llava, recipe.llava))
    logs["instructblip"] = stage(
        root / "instructblip", seed, recipe.instructblip, bridge(train_instructblip, recipe.instructblip)
    )
    for family in FAMILIES:
        write_card(root / family, family, seed, logs)
    return logs


def meets_bounds(logs: dict[str, dict[str, Any]]) -> bool:
    """Tell whether a seed may be shipped: text-only ≥ 0.9 on every blank image, identification ≥ 0.8, both families."""
    return all(
        min(value for name, value in logs[family]["metrics"].items() if name.startswith("text_only")) >= 0.9
        and logs[family]["metrics"]["identification"] >= 0.8
        for family in FAMILIES
    )


def main(recipe: Recipe) -> None:
    """Train, report, and ship if asked to."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    images = DEMO / "digits.parquet"
    if not images.is_file():
        write_test_images(images)
    fit = []
    for seed in sorted(recipe.seeds):
        logs = train_seed(recipe, seed)
        print(json.dumps({"seed": seed, **{name: log["metrics"] for name, log in logs.items()}}, indent=2))
        if meets_bounds(logs):
            fit.append(seed)
    if recipe.ship:
        if not fit:
            raise SystemExit("no seed meets the bounds (text-only ≥ 0.9, identification ≥ 0.8): nothing is shipped")
        for family in FAMILIES:
            target = DEMO / "models" / family
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(recipe.out / f"seed-{fit[0]}" / family, target)
        print(f"shipped seed {fit[0]}")


if __name__ == "__main__":
    main(tyro.cli(Recipe))
