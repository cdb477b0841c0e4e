"""A model behind an OpenAI-compatible server: vLLM, `transformers serve`, or a hosted one, through OpenAI's client.

Replies are kept before they are handed on. The client retries what may pass (a busy server, a broken line), with
back-off and as the server says; what is left is recorded with its request, and the others go on.
"""

from __future__ import annotations

import base64
import hashlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from gapprobe.chat.base import Reply, Request
from gapprobe.chat.kept import KeptReplies, is_log_prob
from gapprobe.errors import ConfigError, ModelError
from gapprobe.files import told_count

if TYPE_CHECKING:
    import openai

GIVE_UP = 20  # failures in a row, after which nothing more is asked
_LOCAL = {"localhost", "127.0.0.1", "::1"}
_KINDS = ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpeg"))


class ServerSettings(BaseModel):
    """Where a server is, how it is asked, and what it charges.

    Attributes:
        url: of its OpenAI-compatible interface, ending in /v1 as a rule.
        api_key_env: environment variable that holds the key, OPENAI_API_KEY for one; none if the server wants none.
        concurrency: requests under way at once.
        requests_per_minute: at most; no limit if not given.
        timeout: seconds until a request counts as lost.
        retries: of a request that failed for a reason that may pass.
        length_field: how the server calls the length limit of a reply.
        stop: whether the server takes stop texts; replies are cut at them all the same.
        sampling: whether the model takes temperature and seed; those that reason by themselves often do not.
        json_schema: whether the server takes a schema that replies must follow.
        log_probs: whether the server gives log-probabilities.
        image_tokens: that a picture costs, for estimates; 765 is what GPT-4o reads of one of 512 to 1,024 pixels.
        price_input: of a million tokens read, in any currency; estimates name no price if not given.
        price_output: of a million tokens written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    # Other variables of whoever runs a configuration of somebody else's are none of its business.
    api_key_env: Annotated[str, Field(pattern=r"^([A-Z0-9_]+_)?API_KEY$")] | None = None
    concurrency: Annotated[int, Field(ge=1, le=256)] = 4
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    timeout: Annotated[float, Field(gt=0)] = 120.0
    retries: Annotated[int, Field(ge=0)] = 5
    length_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    stop: bool = True
    sampling: bool = True
    json_schema: bool = False
    log_probs: bool = False
    image_tokens: Annotated[int, Field(ge=0)] = 765
    price_input: Annotated[float, Field(ge=0)] | None = None
    price_output: Annotated[float, Field(ge=0)] | None = None

    @field_validator("url")
    @classmethod
    def _an_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("it must look like https://api.openai.com/v1 or http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("it must hold no user, password or query; name the key's variable in api_key_env")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _no_key_in_the_clear(self) -> ServerSettings:
        parts = urlsplit(self.url)
        if self.api_key_env and parts.scheme == "http" and parts.hostname not in _LOCAL:
            raise ValueError(f"the key would travel unencrypted to {parts.hostname}; use https")
        return self

    @property
    def place(self) -> str:
        """Return what tells this server from others: host and path."""
        parts = urlsplit(self.url)
        return f"{parts.netloc.lower()}{parts.path}"


class ChatServer:
    """A model behind a server; what it replied is kept in a folder.

    Args:
        settings: of the server.
        model: its name there.
        folder: keeps the replies.

    Raises:
        OutputError: the folder cannot be used.
    """

    def __init__(self, settings: ServerSettings, model: str, folder: Path) -> None:
        self.settings, self.model = settings, model
        self._kept = KeptReplies(folder)
        self._next, self._lock = 0.0, threading.Lock()
        self._answered, self._lost = False, 0

    def ask(self, requests: Sequence[Request], *, progress: bool = False) -> Iterator[tuple[int, Reply]]:
        """Yield replies as they come, each with the index of its request; those that are kept come first.

        Requests that are equal are sent once. The first is sent alone: a wrong key or name costs one request.

        Args:
            requests: what is asked.
            progress: show a bar.

        Raises:
            ConfigError: something must be sent, and the key's variable is not set or `openai` is not installed.
            ModelError: the server refuses everything (a wrong key, no such model, no credit), or many requests in a row
                have failed. What was replied is kept.
        """
        from tqdm import tqdm

        where: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            where.setdefault(reply_key(self.settings, self.model, request), []).append(i)
        with tqdm(total=len(requests), disable=not progress, desc=f"asking {self.model}", unit="reply") as bar:
            wanted: list[tuple[str, Request]] = []
            for key, places in where.items():
                kept = self._kept.get(key)
                if kept is None:
                    wanted.append((key, requests[places[0]]))
                    continue
                for i in places:
                    yield i, kept
                bar.update(len(places))
            for key, reply in self._sent(wanted):
                for i in where[key]:
                    yield i, reply
                bar.update(len(where[key]))

    @cached_property
    def _client(self) -> openai.OpenAI:
        return _client(self.settings)

    def _sent(self, wanted: Sequence[tuple[str, Request]]) -> Iterator[tuple[str, Reply]]:
        if not wanted:
            return
        _ = self._client  # a missing key is found here, before anything is sent and in no thread
        left = iter(wanted)
        running: dict[Future[Reply], str] = {}
        pool = ThreadPoolExecutor(self.settings.concurrency, thread_name_prefix="gapprobe-chat")
        try:
            while True:
                room = self.settings.concurrency if self._answered else 1
                while len(running) < room and (item := next(left, None)) is not None:
                    running[pool.submit(self._one, *item)] = item[0]
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    key = running.pop(future)
                    reply = future.result()
                    self._lost = self._lost + 1 if reply.error else 0
                    self._answered = self._answered or not reply.error
                    if self._lost >= GIVE_UP or (not self._answered and reply.error_kind == "network"):
                        lost = told_count(self._lost, "request")
                        raise ModelError(
                            f"{self.model} at {self.settings.place}: {lost} in a row failed, the last with: "
                            f"{reply.error}. What was answered is kept; mend that and run the same again"
                        )
                    yield key, reply
        finally:
            # What is under way is paid for: it is waited for and kept.
            pool.shutdown(wait=True, cancel_futures=True)

    def _one(self, key: str, request: Request) -> Reply:
        self._pace()
        reply = self._reply(request)
        if not reply.error:
            self._kept.put(key, reply)
        return reply

    def _pace(self) -> None:
        """Wait until a request may be sent."""
        if self.settings.requests_per_minute is None:
            return
        with self._lock:
            now = time.monotonic()
            at = max(self._next, now)
            self._next = at + 60 / self.settings.requests_per_minute
        time.sleep(at - now)

    def _reply(self, request: Request) -> Reply:
        import openai

        where = f"{self.model} at {self.settings.place}"
        try:
            found = self._client.chat.completions.create(**self._body(request))
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise ModelError(f"{where} cannot be asked: {_told(error)}") from error
        except openai.APIStatusError as error:
            if error.status_code == 402 or getattr(error, "code", None) == "insufficient_quota":
                raise ModelError(f"{where} cannot be asked: {_told(error)}") from error
            kind = "server" if error.status_code >= 500 or error.status_code == 429 else "request"
            kind = "refused" if getattr(error, "code", None) == "content_filter" else kind
            return Reply(error=_told(error), error_kind=kind)
        except openai.APIConnectionError as error:
            return Reply(error=f"no connection: {error.__cause__ or error}", error_kind="network")
        # A server may send anything, and the client hands it on unchecked.
        except (openai.OpenAIError, ValueError, TypeError) as error:
            return Reply(error=f"no reply of the agreed form: {error}", error_kind="reply")
        return _read(found, request)

    def _body(self, request: Request) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": request.text}]
        if request.image is not None:
            content.insert(0, {"type": "image_url", "image_url": {"url": data_url(request.image)}})
        system = [{"role": "system", "content": request.system}] if request.system else []
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*system, {"role": "user", "content": content}],
            self.settings.length_field: request.max_tokens,
        }
        if self.settings.sampling:
            body |= {"temperature": request.temperature, "seed": request.seed}
        if request.stop and self.settings.stop:
            body["stop"] = list(request.stop)
        if request.schema is not None and self.settings.json_schema:
            schema = {"name": "reply", "schema": dict(request.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if request.log_probs and self.settings.log_probs:
            body["logprobs"] = True
        return body


def reply_key(settings: ServerSettings, model: str, request: Request) -> str:
    """Return the key under which the reply to a request is kept."""
    return hashlib.sha256("\0".join((settings.place, model, request.key)).encode()).hexdigest()


def picture_kind(image: bytes) -> str | None:
    """Return what an encoded picture is of the kinds that every server reads, "png" or "jpeg"; None if neither."""
    return next((name for start, name in _KINDS if image.startswith(start)), None)


def data_url(image: bytes) -> str:
    """Return an encoded PNG or JPEG as a data URL.

    Raises:
        ConfigError: it is neither.
    """
    kind = picture_kind(image)
    if kind is None:
        raise ConfigError("a picture that is sent must be PNG or JPEG")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"


def _client(settings: ServerSettings) -> openai.OpenAI:
    try:
        import openai
    except ImportError as error:
        raise ConfigError('models behind a server need the package openai: pip install "gapprobe[api]"') from error
    key = "none"
    if settings.api_key_env is not None:
        key = os.environ.get(settings.api_key_env, "")
        if not key:
            raise ConfigError(f"the environment variable {settings.api_key_env} is not set; put the server's key there")
    # The key is given, so that the client does not send OPENAI_API_KEY to whatever server this is.
    return openai.OpenAI(api_key=key, base_url=settings.url, timeout=settings.timeout, max_retries=settings.retries)


def _read(found: Any, request: Request) -> Reply:
    """Return what stands in a completion, as far as it is one."""
    try:
        choice = found.choices[0]
        text, refusal = choice.message.content, getattr(choice.message, "refusal", None)
        ended = getattr(choice, "finish_reason", None)
    except (AttributeError, IndexError, TypeError):
        return Reply(error="the reply holds no message", error_kind="reply")
    if refusal or ended == "content_filter":
        return Reply(error=f"refused: {refusal or 'the content filter stopped the reply'}", error_kind="refused")
    if not isinstance(text, str):
        return Reply(error="the reply holds no text", error_kind="reply")
    # Half of a surrogate pair is no text, and could not be written to any file.
    text = text.encode("utf-8", "replace").decode("utf-8").lstrip()
    cut = min((text.index(stop) for stop in request.stop if stop in text), default=len(text))
    usage = getattr(found, "usage", None)
    return Reply(
        text=text[:cut].strip(),
        log_probs=_log_probs(getattr(choice, "logprobs", None)) if request.log_probs else None,
        prompt_tokens=_count(getattr(usage, "prompt_tokens", None)),
        completion_tokens=_count(getattr(usage, "completion_tokens", None)),
        model=str(getattr(found, "model", "") or ""),
        cut=ended == "length" and cut == len(text),
    )


def _log_probs(told: Any) -> tuple[float, ...] | None:
    try:
        values = tuple(token.logprob for token in told.content)
    except (AttributeError, TypeError):
        return None
    return values if values and all(is_log_prob(value) for value in values) else None


def _count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _told(error: openai.APIStatusError) -> str:
    """Return a server's complaint on one line, not at length."""
    return f"HTTP {error.status_code}: {' '.join(error.message.split())[:300]}"
