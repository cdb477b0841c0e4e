"""Pictures with their class from the forms that data sets are published in. A picture is read when it is asked for.

No archive is unpacked and nothing is unpickled: CIFAR's own files are pickles, and so are taken as parquet.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL.Image

from gapprobe.errors import ConfigError, DataError
from gapprobe.tasks.datasets.classes import CIFAR100, DIGITS
from gapprobe.tasks.images import SUFFIXES

KINDS = ("mnist", "cifar100", "food101", "folder")
GROUPS = 16  # row groups of parquet files that are held: pictures of one class lie together in most
IMAGES, LABELS = 2051, 2049  # the first number of an IDX file, which says what it holds (LeCun's MNIST page)
LARGEST_IDX = 1 << 30  # bytes; MNIST's training images are 47 MB
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
PICTURE, LABEL = ("image", "img"), ("label", "fine_label")


@dataclass(frozen=True)
class Picture:
    """One picture: its class in words, a name that is unique in its class, and how to get the bytes of its file."""

    entity: str
    name: str
    read: Callable[[], bytes]


def from_idx(folder: Path, split: str) -> list[Picture]:
    """Return MNIST's pictures from its own IDX files, plain or gzipped, as PNG. `split` is "train" or "test".

    Raises:
        ConfigError: a file is missing, or is not what it says.
    """
    stem = {"train": "train", "test": "t10k"}.get(split)
    if stem is None:
        raise ConfigError(f"MNIST has the splits train and test, not {split!r}")
    pixels = _read_idx(folder, f"{stem}-images-idx3-ubyte", IMAGES, 3)
    labels = _read_idx(folder, f"{stem}-labels-idx1-ubyte", LABELS, 1)
    if len(pixels) != len(labels) or (len(labels) and labels.max() > 9):
        raise ConfigError(
            f"{folder}: {len(pixels)} pictures and {len(labels)} labels from 0 to 9 do not belong together"
        )
    return [
        Picture(DIGITS[label], f"{split}-{i:05d}.png", lambda i=i: _png(pixels[i])) for i, label in enumerate(labels)
    ]


def from_parquet(path: Path, names: Sequence[str] = ()) -> list[Picture]:
    """Return pictures of a parquet file, or of all in a folder, with a column of pictures and one of labels.

    The pictures are `image` or `img`, `struct<bytes, path>` as Hugging Face `datasets` writes it; the labels `label` or
    `fine_label`, numbers or words. What the numbers mean the file says (its Hugging Face features), else `names`.

    Raises:
        ConfigError: the file is missing or damaged, lacks a column, or has a label without a name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ConfigError(f"{path} is no parquet file, and no folder of some")
    found: list[Picture] = []
    for file in files:
        try:
            opened = pq.ParquetFile(file)
            schema = opened.schema_arrow
            image, label = (_column(schema.names, of, file) for of in (PICTURE, LABEL))
            words = _label_names(schema.metadata or {}, label) or names
            labels = opened.read(columns=[label], use_threads=False).column(0).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{file} cannot be read as parquet: {error}") from error
        start = 0
        for group in range(opened.num_row_groups):
            n = opened.metadata.row_group(group).num_rows
            for i, value in enumerate(labels[start : start + n]):
                entity = _named(value, words, file)
                name = f"{file.stem}-{start + i:06d}"
                found.append(Picture(entity, name, _reader(file, group, i, image)))
            start += n
    return found


