"""Stores elsewhere: what arrives is a store, whatever kills, damages or lies on the way."""

import errno
import io
import json
import logging
import multiprocessing
import re
import shutil
import socket
import threading
import time
import traceback
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from types import SimpleNamespace

import fsspec
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import xxhash
from aiobotocore.client import AioBaseClient
from botocore.exceptions import EndpointConnectionError
from fsspec.implementations.local import LocalFileOpener
from fsspec.implementations.memory import MemoryFileSystem
from moto.server import ThreadedMotoServer

from gapprobe.errors import ConfigError, OutputError, StoreError
from gapprobe.store import disk
from gapprobe.store.care.verify import verify_store
from gapprobe.store.format import VERSION, ShardRecord, StoredRow
from gapprobe.store.manifest import read_manifest
from gapprobe.store.reader import open_store
from gapprobe.store.remote import places, pushing, transfers
from gapprobe.store.remote.places import Place, Stopped, piece_size
from gapprobe.store.remote.pulling import pull
from gapprobe.store.remote.pushing import push
from gapprobe.store.remote.transfers import Transfer, in_order
from gapprobe.store.writer import StoreWriter
from tests.store.elsewhere import KEYS, pull_and_die, push_and_die
from tests.store.rows import HEADER, equal, holds, make_row, reheaded, some_rows, write


