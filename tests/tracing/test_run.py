import errno
import io
import shutil
import threading
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import wavfile

import gapprobe.tracing.run as run_module
from gapprobe.errors import ConfigError, ModelError, OutputError, StoreError
from gapprobe.kernels.logit_lens import reference
from gapprobe.models.model import Model
from gapprobe.models.trace import trace
from gapprobe.store import arena as arena_module
from gapprobe.store.format import ROLES
from gapprobe.store.reader import Store, open_store
from gapprobe.store.writer import StoreWriter
from gapprobe.tasks.examples import Example, mentions
from gapprobe.tasks.images import ImageFile
from gapprobe.tasks.sounds import SoundFile
from gapprobe.tracing import batch as batch_module
from gapprobe.tracing.answers import Decoding
from gapprobe.tracing.plan import row_ids
from gapprobe.tracing.positions import Positions, parse_positions
from gapprobe.tracing.prompts import Preparation
from gapprobe.tracing.run import capture
from tests.models.kinds import KINDS, WITH_IMAGE, fresh, loaded
from tests.models.tiny import LAYERS, WIDTH, image

BAD = [
    Example("zero bytes?", ImageFile("zero.png", data=b""), {"setting": "bad"}),
    Example("cut off?", ImageFile("cut.png", data=image(0).read()[:200]), {"setting": "bad"}),
    Example("What is <image>?", image(1), {"setting": "bad"}),
    Example(" ", image(1), {"setting": "bad"}),
    Example("word " * 300, image(1), {"setting": "bad"}),
]


def examples(n: int = 12) -> list[Example]:
    return [
        Example(
            f"Question: {'what ' * (i % 4)}is {i}? Answer:",
            image(i, 30 + 2 * i, 40) if i % 3 else None,
            {"setting": "visual" if i % 3 else "text", "number": str(i)},
        )
        for i in range(n)
    ]


def ids_of(
    wanted: list[Example], stop: str | None = "###", positions: Positions = ("last_input", "last_output")
) -> list[str]:
    return row_ids(wanted, parse_positions(positions), Decoding(6, (stop,) if stop else ()))


def taken(model: Model, wanted: list[Example], out: Path, **options: Any) -> Store:
    return capture(model, wanted, out, **{"batch_size": 5, "max_new_tokens": 6, "progress": False} | options)


def content(store: Store) -> dict[str, tuple[object, ...]]:
    """Return all that a store holds, byte for byte, whatever the order of its rows."""
    found: dict[str, tuple[object, ...]] = {}
    for id_ in store.ids:
        row = store.row(id_)
        tensors = (row.residual, row.token_ids, row.token_positions, row.token_roles, row.token_marks)
        found[id_] = (dict(row.columns), *(t.contiguous().numpy().tobytes() for t in tensors))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_holds_what_plain_transformers_gives_for_each_example_alone(kind: str, tmp_path: Path) -> None:
    model = loaded(kind)
    wanted = examples(7)
    if kind not in WITH_IMAGE:
        wanted = [Example(example.text, None, example.columns) for example in wanted]
    store = taken(model, wanted, tmp_path / "acts", stop=None)
    assert store.header.layers == tuple(range(LAYERS + 1))
    for example, id_ in zip(wanted, ids_of(wanted, None), strict=True):
        inputs = model.encode([example.text], [example.image.load()] if example.image else None)
        target: Any = model.hf if example.image else model.part(model.family.generator)
        config = model.greedy(7, suppress_tokens=[3], output_hidden_states=True, return_dict_in_generate=True)
        with model.only_asked(config):
            said = target.generate(**inputs, generation_config=config)
        row = store.rows.loc[id_]
        size, k = inputs["input_ids"].shape[1], len(row["answer_token_ids"])
        encoder = bool(model.family.encoder)
        read = said.encoder_hidden_states if encoder else said.hidden_states[0]
        steps = said.decoder_hidden_states if encoder else said.hidden_states
        assert row["error"] is None
        assert row["n_input_tokens"] == size
        new = said.sequences[0, -len(steps) :]
        assert new[:k].tolist() == list(row["answer_token_ids"])
        ends = [torch.stack([states[0, -1] for states in read])]
        # Step k has read the k-th token of the answer.
        ends += [torch.stack([states[0, 0] for states in steps[k]])] if k else []
        theirs = torch.stack(ends, dim=1)
        mine = store.row(id_)
        # Padded against not: float32's rounding. The last of theirs is behind the norm.
        assert torch.allclose(mine.residual[:-1], theirs[:-1], rtol=0, atol=1e-5 * float(theirs.abs().max()))
        assert mine.token_ids.tolist() == [int(inputs["input_ids"][0, -1]), *row["answer_token_ids"][-1:]]
        assert mine.token_positions.tolist() == [size - 1, size - 1 + encoder + k][: len(ends)]
        assert mine.token_roles.tolist() == [ROLES["answer_cue"], ROLES["answer"]][: len(ends)]
        assert mine.token_marks.tolist() == [1, 2][: len(ends)]
        assert dict(row[list(example.columns)]) == dict(example.columns)
        if k:
            assert torch.equal(store.layer(2, "last_output", [id_])[0], mine.residual[2, 1])


