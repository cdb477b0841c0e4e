"""Places to push to: a real S3 server, a file system that is neither local nor atomic; and processes that die there."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import fsspec
import torch
from aiobotocore.client import AioBaseClient
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem

from gapprobe.store.remote import pulling, pushing

KEYS = {"key": "an-access-key", "secret": "a-secret-key"}


class Elsewhere(LocalFileSystem):
    """Folders that fsspec does not know to be local, as those of an SFTP server: a file is seen while it is written."""

    protocol = "elsewhere"


fsspec.register_implementation("elsewhere", Elsewhere)


def die_at(number: int) -> None:
    """Be killed at the given call that a transfer makes: of S3, or that changes a disk, in mid-write."""
    done = 0

    def die_now() -> bool:
        nonlocal done
        done += 1
        return done == number

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def counting(name, real):
        def call(*args, **kwargs):
            if die_now():
                if name in ("write", "pwrite"):
                    real(args[0], args[1][: len(args[1]) // 2], *args[2:])
                if isinstance(args[0], LocalFileOpener):
                    args[0].flush()
                die()
            return real(*args, **kwargs)

        return call

    for name in ("pwrite", "link", "rename", "fsync"):
        setattr(os, name, counting(name, getattr(os, name)))
    LocalFileOpener.write = counting("write", LocalFileOpener.write)
    make_call = AioBaseClient._make_api_call

    async def counting_s3(self, operation, arguments):
        if die_now():
            die()
        return await make_call(self, operation, arguments)

    AioBaseClient._make_api_call = counting_s3


def push_and_die(path: Path, url: str, options: Mapping[str, object], number: int) -> None:
    """Entry of a child process: push, recording every shard at once, and be killed."""
    torch.set_num_threads(1)
    pushing.RECORD_SECONDS = 0
    die_at(number)
    pushing.push(path, url, storage_options=options, transfers=2, progress=False)


def pull_and_die(url: str, path: Path, options: Mapping[str, object], number: int) -> None:
    """Entry of a child process: pull, and be killed."""
    torch.set_num_threads(1)
    die_at(number)
    pulling.pull(url, path, storage_options=options, transfers=2, progress=False)
