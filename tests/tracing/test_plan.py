import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from gapprobe.errors import OutputError
from gapprobe.tasks.examples import Example
from gapprobe.tasks.images import ImageFile, TrivialImage
from gapprobe.tracing.answers import Decoding
from gapprobe.tracing.plan import Need, batches, row_ids
from gapprobe.tracing.positions import Positions, parse_positions
from tests.models.tiny import image

LAST = parse_positions(["last_input"])


def identity(example: Example, positions: Positions = ("last_input", "last_output"), **settings: Any) -> str:
    return row_ids([example], parse_positions(positions), Decoding(**settings))[0]


def test_an_id_is_the_text_the_bytes_of_the_image_and_the_settings() -> None:
    base = Example("a", image(0), {"setting": "visual"})
    same = Example("a", ImageFile("another name", data=image(0).data), {"setting": "x"})
    assert identity(base) == identity(same)
    assert len(identity(base)) == 64
    others = [
        identity(Example("b", image(0))),
        identity(Example("a", image(1))),
        identity(Example("a")),
        identity(base, ("last_input",)),
        identity(base, max_new_tokens=11),
        identity(base, stop=()),
        identity(base, temperature=1.0),
        identity(base, temperature=1.0, seed=1),
        identity(base, {"last_input": "prompt[-2]", "last_output": "last_output"}),
    ]
    assert len({identity(base), *others}) == 10


def test_what_stretches_of_the_text_are_counts_where_a_position_asks() -> None:
    plain, marked = Example("a b"), Example("a b", spans={"entity": [(0, 1)]})
    assert identity(plain) == identity(marked)
    assert identity(plain, ["entity"]) != identity(marked, ["entity"])
    assert identity(plain, {"x": len}) != identity(marked, {"x": len})


def test_mending_an_image_makes_another_row(tmp_path: Path) -> None:
    missing = Example("a", ImageFile("x.png", tmp_path / "x.png"))
    empty = Example("a", ImageFile("x.png", data=b""))
    before = identity(missing)
    assert before == identity(empty) != identity(Example("a", ImageFile("y.png", data=b"")))
    (tmp_path / "x.png").write_bytes(image(0).read())
    assert identity(missing) == identity(Example("a", image(0))) != before


def test_an_image_is_read_once() -> None:
    reads: list[str] = []

    class Counted(TrivialImage):
        def read(self) -> bytes:
            reads.append(self.name)
            return super().read()

    examples = [Example(text, Counted("noise", 8, 8)) for text in "abc"]
    assert row_ids(examples, LAST, Decoding()) == [row_ids([e], LAST, Decoding())[0] for e in examples]
    assert len(reads) == 1 + 3


def test_batches_hold_each_id_once_and_images_or_none() -> None:
    texts = ["long enough", "short", "mid", "a", "mid"]
    examples = [Example(text, image(0) if i % 2 else None) for i, text in enumerate(texts)]
    examples += [Example("short", image(0), {"again": "yes"}), Example("zz", image(1))]
    ids = row_ids(examples, LAST, Decoding())
    plan = batches(examples, ids, 2)
    assert plan == [[3, 6], [1], [2, 0]]
    assert ids[4] == ids[2]
    assert ids[5] == ids[1]
    assert batches([], [], 2) == []


def disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(free, 0, free))


def test_disk_and_memory_are_asked_before_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    need = Need(rows=1000, layers=33, tokens=2.0, longest=2, width=4096, dtype="float32", batch_size=32)
    assert need.bytes == 1000 * (33 * 2 * 4096 * 4 + 2048)
    disk(monkeypatch, need.bytes)
    need.require(tmp_path / "not" / "yet", memory=10**12)
    disk(monkeypatch, need.bytes - 1)
    with pytest.raises(OutputError, match=r"1,000 rows x 33 layers x 2\.0 tokens x 4096 .*1\.1 GB.*dtype='bfloat16'"):
        need.require(tmp_path, memory=10**12)
    disk(monkeypatch, 200_000_000)
    with pytest.raises(OutputError, match="at most 12 layers") as caught:
        need.require(tmp_path, memory=10**12)
    assert "200.0 MB are free" in str(caught.value)
    Need(1000, 12, 2.0, 2, 4096, "bfloat16", 32).require(tmp_path, memory=10**12)
    disk(monkeypatch, 10_000_000)
    with pytest.raises(OutputError, match="fits for 542 rows only"):
        need.require(tmp_path, memory=10**12)
    Need(542, 1, 2.0, 2, 4096, "bfloat16", 32).require(tmp_path, memory=10**12)


def test_a_batch_that_the_memory_cannot_hold_is_refused_with_one_that_it_can(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disk(monkeypatch, 10**15)
    need = Need(rows=1000, layers=33, tokens=600.0, longest=700, width=4096, dtype="float32", batch_size=32)
    assert need.batch_bytes == 2 * 32 * 33 * 700 * 4096 * 4
    need.require(tmp_path, need.batch_bytes)
    with pytest.raises(OutputError, match=r"32 rows at once x 33 layers x 700 tokens .*24\.2 GB.*Use batch_size=10"):
        need.require(tmp_path, need.batch_bytes // 3)
    with pytest.raises(OutputError, match="Keep fewer layers"):
        need.require(tmp_path, need.batch_bytes // 40)
