import errno
import os
from pathlib import Path

import pytest

from gapprobe.errors import OutputError
from gapprobe.files import write_bytes, write_json


def test_a_file_is_written_whole_with_the_folders_it_needs(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b.json", {"é": [1, None]})
    assert (tmp_path / "a" / "b.json").read_text(encoding="utf-8") == '{\n "é": [\n  1,\n  null\n ]\n}\n'
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "kept.json"
    write_bytes(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match=r"kept.json cannot be written: the disk is full\. .* run the same again"):
        write_bytes(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["kept.json"]


def test_what_json_does_not_know_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"value": float("nan")})
    assert not list(tmp_path.iterdir())
