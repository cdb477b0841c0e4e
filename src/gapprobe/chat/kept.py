"""Replies on disk, by what was asked: what was paid for once is not asked again, and a killed run loses nothing.

One SQLite file, so that several programs may share it and a kill leaves whole replies only.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from gapprobe.chat.base import Reply
from gapprobe.errors import OutputError

FILE = "replies.sqlite3"
_WAIT = 60.0  # seconds for another program's write to end


class KeptReplies:
    """Replies in `folder`, which is made. May be used from several threads.

    Raises:
        OutputError: the file is no database, or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(self._path, timeout=_WAIT, check_same_thread=False, isolation_level=None)
            # Whoever gave the file may have put functions into its schema.
            self._base.execute("pragma trusted_schema = off")
            self._base.execute("create table if not exists replies (key text primary key, reply text not null)")
        except (OSError, sqlite3.Error) as error:
            raise self._refused(error) from error

    def get(self, key: str) -> Reply | None:
        """Return what was replied to a request; None where it was not, or what is kept is no reply."""
        try:
            with self._lock:
                found = self._base.execute("select reply from replies where key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise self._refused(error) from error
        return None if found is None else _reply(found[0])

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply, durably before this returns."""
        try:
            with self._lock:
                self._base.execute("insert or replace into replies values (?, ?)", (key, json.dumps(asdict(reply))))
        except sqlite3.Error as error:
            raise self._refused(error) from error

    def close(self) -> None:
        """Let the file go."""
        self._base.close()

    def _refused(self, error: Exception) -> OutputError:
        return OutputError(
            f"kept replies {self._path}: {error}. If it is damaged or none of gapprobe's, move it away: what it held "
            "is asked again"
        )


def _reply(text: object) -> Reply | None:
    """Return a reply from its JSON, or None: whoever gave the file may have put anything there."""
    try:
        told = json.loads(cast(str, text))
        fine = all(isinstance(told[name], str) for name in ("text", "error", "error_kind", "model"))
        counts = (told["prompt_tokens"], told["completion_tokens"])
        fine = fine and isinstance(told["cut"], bool) and all(count is None or type(count) is int for count in counts)
        log_probs = None if told["log_probs"] is None else tuple(told["log_probs"])
        fine = fine and all(is_log_prob(value) for value in log_probs or ())
        return Reply(**told | {"log_probs": log_probs}) if fine else None
    except (TypeError, KeyError, ValueError):
        return None


def is_log_prob(value: Any) -> bool:
    """Return whether a value can be the logarithm of a probability; rounding may leave it a hair above zero."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value < 1e-3
