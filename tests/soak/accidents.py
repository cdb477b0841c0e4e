"""What happens to a store without anybody's intent, or to its folder: bytes and files change, checksums do not.

Each mutation notes in the `Case` what follows for readers.
"""

import struct
from math import prod
from pathlib import Path

from tests.soak.case import (
    MANIFEST,
    STORE,
    Case,
    Folder,
    Link,
    Parts,
    Pick,
    Pipe,
    Sparse,
    lines,
    parts,
    reseal,
    rows_file,
    shard_file,
)


def some_file(case: Case, pick: Pick) -> str:
    """Return the name of a file that has content."""
    return pick.choice([name for name, content in case.files.items() if isinstance(content, bytes) and content])


def blamed(case: Case, name: str, last: int) -> None:
    """Note an accident to a file, up to a byte."""
    if name.startswith("rows/"):
        # The shard has a copy.
        case.seen = True
    elif name.startswith("shards/"):
        case.seen, case.harmless = True, False
        content = case.files[name]
        length = int.from_bytes(content[:8], "little") if isinstance(content, bytes) else 0
        # Readers check a shard's header and size; the data, only verify.
        if last >= 8 + length:
            case.free.add(int(Path(name).stem))
    elif name == MANIFEST:
        case.seen, case.harmless = True, False
    elif name == STORE:
        case.harmless = False


def flip(case: Case, pick: Pick) -> None:
    """Some bytes become others."""
    name = some_file(case, pick)
    content = bytearray(case.files[name])
    # Headers and footers are where the interest lies; data take up most of the room.
    at = pick.randint(0, len(content) - 1) if pick.randint(0, 1) else pick.randint(0, min(1500, len(content) - 1))
    before, end = bytes(content), min(len(content), at + pick.randint(1, 4))
    for i in range(at, end):
        content[i] = pick.choice((content[i] ^ 1 << pick.randint(0, 7), pick.randint(0, 255), 0, 255, 0x30, 0x39))
    if content != before:
        blamed(case, name, end - 1)
        case.files[name] = bytes(content)


def cut(case: Case, pick: Pick) -> None:
    """A file ends too early, or goes on with bytes of no meaning."""
    name = some_file(case, pick)
    content = case.files[name]
    at = pick.choice((0, 1, 7, 8, 9, len(content) - 1, pick.randint(0, len(content) - 1)))
    if pick.randint(0, 2):
        blamed(case, name, 0)
        case.files[name] = content[:at]
    elif name in (STORE, MANIFEST):
        blamed(case, name, 0)
        # What is torn off a line at the end of the manifest is no damage.
        case.seen = case.seen and name != MANIFEST
        case.files[name] = content + pick.choice((b"\0" * 100, b" ", b"{", b"\n", b"\xff" * 9, content))
    else:
        blamed(case, name, 0)
        case.files[name] = content + pick.choice((b"\0", b"\0" * 4096, content))


def lose(case: Case, pick: Pick) -> None:
    """A file is missing, or stands in another one's place."""
    name = some_file(case, pick)
    other = some_file(case, pick)
    if pick.randint(0, 1):
        blamed(case, name, 0)
        del case.files[name]
    elif name != other and name.split("/")[0] == other.split("/")[0]:
        for swapped in (name, other):
            blamed(case, swapped, len(case.files[swapped]))
        case.files[name], case.files[other] = case.files[other], case.files[name]


def shuffle_lines(case: Case, pick: Pick) -> None:
    """Lines of the manifest are lost, doubled, moved, torn, or others stand between."""
    found = lines(case)
    if not found:
        return
    case.harmless = False
    at = pick.randint(0, len(found) - 1)
    garbage = (b"\n", b"{}\n", b"null\n", b"\0" * 4096 + b"\n", b'{"line_sha256":"' + b"0" * 64 + b'"}\n', b"x" * 5000)
    match pick.randint(0, 5):
        case 0:
            del found[at]
            case.seen = True
        case 1:
            found.insert(0, found[at])
        case 2:
            found.append(found.pop(at))
        case 3:
            found.append(found[at][: pick.randint(0, len(found[at]) - 1)])
        case 4:
            found.insert(at, pick.choice(garbage))
        case _:
            found = [line.replace(b"\n", b"\r\n") for line in found]
            case.seen = True
    case.files[MANIFEST] = b"".join(found)


