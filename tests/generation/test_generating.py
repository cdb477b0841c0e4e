"""From pages to a question file that a study reads, with a real small language model behind a real server.

Its questions are poor; what is tested is that whatever it says is read, filtered, told and kept.
"""

import csv
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from gapprobe.chat.base import Reply, Request
from gapprobe.chat.kept import FILE
from gapprobe.chat.server import ChatServer, ServerSettings
from gapprobe.cli import main
from gapprobe.errors import ConfigError, ModelError
from gapprobe.generation.asking import ask_closed_book
from gapprobe.generation.filters import FILTERS, Judge, Pair, relation_of
from gapprobe.generation.generating import (
    Generated,
    generate_questions,
    read_entities,
    report,
    write_generated,
)
from gapprobe.generation.local import LocalChat
from gapprobe.generation.pages import open_pages
from gapprobe.models.loading import load_model
from gapprobe.tasks.questions import Entity, load_questions
from tests.serving import language_model, served

PAGES = {
    "France": "France is a country in Western Europe. Its capital is Paris.",
    "Japan": "Japan is an island country in East Asia. The capital of Japan is Tokyo.",
    "spider": "A spider is an animal with eight legs. Spiders spin webs of silk to catch insects.",
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(language_model(), tmp_path_factory.mktemp("serve") / "log") as address:
        yield address


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    for name, text in PAGES.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.txt").write_text(text)
    (tmp_path / "entities.csv").write_text("entity,aliases\nFrance,\nJapan,Nippon|Nihon\nspider,\nunicorn,\n")
    return tmp_path


def arguments(inputs: Path, out: Path, url: str) -> list[str]:
    told = ["data", "generate", str(inputs / "entities.csv"), str(out), "--model", str(language_model()), "--url", url]
    told += ["--pages", str(inputs / "in"), "--no-own-article", "--distractors", "--no-stop-texts"]
    return [*told, "--reference", "the thing in the image"]


def written(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.mark.xdist_group("language model")
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been_killed(inputs, url, tmp_path, capsys) -> None:
    main(arguments(inputs, tmp_path / "whole", url))
    told = capsys.readouterr().out
    whole = written(tmp_path / "whole")
    lines = list(csv.DictReader((tmp_path / "whole" / "questions.csv").open()))
    assert f"{len(lines)} question" in told
    # This model knows capitals, if little else.
    assert ("Japan", "Tokyo") in {(line["entity"], line["answer"]) for line in lines}
    assert b"unicorn: no page, or none that names it" in whole["report.md"]
    asked = load_questions(tmp_path / "whole" / "questions.csv")
    assert len(asked.questions) == len(lines)
    assert not asked.dropped

    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "gapprobe", *arguments(inputs, killed, url)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end and _kept(killed) < 3:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    before = _kept(killed)
    assert 3 <= before < _kept(tmp_path / "whole")
    assert not (killed / "questions.csv").exists()
    main(arguments(inputs, killed, url))
    assert written(killed) == whole
    assert _kept(killed) == _kept(tmp_path / "whole")


def _kept(out: Path) -> int:
    path = out / "replies" / FILE
    if not path.exists():
        return 0
    base = sqlite3.connect(path)
    try:
        return base.execute("select count(*) from replies").fetchone()[0]
    except sqlite3.OperationalError:
        return 0
    finally:
        base.close()


@pytest.mark.xdist_group("language model")
def test_the_filters_ask_the_real_model(url, tmp_path) -> None:
    chat = ChatServer(ServerSettings(url=url, stop=False), str(language_model()), tmp_path)
    france = Entity("France")
    judge = Judge(chat, {"France": france}, "the country in the image", 0, progress=False)
    right = Pair("France", "What is the capital of France?", "Paris", "page", "")
    wrong = Pair("France", "Who was the first king of France to play the tuba?", "Zwentibold", "page", "")
    found = FILTERS["known"]([right, wrong], judge)
    assert found[0] == ""
    assert found[1].startswith("answered wrong closed-book: ")
    for name in ("unique", "duplicate"):
        assert len(FILTERS[name]([right, wrong], judge)) == 2
    # An article of its own names its subject, and is read like a page.
    made = generate_questions([france], chat, most_passages=1, progress=False)
    assert made.counts["passages"] == 1


@pytest.mark.xdist_group("language model")
def test_a_model_that_is_loaded_here_answers_as_it_does_behind_a_server(url, tmp_path) -> None:
    asked = [ask_closed_book(f"What is the capital of {name}?", 0) for name in ("France", "Japan", "Italy")]
    asked += [Request("Name three animals.", max_tokens=4, system="Be brief."), Request(" ")]
    here = LocalChat(load_model(language_model(), dtype="float32"), tmp_path / "here")
    there = ChatServer(ServerSettings(url=url, stop=False), str(language_model()), tmp_path / "there")
    found = dict(here.ask(asked))
    assert [found[i].text for i in range(3)] == [reply.text for _, reply in sorted(there.ask(asked[:3]))]
    assert "Paris" in found[0].text
    assert found[3].cut
    assert found[3].completion_tokens == 4
    assert found[4].error_kind == "prompt"
    drawn = [replace(asked[3], temperature=1.0, seed=seed) for seed in (0, 1, 0)]
    again = dict(here.ask(drawn))
    assert again[0] == again[2] != again[1]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "here").rglob("*.safetensors")}
    assert dict(here.ask(asked)) == found  # kept: nothing is run again
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "here").rglob("*.safetensors")} == before
    with pytest.raises(ConfigError, match="asked without pictures"):
        next(here.ask([Request("q", b"picture")]))