def test_a_marker_ends_the_answer_and_moves_the_last_output(tmp_path: Path) -> None:
    model = loaded("llava-llama")
    wanted = examples(6)
    free = taken(model, wanted, tmp_path / "free", stop=None)
    answers = free.rows.loc[ids_of(wanted, None), "answer"].tolist()
    stop = next(letter for text in answers for letter in text[1:] if letter.isascii() and not letter.isspace())
    texts = dict(zip(ids_of(wanted, stop), answers, strict=True))
    store = taken(model, wanted, tmp_path / "marked", stop=stop)
    for id_, text in texts.items():
        row = store.rows.loc[id_]
        assert row["answer"] == text.split(stop)[0].strip()
        assert len(row["answer_logprobs"]) == len(row["answer_token_ids"])
        assert stop not in model.tokenizer.decode(row["answer_token_ids"])
        places = store.row(id_).token_positions.tolist()
        end = row["n_input_tokens"] - 1
        assert places == [end, end + len(row["answer_token_ids"])][: len(places)]


def test_an_empty_answer_has_no_last_output(tmp_path: Path) -> None:
    model = loaded("llava-llama")
    wanted = examples(4)
    first = taken(model, wanted, tmp_path / "free", stop=None).rows.loc[ids_of(wanted, None)[1], "answer"][0]
    store = taken(model, wanted, tmp_path / "acts", stop=first)
    id_ = ids_of(wanted, first)[1]
    row = store.row(id_)
    assert row.columns["answer"] == ""
    assert row.columns["answer_token_ids"] == row.columns["answer_logprobs"] == []
    assert row.columns["error"] is None
    assert row.token_marks.tolist() == [1]
    store.layer(1, "last_input", [id_])
    with pytest.raises(StoreError, match="last_output"):
        store.layer(1, "last_output", [id_])
    only = taken(model, wanted, tmp_path / "only", stop=first, positions=["last_output"])
    assert sorted({tuple(only.row(i).token_marks.tolist()) for i in only.ids})[0] == ()


def test_bad_examples_are_recorded_and_the_run_goes_on(tmp_path: Path) -> None:
    model = loaded("instructblip-llama")
    wanted = [*BAD, *examples(5)]
    store = taken(model, wanted, tmp_path / "acts")
    rows = store.rows.loc[ids_of(wanted)]
    assert rows["error_kind"].tolist()[:5] == ["image", "image", "prompt", "prompt", "prompt"]
    for error, words in zip(rows["error"], ["zero bytes", "cut.png", "<image>", "empty", "tokens"], strict=False):
        assert words in error
    assert rows["error"].isna().tolist() == [False] * 5 + [True] * 5
    for id_ in rows.index[:5]:
        row = store.row(id_)
        assert row.residual.shape == (LAYERS + 1, 0, WIDTH)
        assert row.columns["answer"] is None
    assert store.layer(0, "last_input", rows.index[5:]).shape == (5, WIDTH)
    assert store.info().errors == 5


def test_bad_examples_do_not_change_the_others(tmp_path: Path) -> None:
    model = loaded("llava-llama")
    good = [e for e in examples(6) if e.image]
    # The bad ones are as long as the others, so that they share their batches.
    zero = ImageFile("zero", data=b"")
    bad = [Example("Question: <image>? Answer:", image(9)), Example("Question: is 8? Answer:", zero)]
    alone, among = (taken(model, e, tmp_path / str(len(e)), batch_size=6) for e in (good, [*bad, *good]))
    for id_ in ids_of(good):
        assert torch.equal(alone.row(id_).residual, among.row(id_).residual)


