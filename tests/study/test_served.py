"""A study of a model behind a server, against the same model traced here: one real server, the shipped model."""

import json

import pytest

from gapprobe.cli import main
from gapprobe.demo import FOLDER
from gapprobe.errors import ConfigError
from gapprobe.report.page import render_report
from gapprobe.report.tables import markdown
from gapprobe.study.config import StudyConfig, load_config
from gapprobe.study.run import open_study, run_studies
from gapprobe.study.served import ServedStudy
from gapprobe.study.study import Study
from gapprobe.study.validation import validate_classes
from tests.serving import served

MODEL = FOLDER / "models" / "llava"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory):
    with served(MODEL, tmp_path_factory.mktemp("serve") / "log") as address:
        yield address


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    """The demo's study of four digits and two relations, one image a question."""
    import tomllib

    facts = tomllib.loads((FOLDER / "facts.toml").read_text())
    folder = tmp_path_factory.mktemp("few")
    names = ["three", "four", "seven", "nine"]
    lines = ["entity,relation,question,answer"]
    for relation in facts["relations"][:3]:
        for name in names:
            told = relation["answers"].get(name)
            if told is not None:
                answer = told if isinstance(told, str) else told[0]
                lines.append(f'{name},{relation["name"]},"{relation["questions"][0]}",{answer}')
    (folder / "few.csv").write_text("\n".join(lines) + "\n")
    config = load_config(FOLDER / "llava.toml")
    return config.model_copy(
        update={
            "questions": str(folder / "few.csv"),
            "images": str(FOLDER / "digits.parquet"),
            "prompts": str(FOLDER / "prompts.toml"),
            "reference": facts["reference"],
            "identify": facts["identify"],
            "images_per_question": 2,
            "trivial_images": ("black",),
        }
    )


def behind(config: StudyConfig, url: str, **changes: object) -> StudyConfig:
    # This server cannot take stop texts for a model with pictures; replies are cut at them here.
    server = {"url": url, "stop": False, "concurrency": 2, "price_input": 2.5, "price_output": 10.0}
    told = config.model_dump() | {"model": str(MODEL), "name": "behind", "server": server, "folder": config.folder}
    return StudyConfig.model_validate(told | changes)


@pytest.mark.xdist_group("served")
def test_a_served_model_gives_the_outcomes_of_the_same_model_traced(small, url, tmp_path) -> None:
    here = Study(small, tmp_path / "here", progress=False)
    there = open_study(behind(small, url), tmp_path / "there", progress=False)
    assert isinstance(there, ServedStudy)
    before = there.cost()
    assert before.requests == len(here.calls)
    assert before.kept == 0
    assert not (tmp_path / "there").exists()
    drop = [name for name in here.outcomes if name.endswith("_row")]
    assert there.outcomes.drop(columns=drop).equals(here.outcomes.drop(columns=drop))
    assert len(there.outcomes) == 2 * len(here.questions.questions)
    assert here.outcomes["text_only"].any()
    assert here.outcomes["visual"].nunique() == 2
    assert there.gap() == here.gap()
    assert there.judges() == here.judges()
    after = open_study(behind(small, url), tmp_path / "there", progress=False)
    assert after.cost().requests == 0
    assert isinstance(after, ServedStudy)
    assert dict(after.stand())["gap"] == "done"
    table = validate_classes(after, images=2)
    assert table["n"].tolist() == [2] * len(table)
    assert table["kept"].any()


