"""What somebody who wants to do harm can write: content changes, and the checksums fit.

Readers get to see what is inside; that they must not break on it is all that can be asked of them.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress

import pyarrow as pa

from gapprobe.store.format import ShardRecord
from tests.soak.case import (
    MANIFEST,
    STORE,
    Case,
    Pick,
    hostile,
    parts,
    records,
    reseal,
    rows_file,
    shard_file,
    signed,
)
from tests.soak.tables import TABLES, encoded
from tests.soak.values import CODES, NUMBERS, TEXTS, odd


def any_shard(pick: Pick) -> int:
    """Return the number of a shard of the sound store."""
    return pick.randint(0, 2)


# ---- mutations


def author_line(case: Case, pick: Pick) -> None:
    """A line of the manifest says something else, and its checksum is right."""
    found = records(case)
    if not found:
        return
    case.anything, case.harmless = True, False
    record = pick.choice(found)
    name = pick.choice((*ShardRecord.__dataclass_fields__, "versions", "colour"))
    if pick.randint(0, 6):
        record[name] = {"torch": odd(pick)} if name == "versions" and pick.randint(0, 1) else odd(pick)
    else:
        record.pop(name, None)
    if not pick.randint(0, 3):
        found.append(dict(record, shard=pick.choice((*range(6), *NUMBERS))))
    case.files[MANIFEST] = b"".join(map(signed, found))


def author_store(case: Case, pick: Pick) -> None:
    """store.json says something else, its fingerprint fits, and perhaps that of the shards too."""
    content = case.files.get(STORE)
    try:
        fields = json.loads(content)
        assert isinstance(fields, dict)
    except (ValueError, TypeError, AssertionError, RecursionError):
        return
    case.anything, case.harmless = True, False
    name = pick.choice((*fields, "colour"))
    nested = isinstance(fields.get(name), dict) and fields[name]
    if nested and pick.randint(0, 1):
        key = pick.choice((*nested, *TEXTS))
        fields[name] = {**nested, key: odd(pick)}
    elif name in ("layers", "positions"):
        wide = tuple(range(pick.choice((1, 4, 100, 30_000))))
        values = (*(fields[name] if isinstance(fields[name], list) else ()), odd(pick))
        fields[name] = pick.choice((values, [], wide, [str(i) for i in wide[:9]], [0, 1], [10**4299], ["\ud800"]))
    elif name == "dtype":
        fields[name] = pick.choice(("float32", "float16", "float64", odd(pick)))
    else:
        fields[name] = odd(pick)
    plain = {
        f"{name}.{key}" if key else name: value
        for name, group in fields.items()
        for key, value in (group.items() if isinstance(group, dict) else [("", group)])
    }
    left_out = ("format", "version", "fingerprint", "colour", "model.source", "model.revision")
    kept = {name: v for name, v in plain.items() if name not in left_out and not name.startswith("versions.")}
    fingerprint = hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    if name != "fingerprint":
        fields["fingerprint"] = fingerprint
    case.files[STORE] = json.dumps(fields, indent=2).encode()
    if pick.randint(0, 2):
        for number in range(3):
            shard = parts(case, number)
            if shard is not None and isinstance(shard.metadata, dict):
                shard.metadata["fingerprint"] = fingerprint
                case.files[shard_file(number)] = shard.join()
                reseal(case, number)


def raw_store(case: Case, pick: Pick) -> None:
    """store.json is JSON of a kind that breaks parsers."""
    case.harmless = False
    content = case.files.get(STORE)
    if isinstance(content, bytes):
        case.files[STORE] = pick.choice(BREAKERS)(content)


def _deep(content: bytes) -> bytes:
    return content.rstrip()[:-1] + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


BREAKERS: Sequence[Callable[[bytes], bytes]] = (
    _deep,
    lambda content: content.rstrip()[:-1] + b',"width":6}',
    lambda content: content.rstrip()[:-1] + b',"x":NaN}',
    lambda content: content.rstrip()[:-1] + b',"x":-Infinity}',
    lambda content: content.rstrip()[:-1] + b',"x":1e999}',
    lambda content: content.rstrip()[:-1] + b',"x":' + b"9" * 5000 + b"}",
    lambda content: content.replace(b'"width": 6', b'"width": 6.0'),
    lambda content: content.replace(b"0.5", b"1e999"),
    lambda content: b"\xef\xbb\xbf" + content,
    lambda content: content.decode("utf-8", "replace").encode("utf-16"),
    lambda content: content + b" " * (1 << 20),
    lambda content: content + b"{}",
)


def author_header(case: Case, pick: Pick) -> None:
    """A shard's header describes its tensors otherwise, and the checksums are right."""
    number = any_shard(pick)
    shard = parts(case, number)
    if shard is None:
        return
    hostile(case, number)
    names = list(shard.entries)
    name = pick.choice(names)
    entry, text = shard.entries[name], None
    match pick.randint(0, 11):
        case 0:
            entry["dtype"] = pick.choice((*CODES, odd(pick)))
        case 1:
            shape = [pick.choice(NUMBERS) for _ in range(pick.randint(0, 4))]
            entry["shape"] = pick.choice((shape, entry["shape"][::-1], [*entry["shape"], 1], odd(pick)))
        case 2:
            entry["data_offsets"] = pick.choice(([pick.choice(NUMBERS), pick.choice(NUMBERS)], [0], odd(pick)))
        case 3:
            other = pick.choice((*names, *TEXTS, "position.07", "residual.02", "residual.1", "moments.median"))
            shard.entries = {other if n == name else n: e for n, e in shard.entries.items()}
        case 4:
            size = pick.choice(NUMBERS)
            shard.entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
        case 5:
            shard.metadata = pick.choice(
                (odd(pick), {"fingerprint": odd(pick)}, {**dict(shard.metadata or {}), "x": 1})
            )
        case 6:
            del shard.entries[name], shard.data[name]
            if pick.randint(0, 1):
                shard.place()
        case 7:
            shard.entries["extra"] = {"dtype": pick.choice(CODES), "shape": [8], "data_offsets": [0, 0]}
            shard.data["extra"] = bytes(64)
            if pick.randint(0, 1):
                # Where it belongs: before the checksums, or behind them.
                for moved in ("block_checksums",) if pick.randint(0, 1) else ():
                    shard.entries[moved], shard.data[moved] = shard.entries.pop(moved), shard.data.pop(moved)
                shard.place()
        case 8:
            shard.entries[name] = odd(pick)
        case 9:
            text = json.dumps({"__metadata__": shard.metadata, **shard.entries}).encode()
            text = pick.choice((*BREAKERS, lambda t: t.replace(b"token_roles", b"token_marks")))(text)
        case 10:
            # A product of many factors takes long to multiply out.
            factor, many = pick.choice((0, 1, 2, 9)), pick.choice((65, 10_000, 300_000))
            entry["shape"] = [factor] * many
        case _:
            a, b = name, pick.choice(names)
            shard.entries[a], shard.entries[b] = shard.entries[b], shard.entries[a]
    if "block_checksums" in shard.entries and "block_checksums" in shard.data and pick.randint(0, 1):
        try:
            shard.checksums()
        except (TypeError, KeyError):
            return
    case.files[shard_file(number)] = shard.join(text)
    reseal(case, number)


