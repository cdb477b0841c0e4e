import io
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

from gapprobe.errors import ConfigError, DataError
from gapprobe.tasks.choices import Choices
from gapprobe.tasks.examples import Example
from gapprobe.tasks.images import ImageFile, ImageSet, TrivialImage, load_images
from gapprobe.tasks.prompts import PromptTemplate, load_template
from gapprobe.tasks.questions import Entity, Question, QuestionSet, leaks
from gapprobe.tasks.settings import build_trials

TEMPLATE = PromptTemplate(
    "Be short.", (("Q1", "A1"),), "Q: {question} A: {answer} {stop}", "Q: {question} A:", " ", "#"
)
CAN, CAT = Entity("can"), Entity("cat")
QUESTIONS = QuestionSet(
    (CAN, CAT),
    (Question("can", "made-of", "What is a {entity} made of?", "metal"), Question("cat", "legs", "How many?", "four")),
    reference="the object in the image",
    identify="What is in the image?",
)


def png(shade: int, size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("L", size, shade).save(buffer, format="PNG")
    return buffer.getvalue()


def image_set(per_entity: int = 3) -> ImageSet:
    return ImageSet({e: tuple(ImageFile(f"{e}{i}", data=png(i)) for i in range(per_entity)) for e in ("can", "cat")})


def test_each_setting_asks_what_the_study_says() -> None:
    trial = build_trials(QUESTIONS, image_set(), TEMPLATE, images_per_question=1)[0]
    assert trial.full_information.text.endswith("Q: What is a can made of? A:")
    assert trial.visual.text.endswith("Q: What is the object in the image made of? A:")
    assert leaks(trial.visual.text, CAN) == []
    assert trial.identification.text.endswith("Q: What is in the image? A:")
    assert {c.image for c in (trial.identification, trial.full_information, trial.visual)} == {trial.image}
    assert [c.text for c in trial.text_only] == [trial.full_information.text] * 4
    assert [c.text for c in trial.guess_control] == [trial.visual.text] * 4
    assert [c.image and c.image.name for c in trial.text_only] == ["black-6x4", "white-6x4", "noise-6x4", None]


def test_identification_may_list_all_entities_and_nothing_else_may_name_one() -> None:
    listed = replace(QUESTIONS, entities=(CAT, Entity("ice_cream"), CAN)).listing()
    trial = build_trials(listed, image_set(), TEMPLATE, images_per_question=1)[0]
    assert trial.identification.text.endswith("Q: What is in the image? It is one of: can, cat, ice cream. A:")
    assert leaks(trial.visual.text, CAN) == []
    # Named by hand it is a mistake, and with a list a question that names its entity still is.
    with pytest.raises(ConfigError, match="picture of can names it"):
        build_trials(replace(QUESTIONS, identify="A can?"), image_set(), TEMPLATE, images_per_question=1)
    with pytest.raises(ConfigError, match="picture of can names it"):
        build_trials(replace(listed, reference="the can"), image_set(), TEMPLATE, images_per_question=1)


def test_what_stretches_of_a_prompt_are_goes_with_it() -> None:
    trial = build_trials(QUESTIONS, image_set(), TEMPLATE, images_per_question=1)[0]

    def parts(example: Example) -> dict[str, list[str]]:
        return {role: [example.text[a:b] for a, b in spans] for role, spans in example.spans.items()}

    before = "Be short. Q: Q1 A: A1 # Q: "
    assert parts(trial.full_information) == {"system": [before], "answer_cue": [" A:"], "entity": ["can"]}
    reference = "the object in the image"
    assert parts(trial.visual) == {"system": [before], "answer_cue": [" A:"], "reference": [reference]}
    assert parts(trial.identification) == {"system": [before], "answer_cue": [" A:"], "reference": []}
    assert parts(trial.text_only[0]) == parts(trial.full_information)
    assert parts(trial.guess_control[-1]) == parts(trial.visual)


@pytest.mark.parametrize(
    ("change", "asked"),
    [
        ({"reference": "the CAN"}, "What is the CAN made of"),
        ({"identify": "Which can is it?"}, "Which can is it"),
        ({"questions": (Question("can", "r", "Is a tin a {entity}?", "yes"),)}, "Is a tin the object"),
    ],
)
def test_a_visual_prompt_that_names_the_entity_is_refused(change: dict[str, object], asked: str) -> None:
    told = replace(QUESTIONS, entities=(Entity("can", ("tin",)), CAT), **change)
    with pytest.raises(ConfigError, match=f"prompt that asks '{asked}.* about a picture of can names it"):
        build_trials(told, image_set(), TEMPLATE, images_per_question=1)


def test_a_template_whose_examples_name_the_entity_is_refused() -> None:
    template = replace(TEMPLATE, examples=(("What purrs?", "Cats."),))
    with pytest.raises(ConfigError, match=r"picture of cat names it \(cat\)"):
        build_trials(QUESTIONS, image_set(), template, images_per_question=1)


def test_an_entity_in_the_plural_is_a_mention_of_it() -> None:
    many = QuestionSet((CAN,), (Question("can", "n", "How heavy are {entity}s?", "x"),), "the thing", "What?")
    trial = build_trials(many, image_set(), TEMPLATE, images_per_question=1)[0]
    ((a, b),) = trial.full_information.spans["entity"]
    assert trial.full_information.text[a : b + 1] == "cans"


def test_images_are_drawn_without_replacement_and_the_same_for_the_same_seed() -> None:
    def drawn(seed: int) -> list[str]:
        return [
            t.image.name for t in build_trials(QUESTIONS, image_set(50), TEMPLATE, images_per_question=9, seed=seed)
        ]

    assert len(set(drawn(1))) == 18
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_an_unreadable_image_leaves_its_trial_without_trivial_calls() -> None:
    images = ImageSet({"can": (ImageFile("bad", data=b""),), "cat": (ImageFile("torn", data=png(1)[:40]),)})
    for trial in build_trials(QUESTIONS, images, TEMPLATE, images_per_question=1):
        assert trial.text_only == trial.guess_control == ()
        with pytest.raises(DataError, match=trial.image.name):
            trial.image.load()


def test_what_is_wrong_with_an_image_is_said_the_same_way_every_time() -> None:
    def told(data: bytes) -> str:
        with pytest.raises(DataError) as error:
            ImageFile("x.png", data=data).load()
        return str(error.value)

    assert told(b"not an image") == told(b"not an image") == "image x.png is in no format that Pillow knows"
    assert told(png(1)[:40]) == told(png(1)[:40])
    assert told(b"") == "image x.png is empty (zero bytes)"


def test_an_unknown_trivial_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="'grey' is not known"):
        build_trials(QUESTIONS, image_set(), TEMPLATE, images_per_question=1, trivial=["grey"])


