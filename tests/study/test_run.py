"""The whole study on the shipped models: killed and resumed, with bad images, and refused where it must be."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gapprobe.demo import FOLDER
from gapprobe.errors import ConfigError, ModelError, OutputError
from gapprobe.study.config import StudyConfig, load_config
from gapprobe.study.run import run_studies

# One thread: the order of sums in a matrix product, and so its last bits, may depend on how many there are.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def quick(name: str = "llava", **changes: object) -> StudyConfig:
    return load_config(FOLDER / f"{name}.toml").model_copy(
        update={"images_per_question": 2, "trivial_images": ("black",), "batch_size": 32, **changes}
    )


def same_but_for_times(results: dict[str, object]) -> str:
    return json.dumps({key: value for key, value in results.items() if key not in ("steps", "versions", "machine")})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    run_studies([quick("llava"), quick("instructblip")], out, progress=False)
    return out


def results_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


@pytest.mark.xdist_group("study")
@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_the_shipped_models_know_and_see_yet_fail_to_link(finished: Path, family: str) -> None:
    part = results_of(finished)["families"][family]
    assert part["raw"]["text_only"]["accuracy"] >= 0.9
    assert part["raw"]["identification"]["accuracy"] >= 0.8
    assert part["settings"]["full_information"]["accuracy"] == 1.0
    assert part["settings"]["guess_control"]["accuracy"] == 0.0
    assert part["gap"]["absolute"]["ci"][0] > 0
    assert part["rows"]["failed"] == 0
    assert part["counted"]["n"] + sum(part["counted"]["excluded"].values()) == part["counted"]["trials"] == 300


@pytest.mark.xdist_group("study")
@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_every_list_by_layer_has_every_layer(finished: Path, family: str) -> None:
    part = results_of(finished)["families"][family]
    layers = part["layers"]
    assert layers == list(range(part["model"]["layers"] + 1))
    probe = part["probe"]
    for split in part["config"]["probe"]["splits"]:
        for curve in (probe[split], *probe["controls_by_split"][split].values()):
            assert len(curve["auc"]) == len(curve["ci"]) == len(layers)
            assert curve["n"] == probe["n"]
        assert probe["verdict"][split]["sentence"]
    assert probe["controls"] == probe["controls_by_split"]["image"]
    for series in ("text", "visual", "visual_success", "visual_failure"):
        assert len(part["lens"][series]) == len(part["lens"]["ci"][series]) == len(layers)
    for series in ("success", "failure"):
        assert len(part["cosine"][series]) == len(part["cosine"]["centred"][series]) == len(layers)
    for method in ("perplexity", "probe", "ensemble"):
        assert 0 <= part["selective"][method]["coverage"] <= 1


@pytest.mark.xdist_group("study")
@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_judges_recipe_and_measures_stand_beside_the_gap(finished: Path, family: str) -> None:
    part = results_of(finished)["families"][family]
    own = part["judges"]["by_judge"][part["config"]["judge"]]
    assert own["gap"] == part["gap"]["absolute"]
    assert own["n"] == part["counted"]["n"]
    mcnemar = part["gap"]["mcnemar"]
    assert mcnemar["only_told"] - mcnemar["only_shown"] == round(part["gap"]["absolute"]["value"] * own["n"])
    recipe = part["recipe"]
    assert recipe["n"] == round(part["raw"]["full_information"]["accuracy"] * 300)
    assert set(recipe["leakage"]) == {"question", "entity"}
    assert len(recipe["accuracy"]) == len(recipe["layers"]) == 2
    measured = {(m["method"], m["measure"]) for m in part["selective"]["measures"]}
    assert {("stacked", "augrc"), ("probe", "prr"), ("ensemble", "phi_10"), ("perplexity", "ece")} <= measured
    assert part["choices"] is None
    assert part["published"] is None


@pytest.mark.xdist_group("study")
def test_the_layer_that_speaks_names_the_answer_when_told(finished: Path) -> None:
    lens = results_of(finished)["families"]["llava"]["lens"]
    assert lens["text"][-1] > 0.8 > 0.5 > lens["text"][0]
    assert lens["text"][-1] > lens["visual"][-1]
    assert lens["visual_success"][-1] > lens["visual_failure"][-1]


@pytest.mark.xdist_group("study")
@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_the_four_conventions_of_the_lens_are_four(finished: Path, family: str) -> None:
    lens = results_of(finished)["families"][family]["lens"]
    sound, bare, said = (lens["variants"][name] for name in ("norm_gold", "bare_gold", "norm_generated"))
    assert sound["text"] == lens["text"]
    assert sound["visual"] == lens["visual"]
    assert bare["text"][-1] < sound["text"][-1] - 0.05
    # Where the model is wrong, what it says is likelier than what is true.
    assert said["visual"][-1] > sound["visual"][-1] + 0.05


@pytest.mark.xdist_group("study")
@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_a_shown_state_is_nearer_to_the_told_one_where_the_answer_is_right(finished: Path, family: str) -> None:
    cosine = results_of(finished)["families"][family]["cosine"]
    for measure in (cosine, cosine["centred"]):
        assert 0.99 > measure["success"][-1] > measure["failure"][-1] + 0.05


@pytest.mark.xdist_group("study")
@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_answering_when_confident_is_safer_than_always_answering(finished: Path, family: str) -> None:
    part = results_of(finished)["families"][family]
    always = 1 - part["settings"]["visual"]["accuracy"]
    for method in ("perplexity", "probe", "ensemble"):
        found = part["selective"][method]
        assert found["risk"] < always
        assert found["aurc"] < always
        assert found["curve"]["coverage"][-1] == 1.0
        assert found["curve"]["risk"][-1] == pytest.approx(always)


@pytest.mark.xdist_group("study")
def test_a_finished_study_is_not_run_again(finished: Path) -> None:
    before = (finished / "results.json").read_bytes()
    shards = {p: p.stat().st_mtime_ns for p in (finished / "store").rglob("*.safetensors")}
    results = run_studies([quick("llava"), quick("instructblip")], finished, progress=False)
    assert same_but_for_times(results) == same_but_for_times(json.loads(before))
    assert {p: p.stat().st_mtime_ns for p in (finished / "store").rglob("*.safetensors")} == shards


@pytest.mark.xdist_group("study")
def test_a_changed_analysis_keeps_the_activations(finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "copy")
    shards = {p.name for p in (out / "store").rglob("*.safetensors")}
    results = run_studies([quick("llava", judge="published")], out, progress=False)
    assert {p.name for p in (out / "store").rglob("*.safetensors")} == shards
    assert results["families"]["llava"]["config"]["judge"] == "published"
    with pytest.raises(OutputError, match="holds another study called llava"):
        run_studies([quick("llava", seed=1)], out, progress=False)


SCRIPT = """
import sys
from pathlib import Path
from tests.study.test_run import quick
from gapprobe.study.run import run_studies
run_studies([quick("llava")], Path(sys.argv[1]), progress=False)
"""


@pytest.mark.parametrize("moments", [(2.0, 1.0, 3.0)])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, moments: tuple[float, ...]) -> None:
    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", SCRIPT, str(out)]
        return subprocess.Popen(command, env=ONE_THREAD, cwd=Path(__file__).parents[2])

    assert start(tmp_path / "whole").wait() == 0
    for moment in moments:
        process = start(tmp_path / "killed")
        # The clock starts when there is something to lose.
        while process.poll() is None and not (tmp_path / "killed" / "store" / "llava" / "store.json").exists():
            time.sleep(0.05)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "killed").wait() == 0
    assert same_but_for_times(results_of(tmp_path / "killed")) == same_but_for_times(results_of(tmp_path / "whole"))


def test_bad_images_are_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    table = pq.read_table(FOLDER / "digits.parquet").to_pylist()
    kept = [row for digit in range(10) for row in [r for r in table if r["entity"] == NAMES[digit]][:2]]
    whole = [row["image"]["bytes"] for row in kept]
    kept[0]["image"]["bytes"] = b""
    kept[2]["image"]["bytes"] = kept[2]["image"]["bytes"][:60]
    pq.write_table(pa.Table.from_pylist(kept), tmp_path / "images.parquet")
    results = run_studies([quick(images=str(tmp_path / "images.parquet"))], tmp_path / "out", progress=False)
    rows, counts = (results["families"]["llava"][key] for key in ("rows", "counted"))
    assert rows["failures"] == [{"kind": "image", "error": rows["failures"][0]["error"], "n": rows["failed"]}]
    assert kept[0]["image"]["path"] in rows["failures"][0]["error"] or kept[2]["image"]["path"] in str(rows["failures"])
    assert counts["excluded"]["could not be run"] > 0
    assert counts["n"] > 100

    for row, image in zip(kept, whole, strict=True):
        row["image"]["bytes"] = image
    pq.write_table(pa.Table.from_pylist(kept), tmp_path / "images.parquet")
    mended = run_studies([quick(images=str(tmp_path / "images.parquet"))], tmp_path / "out", progress=False)
    assert mended["families"]["llava"]["rows"]["failed"] == 0
    assert mended["families"]["llava"]["counted"]["excluded"]["could not be run"] == 0


NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def test_a_folder_that_is_no_model_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match="no config.json"):
        run_studies([quick(model=str(tmp_path / "model"))], tmp_path / "out", progress=False)


def test_two_studies_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a name of its own"):
        run_studies([quick(), quick()], tmp_path / "out", progress=False)
    with pytest.raises(ConfigError, match="give a configuration"):
        run_studies([], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
