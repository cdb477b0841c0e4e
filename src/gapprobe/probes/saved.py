"""A sweep as a folder: what is no array in `sweep.json`, arrays in safetensors files. Nothing in it can run code.

`sweep.json` is written last and has the checksum of every other file: files of two sweeps are never taken for one.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, astuple
from math import isnan, nan
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from gapprobe.errors import DataError
from gapprobe.files import write_bytes, write_json
from gapprobe.probes.coefficients import Linear, Stored
from gapprobe.probes.plan import Nested, Problems
from gapprobe.probes.result import Cell, Key, ProbeSweep
from gapprobe.probes.splits import NestedFolds
from gapprobe.probes.verdict import Verdict
from gapprobe.stats import Estimate

KIND, VERSION = "gapprobe sweep", 1
ABOUT, SCORES = "sweep.json", "scores.safetensors"
DTYPES = ("int64", "float64", "bool", "str", "object")  # of a table's columns
Arrays = dict[str, np.ndarray]


def save_sweep(sweep: ProbeSweep, path: Path) -> Path:
    """Write a sweep; see `ProbeSweep.save`."""
    if path.exists() and not (path.is_dir() and ((path / ABOUT).is_file() or not any(path.iterdir()))):
        raise DataError(f"{path} is there already and is no saved sweep; name another folder")
    problems = list({id(cell.problems): cell.problems for cell in sweep.cells.values()}.values())
    number = {id(split): i for i, split in enumerate(problems)}
    arrays: Arrays = {}
    for i, split in enumerate(problems):
        parts = {"outer": split.cut.outer, "inner": split.cut.inner}
        parts |= {"target": split.target, "shuffled": split.shuffled}
        arrays |= {f"problems.{i}.{name}": array for name, array in parts.items()}
    files: dict[str, str] = {}
    cells: list[dict[str, object]] = []

    def write(name: str, arrays: Arrays) -> None:
        data = save({key: np.ascontiguousarray(array) for key, array in arrays.items()})
        files[name] = xxhash.xxh3_128(data).hexdigest()
        write_bytes(path / name, data)

    for i, cell in enumerate(sweep.cells.values()):
        parts = {"scores": cell.scores, "nested": cell.nested.scores, "shuffled": cell.nested.shuffled}
        parts |= {f"controls.{name}": scores for name, scores in cell.controls.items()}
        arrays |= {f"cells.{i}.{name}": array for name, array in parts.items()}
        if cell.linear:
            linear = [own.load().arrays(str(layer)) for layer, own in cell.linear.items()]
            write(_coefficients(i), {name: array for own in linear for name, array in own.items()})
        cells.append(
            {
                "key": asdict(cell.key),
                "problems": number[id(cell.problems)],
                "layers": cell.layers,
                "strengths": cell.strengths,
                "nested_layers": cell.nested.layers,
                "nested_strengths": cell.nested.strengths,
                "controls": list(cell.controls),
                "linear": list(cell.linear),
                "verdict": _told(cell.verdict),
            }
        )
    write(SCORES, arrays)
    about = {
        "kind": KIND,
        "version": VERSION,
        "files": files,
        "table": _columns(sweep.table),
        "strengths": _columns(sweep.strengths),
        "problems": [{"groups": p.cut.groups, "one_class_groups": p.cut.one_class_groups} for p in problems],
        "cells": cells,
        "ids": sweep.ids,
    }
    write_json(path / ABOUT, about)
    for left in set(path.glob("coefficients-*.safetensors")) - {path / name for name in files}:
        left.unlink()
    return path


def load_sweep(path: str | Path) -> ProbeSweep:
    """Read a sweep that `ProbeSweep.save` wrote: all of it, but for coefficients, which are read when asked for.

    Raises:
        DataError: there is none, or its files are damaged, torn or of another version.
    """
    path = Path(path)
    if not (path / ABOUT).is_file():
        raise DataError(f"{path} holds no sweep: it has no {ABOUT}; save one with ProbeSweep.save")
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        if (about["kind"], about["version"]) != (KIND, VERSION):
            raise ValueError(f"it is of kind {about['kind']!r:.40}, version {about['version']!r:.40}")
        _check_files(path, about["files"], len(about["cells"]))
        arrays: Arrays = load_file(path / SCORES)
        ids = tuple(map(str, about["ids"]))
        problems = [_problems(i, own, arrays, len(ids)) for i, own in enumerate(about["problems"])]
        cells = [_cell(i, own, arrays, problems, path) for i, own in enumerate(about["cells"])]
        tables = (_frame(about["table"]), _frame(about["strengths"]))
        return ProbeSweep(*tables, ids, {cell.key: cell for cell in cells})
    # Whatever stands in files that others wrote: all of these mean that it is no sweep.
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        told = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} cannot be read as a sweep: {told:.300}; save it again, or run the sweep") from error


def _coefficients(cell: int) -> str:
    return f"coefficients-{cell}.safetensors"


def _check_files(path: Path, files: Mapping[str, str], cells: int) -> None:
    # Only names that a sweep has: what a file says must not lead elsewhere.
    if SCORES not in files or set(files) - {SCORES, *map(_coefficients, range(cells))}:
        raise ValueError(f"{ABOUT} names other files than a sweep has")
    for name, told in files.items():
        with (path / name).open("rb") as file:
            # file_digest takes whatever has `update`, but its types know hashlib's alone.
            found = hashlib.file_digest(file, cast(Any, xxhash.xxh3_128)).hexdigest()
        if found != told:
            raise ValueError(f"{name} is not the file that {ABOUT} was written with")


def _array(arrays: Arrays, name: str, dtype: type, *shape: int | None) -> np.ndarray:
    found = arrays[name]
    fits = found.ndim == len(shape) and all(size in (None, has) for size, has in zip(shape, found.shape, strict=True))
    if found.dtype != dtype or not fits:
        raise ValueError(f"{name} is {found.dtype} of shape {found.shape}")
    return found


def _problems(i: int, about: Mapping[str, int], arrays: Arrays, n: int) -> Problems:
    outer = _array(arrays, f"problems.{i}.outer", np.int64, n)
    inner = _array(arrays, f"problems.{i}.inner", np.int64, None, n)
    if not n or outer.min() < 0 or outer.max() >= len(inner) or inner.min() < -1 or inner.max() >= n:
        raise ValueError(f"problems.{i} has folds that there are none of")
    target = _array(arrays, f"problems.{i}.target", np.bool_, n)
    shuffled = _array(arrays, f"problems.{i}.shuffled", np.bool_, None, n)
    cut = NestedFolds(outer, inner, int(about["groups"]), int(about["one_class_groups"]))
    return Problems.of(cut, target, shuffled)


def _cell(i: int, about: Mapping[str, Any], arrays: Arrays, problems: list[Problems], path: Path) -> Cell:
    split = problems[about["problems"]]
    (folds, n), runs = split.cut.inner.shape, len(split.shuffled)
    layers, strengths = tuple(map(int, about["layers"])), tuple(map(float, about["strengths"]))
    scores = _array(arrays, f"cells.{i}.scores", np.float64, len(layers), len(strengths), n)
    nested = Nested(
        tuple(map(int, about["nested_layers"])),
        tuple(map(float, about["nested_strengths"])),
        _array(arrays, f"cells.{i}.nested", np.float64, n),
        _array(arrays, f"cells.{i}.shuffled", np.float64, runs, n),
    )
    known = set(nested.layers) <= set(layers) and set(nested.strengths) <= set(strengths)
    if not known or {len(nested.layers), len(nested.strengths)} != {folds}:
        raise ValueError(f"cell {i} chose layers or strengths that it has none of")
    controls = {str(c): _array(arrays, f"cells.{i}.controls.{c}", np.float64, n) for c in about["controls"]}
    linear: dict[int, Linear | Stored] = {
        int(layer): Stored(path / _coefficients(i), str(layer)) for layer in about["linear"]
    }
    if linear:
        with safe_open(str(path / _coefficients(i)), framework="numpy") as file:
            for layer in linear:
                shape = file.get_slice(f"{layer}.coef").get_shape()
                if layer not in layers or len(shape) != 3 or shape[:2] != [len(strengths), folds]:
                    raise ValueError(f"cell {i} has coefficients of shape {shape} at layer {layer}")
    verdict = _verdict(about["verdict"])
    return Cell(Key(**about["key"]), layers, strengths, split, scores, nested, verdict, controls, linear)


def _told(verdict: Verdict) -> dict[str, object]:
    """Return a verdict as JSON has it: NaN is null in an estimate."""
    out = dict(vars(verdict))
    for name, value in out.items():
        if isinstance(value, Estimate):
            out[name] = [None if isnan(number) else number for number in astuple(value)]
    return out


def _verdict(told: Mapping[str, Any]) -> Verdict:
    parts: dict[str, Any] = dict(told) | {"layers": tuple(map(int, told["layers"]))}
    for name in ("probe", "control_auc", "difference"):
        if parts[name] is not None:
            value, low, high = (nan if number is None else float(number) for number in parts[name][:3])
            parts[name] = Estimate(value, low, high, *map(int, parts[name][3:]))
    return Verdict(**parts)


def _columns(table: pd.DataFrame) -> list[dict[str, object]]:
    """Return a table as JSON has it: what is missing is null."""
    return [
        {
            "name": str(name),
            "dtype": str(column.dtype),
            "values": column.astype(object).where(column.notna(), None).tolist(),
        }
        for name, column in table.items()
    ]


def _frame(columns: list[dict[str, Any]]) -> pd.DataFrame:
    if odd := [column["dtype"] for column in columns if column["dtype"] not in DTYPES]:
        raise ValueError(f"a table has a column of type {odd[0]!r:.40}")
    if len({len(column["values"]) for column in columns}) > 1:
        raise ValueError("a table has columns of several lengths")
    return pd.DataFrame({column["name"]: pd.Series(column["values"], dtype=column["dtype"]) for column in columns})