@pytest.fixture(scope="module")
def server():
    """A server of the S3 protocol, over HTTP."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture(scope="module")
def options(server):
    return {"endpoint_url": server, "client_kwargs": {"region_name": "us-east-1"}, **KEYS}


@pytest.fixture(scope="module")
def new_bucket(options):
    numbers = count()

    def make():
        name = f"bucket-{next(numbers)}"
        fsspec.filesystem("s3", **options).call_s3("create_bucket", Bucket=name)
        return f"s3://{name}/runs/mine"

    return make


@pytest.fixture
def s3(new_bucket, options):
    """URL and options of a place on the S3 server."""
    return new_bucket(), options


@pytest.fixture
def memory():
    yield "memory://runs/mine", {}
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def place_of(kind, request, tmp_path):
    return request.getfixturevalue(kind) if kind in ("s3", "memory") else (f"{kind}://{tmp_path}/there/mine", {})


@pytest.fixture(params=["s3", "memory", "elsewhere"])
def far(request, tmp_path):
    """Places where a push has to write."""
    return place_of(request.param, request, tmp_path)


@pytest.fixture(params=["s3", "memory", "elsewhere", "file"])
def place(request, tmp_path):
    """All kinds of places; into a folder of this machine, a writer pulls."""
    return place_of(request.param, request, tmp_path)


@pytest.fixture(scope="module")
def nine_rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("nine") / "store"
    write(path, some_rows(9))
    return path


@pytest.fixture
def store(nine_rows, tmp_path):
    """Nine rows in three shards."""
    return shutil.copytree(nine_rows, tmp_path / "here")


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.store.elsewhere"])
    return context


def send(path, place, **kwargs):
    return push(path, place[0], storage_options=place[1], progress=False, **kwargs)


def fetch(place, path, **kwargs):
    return pull(place[0], path, storage_options=place[1], progress=False, **kwargs)


def files(place):
    fs, root = fsspec.core.url_to_fs(place[0], **place[1])
    fs.invalidate_cache()
    return {name.removeprefix(root).lstrip("/"): fs.cat_file(name) for name in fs.find(root)}


def change(place, name, content):
    fs, root = fsspec.core.url_to_fs(place[0], **place[1])
    if content is None:
        fs.rm_file(f"{root}/{name}")
    else:
        fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        fs.pipe_file(f"{root}/{name}", content)


def flipped(content, at=-100):
    changed = bytearray(content)
    changed[at] ^= 1
    return bytes(changed)


def shortened(content):
    return content[:-1]


def recorded_there_is_whole(place):
    """Whatever the manifest there names lies there with the size and the checksums that it names."""
    found = files(place)
    for line in found.get("manifest.jsonl", b"").splitlines():
        record = ShardRecord.from_line(line)
        shard = found[f"shards/{record.shard:06d}.safetensors"]
        assert len(shard) == record.shard_bytes
        assert xxhash.xxh3_128_hexdigest(shard) == record.shard_xxh128
        assert len(found[f"rows/{record.shard:06d}.parquet"]) == record.rows_bytes
    return len(found.get("manifest.jsonl", b"").splitlines())


# --- there and back


def test_there_and_back(store, place, tmp_path):
    sent = send(store, place)
    assert (sent.shards, sent.rows, sent.skipped) == (3, 9, 0)
    size = sum(f.stat().st_size for folder in ("shards", "rows") for f in (store / folder).iterdir())
    assert sent.bytes == size or place[0].startswith("file:")
    assert recorded_there_is_whole(place) == 3
    assert not [name for name in files(place) if ".tmp-" in name]
    brought = fetch(place, tmp_path / "back")
    assert (brought.shards, brought.rows, brought.skipped) == (3, 9, 0)
    assert holds(tmp_path / "back", some_rows(9))
    assert open_store(tmp_path / "back").ids == open_store(store).ids
    for name in ("store.json", "manifest.jsonl", "shards/000001.safetensors", "rows/000002.parquet"):
        assert (tmp_path / "back" / name).read_bytes() == (store / name).read_bytes()


def test_a_second_time_only_new_shards_move(store, place, tmp_path):
    send(store, place)
    fetch(place, tmp_path / "back")
    assert send(store, place) == fetch(place, tmp_path / "back") == Transfer(0, 0, 0, 3)
    write(store, some_rows(14))
    for done in (send(store, place), fetch(place, tmp_path / "back")):
        assert (done.shards, done.rows, done.skipped) == (2, 5, 3)
    assert holds(tmp_path / "back", some_rows(14))


@pytest.mark.usefixtures("store")
def test_a_plain_web_server_is_pulled_from(tmp_path):
    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=tmp_path)) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_address[1]}/here"
        assert pull(url, tmp_path / "back", progress=False).rows == 9
        web.shutdown()
    assert holds(tmp_path / "back", some_rows(9))


def test_an_empty_store_arrives_as_one(place, tmp_path):
    StoreWriter(tmp_path / "here", HEADER).close()
    assert send(tmp_path / "here", place) == Transfer(0, 0, 0, 0)
    fetch(place, tmp_path / "back")
    assert open_store(tmp_path / "back").header == HEADER


def test_what_lies_there_is_read_without_gapprobe(store, s3):
    send(store, s3)
    fs, root = fsspec.core.url_to_fs(s3[0], **s3[1])
    wanted = some_rows(9)[4]
    for line in fs.cat_file(f"{root}/manifest.jsonl").splitlines():
        number = f"{json.loads(line)['shard']:06d}"
        ids = pq.read_table(io.BytesIO(fs.cat_file(f"{root}/rows/{number}.parquet")))["id"].to_pylist()
        if wanted.id in ids:
            shard = safetensors.torch.load(fs.cat_file(f"{root}/shards/{number}.safetensors"))
            first, last = shard["offsets"][ids.index(wanted.id) :][:2].tolist()
            assert torch.equal(shard["residual.03"][first:last], wanted.residual[2])
            return
    pytest.fail("the row is in no shard")


def test_versions_of_shards_stay_told(store, memory, tmp_path):
    """store.json keeps the versions of the first; shards that others made say so, there and back."""
    send(store, memory)
    other = reheaded(versions={"torch": "3.0.0"})
    write(tmp_path / "other", [make_row("a", 2), make_row("b", 1)], other)
    send(tmp_path / "other", memory)
    write(tmp_path / "third", [make_row("c", 1)], reheaded(versions={"torch": "4.0.0"}))
    fetch(memory, tmp_path / "third")
    told = {r.rows: r.versions for r in open_store(tmp_path / "third").records}
    assert told == {1: None, 2: {"torch": "3.0.0"}, 3: {"torch": "2.13.0"}}


def test_rows_sealed_while_a_push_runs_go_with_the_next(store, far, monkeypatch):
    real = Place.send

    def send_while_capture_goes_on(self, *args):
        write(store, some_rows(14))
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "send", send_while_capture_goes_on)
        assert send(store, far).rows == 9
    assert recorded_there_is_whole(far) == 3
    assert send(store, far).rows == 5


def test_where_files_are_seen_while_they_are_written_they_have_other_names(store, tmp_path, monkeypatch):
    opened, real = [], LocalFileOpener._open

    def noting(self):
        if "w" in self.mode:
            opened.append(self.path.rpartition("/")[2])
        real(self)

    monkeypatch.setattr(LocalFileOpener, "_open", noting)
    send(store, (f"elsewhere://{tmp_path}/there", {}))
    assert len(opened) == 8
    assert all(name.startswith(".tmp-") for name in opened)


def test_s3_is_found_by_the_environment(store, s3, monkeypatch, tmp_path):
    for name, value in (
        ("ENDPOINT_URL", s3[1]["endpoint_url"]),
        ("ACCESS_KEY_ID", KEYS["key"]),
        ("SECRET_ACCESS_KEY", KEYS["secret"]),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    push(store, s3[0], progress=False)
    assert pull(s3[0], tmp_path / "back", progress=False).rows == 9


# --- large objects


def large_row(name):
    """20 MiB in one layer: two parts of an upload."""
    seed = torch.Generator().manual_seed(1)
    residual = torch.randn(1, 5, 1 << 20, generator=seed)
    numbers, codes = torch.arange(5), torch.zeros(5, dtype=torch.uint8)
    return StoredRow(name, {}, residual, numbers, numbers, codes, codes)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "store"
    write(path, [large_row("a")], reheaded(layers=(0,), width=1 << 20, dtype="float32", positions=()))
    return path


@pytest.fixture
def calls(monkeypatch):
    """Names of the S3 calls made, in order."""
    made, real = [], AioBaseClient._make_api_call

    async def noting(self, operation, arguments):
        made.append(operation)
        return await real(self, operation, arguments)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", noting)
    return made


def test_a_large_object_goes_in_parts_and_is_verified_by_what_s3_received(large, s3, calls, tmp_path):
    send(large, s3)
    assert calls.count("UploadPart") == 2
    after = calls[calls.index("CompleteMultipartUpload") + 1 :]
    # Nothing but the manifest is read back: S3's own checksums are compared.
    assert after.count("GetObject") <= 1
    assert recorded_there_is_whole(s3) == 1
    fetch(s3, tmp_path / "back")
    assert equal(open_store(tmp_path / "back").row("a"), large_row("a"))


def test_where_s3_tells_no_md5_the_object_is_read_back(large, s3, calls, monkeypatch):
    monkeypatch.setattr(places.Digest, "etags", property(lambda _: set()))
    send(large, s3)
    assert calls[calls.index("CompleteMultipartUpload") :].count("GetObject") >= 2


def test_a_shard_damaged_here_never_appears_there_and_leaves_no_parts(large, s3, tmp_path):
    shutil.copytree(large, tmp_path / "here")
    shard = tmp_path / "here" / "shards" / "000000.safetensors"
    shard.write_bytes(flipped(shard.read_bytes(), 19 << 20))
    with pytest.raises(StoreError, match=r"1 of 1 shards are bad: .*000000.*gapprobe store repair"):
        send(tmp_path / "here", s3)
    assert set(files(s3)) == {"store.json"}
    fs, root = fsspec.core.url_to_fs(s3[0], **s3[1])
    assert fs.list_multipart_uploads(root.partition("/")[0]) == []


def test_pieces_grow_where_s3_would_not_take_so_many():
    for size in (0, 1, 5 << 30, 160 << 30, 5 << 40):
        assert -(-size // piece_size(size)) <= 10_000
        assert piece_size(size) % (1 << 20) == 0
    assert piece_size(1 << 30) == 16 << 20


# --- kills


@pytest.mark.parametrize(("kind", "step"), [("s3", 13), ("elsewhere", 4)])
def test_a_push_killed_at_any_call_goes_on(kind, step, store, processes, new_bucket, options, tmp_path):
    base, opened = (new_bucket(), options) if kind == "s3" else (f"elsewhere://{tmp_path}/there", {})
    resumed = []
    for number in count(1, step):
        place = f"{base}/{number}", opened
        child = processes.Process(target=push_and_die, args=(store, *place, number))
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -9
        before = recorded_there_is_whole(place)
        done = send(store, place)
        assert done.rows == 9 - 3 * before
        resumed.append(done.shards)
        assert recorded_there_is_whole(place) == 3
        assert not [name for name in files(place) if ".tmp-" in name]
        fetch(place, tmp_path / f"back {number}")
        assert holds(tmp_path / f"back {number}", some_rows(9))
    assert len(resumed) >= 3
    # Shards that had arrived were not sent again, the later the kill the fewer.
    assert resumed[0] == 3
    assert min(resumed) < 3


def test_a_pull_killed_at_any_call_goes_on(store, s3, processes, tmp_path):
    send(store, s3)
    resumed = []
    for number in count(1, 13):
        path = tmp_path / f"back {number}"
        child = processes.Process(target=pull_and_die, args=(s3[0], path, s3[1], number))
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -9
        if (path / "store.json").exists():
            assert [p for p in verify_store(path) if "published but not sealed" not in p.what] == []
        resumed.append(fetch(s3, path).shards)
        assert holds(path, some_rows(9))
        assert not list(path.rglob(".tmp-*"))
    assert len(resumed) >= 3
    assert resumed[0] == 3
    assert min(resumed) < 3


def test_progress_is_recorded_while_a_push_runs(store, memory, monkeypatch):
    written, real = [], Place.write

    def write_and_note(self, name, content):
        real(self, name, content)
        written.append((name, recorded_there_is_whole(memory)))

    monkeypatch.setattr(Place, "write", write_and_note)
    monkeypatch.setattr(pushing, "RECORD_SECONDS", 0)
    send(store, memory)
    assert written == [("store.json", 0), *(("manifest.jsonl", number) for number in (1, 2, 3))]


def test_a_network_that_fails_keeps_what_arrived(store, s3, monkeypatch):
    real, sent = AioBaseClient._make_api_call, []

    async def failing(self, operation, arguments):
        if operation == "PutObject" and "shards" in arguments["Key"]:
            sent.append(arguments["Key"])
            if len(sent) == 3:
                raise EndpointConnectionError(
                    endpoint_url=f"http://me:hidden@there/{KEYS['secret']}?X-Signature=hidden"
                )
        return await real(self, operation, arguments)

    with monkeypatch.context() as patch:
        patch.setattr(AioBaseClient, "_make_api_call", failing)
        with pytest.raises(OutputError, match="the same command goes on") as failed:
            send(store, s3, transfers=1)
    assert "http://there/…?…" in str(failed.value)
    assert "hidden" not in "".join(traceback.format_exception(failed.value))
    assert recorded_there_is_whole(s3) == 2
    assert send(store, s3).shards == 1


def test_what_arrived_but_was_not_recorded_is_not_sent_again(store, far):
    send(store, far)
    change(far, "manifest.jsonl", None)
    there = files(far)
    change(far, "shards/000001.safetensors", flipped(there["shards/000001.safetensors"]))
    change(far, "shards/000002.safetensors", there["shards/000002.safetensors"][:-1])
    done = send(store, far)
    assert (done.shards, done.rows) == (2, 9)
    assert recorded_there_is_whole(far) == 3
    change(far, "manifest.jsonl", None)
    assert send(store, far, verify=False).shards == 3


# --- damage


def test_pull_refuses_damaged_shards_and_brings_all_others(store, place, tmp_path):
    write(store, some_rows(12))
    send(store, place)
    there = files(place)
    names = [f"shards/{number:06d}.safetensors" for number in range(4)]
    change(place, names[0], flipped(there[names[0]]))
    change(place, names[1], there[names[1]][:-1])
    change(place, names[2], None)
    with pytest.raises(StoreError, match="3 of 4 shards are bad: ") as refused:
        fetch(place, tmp_path / "back")
    told = str(refused.value)
    assert re.search(r"000000\S* is damaged: its checksum", told)
    assert re.search(r"000001\S* has \d+ bytes, the manifest says", told)
    assert re.search(r"000002\S* is missing", told)
    assert holds(tmp_path / "back", some_rows(12)[9:])
    change(place, names[0], there[names[0]] + b"more")
    with pytest.raises(StoreError, match=r"000000.* has more than the"):
        fetch(place, tmp_path / "back")
    assert holds(tmp_path / "back", some_rows(12)[9:])


def test_push_mends_what_is_damaged_there(store, s3):
    send(store, s3)
    there = files(s3)
    change(s3, "shards/000000.safetensors", there["shards/000000.safetensors"][:-1])
    change(s3, "rows/000001.parquet", None)
    done = send(store, s3)
    assert (done.shards, done.rows) == (2, 0)
    # Of the second shard only the table had to be sent.
    assert done.bytes < len(there["shards/000000.safetensors"]) * 2
    change(s3, "shards/000002.safetensors", flipped(there["shards/000002.safetensors"]))
    assert send(store, s3).shards == 0
    assert send(store, s3, recheck=True).shards == 1
    assert files(s3) == there


@pytest.mark.parametrize(("spoil", "verify"), [(flipped, True), (shortened, True), (shortened, False)])
def test_bytes_that_change_on_their_way_are_noticed(store, s3, monkeypatch, spoil, verify, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(AioBaseClient, "_make_api_call", spoiling(spoil))
        with pytest.raises(OutputError, match=r"000001.*changed on its way"):
            send(store, s3, verify=verify)
    assert recorded_there_is_whole(s3) < 3
    send(store, s3)
    fetch(s3, tmp_path / "back")
    assert holds(tmp_path / "back", some_rows(9))


def test_what_an_unverified_push_let_through_is_noticed_by_pull(store, s3, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(AioBaseClient, "_make_api_call", spoiling(flipped))
        send(store, s3, verify=False)
    with pytest.raises(StoreError, match=r"000001.*its checksum"):
        fetch(s3, tmp_path / "back")


def spoiling(spoil):
    """Make one shard arrive other than it was sent, with S3's own checksums made of what arrives."""
    real = AioBaseClient._make_api_call

    async def call(self, operation, arguments):
        if operation == "PutObject" and arguments["Key"].endswith("000001.safetensors"):
            arguments["Body"] = spoil(arguments["Body"])
        return await real(self, operation, arguments)

    return call


