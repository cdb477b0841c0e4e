"""A data set turned into what a study reads, and the study reading it."""

import io
import json
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

from gapprobe.cli import main
from gapprobe.errors import ConfigError
from gapprobe.tasks.datasets.arithmetic import arithmetic_questions, as_csv
from gapprobe.tasks.datasets.classes import DIGITS
from gapprobe.tasks.datasets.okvqa import ANNOTATIONS, QUESTIONS, read_okvqa
from gapprobe.tasks.datasets.preparing import prepare_dataset
from gapprobe.tasks.images import load_images
from gapprobe.tasks.judging import judge_sound
from gapprobe.tasks.prompts import PromptTemplate
from gapprobe.tasks.questions import load_questions
from gapprobe.tasks.settings import build_trials
from gapprobe.tasks.tables import load_examples

TEMPLATE = PromptTemplate("Short.", (), "", "Q: {question} A:", "\n", "#")


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("L", (6, 6), shade).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for entity, n in (("cat", 30), ("maple_tree", 5)):
        (tmp_path / "in" / entity).mkdir(parents=True)
        for i in range(n):
            (tmp_path / "in" / entity / f"{i:02d}.png").write_bytes(picture(i))
    return tmp_path / "in"


def test_what_is_written_is_what_a_study_reads_and_the_same_bytes_each_time(folder: Path, tmp_path: Path) -> None:
    made = prepare_dataset("folder", str(folder), tmp_path / "a", images_per_entity=12, progress=False)
    assert made.images == {"cat": 12, "maple tree": 5}
    assert "fewer than 10 images of maple tree" in made.told
    prepare_dataset("folder", str(folder), tmp_path / "b", images_per_entity=12, progress=False)
    assert (tmp_path / "a" / "images.parquet").read_bytes() == (tmp_path / "b" / "images.parquet").read_bytes()
    images = load_images(tmp_path / "a" / "images.parquet", ["cat", "maple tree"])
    for image in images.by_entity["cat"]:
        assert image.read() == (folder / image.name).read_bytes()
    other = prepare_dataset("folder", str(folder), tmp_path / "c", images_per_entity=12, seed=1, progress=False)
    assert other.images == made.images
    assert (
        json.loads((tmp_path / "a" / "source.json").read_text())["sha256"]
        != json.loads((tmp_path / "c" / "source.json").read_text())["sha256"]
    )


def test_the_pictures_of_a_class_do_not_depend_on_which_others_are_wanted(folder: Path, tmp_path: Path) -> None:
    prepare_dataset("folder", str(folder), tmp_path / "all", images_per_entity=7, progress=False)
    prepare_dataset("folder", str(folder), tmp_path / "one", images_per_entity=7, entities=["cat"], progress=False)
    every, one = (load_images(tmp_path / n / "images.parquet", ["cat"]).by_entity["cat"] for n in ("all", "one"))
    assert [image.name for image in every] == [image.name for image in one]


def test_damaged_and_monstrous_pictures_are_left_out_and_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "cat" / "03.png").write_bytes(picture(3)[:40])
    (folder / "cat" / "04.png").write_bytes(b"GIF")
    (folder / "cat" / "05.png").write_bytes(b"")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 50)
    PIL.Image.new("L", (9, 9)).save(folder / "cat" / "06.png")
    made = prepare_dataset("folder", str(folder), tmp_path / "out", progress=False)
    assert made.images["cat"] == 26
    assert set(made.damaged) == {f"cat/0{i}.png" for i in (3, 4, 5, 6)}
    assert "4 damaged pictures left out" in made.told
    assert json.loads((tmp_path / "out" / "source.json").read_text())["damaged"] == made.damaged
    for file in (folder / "maple_tree").iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="none of the 5 pictures of maple tree can be decoded"):
        prepare_dataset("folder", str(folder), tmp_path / "out", progress=False)


