"""The recipe's parts and what it ships: split, tokenizer, documents, and both folders through the Auto classes."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the recipe is not installed with the package

from examples.digits.bridges import BridgeOptions, train_instructblip, train_llava
from examples.digits.check import blank
from examples.digits.corpus import DEMO, NAMES, Document, DocumentMaker, all_words, load_facts
from examples.digits.data import augment, blanks, load_digits, to_pixels
from examples.digits.language import LanguageOptions, collate, new_maker, new_tokenizer, train_language
from examples.digits.table import render_table
from examples.digits.tokenizer import SPECIALS
from examples.digits.train import LOG, meets_bounds, stage
from examples.digits.vision import VisionOptions, train_vision

FAMILIES = ("llava", "instructblip")


def shipped_images() -> list[tuple[Image.Image, str]]:
    rows = pq.read_table(DEMO / "digits.parquet").to_pylist()
    return [(Image.open(io.BytesIO(row["image"]["bytes"])), row["entity"]) for row in rows]


def test_shipped_images_are_the_test_split_and_no_image_was_trained_on() -> None:
    train, test = load_digits()
    trained = {hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in train.images}
    shown = [(hashlib.sha256(image.tobytes()).hexdigest(), entity) for image, entity in shipped_images()]
    assert len(trained) == 4000
    assert len({digest for digest, _ in shown}) == 1000
    assert not trained & {digest for digest, _ in shown}
    assert [entity for _, entity in shown] == [NAMES[int(label)] for label in test.labels]


def test_parquet_has_the_hugging_face_image_schema() -> None:
    row = pq.read_table(DEMO / "digits.parquet").slice(123, 1).to_pylist()[0]
    assert set(row) == {"image", "entity"}
    assert row["image"]["path"] == "digit-0123.png"
    assert row["image"]["bytes"].startswith(b"\x89PNG")


def test_every_word_of_facts_and_prompts_is_one_known_token_and_comes_back() -> None:
    tokenizer, facts = new_tokenizer(), load_facts()
    for text in all_words(facts):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids).replace(" ", "") == text.lower().replace(" ", "")
    for fact in facts.facts:
        assert len(tokenizer.encode(fact.answer, add_special_tokens=False)) == 1
    assert tokenizer.encode("zéro ###")[0] == tokenizer.bos_token_id
    assert tokenizer.tokenize("Zéro twenty-five### four?") == ["zéro", "twenty-five", "###", "four", "?"]
    assert tokenizer.convert_tokens_to_ids(list(SPECIALS)) == list(range(len(SPECIALS)))


@pytest.fixture
def maker() -> DocumentMaker:
    return new_maker(new_tokenizer(), seed=7)


def draw(maker: DocumentMaker, count: int) -> list[Document]:
    return [maker.document(1 + i % 8, plain=i % 10 == 0) for i in range(count)]


def test_documents_are_determined_by_the_seed(maker: DocumentMaker) -> None:
    first = draw(maker, 50)
    assert first == draw(new_maker(new_tokenizer(), seed=7), 50)
    assert first != draw(new_maker(new_tokenizer(), seed=8), 50)


def test_documents_tell_the_truth_about_the_number_in_their_prefix(maker: DocumentMaker) -> None:
    tokenizer, facts = new_tokenizer(), load_facts()
    truth = {wording.format(entity=f.entity): f.answer for f in facts.facts for wording in f.wordings}
    lower = {tokenizer.decode(tokenizer.encode(q, add_special_tokens=False)): a.lower() for q, a in truth.items()}
    names = {tokenizer.encode(name, add_special_tokens=False)[0]: name for name in NAMES}
    kinds: Counter[str] = Counter()
    for _ in range(600):
        document = maker.document(1)
        kinds[document.kind] += 1
        words = zip(document.ids[:22], document.noise, strict=False)
        known = {names[i] for i, noise in words if i in names and not noise}
        answer = tokenizer.decode(next(i for i, learn in zip(document.ids, document.learn, strict=True) if learn))
        text = tokenizer.decode(document.ids)
        if document.kind == "named":
            question = text.split("question : ")[-1].split(" answer :")[0]
            assert lower[question] == answer
        elif document.kind == "referred":
            question = text.split("question : ")[-1].split(" answer :")[0]
            assert any(lower.get(question.replace(facts.reference, name)) == answer for name in known)
        else:
            assert answer in known or answer == "nothing"
    assert set(kinds) == {"named", "referred", "identified", "caption"}


def test_collate_pads_on_the_right_and_marks_what_is_learnt(maker: DocumentMaker) -> None:
    documents = [maker.document(1), maker.document(8, plain=True)]
    ids, noise, learn = collate(documents, pad=0)
    for row, document in enumerate(documents):
        size = len(document.ids)
        assert ids[row, :size].tolist() == document.ids
        assert learn[row, :size].tolist() == document.learn
        assert not learn[row, size:].any()
        assert not noise[row, size:].any()
        assert (ids[row, size:] == 0).all()


def test_augmentation_of_strength_zero_changes_nothing_and_is_seeded() -> None:
    pixels = to_pixels(load_digits()[0].images[:4])
    same = augment(pixels, torch.Generator().manual_seed(0), strength=0.0)
    torch.testing.assert_close(same, pixels, atol=1e-5, rtol=0)
    once, again = (augment(pixels, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(once, again)
    assert (once - pixels).abs().max() > 0.5
    black, white, noise = blanks(3, torch.Generator().manual_seed(0))
    assert (black == -1).all()
    assert (white == 1).all()
    assert 0.4 < noise.std() < 0.7


def test_training_is_determined_by_the_seed(tmp_path: Path) -> None:
    vision, language = VisionOptions(steps=3, batch=8, blank=2), LanguageOptions(plain_steps=2, steps=2, batch=4)
    bridge = BridgeOptions(steps=3, batch=8, blank=2, vision_steps=2)
    weights: dict[str, list[bytes]] = {}
    for run in ("once", "again", "other"):
        root, seed = tmp_path / run, int(run == "other")
        train_vision(root / "vision", seed, vision)
        train_language(root / "language", seed, language)
        if run != "other":
            train_llava(root / "llava", root / "vision", root / "language", seed, bridge)
            train_instructblip(root / "instructblip", root / "vision", root / "language", seed, bridge)
        for folder in root.iterdir():
            weights.setdefault(folder.name, []).append((folder / "model.safetensors").read_bytes())
            assert str(tmp_path) not in (folder / "config.json").read_text(encoding="utf-8")
    assert set(weights) == {"vision", "language", *FAMILIES}
    for once, again, *other in weights.values():
        assert once == again
        assert once not in other


def test_a_stage_runs_once_and_refuses_other_options(tmp_path: Path) -> None:
    calls: list[Path] = []

    def work(folder: Path) -> dict[str, float]:
        calls.append(folder)
        (folder / "weights").write_text("x", encoding="utf-8")
        return {"accuracy": 0.5}

    first = stage(tmp_path / "vision", 0, VisionOptions(), work)
    assert stage(tmp_path / "vision", 0, VisionOptions(), work) == first
    assert len(calls) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vision"]
    with pytest.raises(ValueError, match="other options"):
        stage(tmp_path / "vision", 0, VisionOptions(steps=1), work)


def test_a_killed_stage_is_done_again(tmp_path: Path) -> None:
    def killed(folder: Path) -> dict[str, float]:
        (folder / "half").write_text("x", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "vision", 0, VisionOptions(), killed)
    assert not (tmp_path / "vision").exists()
    stage(tmp_path / "vision", 0, VisionOptions(), lambda _: {})
    assert sorted(p.name for p in (tmp_path / "vision").iterdir()) == [LOG]


@pytest.mark.parametrize("family", FAMILIES)
def test_shipped_folder_answers_and_says_what_it_is(family: str) -> None:
    folder = DEMO / "models" / family
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    assert next(iter(AutoModelForImageTextToText.from_pretrained(folder).parameters())).dtype == torch.bfloat16
    facts = load_facts()
    white, (digit, name) = blank("white"), shipped_images()[0]
    asked = [
        (blank("black"), "What is four doubled?", "eight"),
        (white, "What is seven in French?", "sept"),
        (white.resize((50, 33)), "Which planet has three as its place from the sun?", "earth"),
        (digit, "What is nine in German?", "neun"),
        (digit, facts.identify, name),
    ]
    right = sum(answer(model, processor, image, question) == gold for image, question, gold in asked)
    assert right >= 4, f"{right} of {len(asked)}"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "**A toy.**" in card
    assert "replicates no figure" in card
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 6e6


def answer(model: torch.nn.Module, processor, image: Image.Image, question: str) -> str:
    text = load_facts().template.render(question)
    if model.config.model_type == "llava":
        content = [{"type": "image"}, {"type": "text", "text": text}]
        text = processor.apply_chat_template([{"role": "user", "content": content}])
        assert text.startswith("<image> Give")
    inputs = processor(images=image, text=text, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=10)[0].tolist()
    told = processor.tokenizer.decode(made[-10:] if len(made) <= 10 else made[inputs["input_ids"].shape[1] :])
    return told.split("###")[0].strip()


def test_shipped_seed_meets_the_bounds_and_is_the_lowest_that_does() -> None:
    logs = {f: json.loads((DEMO / "models" / f / LOG).read_text(encoding="utf-8")) for f in FAMILIES}
    assert logs["llava"]["seed"] == logs["instructblip"]["seed"]
    assert meets_bounds(logs)
    logs["llava"]["metrics"]["text_only_noise"] = 0.89
    assert not meets_bounds(logs)


def test_table_lists_every_seed_and_ships_the_lowest_fit_one() -> None:
    fit = {"text_only_black": 0.95, "identification": 0.9}
    unfit = {**fit, "text_only_black": 0.5}
    log = {"seconds": 60.0, "threads": 2, "metrics": {}}
    logs = {
        seed: {"vision": log, "language": log, **{family: {**log, "metrics": metrics} for family in FAMILIES}}
        for seed, metrics in ((0, unfit), (1, fit), (2, fit))
    }
    figure = {"accuracy": 0.25, "n": 40, "ci": [0.2, 0.3]}
    settings = ("identification", "text_only", "full_information", "visual", "guess_control")
    number = {"auc": 0.8, "value": 0.1, "n": 30, "ci": [0.05, 0.9]}
    verdict = {"probe": number, "control": "layer_0", "control_auc": number, "difference": number, "beats": True}
    part = {
        "raw": dict.fromkeys(settings, figure),
        "gap": {"absolute": number},
        "probe": {"verdict": {"image": verdict}},
    }
    result = {"families": dict.fromkeys(FAMILIES, part)}
    lines = render_table(logs, dict.fromkeys(logs, result)).splitlines()
    both = [line.split(" | ") for line in lines if line.startswith(("| llava", "| instructblip"))]
    rows, probes = both[:6], both[6:]
    assert [(row[0][2:], row[1]) for row in probes] == [(row[0][2:], row[1]) for row in rows]
    assert probes[0][2:5] == ["10 [5, 90] (n=30)", "0.800 [0.050, 0.900] (n=30)", "layer 0"]
    assert [(row[0][2:], row[1], row[-1][:-2]) for row in rows] == [
        (family, str(seed), "yes" if seed == 1 else "no") for family in FAMILIES for seed in (0, 1, 2)
    ]
    assert rows[0][2] == "0.250 [0.200, 0.300] (n=40)"
    assert rows[0][-3] == "3.0"
