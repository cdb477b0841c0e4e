"""Plans against what a run really takes, and how far a study says it is."""

import shutil
from pathlib import Path

import pytest
import torch

from gapprobe.cli import main
from gapprobe.demo import FOLDER
from gapprobe.errors import ConfigError
from gapprobe.models.loading import load_model
from gapprobe.study.config import ChoicesConfig, SamplesConfig, StudyConfig, load_config, load_configs
from gapprobe.study.planning import measured_tflops, plan, status
from gapprobe.study.study import Study

ROOT = Path(__file__).parents[2]


def quick(**changes: object) -> StudyConfig:
    update = {"images_per_question": 1, "trivial_images": ("black",), "batch_size": 32, **changes}
    return load_config(FOLDER / "llava.toml").model_copy(update=update)


@pytest.mark.xdist_group("study")
@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_a_plan_is_what_the_run_takes(tmp_path: Path, family: str) -> None:
    config = load_config(FOLDER / f"{family}.toml").model_copy(
        update={"images_per_question": 1, "trivial_images": ("black", "none"), "batch_size": 32}
    )
    study = Study(config, tmp_path / "out", progress=False)
    outline = load_model(config.model_source, dtype=config.dtype, device="meta")
    planned = plan(study, outline)
    assert not (tmp_path / "out").exists()
    assert planned.parameters == sum(p.numel() for p in study.model.hf.parameters())
    rows = study.capture().rows
    assert planned.forward_passes == len(rows)
    step = planned.steps[0]
    tokens = int(rows["n_input_tokens"].sum()) + len(rows) * config.max_new_tokens
    assert step.tokens == pytest.approx(tokens, rel=0.05)
    size = sum(file.stat().st_size for file in study.store_folder.rglob("*") if file.is_file())
    assert 0.5 * size < step.disk < 2 * size


def test_what_is_asked_beside_is_planned_too() -> None:
    config = quick(samples=SamplesConfig(count=3), choices=ChoicesConfig())
    outline = load_model(config.model_source, dtype=config.dtype, device="meta")
    study = Study(config, Path("nowhere"))
    planned = plan(study, outline)
    steps = {step.name: step for step in planned.steps}
    assert steps["draws"].rows == 3 * len({trial.visual.text + trial.image.name for trial in study.trials})
    assert steps["choices"].tokens > steps["capture"].tokens
    told = planned.told(100.0, "as given")
    assert "at 100 TFLOP/s (as given)" in told
    assert planned.hours(1.0) == pytest.approx(100 * planned.hours(100.0))
    assert planned.flops == 2 * planned.parameters * sum(step.tokens for step in planned.steps)


def test_the_speed_of_a_device_that_is_not_here_must_be_said() -> None:
    assert measured_tflops("cpu", torch.float32, 0.02) > 0
    with pytest.raises(ConfigError, match="say it with --tflops"):
        measured_tflops("cuda:99", torch.float32)


@pytest.mark.xdist_group("study")
def test_status_follows_a_study_from_nothing_to_done_and_back(tmp_path: Path) -> None:
    study = Study(quick(), tmp_path / "out", progress=False)
    wanted = len(set(study.rows.values()))
    assert status(study) == [("capture", f"0 of {wanted} rows"), *((name, "to do") for name in study.step_names)]
    # Killed before the first shard was sealed: a store with a header and no rows.
    header = Study(quick(), tmp_path / "other", progress=False).capture().path / "store.json"
    study.store_folder.mkdir(parents=True)
    shutil.copy(header, study.store_folder)
    assert dict(status(study))["capture"] == f"0 of {wanted} rows"
    shutil.rmtree(tmp_path / "out")
    study.gap()
    found = dict(status(study))
    assert found["capture"] == f"{wanted} of {wanted} rows"
    assert found["gap"] == "done"
    assert found["probe"] == "to do"
    changed = Study(quick(judge="published"), tmp_path / "out", progress=False)
    assert dict(status(changed))["gap"].startswith("to do again")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_the_papers_configurations_can_be_read(path: Path) -> None:
    configs = load_configs(path)
    assert [c.name for c in configs] == [f"{path.stem}-{d}" for d in ("mnist", "cifar100", "food101", "landmarks")]
    for config in configs:
        assert config.path(config.prompts).exists()
        assert config.published in (None, f"{path.stem}/{config.name.removeprefix(path.stem + '-')}")


def test_the_commands_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["study", "plan", str(FOLDER / "llava.toml"), "--tflops", "1"])
    assert "at 1 TFLOP/s (as given)" in capsys.readouterr().out
    main(["study", "status", str(FOLDER / "llava.toml"), "--out", str(tmp_path / "none")])
    assert "capture    0 of " in capsys.readouterr().out
    path = ROOT / "configs" / "llava-1.6-vicuna-7b.toml"
    for arguments, message in (
        (["gap", str(path)], "has 4 data sets; a step is of one of them"),
        (["gap", str(path), "--data", "mnist"], "mnist"),
        (["plan", str(path), "--data", "boats"], r"no [data.boats]"),
        (["choices", str(FOLDER / "llava.toml")], "has no table [choices]"),
    ):
        with pytest.raises(SystemExit):
            main(["study", *arguments])
        assert message in capsys.readouterr().err
