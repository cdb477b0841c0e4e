from pathlib import Path

import pandas as pd
import pytest

from gapprobe.errors import DataError
from gapprobe.tasks.tables import load_examples
from tests.models.tiny import image

ROWS = pd.DataFrame(
    {
        "text": ["What is a Cat? A cat", "And this?", "é, “quoted”, 1"],
        "image": ["a.png", "", ""],
        "entity": ["cat", "", ""],
        "number": ["01", "2", ""],
    }
)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_table_gives_the_same_examples(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    write = {
        "csv": lambda: ROWS.to_csv(path, index=False),
        "tsv": lambda: ROWS.to_csv(path, index=False, sep="\t"),
        "jsonl": lambda: ROWS.to_json(path, orient="records", lines=True),
        "parquet": lambda: ROWS.to_parquet(path),
    }
    write[suffix]()
    (tmp_path / "a.png").write_bytes(image(0).read())
    first, second, third = load_examples(path)
    assert [first.text, second.text, third.text] == ROWS["text"].tolist()
    assert first.image is not None
    assert first.image.load().size == (40, 30)
    assert first.spans == {"entity": ((10, 13), (17, 20))}
    assert (second.image, second.spans) == (None, {})
    assert first.columns == {"image": "a.png", "entity": "cat", "number": "01"}
    assert third.columns["number"] == ""


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", "a,b\n1,2\n", "has no column 'text'; it has a, b"),
        ("x.csv", "", "cannot be read"),
        ("x.txt", "text\n", "not .txt"),
        ("x.parquet", "nothing", "cannot be read"),
        ("x.jsonl", "{", "cannot be read"),
        ("x.csv", "text,image,sound\na,b.png,c.wav\n", "an image .b.png. and a sound .c.wav."),
    ],
)
def test_tables_that_are_none(name: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        load_examples(tmp_path / name)


def test_a_missing_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_examples(tmp_path / "none.csv")