@pytest.mark.parametrize("place", ["s3", "file"], indirect=True)
def test_a_shard_damaged_here_is_named_and_the_others_are_sent(store, place, tmp_path):
    shard = store / "shards" / "000001.safetensors"
    shard.write_bytes(flipped(shard.read_bytes()))
    with pytest.raises(StoreError, match=r"1 of 3 shards are bad: .*000001.*gapprobe store repair"):
        send(store, place)
    fetch(place, tmp_path / "back")
    assert holds(tmp_path / "back", some_rows(9)[:3] + some_rows(9)[6:])


# --- whose store it is


@pytest.mark.parametrize("place", ["s3", "file"], indirect=True)
@pytest.mark.parametrize("field", ["dtype", "layers", "processor"])
def test_the_store_of_another_run_is_refused_by_name(store, place, field, tmp_path):
    send(store, place)
    before = files(place)
    other = reheaded(**{field: {"dtype": "float32", "layers": (0, 1, 2), "processor": "x"}[field]})
    write(tmp_path / "other", [make_row("a", 2, other)], other)
    for action in (lambda: send(tmp_path / "other", place), lambda: fetch(place, tmp_path / "other")):
        with pytest.raises(StoreError, match=rf"different runs: {field} is .* there and .* here"):
            action()
    assert files(place) == before
    assert holds(tmp_path / "other", [make_row("a", 2, other)])


