"""Class validation on a shipped model and real digits, some under a name that is not theirs."""

from pathlib import Path

import pandas as pd
import pytest

from gapprobe.cli import main
from gapprobe.demo import FOLDER
from gapprobe.errors import ConfigError
from gapprobe.study.config import load_config
from gapprobe.study.study import Study
from gapprobe.study.validation import validate_classes


@pytest.mark.xdist_group("study")
def test_a_class_stays_if_more_than_half_of_its_images_are_named(tmp_path: Path) -> None:
    study = Study(load_config(FOLDER / "llava.toml"), tmp_path / "out", progress=False)
    known = validate_classes(study)
    assert len(known) == 10
    assert (known["n"] == 10).all()
    assert known["kept"].sum() >= 8
    assert (known["kept"] == (known["named"] > 5)).all()
    assert known.set_index("entity").loc["nine", "kept"]
    # Sixes under the name of the nine: the model says what it sees, and the nine goes.
    images = study.images.by_entity
    study.images.by_entity["nine"] = images["six"]
    swapped = validate_classes(study).set_index("entity")
    assert not swapped.loc["nine", "kept"]
    assert swapped.loc["nine", "said"] == "six"
    assert swapped.drop(index="nine").equals(known.set_index("entity").drop(index="nine"))
    # As many as asked for are not more than that.
    exact = known[known["kept"]]["share"].min()
    at = validate_classes(study, share=float(exact)).set_index("entity")
    assert not at[at["share"] == exact]["kept"].any()


def test_impossible_thresholds_are_refused(tmp_path: Path) -> None:
    study = Study(load_config(FOLDER / "llava.toml"), tmp_path / "out", progress=False)
    with pytest.raises(ConfigError, match="share 1"):
        validate_classes(study, share=1.0)
    with pytest.raises(ConfigError, match="images 0"):
        validate_classes(study, images=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.xdist_group("study")
def test_the_command_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["study", "validate", str(FOLDER / "llava.toml"), "--images", "3", "--out", str(tmp_path)])
    assert "of 10 stay" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "classes.csv")) == 10