def test_trivial_noise_is_the_same_picture_every_time_and_no_constant() -> None:
    noise = TrivialImage("noise", 8, 5)
    assert noise.read() == noise.read()
    pixels = np.asarray(noise.load())
    assert pixels.shape == (5, 8, 3)
    assert len(np.unique(pixels)) > 50


def test_a_folder_of_images_is_read_by_entity(tmp_path) -> None:
    for entity in ("can", "cat", "unasked"):
        (tmp_path / entity).mkdir()
        (tmp_path / entity / "b.png").write_bytes(png(2))
        (tmp_path / entity / "a.PNG").write_bytes(png(1))
        (tmp_path / entity / "notes.txt").write_text("no image")
    images = load_images(tmp_path, ["can", "cat"])
    assert [i.name for i in images.by_entity["cat"]] == ["cat/a.PNG", "cat/b.png"]
    assert images.size == 4
    before = images.fingerprint
    (tmp_path / "cat" / "b.png").write_bytes(png(3))
    assert load_images(tmp_path, ["can", "cat"]).fingerprint != before


def test_a_missing_entity_is_named(tmp_path) -> None:
    (tmp_path / "can").mkdir()
    (tmp_path / "can" / "a.png").write_bytes(png(1))
    with pytest.raises(ConfigError, match="show nothing of cat"):
        load_images(tmp_path, ["can", "cat"])


def test_a_parquet_of_another_form_is_refused(tmp_path) -> None:
    import pandas as pd

    pd.DataFrame({"img": [1], "entity": ["can"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="need the columns image"):
        load_images(tmp_path / "x.parquet", ["can"])
    (tmp_path / "y.parquet").write_bytes(b"not parquet")
    with pytest.raises(ConfigError, match="need the columns image"):
        load_images(tmp_path / "y.parquet", ["can"])


def test_the_prompt_template_is_data(tmp_path) -> None:
    assert TEMPLATE.render("Why?") == "Be short. Q: Q1 A: A1 # Q: Why? A:"
    file = tmp_path / "p.toml"
    file.write_text('instruction = "x"\nexamples = []\nsolved = ""\nquery = ""\nseparator = ""\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="lacks the field 'stop'"):
        load_template(file)


def test_with_choices_every_question_but_the_identification_has_its_options() -> None:
    choices = {"made-of/can": Choices(("glass", "metal"), 1)}
    open_form = build_trials(QUESTIONS, image_set(), TEMPLATE, images_per_question=2)
    asked = build_trials(QUESTIONS, image_set(), TEMPLATE, images_per_question=2, choices=choices)
    assert [t.image for t in asked] == [t.image for t in open_form if t.question.entity == "can"]
    trial = asked[0]
    assert trial.visual.text.endswith("Q: What is the object in the image made of?\nA. glass\nB. metal A:")
    assert trial.identification.text.endswith("Q: What is in the image? A:")
    for call in (trial.full_information, *trial.text_only, *trial.guess_control):
        assert "\nA. glass\nB. metal A:" in call.text
    assert {call.columns["question"] for call in trial.guess_control} == {"made-of/can"}


def test_an_option_must_not_name_what_is_only_shown() -> None:
    with pytest.raises(ConfigError, match=r"A\. cans.* about a picture of can names it"):
        build_trials(
            QUESTIONS,
            image_set(),
            TEMPLATE,
            images_per_question=1,
            choices={"made-of/can": Choices(("cans", "metal"), 1)},
        )