def test_a_place_that_holds_something_else_is_refused(store, place, tmp_path):
    change(place, "thesis.tex", b"years of work")
    with pytest.raises(OutputError, match=r"holds 'thesis.tex' and is no gapprobe store"):
        send(store, place)
    with pytest.raises(StoreError, match="is no gapprobe store"):
        fetch(place, tmp_path / "back")
    assert set(files(place)) == {"thesis.tex"}
    assert not (tmp_path / "back").exists()
    change(place, "store.json", b'{"name": "a shop"}')
    for action in (lambda: send(store, place), lambda: fetch(place, tmp_path / "back")):
        with pytest.raises(StoreError, match="does not describe a gapprobe store"):
            action()


def test_a_newer_format_is_refused(store, memory, tmp_path):
    send(store, memory)
    header = json.loads(files(memory)["store.json"]) | {"version": VERSION + 1}
    change(memory, "store.json", json.dumps(header).encode())
    for action in (lambda: send(store, memory), lambda: fetch(memory, tmp_path / "back")):
        with pytest.raises(StoreError, match=rf"memory.*format version {VERSION + 1}"):
            action()


@pytest.mark.parametrize("place", ["memory", "file"], indirect=True)
def test_pull_adds_to_a_store_with_other_rows(store, place, tmp_path):
    """Of a shard whose rows are partly here the others are taken, and a second pull moves nothing."""
    send(store, place)
    rows = some_rows(9)
    write(tmp_path / "other", [make_row("mine", 3), rows[1], *rows[6:]])
    done = fetch(place, tmp_path / "other")
    assert (done.shards, done.rows) == (2, 5)
    assert holds(tmp_path / "other", [*rows, make_row("mine", 3)])
    assert fetch(place, tmp_path / "other").shards == 0