@pytest.mark.xdist_group("language model")
def test_the_command_without_a_server(inputs, tmp_path, capsys) -> None:
    told = arguments(inputs, tmp_path / "out", "http://127.0.0.1:1/v1")
    main([*told, "--local", "--dtype", "float32"])
    assert "questions.csv: " in capsys.readouterr().out
    lines = list(csv.DictReader((tmp_path / "out" / "questions.csv").open()))
    assert lines
    assert {line["entity"] for line in lines} <= {"France", "Japan", "spider"}


class Says:
    """Replies by the first words of a request."""

    def __init__(self, pairs: str, article: str = "") -> None:
        self.pairs, self.article, self.asked = pairs, article, 0

    def ask(self, requests: Sequence[Request], *, progress: bool = False) -> Iterator[tuple[int, Reply]]:
        del progress
        for i, request in enumerate(requests):
            self.asked += 1
            if request.text.startswith("Write a short"):
                yield i, Reply(self.article) if self.article else Reply(error="HTTP 500", error_kind="server")
            elif request.text.startswith("Write questions"):
                yield i, Reply(self.pairs)
            elif request.text.startswith("Write three"):
                yield i, Reply("1. Lyon\n2. Nice\n3. Lyon")
            elif "Another" in request.text or "right, too" in request.text:
                yield i, Reply("no")
            else:
                yield i, Reply("Paris, I think, since 1889")


def test_every_pair_is_in_the_file_or_among_the_dropped(tmp_path) -> None:
    pairs = "\n".join(
        f"Question: {question}\nAnswer: {answer}"
        for question, answer in (
            ("Where is the Eiffel Tower?", "Paris"),
            ("where is the Eiffel Tower??", "Paris"),
            ("Where is it?", "Paris"),
            ("When was the tour Eiffel built?", "1889"),
            ("Who climbed the Eiffel Tower <b>?", "Mr | *Nobody*"),
        )
    )
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "Eiffel_Tower.txt").write_text("The Eiffel Tower is high. It is iron.")
    tower = Entity("Eiffel_Tower", ("tour Eiffel",))
    chat = Says(pairs)
    pages = open_pages(str(tmp_path / "in"), tmp_path)
    found = generate_questions([tower], chat, pages, with_distractors=True, progress=False)
    assert [(q.relation, q.text, q.answer) for q in found.questions] == [
        ("where is the _", "Where is the {entity}?", "Paris"),
        ("when was the _ built", "When was the {entity} built?", "1889"),
    ]
    assert [(d.stage, d.question) for d in found.dropped] == [
        ("form", "Where is it?"),
        ("known", "Who climbed the Eiffel Tower <b>?"),
        ("duplicate", "where is the Eiffel Tower??"),
    ]
    assert found.counts == {"passages": 1, "form": 5, "unique": 4, "known": 4, "duplicate": 3}
    assert found.distractors == {"where is the _/Eiffel_Tower": ["Lyon", "Nice"],
                                 "when was the _ built/Eiffel_Tower": ["Lyon", "Nice"]}  # fmt: skip
    assert found.notes == ["Eiffel_Tower: no article: HTTP 500"]
    write_generated(found, tmp_path / "out")
    kept = load_questions(tmp_path / "out" / "questions.csv")
    assert [(q.text, q.answer, q.relation) for q in kept.questions] == [
        (q.text, q.answer, q.relation) for q in found.questions
    ]
    assert kept.entities == (tower,)
    told = (tmp_path / "out" / "report.md").read_text()
    assert "| form | 5 | 1 |" in told
    assert "<b>" not in told
    assert "\\<b\\>" in told
    assert "Mr \\| \\*Nobody\\*" in told
    assert told == report(found)
    for name in ("dropped.csv", "distractors.csv"):
        assert len(list(csv.DictReader((tmp_path / "out" / name).open()))) in (3, 4)


