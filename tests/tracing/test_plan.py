import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from gapprobe.errors import OutputError
from gapprobe.tasks.examples import Example
from gapprobe.tasks.images import ImageFile, TrivialImage
from gapprobe.tracing.plan import DiskNeed, batches, row_id, row_ids
from gapprobe.tracing.run import POSITIONS, generation_settings
from tests.models.tiny import image

SETTINGS = generation_settings()


def identity(example: Example, positions: tuple[str, ...] = tuple(POSITIONS), **settings: object) -> str:
    return row_id(example, positions, SETTINGS | settings)


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
        identity(base, stop=""),
    ]
    assert len({identity(base), *others}) == 7


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
    assert row_ids(examples, ["last_input"], SETTINGS) == [row_id(e, ["last_input"], SETTINGS) for e in examples]
    assert len(reads) == 1 + 3


def test_batches_hold_each_id_once_and_images_or_none() -> None:
    texts = ["long enough", "short", "mid", "a", "mid"]
    examples = [Example(text, image(0) if i % 2 else None) for i, text in enumerate(texts)]
    examples += [Example("short", image(0), {"again": "yes"}), Example("zz", image(1))]
    ids = row_ids(examples, ["last_input"], SETTINGS)
    plan = batches(examples, ids, 2)
    assert plan == [[3, 6], [1], [2, 0]]
    assert ids[4] == ids[2]
    assert ids[5] == ids[1]
    assert batches([], [], 2) == []


def disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(free, 0, free))


def test_the_disk_is_asked_before_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    need = DiskNeed(rows=1000, layers=33, positions=2, width=4096, dtype="float32")
    assert need.bytes == 1000 * (33 * 2 * 4096 * 4 + 2048)
    disk(monkeypatch, need.bytes)
    need.require(tmp_path / "not" / "yet")
    disk(monkeypatch, need.bytes - 1)
    with pytest.raises(OutputError, match=r"1,000 rows x 33 layers x 2 positions x 4096 .*1\.1 GB.*dtype='bfloat16'"):
        need.require(tmp_path)
    disk(monkeypatch, 200_000_000)
    with pytest.raises(OutputError, match="at most 12 layers") as caught:
        need.require(tmp_path)
    assert "200.0 MB are free" in str(caught.value)
    DiskNeed(1000, 12, 2, 4096, "bfloat16").require(tmp_path)
    disk(monkeypatch, 10_000_000)
    with pytest.raises(OutputError, match="fits for 542 rows only"):
        need.require(tmp_path)
    DiskNeed(542, 1, 2, 4096, "bfloat16").require(tmp_path)