@pytest.mark.xdist_group("served")
def test_options_results_and_report(small, url, tmp_path, capsys) -> None:
    config = behind(small, url, choices={"options": 3})
    results = run_studies([config], tmp_path, progress=False)
    family = results["families"]["behind"]
    assert family["model"]["family"] == "server"
    assert [family[name] for name in ("probe", "recipe", "lens", "cosine", "selective")] == [None] * 5
    assert set(family["choices"]["by"]) == {"log_prob", "letter", "option", "either"}
    assert family["choices"]["by"]["log_prob"] is None
    assert family["counted"]["trials"] == family["data"]["trials"]
    assert family["rows"]["failed"] == 0
    assert json.loads((tmp_path / "results.json").read_text()) == results
    page = render_report(results)
    assert page.count("This model answered behind a server") == 3
    assert "behind a server" in markdown(results)
    path = tmp_path.parent / "behind.toml"
    told = config.model_dump(mode="json", exclude_none=True)
    path.write_text(_toml(told))
    main(["study", "plan", str(path), "--out", str(tmp_path)])
    assert "behind: 0 requests" in capsys.readouterr().out
    main(["study", "status", str(path), "--out", str(tmp_path)])
    assert "choices    done" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["study", "probe", str(path), "--out", str(tmp_path)])
    assert (
        "behind a server, which shows no activations: it has the steps gap, judges, choices" in capsys.readouterr().err
    )


@pytest.mark.xdist_group("served")
def test_a_picture_that_cannot_be_read_costs_its_own_rows(small, url, tmp_path) -> None:
    study = open_study(behind(small, url, images_per_question=1), tmp_path, progress=False)
    images = study.images.by_entity
    first = study.trials[0].image
    bad = type(first)(first.name, data=b"\x89PNG\r\n\x1a\nno picture")
    images[study.trials[0].question.entity] = tuple(bad for _ in images[study.trials[0].question.entity])
    study.trials = study._trials(None)  # pyright: ignore[reportPrivateUsage] (as if the file had been bad from the start)
    assert isinstance(study, ServedStudy)
    before = study.cost()
    table = study.answered()
    failed = table[table["error"].notna()]
    assert set(failed["error_kind"]) == {"image"}
    assert 0 < len(failed) < len(table)
    after = study.cost()
    assert (before.kept, after.requests) == (0, 0)
    assert before.requests == after.kept == len(table) - len(failed)
    assert (study.outcomes["excluded"] == "could not be run").any()
    bad_one = next(call for call in study.calls if call.image is not None and call.image.name == first.name)
    fine = next(call for call in study.calls if call.image is not None and call.image.name != first.name)
    assert [answer is None for answer in study.answers("beside", [bad_one, fine])] == [True, False]


def test_what_a_server_cannot_do_is_refused(small) -> None:
    config = behind(small, "http://127.0.0.1:1/v1")
    study = open_study(config, "nowhere", progress=False)
    for step in (study.capture, study.lens, study.probe):
        with pytest.raises(ConfigError, match="shows no activations"):
            step()
    with pytest.raises(ValueError, match="samples serve selective prediction"):
        behind(small, "http://127.0.0.1:1/v1", samples={"count": 3})
    other = behind(small, "http://127.0.0.1:2/v1")
    assert other.asked != config.asked
    dearer = behind(small, "http://127.0.0.1:1/v1", server={"url": "http://127.0.0.1:1/v1", "price_input": 99.0})
    assert dearer.asked == config.asked


def test_the_estimate_follows_from_prompts_pictures_and_prices(small, tmp_path) -> None:
    study = open_study(behind(small, "http://127.0.0.1:1/v1"), tmp_path, progress=False)
    assert isinstance(study, ServedStudy)
    cost = study.cost()
    calls = study.calls
    read = sum(len(c.text) for c in calls) // 4 + 765 * sum(c.image is not None for c in calls)
    assert (cost.requests, cost.read, cost.written) == (len(calls), read, 10 * len(calls))
    assert cost.price == pytest.approx((2.5 * read + 10.0 * 10 * len(calls)) / 1e6)
    assert f"{len(calls):,} requests (0 more are answered already)" in cost.told


def _toml(told: dict[str, object]) -> str:
    tables = {name: part for name, part in told.items() if isinstance(part, dict)}
    lines = [f"{name} = {json.dumps(value)}" for name, value in told.items() if name not in tables]
    for name, part in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in part.items())]
    return "\n".join(lines)