def test_pairs_stand_by_entity_whatever_they_were_read_in(tmp_path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("France", "Japan"):
        (tmp_path / "in" / f"{name}.txt").write_text(f"{name} is a country.")
    chat = Says("no pairs at all", article="France and Japan are far apart.")
    asked = [Entity("Japan"), Entity("France")]
    found = generate_questions(asked, chat, open_pages(str(tmp_path / "in"), tmp_path), progress=False)
    assert found.counts["passages"] == 4
    assert [d.entity for d in found.dropped] == ["Japan", "Japan", "France", "France"]


def test_relations_group_what_is_alike_and_tell_apart_what_is_long() -> None:
    assert relation_of("Where is the {entity}?") == relation_of(
        "where is {entity}, the".replace("{entity}, the", "the {entity}")
    )
    long = "Which of the very many and very different countries of the world has the {entity} in its {part}"
    assert relation_of(long.replace("{part}", "north")) != relation_of(long.replace("{part}", "south"))
    assert len(relation_of(long)) < 72


def test_bad_input_is_refused_before_anything_is_asked(tmp_path, capsys) -> None:
    chat = Says("")
    with pytest.raises(ConfigError, match="at least one entity"):
        generate_questions([], chat)
    with pytest.raises(ConfigError, match="each once"):
        generate_questions([Entity("a"), Entity("a")], chat)
    with pytest.raises(ConfigError, match="nothing to read"):
        generate_questions([Entity("a")], chat, own_article=False)
    with pytest.raises(ConfigError, match="most_passages is 0"):
        generate_questions([Entity("a")], chat, most_passages=0)
    assert chat.asked == 0
    (tmp_path / "nobody.csv").write_text("entity\n")
    with pytest.raises(ConfigError, match=r"nobody\.csv lists none"):
        read_entities(tmp_path / "nobody.csv")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_entities(tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_text("name\nx\n")
    with pytest.raises(ConfigError, match="need the column entity"):
        read_entities(tmp_path / "bad.csv")
    (tmp_path / "good.csv").write_text("entity,aliases\nx,a| b |\n\ny\n")
    assert read_entities(tmp_path / "good.csv") == [Entity("x", ("a", "b")), Entity("y")]
    command = ["data", "generate", str(tmp_path / "good.csv"), str(tmp_path / "out"), "--model", "m"]
    for more, message in (
        (["--url", "localhost:8000"], "url: Value error, it must look like"),
        (["--url", "http://127.0.0.1:1/v1", "--pages", str(tmp_path / "none")], "must be a folder of"),
        (["--url", "http://127.0.0.1:1/v1", "--api-key-env", "HOME"], "api_key_env"),
    ):
        with pytest.raises(SystemExit):
            main([*command, *more])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "questions.csv").write_text("by hand")
    with pytest.raises(SystemExit):
        main(command)
    assert "was not generated and would be lost" in capsys.readouterr().err
    assert (tmp_path / "out" / "questions.csv").read_text() == "by hand"


def test_a_server_that_is_not_there_is_named(tmp_path) -> None:
    chat = ChatServer(ServerSettings(url="http://127.0.0.1:1/v1", retries=0), "m", tmp_path)
    with pytest.raises(ModelError, match="m at 127.0.0.1:1/v1: 1 request in a row failed"):
        generate_questions([Entity("a")], chat, progress=False)


def test_nothing_kept_is_told_too() -> None:
    told = report(Generated((Entity("a"),)))
    assert "0 questions about 0 of 1 entities" in told
    assert os.linesep not in told or os.linesep == "\n"