@pytest.mark.parametrize("place", ["s3", "file"], indirect=True)
def test_copies_that_captured_different_rows_meet_in_one_place(store, place, tmp_path):
    rows = some_rows(21)
    shutil.copytree(store, tmp_path / "copy")
    write(store, rows[9:15])
    write(tmp_path / "copy", rows[15:])
    send(store, place)
    # Both have shards 3 and 4; those of the second copy get other numbers there.
    assert send(tmp_path / "copy", place).rows == 6
    assert recorded_there_is_whole(place) == 7
    for path in (store, tmp_path / "copy", tmp_path / "back"):
        fetch(place, path)
        assert holds(path, rows)
        assert send(path, place).shards == 0


def test_copies_with_rows_in_common_are_refused_unless_the_rows_are_all_there(store, s3, tmp_path):
    rows = some_rows(15)
    send(store, s3)
    write(tmp_path / "same", rows[:9], batch=9)
    assert send(tmp_path / "same", s3).shards == 0
    write(tmp_path / "mixed", rows[6:12], batch=6)
    before = files(s3)
    with pytest.raises(StoreError, match=r"went on separately.*shard 0 has the row 'row 6'.*gapprobe store merge"):
        send(tmp_path / "mixed", s3)
    assert files(s3) == before
    # What the message says to do.
    fetch(s3, tmp_path / "new")
    write(tmp_path / "new", [open_store(tmp_path / "mixed").row(id_) for id_ in open_store(tmp_path / "mixed").ids])
    send(tmp_path / "new", s3)
    fetch(s3, tmp_path / "back")
    assert holds(tmp_path / "back", rows[:12])


