"""Studies with a known answer: what decides success, and what the residuals know of it, are set by hand."""

import numpy as np
import torch

from gapprobe.probes.sweep import Rows


def planted(seed, *, question=0.0, image=0.0, seen=True, entities=8, relations=8, images=9, width=16, layers=4):
    """Return rows and residuals by layer.

    `question` and `image` say how much the question and the image decide success. Residuals hold the question at every
    layer but 0, which is the same for all rows; from layer 2 on they hold the image's share too, if it is `seen`.
    """
    rng = np.random.default_rng(seed)
    cells = [(e, r, e * images + i) for e in range(entities) for i in range(images) for r in range(relations)]
    entity, relation, picture = np.array(cells).T
    asked = rng.normal(size=(entities, relations))[entity, relation]
    shown = rng.normal(size=entities * images)[picture]
    target = rng.random(len(cells)) < 1 / (1 + np.exp(-question * asked - image * shown))
    noise = rng.normal(size=(layers, len(cells), width))
    directions = rng.normal(size=(2, width))
    x = noise + np.outer(asked, directions[0])
    if seen:
        x[2:] += np.outer(shown, directions[1])
    x[0] = 1.0
    names = [a.astype(str) for a in (entity, relation, picture)]
    asks = np.char.add(np.char.add(names[1], "/"), names[0])
    rows = Rows(
        ids=tuple(f"row-{i}" for i in range(len(cells))),
        targets={"target": target},
        relation=names[1],
        entity=names[0],
        question=asks,
        image=names[2],
        splits={"image": names[2], "entity": names[0], "random": None},
    )
    return rows, torch.from_numpy(x).float()
