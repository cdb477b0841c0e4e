"""A language model as judge: what it is asked, what becomes of what it says, and a real small one over the demo."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from gapprobe.chat.base import Reply, Request
from gapprobe.demo import FOLDER
from gapprobe.errors import ConfigError
from gapprobe.report.page import render_report
from gapprobe.study.config import load_config
from gapprobe.study.llm_judge import judge_by_model
from gapprobe.study.run import run_studies
from gapprobe.study.study import Study
from gapprobe.tasks.judging import judge_sound
from tests.serving import language_model, served

FEW = "entity,relation,question,answer\n" + "\n".join(
    f"{name},{relation},{question},{answer}"
    for name, more, twice in (("three", "four", "six"), ("four", "five", "eight"))
    for relation, question, answer in (("successor", f"Which number comes after {name}?", more),
                                       ("double", f"What is twice {name}?", twice))
)  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("judged")
    (folder / "few.csv").write_text(FEW + "\n")
    told = {"questions": str(folder / "few.csv"), "images_per_question": 2, "trivial_images": ("black",)}
    told |= {"reference": "the digit in the image", "identify": "What is the digit in the image?"}
    return Study(load_config(FOLDER / "llava.toml").model_copy(update=told), folder / "out", progress=False)


class Knows:
    """Says what the sound judge says, or nothing clear of some answers."""

    def __init__(self, unclear: str = "") -> None:
        self.unclear, self.asked = unclear, list[Request]()

    def ask(self, requests: Sequence[Request], *, progress: bool = False) -> Iterator[tuple[int, Reply]]:
        del progress
        for i, request in enumerate(requests):
            self.asked.append(request)
            told = dict(line.split(": ", 1) for line in request.text.split("\n") if ": " in line)
            if self.unclear and told["Given answer"] == self.unclear:
                yield i, Reply("perhaps")
            else:
                right = judge_sound(told["Given answer"], told["Right answer"].split(" or "))
                yield i, Reply("Yes." if right else "No.")


@pytest.mark.xdist_group("study")
def test_verdicts_are_the_models_and_each_answer_is_asked_about_once(study: Study) -> None:
    chat = Knows()
    found, unjudged = judge_by_model(study.trials, study.row_of, study.answered(), study.questions, chat)
    assert found.equals(study.outcomes)  # a model that says what the sound judge says
    assert unjudged == 0
    texts = [request.text for request in chat.asked]
    assert len(set(texts)) == len(texts)
    assert not any("in the image" in text for text in texts if "What is the digit" not in text)
    assert all(answer.strip() for text in texts for answer in [text.split("Given answer: ")[1].split("\n")[0]])
    answer = found["text_only_answer"].iloc[0]
    some, unjudged = judge_by_model(study.trials, study.row_of, study.answered(), study.questions, Knows(answer))
    assert unjudged >= 1
    assert not some[some["text_only_answer"] == answer]["text_only"].any()


@pytest.mark.xdist_group("language model")
def test_a_real_model_judges_beside_the_rules(study: Study, tmp_path: Path) -> None:
    with served(language_model(), tmp_path / "log") as url:
        judge = {"model": str(language_model()), "server": {"url": url, "stop": False}}
        config = type(study.config).model_validate(study.config.model_dump() | {"llm_judge": judge})
        assert config.asked == study.config.asked
        results = run_studies([config.model_copy(update={"folder": study.config.folder})], study.out, progress=False)
    judges = results["families"]["llava"]["judges"]
    assert list(judges["by_judge"]) == ["sound", "published", "model"]
    assert len(judges["agreement"]) == 3
    assert judges["unjudged"] >= 0
    assert "Model: a language model says so" in render_report(results)


def test_a_judge_needs_a_server(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    text = (FOLDER / "llava.toml").read_text()
    path.write_text(text + '\n[llm_judge]\nmodel = "m"\n')
    with pytest.raises(ConfigError, match=r"llm_judge\.server: Field required"):
        load_config(path)
    path.write_text(text + '\n[llm_judge]\nmodel = "m"\ntemperature = 1\n[llm_judge.server]\nurl = "http://x/v1"\n')
    with pytest.raises(ConfigError, match=r"llm_judge\.temperature is not a setting; the settings are model, server"):
        load_config(path)