def test_a_folder_takes_the_rows_it_lacks_of_any_copy(store, tmp_path):
    """There a writer adds them, and needs nobody to merge first."""
    write(tmp_path / "mixed", some_rows(15)[6:12], batch=6)
    push(store, tmp_path / "there", progress=False)
    assert push(tmp_path / "mixed", tmp_path / "there", progress=False).rows == 3
    assert holds(tmp_path / "there", some_rows(12))


@pytest.mark.parametrize("damage", [flipped, shortened, lambda content: content + b"1", lambda _: None])
def test_a_push_refuses_to_guess_which_rows_are_there(store, memory, damage, tmp_path):
    send(store, memory)
    change(memory, "rows/000001.parquet", damage(files(memory)["rows/000001.parquet"]))
    write(tmp_path / "other", [make_row("other", 2)])
    with pytest.raises(StoreError, match=r"rows/000001.parquet is missing or damaged.*Push again with recheck"):
        send(tmp_path / "other", memory)
    send(store, memory, recheck=True)
    assert send(tmp_path / "other", memory).rows == 1


def test_a_push_that_crosses_another_is_told(store, s3, monkeypatch, tmp_path):
    write(tmp_path / "other", [make_row("other", 2)])
    real = Place.send

    def crossed(self, *args):
        if args[0] == "shards/000000.safetensors":
            monkeypatch.setattr(Place, "send", real)
            send(tmp_path / "other", s3)
        return real(self, *args)

    monkeypatch.setattr(Place, "send", crossed)
    with pytest.raises(StoreError, match="another push"):
        send(store, s3)
    send(tmp_path / "other", s3, recheck=True)
    send(store, s3, recheck=True)
    fetch(s3, tmp_path / "back")
    assert holds(tmp_path / "back", [*some_rows(9), make_row("other", 2)])


