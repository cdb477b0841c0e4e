"""A folder anywhere that fsspec reaches: files that appear whole or not at all, streams, checksums, errors in words.

Knows no stores; `remote` does. No message of this module shows a user name, a password, a key or a signed query.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from typing import Any, cast

import xxhash
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.spec import AbstractBufferedFile

from gapprobe.errors import GapprobeError, StoreError
from gapprobe.store.disk import TEMPORARY

# Large enough that a request's delay does not matter; a transfer holds about three of them in memory.
PIECE = 16 << 20
# S3 takes 10,000 parts an object.
_MAX_PARTS = 9_000
# There an upload appears whole when it is complete. Elsewhere a temporary is renamed.
_ATOMIC = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss"})
_CREDENTIAL = re.compile("secret|passw|passphrase|token|key|credential|sas|signature", re.IGNORECASE)
# `user@` or `user:password@`; a password may hold anything, slashes too.
_USER = re.compile(r"(?<=://)[^\s/@:]*(?::(\S*))?@")
_QUERY = re.compile(r"(https?://[^\s?]*\?)[^\s\"']*")


class Damaged(StoreError):
    """A file that is missing or not what it should be; the others may be sound."""


class Stopped(Exception):
    """A transfer was told to give up, because another one failed. Never reaches a user."""


class Digest:
    """XXH128 of a file given in pieces, and the ETags that S3 has for an object uploaded in the same pieces."""

    def __init__(self, etags: bool) -> None:
        self._whole = xxhash.xxh3_128()
        self._etags = etags
        self._parts: list[bytes] = []

    def update(self, piece: bytes) -> None:
        """Take the next piece."""
        self._whole.update(piece)
        if self._etags:
            self._parts.append(hashlib.md5(piece, usedforsecurity=False).digest())

    @property
    def xxh128(self) -> str:
        """Return the XXH128 of all pieces, in hex."""
        return self._whole.hexdigest()

    @property
    def etags(self) -> set[str]:
        """Return the MD5 of the one piece, or the MD5 of the MD5s of several with their number."""
        several = hashlib.md5(b"".join(self._parts), usedforsecurity=False).hexdigest()
        return {part.hex() for part in self._parts[:1] if len(self._parts) == 1} | {f"{several}-{len(self._parts)}"}


class Place:
    """A folder that fsspec reaches.

    Args:
        url: where, as fsspec writes it; a plain path is a local folder.
        options: for fsspec's file system, such as `endpoint_url` or `key` for S3.
        failure: the class of errors when the place cannot be reached, read or written. A single bad file is `Damaged`.

    Attributes:
        shown: the URL as messages may show it.
        local: whether it is a folder of this machine, `root` its path.
        parallel: whether several transfers at once are safe. fsspec promises it of asynchronous file systems alone.
        stop: once set, transfers end with `Stopped`.

    Raises:
        StoreError: fsspec does not know such a place, or lacks a package for it.
    """

    def __init__(self, url: str, options: Mapping[str, Any], failure: type[GapprobeError]) -> None:
        self._secrets = _credentials({"options": options, "password": (_USER.search(url) or [None, None])[1]})
        self.shown = self._clean(url).rstrip("/")
        self.failure = failure
        self.stop = threading.Event()
        with self._failing(f"{self.shown} cannot be reached"):
            try:
                fs, root = url_to_fs(url, **options)
            # An unknown protocol is a ValueError, a missing package an ImportError that names it.
            except (ImportError, ValueError) as error:
                raise StoreError(
                    f"{self.shown} cannot be reached: {self._clean(str(error))}. "
                    "For S3: pip install 'gapprobe[remote]'; other places need the package that fsspec names for them."
                ) from self._cause(error)
        self._fs: AbstractFileSystem = fs
        self.root = str(root).rstrip("/")
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self.local = "file" in protocols
        self.parallel = self.local or bool(fs.async_impl)
        self._atomic = bool(protocols & _ATOMIC)
        self._etags = bool(protocols & {"s3", "s3a"})

    def __str__(self) -> str:
        """Return the URL as messages may show it."""
        return self.shown

    def at(self, name: str) -> str:
        """Return where a file is, as messages may show it."""
        return f"{self.shown}/{name}"

    def names(self, folder: str = "") -> dict[str, int]:
        """Return the sizes of what lies in a folder, by name; nothing when there is no such folder."""
        with self._failing(f"{self.at(folder)} cannot be listed"):
            self._fs.invalidate_cache()
            try:
                entries = self._fs.ls(self._path(folder), detail=True)
            except FileNotFoundError:
                return {}
            found = {entry["name"].rstrip("/").rpartition("/")[2]: int(entry.get("size") or 0) for entry in entries}
            # Object stores may list the folder itself, as an object with an empty name.
            found.pop("", None)
            return found

    def read(self, name: str, limit: int) -> bytes | None:
        """Return a file's content, or None when there is none.

        Raises:
            Damaged: it has more than `limit` bytes.
        """
        with self._failing(f"{self.at(name)} cannot be read"):
            self._fs.invalidate_cache()
            try:
                with self._fs.open(self._path(name), "rb", block_size=PIECE, cache_type="none") as stream:
                    content = cast(bytes, stream.read(limit + 1))
            except FileNotFoundError:
                return None
        if len(content) > limit:
            raise Damaged(f"{self.at(name)} is damaged: it has more than {limit} bytes")
        return content

    def pieces(self, name: str) -> Generator[bytes, None, None]:
        """Yield a file's content, a piece at a time.

        Raises:
            Damaged: there is no such file.
        """
        with self._failing(f"{self.at(name)} cannot be read"):
            try:
                with self._fs.open(self._path(name), "rb", block_size=PIECE, cache_type="none") as stream:
                    while piece := cast(bytes, stream.read(PIECE)):
                        if self.stop.is_set():
                            raise Stopped
                        yield piece
            except FileNotFoundError as error:
                raise Damaged(f"{self.at(name)} is missing") from error

    def write(self, name: str, content: bytes) -> None:
        """Put a small file there, replacing one of that name."""
        with self._new_file(name, PIECE) as stream:
            stream.write(content)

    def digest(self, pieces: Iterable[bytes]) -> Digest:
        """Return the checksums of what would be sent as these pieces."""
        digest = Digest(self._etags)
        for piece in pieces:
            if self.stop.is_set():
                raise Stopped
            digest.update(piece)
        return digest

    def send(self, name: str, size: int, pieces: Iterable[bytes], xxh128: str, sent: Callable[[int], object]) -> Digest:
        """Put a file there that comes in pieces of `piece_size(size)`. Nothing appears unless its checksum is right.

        Raises:
            Damaged: what came has another checksum.
        """
        digest = Digest(self._etags)
        with self._new_file(name, piece_size(size)) as stream:
            for piece in pieces:
                if self.stop.is_set():
                    raise Stopped
                stream.write(piece)
                digest.update(piece)
                sent(len(piece))
            if digest.xxh128 != xxh128:
                raise Damaged(f"what was read to be sent as {name} does not have the checksum of the manifest")
        return digest

    def holds(self, name: str, size: int, digest: Digest, content: bool = True) -> bool:
        """Return whether a file there has this size and content.

        The content is compared by the checksum that S3 itself made of what it received, where it tells one that we can
        make too; else by reading it back.
        """
        with self._failing(f"{self.at(name)} cannot be read"):
            self._fs.invalidate_cache()
            try:
                info = self._fs.info(self._path(name))
            except FileNotFoundError:
                return False
        if int(info["size"] or 0) != size:
            return False
        if not content or (self._etags and str(info.get("ETag")).strip('"') in digest.etags):
            return True
        back = xxhash.xxh3_128()
        for piece in self.pieces(name):
            back.update(piece)
        return back.hexdigest() == digest.xxh128

    @contextmanager
    def _new_file(self, name: str, piece: int) -> Generator[Any, None, None]:
        """Yield a stream whose content appears under `name` when the block ends well, and never in part."""
        target = self._path(name)
        folder, _, file = target.rpartition("/")
        # The same name each time, so that the next push replaces what a killed one left.
        draft = target if self._atomic else f"{folder}/{TEMPORARY}{file}"
        with self._failing(f"{self.at(name)} cannot be written"):
            if not self._atomic:
                # Object stores need no folders, and some would make a bucket of a misspelt name.
                self._fs.makedirs(folder, exist_ok=True)
            stream = self._fs.open(draft, "wb", block_size=piece)
            try:
                yield stream
                stream.close()
                if draft != target:
                    self._fs.mv(draft, target)
            except BaseException:
                # The first failure is the one to tell.
                with suppress(Exception):
                    _abandon(stream)
                if draft != target:
                    with suppress(Exception):
                        self._fs.rm_file(draft)
                raise

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")

    @contextmanager
    def _failing(self, what: str) -> Generator[None, None, None]:
        """Turn whatever the place raises into an error of ours."""
        try:
            yield
        except (GapprobeError, Stopped):
            raise
        # Each backend has errors of its own, many of them no OSError.
        except Exception as error:
            reason = self._clean(str(error).strip() or type(error).__name__)
            raise self.failure(
                f"{what}: {reason[:300]}. What has arrived whole is kept: the same command goes on where this stopped."
            ) from self._cause(error)

    def _clean(self, text: str) -> str:
        """Return the text without credentials."""
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return _QUERY.sub(r"\1…", _USER.sub("", text))

    def _cause(self, error: Exception) -> Exception | None:
        """Return the error for a traceback to show, unless it would show credentials."""
        return error if self._clean(str(error)) == str(error) else None


def piece_size(size: int) -> int:
    """Return how large the pieces are in which a file of `size` bytes is sent: whole MiB, not too many."""
    return max(PIECE, -(-size // _MAX_PARTS // (1 << 20)) << 20)


def _abandon(stream: Any) -> None:
    """End a half-written stream. Closing it, as `with` and the garbage collector do, would publish the half."""
    if isinstance(stream, AbstractBufferedFile):
        stream.closed = True
        stream.discard()
    else:
        stream.close()


def _credentials(options: Mapping[str, Any]) -> list[str]:
    """Return the values of options, nested ones too, that must not be shown."""
    found: list[str] = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            found += _credentials(value)
        # Replacing a letter or two would only make messages unreadable.
        elif isinstance(value, str) and len(value) > 3 and _CREDENTIAL.search(name):
            found.append(value)
    return found