def test_nothing_but_bad_examples(tmp_path: Path) -> None:
    store = taken(loaded("llava-llama"), BAD, tmp_path / "acts")
    assert store.info().errors == 5
    assert store.info().tokens == 0


def test_doubles_are_run_once_and_the_first_counts(tmp_path: Path) -> None:
    one = examples(2)[1]
    assert one.image is not None
    again = Example(one.text, ImageFile("same bytes", data=one.image.read()), {"setting": "again"})
    store = taken(loaded("llava-llama"), [one, again], tmp_path / "acts")
    assert store.rows["setting"].tolist() == ["visual"]


@pytest.mark.parametrize("kind", ["llava-llama", "instructblip-llama"])
def test_a_stopped_run_goes_on_to_the_same_bytes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, wanted = loaded(kind), [*examples(12), *BAD]
    whole = content(taken(model, wanted, tmp_path / "whole"))
    original, calls = batch_module.trace, []

    def stopped(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(batch_module, "trace", stopped)
    with pytest.raises(KeyboardInterrupt):
        taken(model, wanted, tmp_path / "acts")
    monkeypatch.setattr(batch_module, "trace", original)
    half = len(open_store(tmp_path / "acts").ids)
    assert 0 < half < len(whole)
    assert content(taken(model, wanted, tmp_path / "acts")) == whole


def test_rows_that_are_missing_inside_a_batch_come_back_the_same(tmp_path: Path) -> None:
    model, wanted = loaded("instructblip-llama"), examples(12)
    whole = taken(model, wanted, tmp_path / "whole")
    with StoreWriter(tmp_path / "acts", whole.header) as writer:
        writer.append([whole.row(id_) for id_ in whole.ids[::3]])
    assert content(taken(model, wanted, tmp_path / "acts")) == content(whole)


def test_a_finished_run_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, wanted = loaded("llava-llama"), examples(4)
    taken(model, wanted, tmp_path / "acts")
    monkeypatch.setattr(batch_module, "trace", None)
    assert len(taken(model, wanted, tmp_path / "acts").ids) == 4


def test_rows_are_sealed_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "SEAL_SECONDS", 0.0)
    store = taken(loaded("llava-llama"), examples(12), tmp_path / "acts")
    assert store.info().shards == 3


def test_another_model_or_setting_is_refused(tmp_path: Path) -> None:
    wanted = examples(2)
    taken(loaded("llava-llama"), wanted, tmp_path / "acts")
    other = fresh("llava-llama")
    with torch.no_grad():
        next(other.hf.parameters()).view(-1)[0] += 1
    for model, options, words in (
        (other, {}, "weights"),
        (loaded("llava-llama"), {"stop": "."}, "generation.stop"),
        (loaded("llava-llama"), {"dtype": "bfloat16"}, "dtype"),
        (loaded("llava-llama"), {"layers": [0, 1]}, "layers"),
        (loaded("llava-llama"), {"positions": ["last_input"]}, "positions"),
    ):
        with pytest.raises(StoreError, match=words):
            taken(model, wanted, tmp_path / "acts", **options)


def test_chosen_layers_positions_and_dtype(tmp_path: Path) -> None:
    model, wanted = loaded("llava-llama"), examples(3)
    full = taken(model, wanted, tmp_path / "full")
    names = ["last_output", "last_input"]
    some = taken(model, wanted, tmp_path / "some", layers=[3, 0], positions=names, dtype="bfloat16")
    assert some.header.layers == (0, 3)
    for mine, theirs in zip(ids_of(wanted, positions=names), ids_of(wanted), strict=True):
        for layer in (0, 3):
            for name in names:
                expected = full.layer(layer, name, [theirs]).to(torch.bfloat16)
                assert torch.equal(some.layer(layer, name, [mine]), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"layers": [LAYERS + 1]},
        {"layers": [-1]},
        {"layers": []},
        {"layers": "some"},
        {"positions": ["first output"]},
        {"positions": []},
        {"positions": ["last_input", "last_input"]},
        {"dtype": "int8"},
        {"batch_size": 0},
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"temperature": -1.0},
        {"stop": ["", "x"]},
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        taken(loaded("llava-llama"), examples(1), tmp_path / "acts", **options)
    assert not (tmp_path / "acts").exists()


