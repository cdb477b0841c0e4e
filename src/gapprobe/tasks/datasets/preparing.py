"""From the pictures of a data set to what a study reads: `images.parquet`, a list of entities, and where it is from."""

from __future__ import annotations

import csv
import hashlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

from gapprobe.errors import ConfigError, DataError
from gapprobe.files import told_count, write_bytes, write_json
from gapprobe.tasks.datasets.classes import ALIASES
from gapprobe.tasks.datasets.sources import Picture, pictures

FEW = 10  # images a question wants (arXiv 2508.18297)


@dataclass(frozen=True)
class Prepared:
    """What was written.

    Attributes:
        folder: where.
        images: how many of each entity.
        damaged: pictures that cannot be decoded, with what is wrong; they were left out.
    """

    folder: Path
    images: dict[str, int]
    damaged: dict[str, str]

    @property
    def told(self) -> str:
        """Return this in words."""
        few = [entity for entity, n in self.images.items() if n < FEW]
        lines = [f"{self.folder}: {told_count(sum(self.images.values()), 'image')} of {len(self.images):,} entities"]
        if few:
            lines.append(f"fewer than {FEW} images of {', '.join(few[:10])}{' …' if len(few) > 10 else ''}")
        if self.damaged:
            name, why = next(iter(self.damaged.items()))
            lines.append(f"{told_count(len(self.damaged), 'damaged picture')} left out, such as {name}: {why}")
        return "\n".join(lines)


def prepare_dataset(
    kind: str,
    source: str,
    out: str | Path,
    *,
    split: str = "test",
    images_per_entity: int = 100,
    entities: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Prepared:
    """Write a data set in the form that a study reads: `images.parquet`, `entities.csv` and `source.json` in `out`.

    Pictures are drawn by the seed, class by class, and kept as they are, byte for byte; each is decoded once, so that
    one that cannot be is left out and named. The same source and settings give the same bytes.

    Args:
        kind: see `sources.pictures`.
        source: a path in the published form, or a Hugging Face id.
        out: folder; files of these names are replaced.
        split: "test" or "train".
        images_per_entity: at most so many.
        entities: some of the classes; all if none.
        seed: of the draw.
        progress: show a progress bar.

    Raises:
        ConfigError: the source is not what it should be, a class is unknown, or one has no picture that can be read.
        OutputError: `out` cannot be written.
    """
    from tqdm import tqdm

    if images_per_entity < 1:
        raise ConfigError(f"images_per_entity is {images_per_entity}; it must be at least 1")
    by_entity: dict[str, dict[str, Picture]] = {}
    for picture in pictures(kind, source, split):
        # A study tells pictures apart by their names.
        if by_entity.setdefault(picture.entity, {}).setdefault(picture.name, picture) is not picture:
            raise ConfigError(f"{source} has two pictures {picture.name} of {picture.entity}: rename one of them")
    if unknown := [name for name in entities if name not in by_entity]:
        raise ConfigError(f"{source} has no class {unknown[0]!r}; it has {', '.join(sorted(by_entity))}")
    chosen = sorted(entities or by_entity)
    kept: list[tuple[str, str, bytes]] = []
    damaged: dict[str, str] = {}
    for entity in tqdm(chosen, desc=kind, unit="class", disable=not progress):
        # Each class has draws of its own: those of one do not depend on which others are wanted.
        own = int.from_bytes(hashlib.sha256(entity.encode()).digest()[:8])
        candidates = list(by_entity[entity].values())
        found: list[tuple[str, str, bytes]] = []
        for i in np.random.default_rng([seed, own]).permutation(len(candidates)).tolist():
            if len(found) == images_per_entity:
                break
            name = f"{entity}/{candidates[i].name}"
            try:
                content = candidates[i].read()
                _require_picture(content)
            except (DataError, OSError) as error:
                damaged[name] = str(error)
            else:
                found.append((entity, name, content))
        if not found:
            raise ConfigError(f"{source}: none of the {len(candidates)} pictures of {entity} can be decoded")
        kept += sorted(found, key=lambda row: row[1])
    out = Path(out)
    images = _parquet(kept)
    counts = {entity: sum(row[0] == entity for row in kept) for entity in chosen}
    write_bytes(out / "images.parquet", images)
    write_bytes(out / "entities.csv", _entities(counts))
    told = {
        "kind": kind,
        "source": source,
        "split": split,
        "seed": seed,
        "images_per_entity": images_per_entity,
        "images": counts,
        "damaged": damaged,
        "sha256": hashlib.sha256(images).hexdigest(),
    }
    write_json(out / "source.json", told)
    return Prepared(out, counts, damaged)


def _require_picture(content: bytes) -> None:
    """Raise DataError where Pillow cannot decode a picture, or finds it far too large to be one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        try:
            with PIL.Image.open(io.BytesIO(content)) as image:
                image.load()
        except PIL.UnidentifiedImageError as error:
            raise DataError("it is in no format that Pillow knows") from error
        # As in `tasks.images`: damaged files make Pillow raise nearly anything.
        except Exception as error:
            raise DataError(f"it cannot be decoded: {error}") from error


def _parquet(rows: Sequence[tuple[str, str, bytes]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Hugging Face `datasets` shows the column as pictures by this note.
    note = b'{"info": {"features": {"image": {"_type": "Image"}, "entity": {"dtype": "string", "_type": "Value"}}}}'
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "image": pa.array([{"bytes": content, "path": name} for _, name, content in rows], picture),
            "entity": pa.array([entity for entity, _, _ in rows], pa.string()),
        }
    ).replace_schema_metadata({b"huggingface": note})
    sink = io.BytesIO()
    # Pictures are compressed already; groups of this size are read one by one.
    pq.write_table(table, sink, compression="none", row_group_size=256)
    return sink.getvalue()


def _entities(counts: dict[str, int]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["entity", "aliases", "images"])
    writer.writerows([entity, "|".join(ALIASES.get(entity, ())), n] for entity, n in counts.items())
    return text.getvalue().encode()
