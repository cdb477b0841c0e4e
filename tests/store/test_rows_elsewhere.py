"""The tables of rows as polars and DuckDB read them, without gapprobe."""

from dataclasses import replace

import duckdb
import polars as pl
import pytest

from gapprobe.store.reader import open_store
from tests.store.rows import make_row, some_rows, write


@pytest.fixture
def store(tmp_path):
    """Rows whose columns come, go and widen from shard to shard, with ids in many scripts."""
    rows = some_rows(12)
    rows[1] = replace(rows[1], id="été 東京 'quoted' \"twice\" 🦓")
    rows[4] = replace(rows[4], columns={**rows[4].columns, "score": 1, "late": "only here"})
    rows[7] = replace(rows[7], columns={**rows[7].columns, "score": 0.25})
    rows[11] = make_row("no columns", 1)
    rows[11] = replace(rows[11], columns={})
    write(tmp_path / "s", rows, batch=3)
    return open_store(tmp_path / "s")


def test_polars_reads_the_rows(store):
    files = sorted((store.path / "rows").glob("*.parquet"))
    assert len(files) == 4
    found = pl.concat([pl.read_parquet(file) for file in files], how="diagonal_relaxed")
    assert found.to_dicts() == store.table.to_pylist()
    lazy = pl.scan_parquet(store.path / "rows" / "*.parquet", missing_columns="insert", extra_columns="ignore")
    assert lazy.select("id").collect()["id"].to_list() == list(store.ids)


def test_duckdb_queries_the_rows(store):
    rows = f"read_parquet('{store.path}/rows/*.parquet', union_by_name = true, filename = true)"
    names = ", ".join(f'"{name}"' for name in store.table.column_names)
    found = duckdb.sql(f"select {names} from {rows} order by filename, file_row_number")
    assert [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()] == store.table.to_pylist()
    query = f"select setting, count(*) from {rows} where error is null and setting is not null group by setting"
    frame = store.rows
    wanted = frame[frame["error"].isna()]["setting"].value_counts().to_dict()
    assert dict(duckdb.sql(query).fetchall()) == wanted