def test_a_model_that_fails_its_check_writes_nothing(tmp_path: Path) -> None:
    model = fresh("instructblip-llama")
    processor: Any = model.processor
    processor.qformer_tokenizer.padding_side = "left"
    with pytest.raises(ModelError, match="not this model's residual stream"):
        taken(model, examples(2), tmp_path / "acts")
    assert not (tmp_path / "acts").exists()


def test_a_full_disk_is_seen_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, wanted = loaded("llava-llama"), examples(4)
    monkeypatch.setattr(batch_module, "trace", None)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(9000, 0, 9000))
    with pytest.raises(OutputError, match=r"4 rows x 4 layers x 2\.0 tokens x 32 wide in float32 .*free some space"):
        taken(model, wanted, tmp_path / "acts")


def test_all_tokens_are_kept_once_and_marked_by_what_chose_them(tmp_path: Path) -> None:
    model = loaded("llava-llama")
    wanted = examples(5)
    names = {"everything": "all", "end": "last_input", "picture": "image", "fourth": lambda _table: [3]}
    store = taken(model, wanted, tmp_path / "all", positions=names, stop=None)
    ends = taken(model, wanted, tmp_path / "ends", stop=None)
    for id_, same, example in zip(ids_of(wanted, None, names), ids_of(wanted, None), wanted, strict=True):
        row, end = store.row(id_), ends.row(same)
        size, spoken = row.columns["n_input_tokens"], row.columns["answer_token_ids"]
        assert isinstance(size, int)
        assert isinstance(spoken, list)
        assert row.token_positions.tolist() == list(range(size + len(spoken)))
        inputs = model.encode([example.text], [example.image.load()] if example.image else None)
        assert row.token_ids.tolist() == inputs["input_ids"][0].tolist() + spoken
        picture = row.token_roles == ROLES["image"]
        assert int(picture.sum()) == (16 if example.image else 0)
        assert torch.equal(row.token_marks & 4 > 0, picture)
        assert (row.token_marks & 1).all()
        assert (row.token_marks & 2).nonzero()[:, 0].tolist() == [size - 1]
        assert (row.token_marks & 8).nonzero()[:, 0].tolist() == [3]
        assert torch.equal(row.residual[:, [size - 1, -1]], end.residual)
        boxes = row.columns["image_boxes"]
        assert (boxes is None) if example.image is None else (isinstance(boxes, list) and len(boxes) == 64)


def test_roles_and_slices_choose_tokens(tmp_path: Path) -> None:
    model = loaded("llava-llama")
    text = "Question: Is the CAT a cat? Answer:"
    wanted = [Example(text, image(1), spans={"entity": mentions(text, "cat")}), Example("Is it? Answer:", image(2))]
    names = ["entity", "entity[-1]", "prompt[-3:]", "answer[0]", "answer[:2]", "reference"]
    store = taken(model, wanted, tmp_path / "acts", positions=names, stop=None)
    assert store.header.positions == tuple(names)
    first, second = (store.row(id_) for id_ in ids_of(wanted, None, names))
    words = model.tokenizer.convert_ids_to_tokens(first.token_ids.tolist())
    chosen = {
        name: [w for w, m in zip(words, first.token_marks.tolist(), strict=True) if m >> i & 1]
        for i, name in enumerate(names)
    }
    assert "".join(chosen["entity"]).replace("Ġ", "") == "CATcat"
    assert chosen["entity[-1]"] == chosen["entity"][-1:]
    assert len(chosen["prompt[-3:]"]) == 3
    spoken = first.columns["answer_token_ids"]
    assert isinstance(spoken, list)
    assert chosen["answer[0]"] == model.tokenizer.convert_ids_to_tokens(spoken[:1])
    assert chosen["answer[:2]"] == model.tokenizer.convert_ids_to_tokens(spoken[:2])
    assert not chosen["reference"]
    assert not (second.token_marks & 3).any()


