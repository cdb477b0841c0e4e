"""The shape of results.json: numbers with n and interval, reading it back. docs/results.md is its documentation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gapprobe.errors import DataError
from gapprobe.stats import Estimate

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
Json = dict[str, Any]


def number(value: float) -> float | None:
    """Return `value`, or None (JSON's null) where it does not exist."""
    return float(value) if math.isfinite(value) else None


def interval(estimate: Estimate) -> list[float | None]:
    """Return the ends of the 95 % interval."""
    return [number(estimate.low), number(estimate.high)]


def measured(estimate: Estimate, name: str = "value") -> Json:
    """Return a number with its n and interval, under `name`."""
    return {name: number(estimate.value), "n": estimate.n, "ci": interval(estimate)}


def records(table: pd.DataFrame) -> list[Json]:
    """Return the rows of a table as JSON holds them: plain numbers and truth values, NaN and infinities as None."""

    def plain(value: Any) -> Any:
        value = value.item() if hasattr(value, "item") else value
        return number(value) if isinstance(value, float) else value

    return [{str(key): plain(value) for key, value in row.items()} for row in table.to_dict("records")]


def read_results(path: Path) -> Json:
    """Read a results.json.

    Raises:
        DataError: the file is missing, is no JSON, or has another schema.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: is this the output folder of a finished study?") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise DataError(f"{path} is not a results file of schema {SCHEMA}, which this version of gapprobe reads")
    return results
