"""Where images come from: a folder by entity, a parquet file in the Hugging Face form, or made up (trivial images).

An image is read when it is needed, so that one bad file costs its own rows and nothing else.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import PIL.Image

from gapprobe.errors import ConfigError, DataError
from gapprobe.files import read_bytes

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"})


@runtime_checkable
class ImageSource(Protocol):
    """An image that can be named without being read."""

    @property
    def name(self) -> str:
        """A name that is unique among the images of a study."""
        ...

    def read(self) -> bytes:
        """Return the file's bytes. Raises DataError when there are none."""
        ...

    def load(self) -> PIL.Image.Image:
        """Return the picture in RGB. Raises DataError when it cannot be decoded."""
        ...


@dataclass(frozen=True)
class ImageFile:
    """An image in a file, or its bytes from a table (`data`)."""

    name: str
    path: Path | None = None
    data: bytes | None = None

    def read(self) -> bytes:
        """Return the bytes of the file."""
        return read_bytes(f"image {self.name}", self.path, self.data)

    def load(self) -> PIL.Image.Image:
        """Return the picture in RGB."""
        content = self.read()
        try:
            return PIL.Image.open(io.BytesIO(content)).convert("RGB")
        except PIL.UnidentifiedImageError as error:
            # Pillow's own message holds a memory address, which would differ from run to run.
            raise DataError(f"image {self.name} is in no format that Pillow knows") from error
        # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error and more on damaged files; whichever
        # it is, it says the same of the input.
        except Exception as error:
            raise DataError(f"image {self.name} cannot be decoded: {error}") from error


@dataclass(frozen=True)
class TrivialImage:
    """An image that shows nothing: `black`, `white`, or uniform RGB `noise`, of the given size in pixels."""

    kind: str
    width: int
    height: int

    @property
    def name(self) -> str:
        """Return the kind and size."""
        return f"{self.kind}-{self.width}x{self.height}"

    def load(self) -> PIL.Image.Image:
        """Return the picture in RGB; noise comes from a fixed seed, so that the same size gives the same picture."""
        if self.kind == "noise":
            pixels = np.random.default_rng(0).integers(0, 256, (self.height, self.width, 3), dtype=np.uint8)
            return PIL.Image.fromarray(pixels)
        return PIL.Image.new("RGB", (self.width, self.height), self.kind)

    def read(self) -> bytes:
        """Return the picture as PNG bytes."""
        buffer = io.BytesIO()
        self.load().save(buffer, format="PNG")
        return buffer.getvalue()


@dataclass(frozen=True)
class ImageSet:
    """Images by entity, each list in a fixed order."""

    by_entity: dict[str, tuple[ImageFile, ...]]

    @property
    def size(self) -> int:
        """Return the number of images."""
        return sum(len(images) for images in self.by_entity.values())

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of all names and contents, by which kept results know their data again."""
        digest = hashlib.sha256()
        for entity, images in sorted(self.by_entity.items()):
            for image in images:
                digest.update(f"{entity}\0{image.name}\0".encode())
                try:
                    digest.update(hashlib.sha256(image.read()).digest())
                except DataError:
                    digest.update(b"unreadable")
        return digest.hexdigest()


def load_images(path: Path, entities: Sequence[str]) -> ImageSet:
    """Read an image set: a folder with one folder an entity, or a `.parquet` with columns `image` and `entity`.

    The parquet's `image` column is `struct<bytes, path>`, as Hugging Face `datasets` writes it. Images of entities
    that are not asked about are left out.

    Raises:
        ConfigError: the path does not exist, has another form, or shows none of the entities.
    """
    if path.is_dir():
        found = {entity: _in_folder(path / entity, entity) for entity in entities if (path / entity).is_dir()}
    elif path.is_file() and path.suffix == ".parquet":
        found = _in_parquet(path, frozenset(entities))
    elif path.exists():
        raise ConfigError(f"images {path} must be a folder with one folder an entity, or a .parquet file")
    else:
        raise ConfigError(f"images {path} do not exist")
    missing = [entity for entity in entities if not found.get(entity)]
    if missing:
        raise ConfigError(
            f"images {path} show nothing of {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}; add a folder "
            "(or rows) of that name, or leave the entity out of the questions"
        )
    return ImageSet({entity: found[entity] for entity in entities})


def _in_folder(folder: Path, entity: str) -> tuple[ImageFile, ...]:
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    return tuple(ImageFile(f"{entity}/{p.name}", path=p) for p in paths)


def _in_parquet(path: Path, entities: frozenset[str]) -> dict[str, tuple[ImageFile, ...]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # No threads: one that still starts when the process ends aborts it (see `store.table`).
        columns = pq.read_table(path, columns=["image", "entity"], use_threads=False).to_pydict()
        found: dict[str, list[ImageFile]] = {}
        for image, entity in zip(columns["image"], columns["entity"], strict=True):
            if entity in entities:
                found.setdefault(entity, []).append(ImageFile(image["path"], data=image["bytes"] or b""))
    except (pa.ArrowInvalid, pa.ArrowKeyError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"images {path} need the columns image (bytes, path) and entity: {error}") from error
    return {entity: tuple(images) for entity, images in found.items()}


@cache
def size_of(image: ImageFile) -> tuple[int, int]:
    """Return width and height in pixels. Raises DataError when the image cannot be decoded."""
    return image.load().size
