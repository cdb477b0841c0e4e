"""Made-up studies whose truth is known: what each trial's residual says of its outcome is put there by hand.

python -m tests.study.planted            200 studies with nothing in them: how many intervals exclude chance
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from gapprobe.demo import FOLDER
from gapprobe.store.format import StoredRow, StoreHeader
from gapprobe.store.reader import Store, open_store
from gapprobe.store.writer import StoreWriter
from gapprobe.study.config import ProbeConfig, StudyConfig, load_config

LAYERS = 3
STUDIES = 200


def trials(questions: int, images: int, rate: float, seed: int) -> pd.DataFrame:
    """Return trials of `questions` questions with `images` images each.

    Half of the questions are mostly answered right when shown (with probability `rate`), half mostly wrong, so 0.5
    makes outcomes independent of the question.
    """
    rng = np.random.default_rng(seed)
    n = questions * images
    question = np.repeat(np.arange(questions), images)
    easy = rng.permutation(questions) % 2 == 0
    right = rng.random(n) < np.where(easy[question], rate, 1 - rate)
    return pd.DataFrame(
        {
            "visual_row": [f"row{i}" for i in range(n)],
            "visual": right,
            "full_information": True,
            "excluded": "",
            "relation": [f"r{q % 4}" for q in question],
            "entity": [f"e{q // 4}" for q in question],
            "question": [f"r{q % 4}/e{q // 4}" for q in question],
            "image": [f"image{i}" for i in range(n)],
            "number": question,
        },
        index=[f"trial{i}" for i in range(n)],
    )


def residuals(table: pd.DataFrame, width: int, strength: float, identity: float, seed: int) -> torch.Tensor:
    """Return [layers n width]: noise, a vector of each question's own, and at the last layer the outcome's direction.

    `strength` is the distance of the two outcomes' means along the direction in standard deviations: the best area
    under the ROC curve that any probe can have of it is Phi(strength / sqrt 2). `identity` is the scale of the
    questions' vectors, in all dimensions but the first.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((LAYERS, len(table), width))
    own = rng.standard_normal((table["number"].max() + 1, width))
    own[:, 0] = 0.0
    x += identity * own[table["number"].to_numpy()]
    x[-1, :, 0] += strength * (table["visual"].to_numpy() - 0.5)
    return torch.from_numpy(x).float()


def store_with(x: torch.Tensor, table: pd.DataFrame, folder: Path) -> Store:
    """Write residuals as the store of a study: position last_input and last_output are one token."""
    header = StoreHeader(
        model={"source": "planted", "weights": "0" * 64, "architecture": "none", "family": "none", "revision": ""},
        processor="",
        attention="eager",
        padding_side="left",
        dtype="float32",
        layers=tuple(range(len(x))),
        width=x.shape[2],
        positions=("last_input", "last_output"),
        generation={},
        versions={},
    )
    one, both = torch.ones(1, dtype=torch.int64), torch.full((1,), 3, dtype=torch.uint8)
    with StoreWriter(folder, header) as writer:
        writer.append(
            [
                StoredRow(id_, {"answer": "yes"}, x[:, i : i + 1], one, one, one.to(torch.uint8), both)
                for i, id_ in enumerate(table["visual_row"])
            ]
        )
    return open_store(folder)


def planted(
    folder: Path,
    *,
    questions: int,
    images: int,
    width: int,
    strength: float = 0.0,
    identity: float = 0.0,
    rate: float = 0.5,
    seed: int = 0,
) -> tuple[Store, pd.DataFrame]:
    """Return the store and the outcomes of a study."""
    table = trials(questions, images, rate, seed)
    return store_with(residuals(table, width, strength, identity, seed + 1), table, folder), table


def config(seed: int = 0, **probe: Any) -> StudyConfig:
    """Return the demo's configuration with other probe settings."""
    settings = ProbeConfig(**({"replicates": 400, "folds": 4, "controls": ()} | probe))
    return load_config(FOLDER / "llava.toml").model_copy(update={"probe": settings, "seed": seed})


def excluding_chance(studies: int, split: str) -> int:
    """Return in how many studies without any signal the interval of the nested probe leaves out 0.5."""
    from gapprobe.study import analysis

    found = 0
    for seed in range(studies):
        with tempfile.TemporaryDirectory() as folder:
            store, table = planted(Path(folder) / "store", questions=40, images=4, width=6, seed=1000 + 2 * seed)
            verdict = analysis.probe(store, table, config(seed, splits=(split,)), progress=False)["verdict"][split]
            low, high = verdict["probe"]["ci"]
            found += not low <= 0.5 <= high
    return found


if __name__ == "__main__":
    asked = int(sys.argv[1]) if len(sys.argv) > 1 else STUDIES
    for name in ("image", "entity", "question", "random"):
        share = excluding_chance(asked, name)
        print(f"split by {name}: {share} of {asked} intervals exclude chance ({share / asked:.1%})")