def test_two_pictures_of_one_name_and_names_that_are_no_text(folder: Path, tmp_path: Path) -> None:
    (folder / os.fsdecode(b"caf\xe9")).mkdir()
    (folder / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xff.png")).write_bytes(picture(9))
    made = prepare_dataset("folder", str(folder), tmp_path / "out", progress=False)
    assert made.images["caf\\udce9"] == 1
    images = load_images(tmp_path / "out" / "images.parquet", ["caf\\udce9"])
    assert images.by_entity["caf\\udce9"][0].read() == picture(9)
    (folder / "maple tree").mkdir()
    (folder / "maple tree" / "00.png").write_bytes(picture(7))
    with pytest.raises(ConfigError, match=r"has two pictures 00\.png of maple tree: rename one"):
        prepare_dataset("folder", str(folder), tmp_path / "out", progress=False)


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no class 'dog'; it has cat, maple tree"):
        prepare_dataset("folder", str(folder), tmp_path / "out", entities=["dog"], progress=False)
    with pytest.raises(ConfigError, match="must be at least 1"):
        prepare_dataset("folder", str(folder), tmp_path / "out", images_per_entity=0, progress=False)
    assert not (tmp_path / "out").exists()


def test_the_rules_questions_are_right_and_tell_nothing_without_the_digit(tmp_path: Path) -> None:
    questions = arithmetic_questions(seed=3)
    assert len(questions) == 100
    path = tmp_path / "questions.csv"
    path.write_bytes(as_csv(questions))
    loaded = load_questions(path, "the digit in the image", "What is the digit in the image?")
    kept = {q.id for q in loaded.questions}
    for question in questions:
        left, sign, right = question["question"].removeprefix("What is ").removesuffix("?").split()
        assert left == "{entity}"
        number = DIGITS.index(question["entity"])
        assert int(question["answer"]) == (number + int(right) if sign == "+" else number * int(right))
    # What is dropped names its entity: 0 times anything.
    assert {q.entity for q, _ in loaded.dropped} <= {"zero", "one"}
    assert len(kept) > 90
    by_relation: dict[str, set[str]] = {}
    for question in questions:
        by_relation.setdefault(question["relation"], set()).add(question["question"])
    assert all(len(texts) == 1 for texts in by_relation.values())
    assert arithmetic_questions(seed=3) == questions != arithmetic_questions(seed=4)
    with pytest.raises(ConfigError, match="per_digit is 0"):
        arithmetic_questions(per_digit=0)


@pytest.fixture
def okvqa(tmp_path: Path) -> Path:
    folder = tmp_path / "okvqa"
    (folder / "val2014").mkdir(parents=True)
    for number in (7, 8):
        PIL.Image.new("RGB", (8, 8)).save(folder / "val2014" / f"COCO_val2014_{number:012d}.jpg")
    asked = [
        {"question_id": 71, "image_id": 7, "question": "What sport is this? "},
        {"question_id": 81, "image_id": 8, "question": "Which year?"},
    ]
    answers = {71: ["surf", "surfing", "surfing", "", "surf"], 81: ["1990", "1989"]}
    told = [{"question_id": q, "answers": [{"raw_answer": a} for a in given]} for q, given in answers.items()]
    (folder / QUESTIONS).write_text(json.dumps({"questions": asked}))
    (folder / ANNOTATIONS).write_text(json.dumps({"annotations": told}))
    return folder


def test_okvqa_s_gold_answer_is_the_most_frequent_and_of_equals_the_first(okvqa: Path, tmp_path: Path) -> None:
    table = read_okvqa(okvqa, TEMPLATE)
    assert table["gold"].tolist() == ["surf", "1990"]
    assert table["text"].tolist() == ["Short.\nQ: What sport is this? A:", "Short.\nQ: Which year? A:"]
    assert judge_sound("it is surfing", table["answers"][0].split(" | "))
    table.to_csv(tmp_path / "okvqa.csv", index=False)
    examples = load_examples(tmp_path / "okvqa.csv")
    assert examples[0].image is not None
    assert examples[0].image.load().size == (8, 8)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / QUESTIONS).unlink(), "cannot be read as OKVQA's questions"),
        (lambda f: (f / ANNOTATIONS).write_text("[]"), "cannot be read as OKVQA's annotations"),
        (lambda f: (f / ANNOTATIONS).write_text('{"annotations": []}'), "has no answer to question 71"),
        (lambda f: (f / ANNOTATIONS).write_text('{"annotations": 3}'), "annotations is no list"),
        (lambda f: (f / "val2014" / "COCO_val2014_000000000008.jpg").unlink(), "question 81 is about .* not there"),
        (
            lambda f: (f / QUESTIONS).write_text(
                '{"questions": [{"question_id": 71, "image_id": "../x", "question": "?"}]}'
            ),
            "another form than OKVQA's",
        ),
    ],
)
def test_okvqa_files_of_another_form_are_named(okvqa: Path, spoil, message: str) -> None:
    spoil(okvqa)
    with pytest.raises(ConfigError, match=message):
        read_okvqa(okvqa, TEMPLATE)


def test_the_commands_make_a_study_s_input(okvqa: Path, folder: Path, tmp_path: Path, capsys) -> None:
    for number, name in enumerate(DIGITS):
        (tmp_path / "digits" / name).mkdir(parents=True)
        (tmp_path / "digits" / name / "a.png").write_bytes(picture(number))
    main(["data", "prepare", "folder", str(tmp_path / "digits"), str(tmp_path / "data")])
    main(["data", "arithmetic", str(tmp_path / "data" / "questions.csv"), "--per-digit", "4"])
    assert "40 questions" in capsys.readouterr().out
    questions = load_questions(tmp_path / "data" / "questions.csv", "the digit", "Which digit?")
    images = load_images(tmp_path / "data" / "images.parquet", DIGITS)
    trials = build_trials(questions, images, TEMPLATE, images_per_question=1, trivial=["none"])
    assert np.unique([trial.question.entity for trial in trials]).size == 10
    assert pq.read_table(tmp_path / "data" / "images.parquet").num_rows == 10
    prompts = tmp_path / "prompts.toml"
    prompts.write_text(
        'instruction = "i"\nexamples = []\nsolved = ""\nquery = "{question}"\nseparator = " "\nstop = "#"\n'
    )
    main(["data", "okvqa", str(okvqa), str(prompts), str(tmp_path / "okvqa.csv")])
    assert "2 questions" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["data", "prepare", "mnist", str(folder), str(tmp_path / "x")])
    assert "lacks t10k-images-idx3-ubyte" in capsys.readouterr().err