# ---- layout: what else can lie in a folder

STRAY = (
    "shards/0000001.safetensors", "shards/9999999999.safetensors", "shards/1000000000.safetensors",
    "shards/٠٠٠٠٠٧.safetensors", "shards/a\nb.safetensors", "shards/000007.safetensors", "rows/000007.parquet",
    "shards/.tmp-1-aa", "rows/.tmp-1-aa", ".tmp-1-aa", "notes.txt", "shards/x", "rows/000001.parquet.bak",
    "shards/-00001.safetensors", "lock", "damaged",
)  # fmt: skip


def stray(case: Case, pick: Pick) -> None:
    """A file lies about that no line speaks of."""
    name = pick.choice(STRAY)
    if name in case.files and name != "lock":
        return
    sound = [content for content in case.files.values() if isinstance(content, bytes)]
    content = pick.choice((b"", b"\0" * 9, Folder(), pick.choice(sound)))
    # A shard that an author published is adopted by the next writer, and the last number leaves none for the next one.
    case.harmless &= name not in ("shards/000007.safetensors", "shards/1000000000.safetensors", "lock")
    case.files[name] = content


OUTSIDE = ("victim.txt", "folder", "000000.safetensors", "000000.parquet", "missing", "manifest.jsonl", ".")


def misplaced(case: Case, pick: Pick) -> None:
    """A link, pipe or folder stands where a file should."""
    names = (STORE, MANIFEST, "lock", *map(shard_file, range(3)), *map(rows_file, range(3)))
    name = pick.choice((*names, "shards/000007.safetensors", "shards/.tmp-1-aa", "rows/.tmp-1-aa"))
    up = "../" * (1 + name.count("/"))
    link = Link(pick.choice((f"{up}outside/{pick.choice(OUTSIDE)}", Path(name).name, "/dev/zero", "/dev/full")))
    case.files[name] = pick.choice((link, link, link, Pipe(), Folder()))
    case.anything, case.harmless = True, False


def linked_folder(case: Case, pick: Pick) -> None:
    """A folder of the store is a link to one outside."""
    name = pick.choice(("shards", "rows", "damaged"))
    for file in [file for file in case.files if file.startswith(f"{name}/")]:
        del case.files[file]
    case.files[name] = Link(f"../outside/{pick.choice(OUTSIDE)}")
    case.anything, case.harmless = True, False


def sparse(case: Case, pick: Pick) -> None:
    """A file claims to be enormous; the manifest, and the shard's own header, may agree."""
    name = some_file(case, pick)
    content, size = case.files[name], pick.choice((2**24, 2**36, 2**40))
    case.harmless, case.anything = False, True
    case.files[name] = Sparse(content, size)
    agrees, number = pick.randint(0, 1), int(Path(name).stem) if "/" in name else 0
    if name.startswith("rows/") and agrees:
        reseal(case, number, rows_bytes=size)
    if name.startswith("shards/") and agrees:
        case.files[name] = content
        shard = parts(case, number)
        if shard is not None and "offsets" in shard.data:
            case.enormous = True
            case.files[name] = enormous(shard, size // 64)
            reseal(case, number, shard_bytes=case.files[name].size, tokens=size // 64)


def enormous(shard: Parts, tokens: int) -> Sparse:
    """Return a shard with the same rows, the last of which has that many tokens, all zeros."""
    ends = (*struct.unpack(f"<{len(shard.data['offsets']) // 8}q", shard.data["offsets"])[:-1], tokens)
    at = 0
    for name, entry in shard.entries.items():
        if name.startswith(("residual.", "token_")):
            entry["shape"] = [tokens, *entry["shape"][1:]]
        elif name == "block_checksums":
            entry["shape"] = [-(-at // (1 << 20)), 8]
        size = prod(entry["shape"]) * {"I64": 8, "F32": 4, "BF16": 2}.get(entry["dtype"], 1)
        entry["data_offsets"] = [at, at + size]
        at += size
    shard.data = {}
    head, offsets = shard.join(), shard.entries["offsets"]["data_offsets"][0]
    return Sparse(head, len(head) + at, (len(head) + offsets, struct.pack(f"<{len(ends)}q", *ends)))
