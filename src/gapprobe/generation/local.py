"""A language model that is loaded here and answers, in the place of one behind a server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from gapprobe.chat.base import Reply, Request
from gapprobe.errors import ConfigError
from gapprobe.models.model import Model
from gapprobe.tasks.examples import Example
from gapprobe.tracing.answers import Decoding
from gapprobe.tracing.plan import row_ids
from gapprobe.tracing.positions import parse_positions
from gapprobe.tracing.run import capture

AT = ("last_input",)  # what capture keeps beside the answer: one token, of the embeddings alone


class LocalChat:
    """A model from `load_model`. Its replies are captures, kept in stores in `folder`, one for each way to decode."""

    def __init__(self, model: Model, folder: Path, *, batch_size: int = 8) -> None:
        self.model, self.folder, self.batch_size = model, folder, batch_size

    def ask(self, requests: Sequence[Request], *, progress: bool = False) -> Iterator[tuple[int, Reply]]:
        """Yield replies, each with the index of its request; a schema is not held to, for nothing here can.

        Raises:
            ConfigError: a request has a picture.
        """
        if any(request.image is not None for request in requests):
            raise ConfigError("a model that is loaded here is asked without pictures; `gp.capture` shows it some")
        ways: dict[Decoding, list[int]] = {}
        for i, request in enumerate(requests):
            # Without a temperature nothing is drawn, and the seed tells no two requests apart.
            seed = request.seed if request.temperature else 0
            decoding = Decoding(request.max_tokens, request.stop, request.temperature, seed=seed)
            ways.setdefault(decoding, []).append(i)
        for decoding, places in ways.items():
            examples = [Example(_text(requests[i])) for i in places]
            name = hashlib.sha256(json.dumps(dict(decoding.described), sort_keys=True).encode()).hexdigest()[:16]
            rows = capture(
                self.model,
                examples,
                self.folder / name,
                layers=(0,),
                positions=AT,
                batch_size=self.batch_size,
                max_new_tokens=decoding.max_new_tokens,
                stop=decoding.stop,
                temperature=decoding.temperature,
                seed=decoding.seed,
                dtype=str(self.model.dtype).removeprefix("torch."),
                progress=progress,
            ).rows
            failed = rows["error"].notna()
            ids = row_ids(examples, parse_positions(AT), decoding)
            for i, row in zip(places, ids, strict=True):
                if failed[row]:
                    yield i, Reply(error=str(rows["error"][row]), error_kind=str(rows["error_kind"][row]))
                else:
                    tokens = len(rows["answer_token_ids"][row])
                    cut = tokens >= decoding.max_new_tokens
                    yield i, Reply(str(rows["answer"][row]), completion_tokens=tokens, cut=cut)


def _text(request: Request) -> str:
    return f"{request.system}\n\n{request.text}" if request.system else request.text
