"""Multiple choice on a shipped model, which has no letters: its log-probabilities can be read, letters never."""

from pathlib import Path

import pytest

from gapprobe.demo import FOLDER
from gapprobe.errors import ConfigError
from gapprobe.models.loading import load_model
from gapprobe.study.config import ChoicesConfig, StudyConfig, load_config
from gapprobe.study.multiple_choice import read_distractors
from gapprobe.study.study import Study


def quick(**choices: object) -> StudyConfig:
    return load_config(FOLDER / "llava.toml").model_copy(
        update={
            "images_per_question": 1,
            "trivial_images": ("black", "white"),
            "batch_size": 32,
            "choices": ChoicesConfig.model_validate(choices),
        }
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(quick(options=3), tmp_path_factory.mktemp("choices") / "out", progress=False)


@pytest.mark.xdist_group("study")
def test_every_way_to_read_a_choice_is_measured_on_the_same_trials(study: Study) -> None:
    found = study.choices()
    assert found is not None
    assert found["options"] == 3
    assert list(found["by"]) == ["log_prob", "letter", "option", "either"]
    assert found["log_prob_of"] == "the first tokens of the options"
    identified = {part["raw"]["identification"]["accuracy"] for part in found["by"].values()}
    assert len(identified) == 1
    for part in found["by"].values():
        assert part["counted"]["trials"] == found["questions"]
    # The model's vocabulary has no letters, so no answer gives one; the log-probabilities always choose.
    assert found["by"]["letter"]["none"] == 1.0
    assert found["by"]["log_prob"]["none"] == 0.0
    # A guess among three options without the picture is right about once in three.
    low, high = found["by"]["log_prob"]["raw"]["guess_control"]["ci"]
    assert low < 1 / 3 < high


@pytest.mark.xdist_group("study")
def test_the_options_log_probabilities_are_those_of_the_models_own_logits(study: Study) -> None:
    """Against a forward pass of transformers: the choice of the log-probabilities is the largest logit's."""
    import torch

    from gapprobe.tasks.choices import make_choices

    found = study.choices()
    assert found is not None
    choices = make_choices(
        study.questions.questions, entities=study.questions.entities, options=3, leave_out=True, seed=0
    )
    trials = study._trials(choices)
    model = load_model(FOLDER / "models" / "llava", dtype="float32", device="cpu")
    right = []
    for trial in trials:
        inputs = model.encode([trial.full_information.text], [trial.full_information.image.load()])
        with torch.no_grad():
            logits = model.hf(**inputs).logits[0, -1]
        options = choices[trial.question.id]
        best = max(range(3), key=lambda i: float(logits[model.first_token(options.options[i])]))
        right.append(best == options.right)
    outcome = found["by"]["log_prob"]["raw"]["full_information"]
    assert outcome["n"] == len(trials)
    assert outcome["accuracy"] == pytest.approx(sum(right) / len(trials))


@pytest.mark.xdist_group("study")
def test_asking_with_options_changes_nothing_else(study: Study) -> None:
    assert study.config.asked == quick(options=4).asked == quick().model_copy(update={"choices": None}).asked


def test_distractors_come_from_a_table(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("question,distractor\ndouble/four,nine\ndouble/four,ten \n", encoding="utf-8")
    assert read_distractors(path) == {"double/four": ["nine", "ten"]}
    path.write_text("question,wrong\ndouble/four,nine\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="need the columns question and distractor"):
        read_distractors(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_distractors(tmp_path / "none.csv")


@pytest.mark.xdist_group("study")
def test_other_distractors_are_asked_anew(study: Study, tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("question,distractor\ndouble/four,nine\ndouble/two,nine\n", encoding="utf-8")
    config = quick(options=2, distractors=str(path))
    first = Study(config, study.out, progress=False).choices()
    assert first is not None
    assert first["questions"] == 2
    path.write_text("question,distractor\ndouble/four,nine\n", encoding="utf-8")
    second = Study(config, study.out, progress=False).choices()
    assert second is not None
    assert second["questions"] == 1


def test_too_many_options_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no question has 24 distractors"):
        Study(quick(options=25), tmp_path / "out", progress=False).choices()
    assert not (tmp_path / "out").exists()
