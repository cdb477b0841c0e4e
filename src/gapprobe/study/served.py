"""A study of a model behind a server: its answers and the gap. Activations are not seen, so no step reads any."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

import pandas as pd

from gapprobe.chat.base import Reply, Request
from gapprobe.chat.kept import FILE, KeptReplies
from gapprobe.chat.server import ChatServer, ServerSettings, picture_kind, reply_key
from gapprobe.errors import ConfigError, DataError
from gapprobe.study.asking import AskedWithChoices, Call, call_of
from gapprobe.study.config import ChoicesConfig
from gapprobe.study.multiple_choice import Compared
from gapprobe.study.results import Json
from gapprobe.study.steps import key_of
from gapprobe.study.study import INSIDE, REPLIES, Study
from gapprobe.tasks.examples import Example
from gapprobe.tasks.images import ImageSource

if TYPE_CHECKING:
    from collections.abc import Callable

    from gapprobe.models.model import Model
    from gapprobe.store.reader import Store

AT_ONCE = 512  # requests held in memory, with their pictures
PICTURES = 64  # encoded ones kept at hand
CHARACTERS = 4  # of a token of English, at a guess


@dataclass(frozen=True)
class Cost:
    """What asking will cost, at an estimate.

    Attributes:
        requests: to be sent; those that were answered before are none.
        kept: requests that were.
        read: tokens that the model will read: a quarter of the characters, and what the server counts for a picture.
        written: tokens that it will write at most.
        price: of both, by the prices of the settings; None where they name none.
    """

    requests: int
    kept: int
    read: int
    written: int
    price: float | None

    @property
    def told(self) -> str:
        """Return it in words."""
        price = "" if self.price is None else f", about {self.price:,.2f} in the currency of the prices"
        return (
            f"{self.requests:,} requests ({self.kept:,} more are answered already), about {self.read:,} tokens read "
            f"and at most {self.written:,} written{price}"
        )


class ServedStudy(Study):
    """One study of a model that answers behind a server; see `Study`."""

    @property
    def settings(self) -> ServerSettings:
        """Return what is known of the server."""
        return cast(ServerSettings, self.config.server)

    @cached_property
    def server(self) -> ChatServer:
        """Return the model, as far as it can be asked. Replies are kept in the output folder."""
        self.claim()
        return ChatServer(self.settings, self.config.model, self.out / REPLIES)

    @property
    def model(self) -> Model:  # pyright: ignore[reportIncompatibleVariableOverride] (there is none here)
        """Refuse: there is nothing to trace."""
        raise self._unseen()

    def capture(self) -> Store:
        """Refuse: there is nothing to trace."""
        raise self._unseen()

    def _unseen(self) -> ConfigError:
        return ConfigError(
            f"study {self.config.name} asks {self.config.model} behind a server, which shows no activations: it has "
            f"the steps {', '.join(self.step_names)}"
        )

    def answered(self) -> pd.DataFrame:
        """Ask what was not asked yet, and return all answers by row id; see `Asking.answered`.

        Further columns: `mean_log_prob`, NaN where the server gives none, and of each reply `prompt_tokens`,
        `completion_tokens` and `model`, by the server's account.
        """
        return self._answered

    @cached_property
    def _answered(self) -> pd.DataFrame:
        return self._asked(self._calls)

    def _asked(self, calls: Mapping[Call, Example]) -> pd.DataFrame:
        found: dict[str, dict[str, object]] = {}
        items = list(calls.items())
        for start in range(0, len(items), AT_ONCE):
            requests: dict[str, Request] = {}
            for call, example in items[start : start + AT_ONCE]:
                try:
                    requests[_row(call)] = self._request(example)
                except DataError as error:
                    found[_row(call)] = _line(Reply(error=str(error), error_kind="image"))
            rows = list(requests)
            for i, reply in self.server.ask(list(requests.values()), progress=self.progress):
                found[rows[i]] = _line(reply)
        return pd.DataFrame.from_dict(found, orient="index").loc[[_row(call) for call in calls]]

    def _request(self, example: Example) -> Request:
        return Request(
            example.text,
            None if example.image is None else self._encoded(example.image),
            max_tokens=self.config.max_new_tokens,
            seed=self.config.seed,
            stop=(self.template.stop,),
            log_probs=self.settings.log_probs,
        )

    def _encoded(self, image: ImageSource) -> bytes:
        """Return a picture as it is sent; calls that follow each other show the same ones."""
        if image.name not in self._pictures:
            while len(self._pictures) >= PICTURES:
                self._pictures.pop(next(iter(self._pictures)))
            self._pictures[image.name] = encoded(image)
        else:
            self._pictures[image.name] = self._pictures.pop(image.name)  # the last used goes last
        return self._pictures[image.name]

    @cached_property
    def _pictures(self) -> dict[str, bytes]:
        return {}

    @cached_property
    def rows(self) -> dict[Call, str]:
        """Return the id of the row of every call."""
        return {call: _row(call) for call in self._calls}

    def with_choices(self, settings: ChoicesConfig) -> AskedWithChoices:
        """Ask every question that has distractors with options; see `Asking.with_choices`."""
        choices, trials = self._with_options(settings)
        rows = self._asked({call_of(example): example for trial in trials for example in trial.calls})
        nothing = Compared({}, "", "How probable the options were is not read from a model behind a server.")
        return AskedWithChoices(trials, choices, rows, lambda example: _row(call_of(example)), lambda: nothing)

    def answers(self, what: str, calls: Sequence[Example]) -> list[str | None]:  # noqa: ARG002 (kept by content)
        """Return answers to calls beside the study's; None for one that failed."""
        rows = self._asked({call_of(call): call for call in calls})
        told = rows["answer"][rows["error"].isna()].to_dict()
        return [told.get(_row(call_of(call))) for call in calls]

    def cost(self) -> Cost:
        """Return what the study's calls will cost, those with options too. Sends nothing and writes nothing."""
        asked = dict(self._calls)
        if self.config.choices is not None:
            _, trials = self._with_options(self.config.choices)
            asked |= {call_of(example): example for trial in trials for example in trial.calls}
        folder = self.out / REPLIES
        kept = 0
        left: list[Example] = []
        # Nothing is made where nothing was kept.
        with closing(KeptReplies(folder)) if (folder / FILE).exists() else nullcontext() as replies:
            for example in asked.values():
                try:
                    request = self._request(example)
                except DataError:  # its picture cannot be read: it will not be sent
                    continue
                key = reply_key(self.settings, self.config.model, request)
                if replies is not None and replies.get(key) is not None:
                    kept += 1
                else:
                    left.append(example)
        pictures = sum(example.image is not None for example in left)
        read = sum(len(example.text) for example in left) // CHARACTERS + pictures * self.settings.image_tokens
        written = len(left) * self.config.max_new_tokens
        per_read, per_written = self.settings.price_input, self.settings.price_output
        price = None if per_read is None or per_written is None else (read * per_read + written * per_written) / 1e6
        return Cost(len(left), kept, read, written, price)

    def _once(self, name: str, compute: Callable[[], Json]) -> Json:
        if name in INSIDE:
            raise self._unseen()
        return self._steps.once(name, self._key(name, _hash(self.answered())), compute)

    @property
    def step_names(self) -> tuple[str, ...]:
        """Return the names of the steps after asking."""
        return tuple(name for name in super().step_names if name not in INSIDE)

    def stand(self) -> list[tuple[str, str]]:
        """Return every step with how far it is, sending nothing; see `gapprobe.study.planning.status`."""
        cost = self.cost()
        total = cost.requests + cost.kept
        found = [("asking", f"{cost.kept:,} of {total:,} requests")]
        if cost.requests:
            return found + [(name, "to do") for name in self.step_names]
        answers = _hash(self.answered())  # all are kept: nothing is sent
        return found + [(name, self._steps.state(name, self._key(name, answers))) for name in self.step_names]

    def _described(self) -> Json:
        # A hosted name stands for one version today and another tomorrow; some servers say which answered.
        answering = sorted(set(self.answered()["model"].dropna()))
        told = {"family": "server", "architecture": f"behind {self.settings.place}", "revision": ", ".join(answering)}
        return told | dict.fromkeys(("layers", "width", "parameters")) | {"source": self.config.model}

    def _inside(self) -> Json:
        return {"layers": [], **dict.fromkeys(INSIDE)}


def encoded(image: ImageSource) -> bytes:
    """Return a picture as PNG or JPEG: its own bytes if they are that, else what it shows as PNG.

    Raises:
        DataError: it cannot be decoded.
    """
    picture = image.load()
    data = image.read()
    if picture_kind(data) is not None:
        return data
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _row(call: Call) -> str:
    return hashlib.sha256(repr(call).encode("utf-8", "backslashreplace")).hexdigest()[:32]


def _line(reply: Reply) -> dict[str, object]:
    log_probs = reply.log_probs
    return {
        "answer": None if reply.error else reply.text,
        "error": reply.error or None,
        "error_kind": reply.error_kind or None,
        "mean_log_prob": sum(log_probs) / len(log_probs) if log_probs else float("nan"),
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "model": reply.model or None,
    }


def _hash(rows: pd.DataFrame) -> str:
    return key_of(rows[["answer", "error"]].to_json(orient="split"))
