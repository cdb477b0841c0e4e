"""What a parquet footer says of its columns, against pyarrow; and footers that are wrong."""

import io
import random
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapprobe.errors import StoreError
from gapprobe.store.footer import claimed_sizes
from gapprobe.store.table import decode_table

TABLE = pa.table(
    {
        "id": ["a", "b", "é", "d"],
        "n": [1, None, 3, 4],
        "right": [True, False, None, True],
        "x": pa.array([0.5, 1.0, 2.0, 3.0], pa.float32()),
        "tokens": [[1, 2], [], None, [3]],
        "words": [["a", None], ["b"], [], None],
        "pair": [{"a": 1, "b": "x"}] * 4,
        "hash": pa.array([b"0123"] * 4, pa.binary(4)),
    }
)


def written(table: pa.Table, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def by_pyarrow(content: bytes) -> list[list[tuple[int, int]]]:
    found = pq.ParquetFile(io.BytesIO(content)).metadata
    groups = [found.row_group(i) for i in range(found.num_row_groups)]
    chunks = [[group.column(i) for i in range(found.num_columns)] for group in groups]
    return [[(chunk.num_values, chunk.total_uncompressed_size) for chunk in group] for group in chunks]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    columns=st.lists(st.sampled_from(TABLE.column_names), min_size=1, max_size=20),
    rows=st.integers(0, 4),
    copies=st.integers(1, 40),
    group=st.integers(1, 50),
    options=st.fixed_dictionaries(
        {
            "compression": st.sampled_from(["zstd", "none", "snappy"]),
            "version": st.sampled_from(["1.0", "2.6"]),
            "use_dictionary": st.booleans(),
            "write_statistics": st.booleans(),
            "write_page_index": st.booleans(),
            "store_schema": st.booleans(),
        }
    ),
)
def test_sizes_are_those_that_pyarrow_reads(columns, rows, copies, group, options):
    table = pa.concat_tables([TABLE.slice(0, rows)] * copies)
    table = pa.table([table.column(name) for name in columns], names=[f"{i} {name}" for i, name in enumerate(columns)])
    content = written(table, row_group_size=group, **options)
    assert list(claimed_sizes(content)) == by_pyarrow(content)


def test_no_byte_of_a_footer_ends_the_process():
    """pyarrow's own way to ask for these sizes aborts at some of them."""
    content = written(TABLE.select(["id", "n", "tokens"]))
    begin = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    pick = random.Random(0)
    refused = 0
    for at in range(begin, len(content)):
        for value in {content[at] ^ 1, content[at] ^ 16, 0, 255, pick.randrange(256)} - {content[at]}:
            changed = bytearray(content)
            changed[at] = value
            try:
                decode_table(bytes(changed), Path("t.parquet"), 4)
            except StoreError:
                refused += 1
    assert refused > 500


@settings(max_examples=300, deadline=None, derandomize=True)
@given(footer=st.binary(max_size=200))
def test_nonsense_is_refused(footer):
    content = b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    with suppress(ValueError):
        assert list(claimed_sizes(content)) == []


def test_a_field_of_another_number_is_passed_over():
    footer = b"\x09\x88\x04\x16\x02\x00"  # field 4 + 2^8
    assert list(claimed_sizes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")) == []


@pytest.mark.parametrize(
    ("footer", "told"),
    [
        (b"\x1c" * 100, "nested"),
        (b"\x49\xfc\xff\xff\xff\xff\x0f", "longer"),
        (b"\x49\x16\x02\x00", "numbers"),
        (b"\x49\x1c\x19\x1c\x3c\x00\x00\x00\x00", "how large"),
        (b"\x16" + b"\xff" * 20, "64 bits"),
        (b"\x18\x7f", "too early"),
        # Field 4 + 2^16, which is field 4 to readers that count in 16 bits.
        (b"\x09\x88\x80\x08\x16\x02\x00", "numbers"),
    ],
)
def test_what_is_wrong_is_told(footer, told):
    content = b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    with pytest.raises(ValueError, match=told):
        list(claimed_sizes(content))
    with pytest.raises(ValueError, match="no footer"):
        list(claimed_sizes(footer))