def from_folders(path: Path, wanted: Path | None = None) -> list[Picture]:
    """Return pictures of a folder with one folder a class; `wanted` lists some as Food101's `meta/test.txt` does.

    Raises:
        ConfigError: the folder is missing or holds no pictures, or the list names what is not there.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder; it must hold one folder a class")
    found = [
        Picture(_readable(folder.name).replace("_", " "), _readable(file.name), file.read_bytes)
        for folder in sorted(path.iterdir())
        if folder.is_dir()
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in SUFFIXES and file.is_file()
    ]
    if wanted is not None:
        try:
            lines = {line.strip() for line in wanted.read_text(encoding="utf-8").splitlines() if line.strip()}
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{wanted} cannot be read: {error}") from error
        # A list is compared with what is there, never followed: it cannot lead out of the folder.
        there = {f"{p.entity.replace(' ', '_')}/{Path(p.name).stem}": p for p in found}
        if lost := sorted(lines - set(there)):
            raise ConfigError(f"{wanted} names {len(lost)} pictures that are not in {path}, such as {lost[0]!r:.80}")
        found = [picture for key, picture in there.items() if key in lines]
    if not found:
        raise ConfigError(
            f"{path} holds no pictures: one folder a class, files ending in {', '.join(sorted(SUFFIXES))}"
        )
    return found


def from_dataset(rows: Any, names: Sequence[str] = ()) -> Iterator[Picture]:
    """Yield the pictures of a Hugging Face dataset, streamed or not, with the columns that `from_parquet` wants.

    Raises:
        ConfigError: it lacks a column, or has a label without a name.
    """
    import datasets

    columns = list(rows.features)
    image, label = (_column(columns, of, "the dataset") for of in (PICTURE, LABEL))
    words = getattr(rows.features[label], "names", None) or names
    for i, row in enumerate(rows.cast_column(image, datasets.Image(decode=False))):
        held = cast(Mapping[str, Any], row[image])
        yield Picture(
            _named(row[label], words, "the dataset"), f"{i:06d}", lambda held=held: bytes(held["bytes"] or b"")
        )


def pictures(kind: str, source: str, split: str = "test") -> list[Picture]:
    """Return the pictures of a data set by the kind of its source.

    Args:
        kind: "mnist", "cifar100", "food101", or "folder" for one folder a class (landmarks, your own).
        source: a path in the published form, or a Hugging Face id (needs the package datasets).
        split: "test" or "train"; a folder has none.

    Raises:
        ConfigError: an unknown kind, or a source that is not of it.
    """
    if kind not in KINDS:
        raise ConfigError(f"no data set is called {kind!r}; there are {', '.join(KINDS)}")
    path = Path(source).expanduser()
    names = CIFAR100 if kind == "cifar100" else DIGITS if kind == "mnist" else ()
    if not path.exists() and kind != "folder" and HUB_ID.fullmatch(source):
        return list(from_dataset(_from_hub(source, split), names))
    if kind == "folder":
        return from_folders(path)
    if path.suffix == ".parquet" or any(path.glob("*.parquet")):
        return from_parquet(path, names)
    if kind == "mnist":
        return from_idx(path, split)
    if kind == "food101":
        return from_folders(path / "images", path / "meta" / f"{split}.txt")
    raise ConfigError(
        f"{source} holds no parquet file: CIFAR's own archives are pickles, which can run code; take its parquet "
        "files or the Hugging Face id (uoft-cs/cifar100)"
    )


def _from_hub(name: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("a Hugging Face id needs the package datasets: pip install 'gapprobe[export]'") from error
    try:
        return datasets.load_dataset(name, split=split, streaming=True)
    # The hub's client answers with its own errors, ValueError and OSError; each means that it is not to be had.
    except Exception as error:
        raise ConfigError(f"data set {name} cannot be had: {str(error).splitlines()[0]:.200}") from error


def _read_idx(folder: Path, name: str, magic: int, axes: int) -> np.ndarray:
    """Return the array of an IDX file; no more is read, or unpacked, than its header says."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise ConfigError(f"{folder} lacks {name} (or {name}.gz), as MNIST is published")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = np.frombuffer(file.read(4 + 4 * axes), dtype=">u4")
            if len(header) != 1 + axes or header[0] != magic:
                raise ConfigError(f"{path} is no IDX file of {axes} axes")
            shape = tuple(int(n) for n in header[1:])
            size = int(np.prod(shape, dtype=object))
            if size > LARGEST_IDX:
                raise ConfigError(f"{path} says that it holds {size:,} bytes; no MNIST does")
            data = file.read(size + 1)
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if len(data) != size:
        raise ConfigError(f"{path} should hold {size:,} bytes behind its header, and holds {len(data):,} or more")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _column(names: Sequence[str], known: Sequence[str], where: Path | str) -> str:
    found = next((name for name in known if name in names), None)
    if found is None:
        raise ConfigError(f"{where} has none of the columns {', '.join(known)}; it has {', '.join(names)}")
    return found


def _label_names(metadata: Mapping[bytes, bytes], label: str) -> list[str]:
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


def _named(label: object, names: Sequence[str], where: Path | str) -> str:
    if isinstance(label, str) and label.strip():
        return label.strip().replace("_", " ")
    if isinstance(label, int) and 0 <= label < len(names):
        return names[label].replace("_", " ")
    raise ConfigError(
        f"{where}: label {label!r:.40} has no name; labels are words, or numbers from 0 to {len(names) - 1}"
    )


def _reader(file: Path, group: int, row: int, column: str) -> Callable[[], bytes]:
    def read() -> bytes:
        import pyarrow as pa

        try:
            return bytes(_cells(file, group, column)[row].as_py()["bytes"])
        except (pa.ArrowException, OSError, TypeError, KeyError) as error:
            raise DataError(f"row {row} of row group {group} of {file} holds no picture: {error}") from error

    return read


@lru_cache(maxsize=GROUPS)
def _cells(file: Path, group: int, column: str) -> Any:
    """Return a column of a row group: parquet gives no single rows, and reading a group for each would take hours."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(file).read_row_group(group, columns=[column], use_threads=False)[column]


def _readable(name: str) -> str:
    """Return the name of a file as text that can be written; bytes that are no UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()
