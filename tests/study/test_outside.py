"""Questions of another kind, foreseen from a study's trials: the shipped model, real digits, and arithmetic by hand."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from gapprobe.cli import main
from gapprobe.demo import FOLDER
from gapprobe.errors import ConfigError, DataError
from gapprobe.study.config import load_config
from gapprobe.study.outside import _confidences, _paid, _trials, measure_outside
from gapprobe.study.study import Study


def study_in(out: Path) -> Study:
    update = {"images_per_question": 3, "trivial_images": ("black",)}
    return Study(load_config(FOLDER / "llava.toml").model_copy(update=update), out, progress=False)


def table_of(study: Study, path: Path, *, per_digit: int = 6) -> pd.DataFrame:
    """Write a table that asks what digit each picture shows: pictures that the study's trials do not show first."""
    prompt = study.template.render(study.questions.identify)
    lines: list[dict[str, str]] = []
    for entity, images in study.images.by_entity.items():
        for image in images[-per_digit:]:
            file = path.parent / "pictures" / f"{image.name.replace('/', '-')}.png"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(image.read())
            lines.append({"text": prompt, "image": str(file), "question": f"what {entity}", "gold": entity})
    table = pd.DataFrame(lines)
    table.to_csv(path, index=False)
    return table


@pytest.mark.xdist_group("study")
def test_rows_of_another_kind_are_judged_by_what_the_trials_taught(tmp_path: Path) -> None:
    study = study_in(tmp_path / "out")
    table = table_of(study, tmp_path / "table.csv")
    found = measure_outside([study], tmp_path / "table.csv")
    json.dumps(found, allow_nan=False)
    assert found["n"] + found["left_out"] == len(table)
    assert 0 < found["right"] < found["n"]
    assert 0 <= found["auc"]["ci"][0] <= found["auc"]["value"] <= found["auc"]["ci"][1] <= 1
    assert found["learnt_from"]["llava"] > 100
    assert {m["method"] for m in found["measures"]} == {"perplexity", "probe", "ensemble"}
    # The gain is that of the two figures beside it.
    for part in ("coverage", "risk"):
        gain = found["ensemble"][part] - found["perplexity"][part]
        assert found["ensemble_minus_perplexity"][part]["value"] == pytest.approx(gain, abs=1e-12)

    # The regression on perplexity is scikit-learn's, fitted on the trials alone.
    part, before = _trials(study)
    store, ids = study.outside([])
    assert ids == []
    rows = store.rows[store.rows["answer"].fillna("") != ""]
    right = pd.Series([a == g for a, g in zip(rows["answer"], rows["gold"], strict=True)], index=rows.index)
    scores = _confidences({"llava": (part, before)}, rows, right, np.zeros(len(rows)))
    scaler = StandardScaler().fit(before.to_numpy()[:, None])
    fit = LogisticRegression(class_weight="balanced", tol=1e-10).fit(
        scaler.transform(before.to_numpy()[:, None]), np.asarray(part.target, dtype=bool)
    )
    own = rows["answer_logprobs"].map(np.mean).to_numpy(dtype=np.float64)
    np.testing.assert_allclose(
        scores["perplexity"], fit.predict_proba(scaler.transform(own[:, None]))[:, 1], rtol=0, atol=1e-4
    )
    np.testing.assert_allclose(scores["ensemble"], (scores["perplexity"] + 0.5) / 2)

    # The order of lines is no matter, and a line with a bad picture costs itself only.
    spoiled = table.iloc[::-1].copy()
    (tmp_path / "bad.png").write_bytes(b"no picture")
    spoiled.loc[len(spoiled)] = {
        "text": table["text"][0],
        "image": str(tmp_path / "bad.png"),
        "question": "q",
        "gold": "x",
    }
    spoiled.to_csv(tmp_path / "spoiled.csv", index=False)
    again = measure_outside([study], tmp_path / "spoiled.csv")
    assert again["left_out"] == found["left_out"] + 1
    assert again["auc"]["value"] == pytest.approx(found["auc"]["value"])
    assert again["ensemble"]["coverage"] == pytest.approx(found["ensemble"]["coverage"])

    # Gold answers are those of the table, whatever they were when the model was asked.
    table.assign(gold="never said").to_csv(tmp_path / "never.csv", index=False)
    with pytest.raises(DataError, match="one class|all wrong"):
        measure_outside([study], tmp_path / "never.csv")
    pd.concat([table, table.assign(gold="never said")]).to_csv(tmp_path / "both.csv", index=False)
    with pytest.raises(DataError, match="with two gold answers"):
        measure_outside([study], tmp_path / "both.csv")
    table.drop(columns="gold").to_csv(tmp_path / "none.csv", index=False)
    with pytest.raises(ConfigError, match="must have a column gold"):
        measure_outside([study], tmp_path / "none.csv")
    table.iloc[:0].to_csv(tmp_path / "empty.csv", index=False)
    with pytest.raises(ConfigError, match="has no lines"):
        measure_outside([study], tmp_path / "empty.csv")
    with pytest.raises(ConfigError, match="give a study"):
        measure_outside([], tmp_path / "table.csv")
    other = Study(study.config.model_copy(update={"model": "other", "name": "b"}), tmp_path / "out", progress=False)
    with pytest.raises(ConfigError, match="studies of one model"):
        measure_outside([study, other], tmp_path / "table.csv")


@pytest.mark.xdist_group("study")
def test_the_command_says_so_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = study_in(tmp_path / "out")
    table_of(study, tmp_path / "table.csv", per_digit=2)
    path = tmp_path / "few.toml"
    text = (FOLDER / "llava.toml").read_text().replace("images_per_question = 10", "images_per_question = 3")
    text = text.replace('["black", "white", "noise", "none"]', '["black"]')
    for name in ("model", "images", "questions", "prompts"):
        text = text.replace(f'\n{name} = "', f'\n{name} = "{FOLDER}/')
    path.write_text(text)
    main(["study", "outside", str(tmp_path / "table.csv"), str(path), "--out", str(tmp_path / "other")])
    assert json.loads(capsys.readouterr().out)["n"] > 0


def test_what_is_gained_by_hand() -> None:
    right = np.array([True, True, False, False])
    ours, theirs = np.array([0.9, 0.5, 0.2, 0.6]), np.array([0.9, 0.1, 0.8, 0.1])
    found = _paid(ours, theirs, right, np.array([[1.0, 1, 1, 1], [0, 0, 1, 1]]))
    assert found["coverage"]["value"] == pytest.approx(1 / 4)
    assert found["risk"]["value"] == pytest.approx(1 / 3 - 1 / 2)
    assert found["risk"]["n"] == 4
