"""Both shipped models, asked the same questions: probes from each to the other."""

import json
from pathlib import Path

import pytest

from gapprobe.cli import main
from gapprobe.demo import FOLDER
from gapprobe.errors import ConfigError
from gapprobe.study.asking import call_of
from gapprobe.study.config import StudyConfig, load_config
from gapprobe.study.study import Study
from gapprobe.study.transfer import _anchors, transfer_between


def quick(name: str) -> StudyConfig:
    update = {"images_per_question": 2, "trivial_images": ("black",), "batch_size": 32}
    return load_config(FOLDER / f"{name}.toml").model_copy(update=update)


@pytest.mark.xdist_group("study")
def test_from_each_model_to_the_other_without_their_shared_questions(tmp_path: Path) -> None:
    studies = [Study(quick(name), tmp_path / "out", progress=False) for name in ("llava", "instructblip")]
    found = transfer_between(studies)
    json.dumps(found, allow_nan=False)
    assert [(b["train"], b["test"]) for b in found["best"]] == [("instructblip", "llava"), ("llava", "instructblip")]
    for line, study in zip(found["best"], studies, strict=True):
        counts = study.gap()["counted"]["n"]
        assert {row["n"] for row in found["table"] if row["test"] == study.config.name} == {counts}
        assert line["shared"] > 50
        assert len(line["layers"]) == 5
        assert line["ci_low"] <= line["auc"] <= line["ci_high"]


@pytest.mark.xdist_group("study")
def test_models_are_aligned_on_calls_that_no_probe_reads(tmp_path: Path) -> None:
    studies = [Study(quick(name), tmp_path / "out", progress=False) for name in ("llava", "instructblip")]
    found = transfer_between(studies, aligned=True)
    assert all(0.5 <= line["agreement"] <= 1 for line in found["table"])
    # Both were shown the same: they have more in common than chance gives.
    assert max(line["agreement"] for line in found["table"]) > 0.7
    shown = [{call_of(trial.visual) for trial in study.trials} for study in studies]
    told = _anchors(studies, set.union(*shown))
    calls = [{row: call for call, row in study.rows.items()} for study in studies]
    pairs = [[calls[i][row] for row in told[study.config.name]] for i, study in enumerate(studies)]
    assert pairs[0] == pairs[1]
    assert len(pairs[0]) > 300
    assert not set(pairs[0]) & shown[0]


def test_one_study_has_nowhere_to_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="two studies at least"):
        transfer_between([Study(quick("llava"), tmp_path / "out", progress=False)])
    with pytest.raises(SystemExit):
        main(["study", "transfer", str(FOLDER / "llava.toml"), "--out", str(tmp_path / "out")])
    assert "two studies at least" in capsys.readouterr().err
