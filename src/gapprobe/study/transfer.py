"""Failure probes carried from study to study: other data of one model, or other models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gapprobe.errors import ConfigError
from gapprobe.probes.alignment import Alignment
from gapprobe.probes.transfer import TransferSet, transfer_probes
from gapprobe.study.analysis import probe_rows
from gapprobe.study.asking import Call, call_of
from gapprobe.study.results import Json, records

if TYPE_CHECKING:
    from gapprobe.study.study import Study


def transfer_between(studies: Sequence[Study], *, aligned: bool = False, progress: bool = False) -> Json:
    """Learn from all studies but one and judge on that one, each in turn; of two studies, from each to the other.

    On the rows that `probe.rows` of each study names, at its position; questions stay on one side, and are told apart
    by their ids: two studies that ask the same ones share them. Models of different widths must have been asked the
    same questions about the same images: they are aligned on the calls that no probe reads, all but the visual ones.

    Args:
        studies: of other data, or other models.
        aligned: align models of one width, too; nothing says that two models use the same coordinates.
        progress: show a progress bar over layers.

    Returns:
        `best[]` and `table[]`, see `gapprobe.probes.transfer.Transfer`.

    Raises:
        ConfigError: fewer than two studies.
        DataError: models of other widths that were not asked the same, or rows of one outcome only.
    """
    if len(studies) < 2:
        raise ConfigError("a transfer needs two studies at least: another data set, or another model")
    sets: dict[str, TransferSet] = {}
    used: set[Call] = set()
    for study in studies:
        store = study.capture()
        rows = probe_rows(study.outcomes, store, study.config)
        told = {"groups": rows["question"], "clusters": rows["image"]}
        sets[study.config.name] = TransferSet(store, rows["visual"], position=study.config.probe.position, **told)
        used |= {call_of(trial.visual) for trial in study.trials}
    first = studies[0].config
    aligned = aligned or len({part.store.header.width for part in sets.values()}) > 1
    found = transfer_probes(
        sets,
        alignment=Alignment(_anchors(studies, used)) if aligned else None,
        seed=first.seed,
        replicates=first.probe.replicates,
        progress=progress,
    )
    return {"best": records(found.best), "table": records(found.table)}


def _anchors(studies: Sequence[Study], used: set[Call]) -> dict[str, list[str]]:
    """Return the rows of calls that all studies made and none learns from, by study, in one order."""
    ran: list[set[Call]] = []
    for study in studies:
        table = study.capture().rows
        # A probe at the last output token cannot read a row that has none.
        fine = table["error"].isna() & (table["answer"].fillna("") != "")
        ran.append({call for call, row in study.rows.items() if fine[row]})
    common = [call for call in studies[0].rows if call not in used and all(call in calls for calls in ran)]
    return {study.config.name: [study.rows[call] for call in common] for study in studies}
