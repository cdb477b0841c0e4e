"""Fixtures that tests of several packages share."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from gapprobe.store.format import StoredRow, StoreHeader
from gapprobe.store.reader import Store, open_store
from gapprobe.store.writer import StoreWriter

WEIGHTS = "f" * 64


@pytest.fixture
def store_of(tmp_path: Path) -> Callable[[torch.Tensor, Sequence[str]], Store]:
    """Return a function that writes residuals [l n d] as a store: one token a row, at the position `last_input`."""

    def write(residuals: torch.Tensor, ids: Sequence[str]) -> Store:
        header = StoreHeader(
            model={"source": "a test", "weights": WEIGHTS, "architecture": "none", "family": "none", "revision": ""},
            processor="",
            attention="eager",
            padding_side="left",
            dtype=str(residuals.dtype).removeprefix("torch."),
            layers=tuple(range(len(residuals))),
            width=residuals.shape[2],
            positions=("last_input",),
            generation={},
            versions={},
        )
        one = torch.ones(1, dtype=torch.int64)
        with StoreWriter(tmp_path / "store", header) as writer:
            writer.append(
                [
                    StoredRow(id_, {}, residuals[:, i : i + 1], one, one, one.to(torch.uint8), one.to(torch.uint8))
                    for i, id_ in enumerate(ids)
                ]
            )
        return open_store(tmp_path / "store")

    return write