# --- what a hostile place says


def lines(place):
    return [json.loads(line) for line in files(place)["manifest.jsonl"].splitlines()]


def line(**fields):
    return ShardRecord(0, 1, 1, 1, "0" * 32, 1, "0" * 64, later=fields).to_line()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shard": "../../../outside"}, "field 'shard'"),
        ({"shard": -1}, "out of range"),
        ({"shard": 10**10}, "out of range"),
        ({"shard_bytes": 10**15}, "are free"),
        ({"shard_bytes": 10**30}, "out of range"),
        ({"shard_xxh128": 5}, "field 'shard_xxh128'"),
        ({"rows": 10**12, "tokens": 10**12}, "is missing"),
    ],
)
def test_a_hostile_manifest_is_refused_and_writes_nothing(memory, fields, message, tmp_path):
    change(memory, "store.json", HEADER.to_json())
    change(memory, "manifest.jsonl", line(**fields))
    with pytest.raises(StoreError if "free" not in message else OutputError, match=message):
        fetch(memory, tmp_path / "in" / "back")
    assert {p.name for p in tmp_path.rglob("*")} <= {"in", "back", "store.json", "lock", "shards", "rows"}


def test_a_header_that_would_take_all_memory_is_refused(memory, tmp_path):
    change(memory, "store.json", reheaded(layers=tuple(range(10_000)), width=(1 << 24) - 1).to_json())
    with pytest.raises(StoreError, match="10000 layers of width 16777215"):
        fetch(memory, tmp_path / "back")


def test_hostile_shards_are_refused(store, memory, tmp_path):
    """Checksums that fit are no proof: what is in the file has to fit, too."""
    send(store, memory)
    there = files(memory)
    record = read_manifest(store).records[0]
    tricks = {
        "is damaged: no safetensors header": b"\xff" * 5000,
        "is damaged: rows_parquet is": there["shards/000001.safetensors"],
    }
    for message, content in tricks.items():
        told = replace(record, shard_bytes=len(content), shard_xxh128=xxhash.xxh3_128_hexdigest(content))
        change(memory, "manifest.jsonl", told.to_line())
        change(memory, "shards/000000.safetensors", content)
        with pytest.raises(StoreError, match=rf"000000.*{message}"):
            fetch(memory, tmp_path / "back")
        assert open_store(tmp_path / "back").ids == ()


def test_lines_that_contradict_each_other_are_refused_and_torn_ones_do_not_count(store, memory, tmp_path):
    send(store, memory)
    text = files(memory)["manifest.jsonl"]
    first, second, third = text.splitlines(keepends=True)
    change(memory, "manifest.jsonl", first + flipped(second) + first + third[:-20])
    with pytest.warns(UserWarning, match="line 2 of its manifest is damaged"):
        fetch(memory, tmp_path / "back")
    assert holds(tmp_path / "back", some_rows(3))
    # A push makes it whole.
    assert send(store, memory).rows == 6
    assert sorted(files(memory)["manifest.jsonl"].splitlines()) == sorted(text.splitlines())
    change(memory, "manifest.jsonl", text + line(shard=1))
    for action in (lambda: send(store, memory), lambda: fetch(memory, tmp_path / "back")):
        with pytest.raises(StoreError, match="line 4 contradicts an earlier line about shard 1"):
            action()