def test_the_decoder_of_an_encoder_decoder_has_a_start(tmp_path: Path) -> None:
    model = loaded("blip2_t5-t5")
    names = ["start", "all", "query"]
    wanted = examples(3)
    store = taken(model, wanted, tmp_path / "acts", positions=names, stop=None)
    for id_, example in zip(ids_of(wanted, None, names), wanted, strict=True):
        row = store.row(id_)
        size, spoken = row.columns["n_input_tokens"], row.columns["answer_token_ids"]
        assert isinstance(size, int)
        assert isinstance(spoken, list)
        assert row.token_positions.tolist() == list(range(size + 1 + len(spoken)))
        assert row.token_roles[size:].tolist() == [ROLES["start"], *[ROLES["answer"]] * len(spoken)]
        assert (row.token_marks & 1).nonzero()[:, 0].tolist() == [size]
        assert (row.token_roles == ROLES["query"]).sum() == (4 if example.image else 0)
        # The logits of the first token of the answer follow from the start token's last layer.
        found = reference(row.residual[-1, size][None], model.unembedding(), torch.tensor(spoken[:1]))
        logprobs = row.columns["answer_logprobs"]
        assert isinstance(logprobs, list)
        assert float(found.log_prob[0]) == pytest.approx(logprobs[0], abs=1e-4)


def test_prompts_alone(tmp_path: Path) -> None:
    wanted = examples(3)
    store = taken(loaded("llava-llama"), wanted, tmp_path / "acts", positions=["last_input"], max_new_tokens=0)
    assert store.rows["answer"].tolist() == [""] * 3
    ends = taken(loaded("llava-llama"), wanted, tmp_path / "ends", positions=["last_input"])
    assert sorted(store.layer(2, "last_input").sum(1).tolist()) == sorted(ends.layer(2, "last_input").sum(1).tolist())


