"""Failure probes carried from study to study: other data of one model, or other models of one width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gapprobe.errors import ConfigError
from gapprobe.probes.transfer import TransferSet, transfer_probes
from gapprobe.study.analysis import probe_rows
from gapprobe.study.results import Json, records

if TYPE_CHECKING:
    from gapprobe.study.study import Study


def transfer_between(studies: Sequence[Study], progress: bool = False) -> Json:
    """Learn from all studies but one and judge on that one, each in turn; of two studies, from each to the other.

    On the rows that `probe.rows` of each study names, at its position; questions stay on one side, and are told apart
    by their ids: two studies that ask the same ones share them.

    Returns:
        `best[]` and `table[]`, see `gapprobe.probes.transfer.Transfer`.

    Raises:
        ConfigError: fewer than two studies.
        DataError: models of other widths, or rows of one outcome only.
    """
    if len(studies) < 2:
        raise ConfigError("a transfer needs two studies at least: another data set, or another model of the same width")
    sets: dict[str, TransferSet] = {}
    for study in studies:
        store = study.capture()
        rows = probe_rows(study.outcomes, store, study.config)
        told = {"groups": rows["question"], "clusters": rows["image"]}
        sets[study.config.name] = TransferSet(store, rows["visual"], position=study.config.probe.position, **told)
    first = studies[0].config
    found = transfer_probes(sets, seed=first.seed, replicates=first.probe.replicates, progress=progress)
    return {"best": records(found.best), "table": records(found.table)}
