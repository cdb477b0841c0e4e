"""Tables of labels: every form gives the same columns, text stays text, and what a store cannot hold is named."""

from datetime import date

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gapprobe.errors import DataError
from gapprobe.store.exchange.labels import read_labels

COLUMNS = {
    "name": ["ä", "NA", None],
    "right": [True, None, False],
    "count": [1, 2, 3],
    "score": [0.5, None, -1.0],
    "answer_ids": [[1, 2], [], None],
    "weights": [[0.5], [1.5, 2.0], []],
}


class Stream:
    """A table of another library, as polars hands itself over."""

    def __arrow_c_stream__(self, schema=None):
        return pa.table(COLUMNS).__arrow_c_stream__(schema)


def test_every_form_gives_the_same_columns(tmp_path):
    table = pa.table(COLUMNS)
    pq.write_table(table, tmp_path / "labels.parquet")
    forms = {
        "columns": COLUMNS,
        "arrow": table,
        "large types": table.set_column(0, "name", table.column(0).cast(pa.large_string())),
        "categories": table.set_column(0, "name", table.column(0).dictionary_encode()),
        "stream": Stream(),
        "parquet": tmp_path / "labels.parquet",
        "pandas": table.to_pandas(types_mapper={pa.bool_(): pd.BooleanDtype()}.get),
    }
    for form, labels in forms.items():
        found, ids = read_labels(labels)
        assert ids is None, form
        assert found.to_pydict() == COLUMNS, form
        kinds = [pa.string(), pa.bool_(), pa.int64(), pa.float64(), pa.list_(pa.int64()), pa.list_(pa.float64())]
        assert found.schema.types == kinds, form


def test_csv_keeps_text_as_it_is_written(tmp_path):
    (tmp_path / "labels.csv").write_text("id,answer,n,score\n007,NA,1,0.5\n1e5,None,2,\nä b,,3,2\n", encoding="utf-8")
    table, ids = read_labels(str(tmp_path / "labels.csv"))
    assert ids == ["007", "1e5", "ä b"]
    assert table.to_pydict() == {"answer": ["NA", "None", None], "n": [1, 2, 3], "score": [0.5, None, 2.0]}
    (tmp_path / "numbers.csv").write_text("id,y\n007,1\n1e5,2\n", encoding="utf-8")
    assert read_labels(tmp_path / "numbers.csv")[1] == ["007", "1e5"]
    (tmp_path / "labels.tsv").write_text("a\tb\n1,5\t2\n", encoding="utf-8")
    assert read_labels(tmp_path / "labels.tsv")[0].to_pydict() == {"a": ["1,5"], "b": [2]}


def test_vectors_become_the_column_label():
    for labels in ([1, 0], (1, 0), np.array([1, 0]), torch.tensor([1, 0]), pd.Series([1, 0])):
        assert read_labels(labels)[0].to_pydict() == {"label": [1, 0]}
    assert read_labels(pd.Series([1.5], name="y"))[0].to_pydict() == {"y": [1.5]}
    assert read_labels({"v": torch.ones(2, 3), "w": np.zeros((2, 1), int)})[0].to_pydict() == {
        "v": [[1.0] * 3] * 2,
        "w": [[0], [0]],
    }


def test_an_index_of_text_gives_ids_unless_a_column_does():
    frame = pd.DataFrame({"y": [1, 2]}, index=["a", "b"])
    assert read_labels(frame)[1] == ["a", "b"]
    table, ids = read_labels(frame.assign(id=["c", "d"]))
    assert ids == ["c", "d"]
    assert table.column_names == ["y"]
    assert read_labels(frame.set_axis([3, 1]))[1] is None
    only_ids, ids = read_labels(frame[[]])
    assert (only_ids.num_rows, ids) == (2, ["a", "b"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (3, "of type int; give a pandas, polars or Arrow table"),
        ("nowhere.csv", "nowhere.csv does not exist"),
        ({"a": [1, 2], "b": [1]}, "different lengths: {'a': 2, 'b': 1}"),
        ({"a": [1, "x"]}, "column 'a' cannot be stored"),
        ({"a": [2**63]}, "column 'a' cannot be stored"),
        ({"a": np.array([2**63], np.uint64)}, "column 'a' cannot be stored"),
        ({"when": [date(2026, 1, 1)]}, r"column 'when' holds date32.*Turn it into one of these"),
        ({"a": [{"b": 1}]}, "column 'a' holds struct"),
        ({"a": [["x"]]}, "column 'a' holds list<.*string>"),
        ({"id": ["a", None]}, "a row has no id"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "a column name stands twice"),
        (pa.table([[1], [2]], names=["a", "a"]), "a column name stands twice"),
        (pd.DataFrame({"a": [1, "x"]}), "Give each column one type"),
    ],
)
def test_what_a_store_cannot_hold_is_named(labels, message):
    with pytest.raises(DataError, match=message):
        read_labels(labels)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "a.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    (tmp_path / "b.csv").write_bytes(b"")
    (tmp_path / "a.xlsx").touch()
    for name in ("a.parquet", "a.csv", "b.csv"):
        with pytest.raises(DataError, match=rf"{name} cannot be read"):
            read_labels(tmp_path / name)
    with pytest.raises(DataError, match="none of .csv, .tsv, .parquet"):
        read_labels(tmp_path / "a.xlsx")