@pytest.mark.parametrize("kind", ["llava-llama", "gpt2-gpt2"])
def test_residuals_of_prompts_alone_are_never_copied(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wanted = loaded(kind), examples(12)
    if kind not in WITH_IMAGE:
        wanted = [Example(example.text) for example in wanted]
    asked: dict[str, Any] = {"positions": ["prompt"], "max_new_tokens": 0}
    copied: list[int] = []
    real = arena_module._as_bytes
    monkeypatch.setattr(
        arena_module, "_as_bytes", lambda residual: (copied.append(residual.shape[1]), real(residual))[1]
    )
    with monkeypatch.context() as patch:
        patch.setattr(batch_module.Batches, "_space", lambda *_: None)
        through_memory_of_its_own = content(taken(model, wanted, tmp_path / "copied", **asked))
    assert len(copied) == 12
    copied.clear()
    store = taken(model, wanted, tmp_path / "placed", **asked)
    assert not copied
    assert content(store) == through_memory_of_its_own
    # Rows that are stored already leave holes in a batch: here what is left has to move.
    half = tmp_path / "half"
    with StoreWriter(half, store.header) as writer:
        writer.append([store.row(id_) for id_ in store.ids[::2]])
    copied.clear()
    again = taken(model, wanted, half, **asked)
    assert copied
    assert content(again) == content(store)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_prepared_beside_the_model_are_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wanted = loaded(kind), [*examples(24), *BAD]
    if kind not in WITH_IMAGE:
        wanted = [Example(example.text) for example in wanted]
    asked: dict[str, Any] = {"positions": ["all"], "batch_size": 3, "max_new_tokens": 3}
    threads = set[str]()
    real = Preparation.__call__
    monkeypatch.setattr(
        Preparation, "__call__", lambda self, some: (threads.add(threading.current_thread().name), real(self, some))[1]
    )
    alone = content(taken(model, wanted, tmp_path / "alone", **asked))
    assert threads == {threading.current_thread().name}
    # Only on a GPU does the processor have time of its own; that it may have it is the same everywhere.
    monkeypatch.setattr(run_module, "_beside", lambda _: True)
    assert content(taken(model, wanted, tmp_path / "beside", **asked)) == alone
    assert any(name.startswith("gapprobe-ahead") for name in threads)


def test_nothing_is_prepared_in_the_memory_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It is full while the model runs, and what fails there would be taken for a picture that cannot be used.
    model, devices, real = loaded("llava-llama"), list[object](), Model.encode

    def encode(self: Model, *args: Any, **options: Any) -> Any:
        devices.append(options.get("device"))
        return real(self, *args, **options)

    monkeypatch.setattr(Model, "encode", encode)
    monkeypatch.setattr(run_module, "check_model", lambda _: SimpleNamespace(require=lambda: None))
    small = TooMany(2, MemoryError())
    monkeypatch.setattr(batch_module, "trace", small)
    with pytest.warns(UserWarning, match="does not hold"):
        taken(model, examples(12), tmp_path / "acts")
    assert set(devices) == {"cpu"}


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_a_batch_whose_place_the_memory_does_not_hold_is_halved(error: Exception) -> None:
    model, wanted = loaded("llava-llama"), [e for e in examples(6) if e.image]
    run = batch_module.Batches(
        model, (0, 1), parse_positions(["prompt"]), Decoding(0, ()), "float32", "residual", WIDTH
    )

    def place(_: int) -> torch.Tensor:
        raise error

    ids = ids_of(wanted)
    with pytest.warns(UserWarning, match="does not hold 4 rows at once; from here 2 are run"):
        found = run.rows(wanted, ids, None, place)
    assert all(row.columns["error"] is None for row in found)
    whole = run.rows(wanted, ids)
    assert all(map(torch.equal, (a.residual for a in found), (b.residual for b in whole)))


def test_a_preparation_apart_shares_the_model_and_no_processor() -> None:
    model = loaded("llava-llama")
    apart = Preparation(model, parse_positions(["prompt"]), 0, "residual").apart().model
    assert apart.hf is model.hf
    assert apart.tokenizer is not model.tokenizer
    assert apart.processor_fingerprint == model.processor_fingerprint


def test_an_error_beside_the_model_ends_the_run_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wanted = loaded("llava-llama"), examples(12)
    whole = content(taken(model, wanted, tmp_path / "whole"))
    monkeypatch.setattr(run_module, "_beside", lambda _: True)
    real, calls = Preparation.__call__, list[int]()

    def failing(self: Preparation, some: Any) -> Any:
        calls.append(1)
        # One sizes up the run, and so one of a batch comes third.
        if len(calls) == 4:
            raise ConfigError("a user's own function")
        return real(self, some)

    monkeypatch.setattr(Preparation, "__call__", failing)
    with pytest.raises(ConfigError, match="own function"):
        taken(model, wanted, tmp_path / "acts")
    half = open_store(tmp_path / "acts")
    assert 0 < len(half) < len(whole)
    monkeypatch.setattr(Preparation, "__call__", real)
    assert content(taken(model, wanted, tmp_path / "acts")) == whole


def test_drawn_answers_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    model, wanted = loaded("llava-llama"), examples(6)
    one, many, other = (
        taken(
            model,
            wanted,
            tmp_path / f"{size}-{seed}",
            batch_size=size,
            temperature=20.0,
            seed=seed,
            positions=["last_input"],
        )
        for size, seed in ((1, 0), (6, 0), (6, 1))
    )
    drawn = Decoding(6, ("###",), temperature=20.0)
    ids = row_ids(wanted, parse_positions(["last_input"]), drawn)
    assert one.rows.loc[ids, "answer"].tolist() == many.rows.loc[ids, "answer"].tolist()
    assert sorted(other.rows["answer"]) != sorted(many.rows["answer"])


class TooMany:
    """A trace in a memory that holds so many rows."""

    def __init__(self, most: int, error: Exception) -> None:
        self.most, self.error, self.sizes = most, error, list[int]()
        self.original = batch_module.trace

    def __call__(self, model: Model, inputs: dict[str, torch.Tensor], *args: Any, **options: Any) -> Any:
        self.sizes.append(len(inputs["input_ids"]))
        if self.sizes[-1] > self.most:
            raise self.error
        return self.original(model, inputs, *args, **options)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] can't allocate memory: you tried"),
    ],
)
def test_a_batch_too_large_for_the_memory_is_halved(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wanted = loaded("llava-llama"), [e for e in examples(14) if e.image]
    whole = taken(model, wanted, tmp_path / "whole", batch_size=7)
    small = TooMany(2, error)
    monkeypatch.setattr(batch_module, "trace", small)
    with pytest.warns(UserWarning, match="does not hold 7 rows at once; from here 4 are run"):
        store = taken(model, wanted, tmp_path / "acts", batch_size=7)
    # Once it is known what fits, no more is tried.
    assert small.sizes == [7, 4, 2, 2, 2, 1, 2]
    assert store.rows["error"].isna().all()
    for id_ in whole.ids:
        assert torch.allclose(store.row(id_).residual, whole.row(id_).residual, rtol=0, atol=1e-4)


def test_parts_of_a_halved_batch_do_not_take_each_others_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is said, so that rows are views of the memory that the trace filled.
    model, wanted = loaded("llava-llama"), [e for e in examples(9) if e.image]
    options: dict[str, Any] = {"positions": ["prompt"], "max_new_tokens": 0, "batch_size": 6}
    whole = taken(model, wanted, tmp_path / "whole", **options)
    monkeypatch.setattr(batch_module, "trace", TooMany(2, MemoryError()))
    with pytest.warns(UserWarning, match="does not hold"):
        store = taken(model, wanted, tmp_path / "acts", **options)
    for id_ in whole.ids:
        assert torch.allclose(store.row(id_).residual, whole.row(id_).residual, rtol=0, atol=1e-4)


def test_an_example_too_large_for_the_memory_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "trace", TooMany(0, MemoryError()))
    with pytest.warns(UserWarning, match="does not hold"):
        store = taken(loaded("llava-llama"), examples(3), tmp_path / "acts")
    assert store.rows["error_kind"].tolist() == ["memory"] * 3


