"""What goes wrong in the published code of arXiv 2508.18297, as small functions, and that it does not go wrong here."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

import gapprobe as gp
from gapprobe import stats
from gapprobe.demo import FOLDER
from gapprobe.kernels.logit_lens import Unembedding
from gapprobe.lens.logit import logit_lens
from gapprobe.selective import selective_scores
from gapprobe.tasks.examples import Example
from gapprobe.tasks.judging import judge_sound
from gapprobe.tasks.questions import SLOT, Entity, Question, leaks, reason_to_drop, with_slot
from gapprobe.tracing.positions import parse_positions
from gapprobe.tracing.tokens import token_tables
from tests.models.kinds import loaded

REFERENCE = "the object in the image"


@pytest.mark.parametrize(
    ("name", "question", "published", "ours"),
    [
        ("can", "Is candy sold in a Can?", f"Is {REFERENCE}dy sold in a Can?", f"Is candy sold in {REFERENCE}?"),
        (
            "man",
            "Do many call a Man human?",
            f"Do {REFERENCE}y call a Man hu{REFERENCE}?",
            f"Do many call {REFERENCE} human?",
        ),
        ("ray", "Is a RAY grey or gray?", f"Is a RAY grey or g{REFERENCE}?", f"Is {REFERENCE} grey or gray?"),
    ],
)
def test_a_name_is_replaced_in_any_casing_and_never_inside_a_word(
    name: str, question: str, published: str, ours: str
) -> None:
    entity = Entity(name)
    assert question.replace(name, REFERENCE) == published
    assert leaks(published, entity) == [name]
    shown = Question(name, "r", with_slot(question, entity), "x").referring(REFERENCE)
    assert shown == ours
    assert leaks(shown, entity) == []


def test_a_pair_that_is_dropped_does_not_take_the_later_ones_with_it(tmp_path: Path) -> None:
    entity = Entity("Stonehenge")
    pairs = [("Where is it?", "England"), ("In which country is Stonehenge?", "England"), ("Who?", "")]

    def published() -> list[tuple[str, str]]:
        kept: list[tuple[str, str]] = []
        for question, answer in pairs:
            if reason_to_drop(Question("Stonehenge", "r", with_slot(question, entity), answer), entity):
                return kept
            kept.append((question, answer))
        return kept

    assert published() == []
    file = tmp_path / "questions.csv"
    lines = [f"Stonehenge,{question},{answer}" for question, answer in pairs]
    file.write_text("\n".join(["entity,question,answer", *lines]), encoding="utf-8")
    found = gp.load_questions(file)
    assert [q.text for q in found.questions] == [f"In which country is {SLOT}?"]
    assert [(q.text, why) for q, why in found.dropped] == [
        ("Where is it?", "question does not name the entity"),
        ("Who?", "empty question or answer"),
    ]


def test_one_is_not_twelve() -> None:
    def published(answer: str, gold: str) -> bool:
        return gold.lower() in answer.lower() or answer.lower() in gold.lower()

    for answer, gold in (("12", "1"), ("1", "12"), ("", "1"), ("1.5", "1"), ("nineteen", "nine")):
        assert published(answer, gold)
        assert not judge_sound(answer, [gold])
    assert judge_sound("it is 1.", ["one"])
    assert not published("it is 1.", "one")


def test_a_divergence_is_that_of_the_distributions(store_of) -> None:
    def published(final: np.ndarray, layer: np.ndarray) -> float:
        return float(rel_entr(softmax(final), softmax(layer)).sum())

    # Two layers that are sure of different words: far apart.
    g = torch.Generator().manual_seed(0)
    head = Unembedding(torch.randn(31, 8, generator=g))
    residuals = 4 * torch.randn(2, 5, 8, generator=g)
    store = store_of(residuals, [f"row {i}" for i in range(5)])
    read = logit_lens(store, head, np.zeros(5, dtype=np.int64), position="last_input", norm=False, weights="f" * 64)
    assert read.kl is not None
    said = softmax(residuals.double().numpy() @ head.weight.double().numpy().T, axis=-1)
    truth = rel_entr(said[1], said[0]).sum(1)
    # Logits of float32: each is off by its rounding, and a divergence by the largest of them, twice.
    logits = np.abs(residuals.double().numpy()) @ np.abs(head.weight.double().numpy()).T
    bound = 2 * 8 * float(np.finfo(np.float32).eps) * logits.max()
    assert np.abs(read.kl[0] - truth).max() < bound
    assert truth.min() > 1
    # A softmax of probabilities is nearly even whatever they are: no two are further apart than about two nats.
    assert max(published(final, layer) for layer, final in zip(said[0], said[1], strict=True)) < truth.min() / 10


def test_an_entity_is_where_it_is_mentioned_not_where_its_last_token_first_occurs() -> None:
    def published(ids: list[int], entity: list[int]) -> int:
        return ids.index(entity[-1])

    model = loaded("llava-llama")
    text = "Is old Ben near Big Ben? Answer:"
    start = text.index("Big Ben")
    ids = model.encode([text])["input_ids"][0].numpy()
    (table,) = token_tables(model, [Example(text, spans={"entity": [(start, start + 7)]})], [ids], [None])
    mentioned = table.where("entity")
    assert "".join(model.tokenizer.decode(ids[mentioned]).split()) == "BigBen"
    (last,) = parse_positions(["entity[-1]"])
    assert last.in_prompt(table).tolist() == [mentioned[-1]]
    assert published(ids.tolist(), ids[mentioned].tolist()) < mentioned[0]


def test_perplexity_has_the_sign_of_a_confidence() -> None:
    def published(log_probs: Sequence[float]) -> float:
        return float(np.mean(log_probs))

    rng = np.random.default_rng(0)
    answers = [-rng.exponential(scale, size=3) for scale in rng.uniform(0.1, 2.0, size=200)]
    mean = np.array([published(answer) for answer in answers])
    correct = rng.random(200) < np.exp(mean)
    perplexity = np.exp(-mean)
    # What is called so there is below zero, where a perplexity is at least one, and falls where a perplexity rises.
    assert (mean < 0).all()
    assert (perplexity >= 1).all()
    # Read as a perplexity, the less the surer, it is worse than chance.
    assert stats.auc(-mean, correct) < 0.5
    folds = np.arange(200) % 5
    ours = selective_scores(mean, np.full(200, 0.5), correct, folds)["perplexity"]
    assert ((ours > 0) & (ours < 1)).all()
    assert stats.auc(ours, correct, folds) == stats.auc(-perplexity, correct, folds) > 0.5


def test_hidden_states_are_kept_of_instructblip_too(tmp_path: Path) -> None:
    """For every family, layer and token: tests/models/test_trace.py and tests/tracing/test_run.py."""

    def published(architecture: str) -> bool:
        return "LlavaNext" in architecture

    model = gp.load_model(FOLDER / "models" / "instructblip")
    assert not published(type(model.hf).__name__)
    image = gp.load_images(FOLDER / "digits.parquet", ["four"]).by_entity["four"][0]
    example = gp.Example("Question: What is the number in the image doubled? Answer:", image)
    store = gp.capture(model, [example], tmp_path / "acts", positions=["last_input"], progress=False)
    inputs = model.encode([example.text], [image.load()])
    config = model.greedy(1, output_hidden_states=True, return_dict_in_generate=True)
    with model.only_asked(config):
        theirs = model.hf.generate(**inputs, generation_config=config).hidden_states[0]
    assert store.header.layers == tuple(range(len(theirs)))
    # The last one of transformers is behind the final norm.
    for layer in store.header.layers[:-1]:
        assert torch.equal(store.layer(layer, "last_input")[0], theirs[layer][0, -1])