def author_length(case: Case, pick: Pick) -> None:
    """The length of a shard's header is another, and the checksum is right."""
    number = any_shard(pick)
    content = case.files.get(shard_file(number))
    if isinstance(content, bytes) and len(content) > 8:
        hostile(case, number)
        length = pick.choice((0, 1, 2**20, 2**20 + 1, 2**63, 2**64 - 1, len(content) - 8, pick.randint(0, 2**64 - 1)))
        case.files[shard_file(number)] = length.to_bytes(8, "little") + content[8:]
        reseal(case, number)


def author_tensor(case: Case, pick: Pick) -> None:
    """A tensor holds something else, and the checksums are right."""
    number = any_shard(pick)
    shard = parts(case, number)
    if shard is None:
        return
    hostile(case, number)
    name = pick.choice(("offsets", "token_marks", "moments.count", pick.choice(list(shard.data))))
    content = shard.data.get(name, b"")
    if not content:
        return
    if shard.entries[name].get("dtype") == "I64":
        values = list(struct.unpack(f"<{len(content) // 8}q", content))
        for _ in range(pick.randint(1, 3)):
            values[pick.randint(0, len(values) - 1)] = pick.choice((0, 1, 2, 3, 5, -1, -7, 2**40, 2**63 - 1, -(2**63)))
        content = struct.pack(f"<{len(values)}q", *values)
    else:
        at = pick.randint(0, len(content) - 1)
        size = min(len(content) - at, pick.randint(1, 8))
        content = content[:at] + pick.choice((b"\xff" * size, bytes(size), pick.randbytes(size))) + content[at + size :]
    shard.data[name] = content
    if name != "block_checksums":
        shard.checksums()
    case.files[shard_file(number)] = shard.join()
    reseal(case, number)


def set_table(case: Case, number: int, table: bytes, both: bool = True, **fields: object) -> None:
    """Give a shard another table of rows, in its file and, if asked, in its own copy; checksums fit."""
    hostile(case, number)
    shard = parts(case, number)
    if both and shard is not None and "rows_parquet" in shard.data and "block_checksums" in shard.entries:
        shard.data["rows_parquet"] = table
        shard.entries["rows_parquet"]["shape"] = [len(table)]
        shard.checksums()
        shard.place()
        case.files[shard_file(number)] = shard.join()
    case.files[rows_file(number)] = table
    reseal(case, number, **fields)


def author_parquet(case: Case, pick: Pick) -> None:
    """Bytes of a table change, and the checksums are right, so that the parser gets to see them."""
    number = any_shard(pick)
    content = case.files.get(rows_file(number))
    if not isinstance(content, bytes) or len(content) < 12:
        return
    changed = bytearray(content)
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for _ in range(pick.randint(1, 4)):
        low = pick.choice((0, max(0, min(footer, len(changed) - 1))))
        at = pick.randint(low, len(changed) - 1)
        changed[at] = pick.choice((changed[at] ^ 1 << pick.randint(0, 7), pick.randint(0, 255), 0, 127, 128, 255))
    if not pick.randint(0, 7):
        at = pick.randint(0, len(changed))
        changed[at:at] = pick.randbytes(pick.randint(1, 8))
    set_table(case, number, bytes(changed), both=bool(pick.randint(0, 2)))


def author_table(case: Case, pick: Pick) -> None:
    """A table of rows is sound parquet, but not what a store expects."""
    number = any_shard(pick)
    ids = [id_ for id_, home in case.home.items() if home == number]
    try:
        table = pick.choice(TABLES)(ids, pick)
        content = encoded(table, pick)
    # Parquet cannot hold just anything that Arrow can.
    except (pa.ArrowException, UnicodeEncodeError):
        return
    # Where the line of another shard is lost, the row that goes by the name of one of its rows is the author's.
    with suppress(UnicodeDecodeError):
        case.free |= {
            case.home[id_] for id_ in table.column(0).to_pylist() if isinstance(id_, str) and id_ in case.home
        }
    set_table(case, number, content)
