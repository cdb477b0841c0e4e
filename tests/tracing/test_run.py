import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

import gapprobe.tracing.run as run_module
from gapprobe.errors import ConfigError, ModelError, OutputError, StoreError
from gapprobe.models.model import Model
from gapprobe.store.format import ROLES
from gapprobe.store.reader import Store, open_store
from gapprobe.store.writer import StoreWriter
from gapprobe.tasks.examples import Example
from gapprobe.tasks.images import ImageFile
from gapprobe.tracing.plan import row_id
from gapprobe.tracing.run import POSITIONS, capture, generation_settings
from tests.models.tiny import KINDS, LAYERS, WIDTH, fresh, image, loaded

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


def ids_of(wanted: list[Example], stop: str | None = "###") -> list[str]:
    return [row_id(e, tuple(POSITIONS), generation_settings(6, stop)) for e in wanted]


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


def hooked(model: Model, target: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return what the first block reads and what each block returns, by torch's own hooks."""
    seen: list[torch.Tensor] = []
    blocks: Any = model.part(model.family.blocks)
    hooks = [blocks[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))]
    hooks += [block.register_forward_hook(lambda _module, _args, out: seen.append(out)) for block in blocks]
    with torch.no_grad():
        target(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_holds_what_plain_transformers_gives_for_each_example_alone(kind: str, tmp_path: Path) -> None:
    model = loaded(kind)
    wanted = examples(7)
    store = taken(model, wanted, tmp_path / "acts", stop=None)
    assert store.header.layers == tuple(range(LAYERS + 1))
    for example, id_ in zip(wanted, ids_of(wanted, None), strict=True):
        prompt = model.render(example.text, with_image=example.image is not None)
        if example.image is None:
            target: Any = model.part(model.family.generator)
            inputs = dict(model.tokenizer(prompt, return_tensors="pt"))
        else:
            target = model.hf
            call: Any = model.processor
            inputs = dict(call(images=example.image.load(), text=prompt, return_tensors="pt"))
        ids = inputs["input_ids"]
        greedy = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [3]}
        said = target.generate(**inputs, **greedy, output_logits=True, return_dict_in_generate=True)
        row = store.rows.loc[id_]
        answer = torch.tensor(row["answer_token_ids"])
        k = len(answer)
        assert k > 0
        assert torch.equal(said.sequences[0, ids.shape[1] :][:k], answer)
        scores = torch.stack(said.logits)[:k, 0].log_softmax(-1).gather(1, answer[:, None])[:, 0]
        # Cached steps against one pass, and padded against not: float32's rounding, in log-probabilities near -4.
        assert torch.allclose(torch.tensor(row["answer_logprobs"], dtype=torch.float32), scores, rtol=0, atol=1e-5)
        assert row["n_input_tokens"] == ids.shape[1]
        t = ids.shape[1] + k
        whole = inputs | {"input_ids": said.sequences[:, :t], "attention_mask": torch.ones(1, t)}
        places = [ids.shape[1] - 1, t - 1]
        theirs = torch.stack([hidden[0, places] for hidden in hooked(model, target, whole)])
        mine = store.row(id_)
        assert torch.allclose(mine.residual, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
        assert mine.token_ids.tolist() == [int(ids[0, -1]), int(answer[-1])]
        assert mine.token_positions.tolist() == places
        assert mine.token_roles.tolist() == [ROLES["answer_cue"], ROLES["answer"]]
        assert mine.token_marks.tolist() == [1, 2]
        assert dict(row[list(example.columns)]) == dict(example.columns)
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
    original, calls = run_module.trace, []

    def stopped(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(run_module, "trace", stopped)
    with pytest.raises(KeyboardInterrupt):
        taken(model, wanted, tmp_path / "acts")
    monkeypatch.setattr(run_module, "trace", original)
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
    monkeypatch.setattr(run_module, "generate", None)
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
    for mine, theirs in zip((row_id(e, names, generation_settings(6)) for e in wanted), ids_of(wanted), strict=True):
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
        {"positions": ["first_output"]},
        {"positions": []},
        {"positions": ["last_input", "last_input"]},
        {"dtype": "int8"},
        {"batch_size": 0},
        {"max_new_tokens": 0},
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
    monkeypatch.setattr(run_module, "generate", None)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(9000, 0, 9000))
    with pytest.raises(OutputError, match="4 rows x 4 layers x 2 positions x 32 wide in float32 .*free some space"):
        taken(model, wanted, tmp_path / "acts")