def test_files_beyond_all_measure_are_not_read(store, memory, monkeypatch, tmp_path):
    send(store, memory)
    monkeypatch.setattr(transfers, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(StoreError, match=r"manifest.jsonl is damaged: it has more than 100 bytes"):
        fetch(memory, tmp_path / "back")
    change(memory, "store.json", b" " * (1 << 20) + b"{}")
    with pytest.raises(StoreError, match=r"store.json is damaged: it has more than"):
        fetch(memory, tmp_path / "back")


def test_fields_of_a_later_version_stay_in_lines_that_are_there(store, memory):
    send(store, memory)
    texts = files(memory)["manifest.jsonl"].splitlines(keepends=True)
    later = replace(read_manifest(store).records[0], later={"later": 1}).to_line()
    change(memory, "manifest.jsonl", later + texts[1])
    send(store, memory)
    assert files(memory)["manifest.jsonl"] == later + texts[1] + texts[2]


# --- errors


@pytest.mark.parametrize("url", ["nowhere://user:se/cr@et@host/x", "dropbox://user:se/cr@et@host/x"])
def test_a_place_that_fsspec_does_not_know_is_said_without_credentials(store, url, tmp_path):
    for action in (lambda: push(store, url), lambda: pull(url, tmp_path / "back")):
        with pytest.raises(StoreError, match=r"://host/x cannot be reached: .*gapprobe\[remote\]") as refused:
            action()
        assert "cr@et" not in "".join(traceback.format_exception(refused.value))


def test_a_server_that_is_away_is_said_without_credentials(store, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        options = {
            "endpoint_url": f"http://127.0.0.1:{port}",
            "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1},
            **KEYS,
        }
        for action, kind in (
            (lambda: push(store, "s3://bucket/x", storage_options=options), OutputError),
            (lambda: pull("s3://bucket/x", tmp_path / "back", storage_options=options), StoreError),
        ):
            with pytest.raises(kind, match=rf"127\.0\.0\.1:{port}.*the same command goes on") as failed:
                action()
            text = "".join(traceback.format_exception(failed.value))
            assert "a-secret-key" not in text
            assert "an-access-key" not in text


def test_a_bucket_that_does_not_exist_is_not_made(store, s3):
    with pytest.raises(OutputError, match="bucket does not exist"):
        push(store, "s3://misspelt/x", storage_options=s3[1], progress=False)
    assert not fsspec.filesystem("s3", **s3[1]).exists("s3://misspelt")


def test_a_disk_without_room_is_said_before_anything_moves(store, memory, monkeypatch, tmp_path):
    send(store, memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match="are free"):
        fetch(memory, tmp_path / "back")
    monkeypatch.undo()
    monkeypatch.setattr(disk, "reserve", full)
    with pytest.raises(OutputError, match="disk is full.*What was pulled is safe"):
        fetch(memory, tmp_path / "back")
    monkeypatch.undo()
    fetch(memory, tmp_path / "back")
    assert holds(tmp_path / "back", some_rows(9))


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_transfer_that_is_told_to_stop_stops_and_leaves_nothing(store, s3):
    send(store, s3)
    there = Place(s3[0], s3[1], StoreError)
    pieces = there.pieces("shards/000000.safetensors")
    there.stop.set()
    with pytest.raises(Stopped):
        next(pieces)
    with pytest.raises(Stopped):
        there.send("shards/000009.safetensors", 1, [b"1"], "", len)
    with pytest.raises(Stopped):
        there.digest([b"1"])
    assert "shards/000009.safetensors" not in files(s3)


def test_no_transfers_at_all_are_refused(store, memory, tmp_path):
    with pytest.raises(ConfigError, match="transfers 0 must be at least 1"):
        send(store, memory, transfers=0)
    with pytest.raises(ConfigError, match="transfers 0 must be at least 1"):
        fetch(memory, tmp_path / "back", transfers=0)


def test_results_come_in_order_and_those_nobody_takes_are_dropped(memory):
    there = Place(memory[0], {}, StoreError)
    there.parallel = True

    def work(item):
        time.sleep(0.02 * (item % 2 == 0))
        if item == 6:
            raise StoreError("six")
        return item

    dropped = []
    results = in_order(work, range(20), 2, there, dropped.append)
    taken = [next(results) for _ in range(3)]
    results.close()
    assert taken == [0, 1, 2]
    assert sorted(dropped)[0] == 3
    assert there.stop.is_set()
    there.stop.clear()
    taken = []
    with pytest.raises(StoreError, match="six"):
        taken.extend(in_order(work, range(20), 2, there, dropped.append))