def test_other_errors_of_the_model_are_not_taken_for_a_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_module, "trace", TooMany(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        taken(loaded("llava-llama"), examples(3), tmp_path / "acts")


def test_a_picture_that_the_processor_cannot_use_is_recorded(tmp_path: Path) -> None:
    # Qwen's refuses pictures 200 times as wide as high.
    model = loaded("qwen2_vl-qwen2_vl_text")
    wanted = [Example("What is this? Answer:", image(3, 900, 2)), *[e for e in examples(4) if e.image]]
    store = taken(model, wanted, tmp_path / "acts")
    rows = store.rows.loc[ids_of(wanted)]
    assert rows["error_kind"].fillna("").tolist() == ["processor", "", ""]
    assert "ratio" in rows["error"].iloc[0]


def test_roles_that_are_none_are_refused(tmp_path: Path) -> None:
    for spans, words in (({"animal": [(0, 1)]}, "role 'animal'"), ({"entity": [(0, 99)]}, "outside their text of 4")):
        with pytest.raises(ConfigError, match=words):
            taken(loaded("llava-llama"), [Example("what", None, spans=spans)], tmp_path / "acts")


def test_a_site_of_the_blocks_is_kept_as_the_stream_is(tmp_path: Path) -> None:
    model, wanted = loaded("llava-llama"), examples(4)
    stream, mlp, attention = (
        taken(model, wanted, tmp_path / site, site=site) for site in ("residual", "mlp", "attention")
    )
    assert mlp.header.layers == (1, 2, 3)
    for id_ in stream.ids:
        whole, added = stream.row(id_).residual, mlp.row(id_).residual + attention.row(id_).residual
        assert torch.allclose(whole[:-1] + added, whole[1:], rtol=0, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("site", ["vision", "bridge", "queries"])
def test_a_site_of_the_tower_keeps_the_pictures_own_tokens(site: str, tmp_path: Path) -> None:
    model, wanted = loaded("instructblip-llama"), examples(4)
    store = taken(model, wanted, tmp_path / "acts", site=site)
    tokens, width = {"vision": (17, 24), "bridge": (4, WIDTH), "queries": (4, 24)}[site]
    assert store.header.width == width
    assert store.header.model["site"] == site
    for example, id_ in zip(wanted, row_ids(wanted, parse_positions(["all"]), Decoding(6)), strict=True):
        row = store.row(id_)
        if example.image is None:
            assert "without one the site" in str(row.columns["error"])
            continue
        inputs = model.encode([example.text], [example.image.load()])
        found = trace(model, inputs, torch.empty(0, dtype=torch.int64), store.header.layers, site=site)
        assert torch.equal(row.residual, found.prompt)
        assert row.token_positions.tolist() == list(range(tokens))
        assert row.columns["answer"]


def test_a_store_holds_one_site(tmp_path: Path) -> None:
    model, wanted = loaded("llava-llama"), examples(2)
    taken(model, wanted, tmp_path / "acts", site="mlp", layers=[1])
    with pytest.raises(StoreError, match=r"model\.site is 'mlp' in the store and 'attention' in this run"):
        taken(model, wanted, tmp_path / "acts", site="attention", layers=[1])
    with pytest.raises(ConfigError, match="no tokens of a prompt to choose from"):
        taken(model, wanted, tmp_path / "other", site="bridge", positions=["image"])
    with pytest.raises(ConfigError, match=r"layers \[0\] must be 'all' or numbers from 1 to 3"):
        taken(model, wanted, tmp_path / "other", site="mlp", layers=[0])


def test_what_a_run_will_take_is_said_before_it_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, wanted = loaded("llava-llama"), examples(8)
    names = ["all"]
    store = taken(model, wanted, tmp_path / "acts", positions=names, progress=True, dtype="bfloat16")
    told = capsys.readouterr().err
    assert "capture llava: 8 rows x 4 layers x " in told
    assert "8/8" in told
    said = float(told.split(" tokens x")[0].rsplit(" x ", 1)[1])
    # The answers may be shorter than they can be.
    held = store.info().tokens / 8
    assert held <= said <= held + 6
    taken(model, wanted, tmp_path / "acts", positions=names, progress=True, dtype="bfloat16")
    assert "rows x" not in capsys.readouterr().err


def test_sounds(tmp_path: Path) -> None:
    model = loaded("qwen2_audio-qwen2")
    random = np.random.default_rng(0)
    sounds = [SoundFile(f"{i}.wav", data=wav(random.normal(0, 0.2, 4000 + 3000 * i))) for i in range(3)]
    sounds += [SoundFile("long.wav", data=wav(np.zeros(17000))), SoundFile("bad.wav", data=b"RIFF")]
    wanted = [Example(f"What is sound {i}? Answer:", sound=sound) for i, sound in enumerate(sounds)]
    store = taken(model, wanted, tmp_path / "acts", positions=["audio", "last_input"], stop=None)
    rows = store.rows.loc[ids_of(wanted, None, ["audio", "last_input"])]
    assert rows["error_kind"].fillna("").tolist() == ["", "", "", "sound", "sound"]
    for i, id_ in enumerate(rows.index[:3]):
        row = store.row(id_)
        inputs = model.encode([wanted[i].text], [sounds[i].load()])
        heard = (inputs["input_ids"][0] == model.media_token_id).nonzero()[:, 0]
        assert (row.token_roles == ROLES["audio"]).sum() == len(heard) > 4
        theirs = trace(model, inputs, heard, store.header.layers).prompt
        assert torch.allclose(row.residual[:, :-1], theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
        spans = row.columns["audio_spans"]
        assert isinstance(spans, list)
        assert len(spans) == 2 * len(heard)
        assert spans[0] == 0.0
        assert spans[-1] == 1.0


def wav(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    wavfile.write(buffer, 16000, samples.astype(np.float32))
    return buffer.getvalue()


def test_a_template_that_leaves_the_picture_out_is_told_by_every_row() -> None:
    model = fresh("llava-llama")
    model.processor.chat_template = "USER: {{ messages[0].content[-1].text }} ASSISTANT:"
    wanted = examples(3)
    run = batch_module.Batches(model, (0,), parse_positions(["last_input"]), Decoding(2), "float32", "residual", WIDTH)
    rows = run.rows(wanted, ids_of(wanted))
    assert [row.columns["error_kind"] for row in rows] == [None, "processor", "processor"]
    assert "Found total 0 <image> tokens" in str(rows[1].columns["error"])


@pytest.mark.parametrize(
    ("positions", "site"),
    [(["all"], "residual"), (["answer[0]", "answer[-1]"], "residual"), (["answer[:3]", "image"], "residual")]
    + [(None, "vision"), (None, "queries")],
)
def test_as_many_tokens_are_kept_as_were_said(
    positions: list[str] | None, site: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Answers run to their full length here: no stop text, and no end token among the first six.
    model, wanted = loaded("instructblip-llama"), [e for e in examples(7) if e.image]
    store = taken(model, wanted, tmp_path / "acts", positions=positions, site=site, stop=None, progress=True)
    assert {len(ids) for ids in store.rows["answer_token_ids"]} == {6}
    said = float(capsys.readouterr().err.split(" tokens x")[0].rsplit(" x ", 1)[1])
    assert said == pytest.approx(store.info().tokens / len(wanted), abs=0.05)


def test_a_tower_reads_one_example_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = TooMany(1, RuntimeError("more than one"))
    monkeypatch.setattr(batch_module, "trace", seen)
    store = taken(loaded("llava-llama"), [e for e in examples(7) if e.image], tmp_path / "acts", site="bridge")
    assert set(seen.sizes) == {1}
    assert store.rows["error"].isna().all()
