"""Examples from a table: one line a call of the model."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from gapprobe.errors import DataError
from gapprobe.tasks.examples import Example, mentions
from gapprobe.tasks.images import ImageFile
from gapprobe.tasks.sounds import SoundFile

PHRASES = ("entity", "reference")


def load_examples(path: str | Path) -> list[Example]:
    """Read examples from a .csv, .tsv, .jsonl or .parquet file.

    The column `text` is the prompt. `image` and `sound` are files, named from the table's folder, or empty.
    `entity` and `reference` are phrases: their mentions in the text become the tokens of that role. These and all
    other columns are kept beside the activations.

    Raises:
        DataError: the file cannot be read, has no column `text`, or a line has both an image and a sound.
    """
    path = Path(path)
    table = _read(path)
    if "text" not in table:
        raise DataError(f"{path} has no column 'text'; it has {', '.join(table.columns) or 'none'}")
    return [_example({str(name): str(cell) for name, cell in row.items()}, path) for row in table.to_dict("records")]


def _read(path: Path) -> pd.DataFrame:
    readers = {
        ".csv": lambda: pd.read_csv(path, dtype=str, keep_default_na=False),
        ".tsv": lambda: pd.read_csv(path, dtype=str, keep_default_na=False, sep="\t"),
        ".jsonl": lambda: pd.read_json(path, lines=True, dtype=False),
        ".parquet": lambda: pd.read_parquet(path),
    }
    if path.suffix not in readers:
        raise DataError(
            f"{path}: examples come from a {', '.join(readers)} file, not {path.suffix or 'one without ending'}"
        )
    try:
        table = readers[path.suffix]()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    # Each reader answers damaged files in its own way.
    except Exception as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return table.astype(object).where(table.notna(), "")


def _example(row: dict[str, str], path: Path) -> Example:
    image, sound = (row.get(name, "") for name in ("image", "sound"))
    if image and sound:
        raise DataError(f"{path}: a line has an image ({image}) and a sound ({sound}); give one of them")
    return Example(
        row["text"],
        ImageFile(image, path.parent / image) if image else None,
        {name: cell for name, cell in row.items() if name != "text"},
        {name: mentions(row["text"], row[name]) for name in PHRASES if row.get(name)},
        SoundFile(sound, path.parent / sound) if sound else None,
    )
