"""Answers: which token comes next, when an answer is over, and where it is cut. Residuals and files are no matter here.

Tokens are picked by our own hand inside transformers' loop, so that a row's answer depends on its own seed alone and
log-probabilities are those of the model, before anything is suppressed, cooled or cut off.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria

from gapprobe.errors import ConfigError
from gapprobe.models.model import Model


@dataclass(frozen=True)
class Decoding:
    """How answers are made.

    Attributes:
        max_new_tokens: longest answer; 0 reads the prompt only.
        stop: texts that end an answer and are no part of it.
        temperature: 0 takes the most probable token; above, tokens are drawn from softmax(logits / temperature).
        top_k: draw from the k most probable tokens only; 0 is from all.
        top_p: draw from the fewest tokens that together have at least this probability.
        seed: of the draws. A row's draws depend on it and on the row's id, not on the batch.

    Raises:
        ConfigError: a value out of range.
    """

    max_new_tokens: int = 10
    stop: tuple[str, ...] = ("###",)
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.max_new_tokens < 0 or self.top_k < 0:
            raise ConfigError(f"max_new_tokens {self.max_new_tokens} and top_k {self.top_k} must not be negative")
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1):
            raise ConfigError(f"temperature {self.temperature} must be at least 0, top_p {self.top_p} in (0, 1]")
        if not all(self.stop):
            raise ConfigError("an empty stop text would end every answer before it begins")

    @property
    def described(self) -> dict[str, str | int | float]:
        """Return this in the form that the header of a store and the ids of its rows take."""
        told: dict[str, str | int | float] = {
            "method": "sampled" if self.temperature else "greedy",
            "max_new_tokens": self.max_new_tokens,
            "stop": "\n".join(self.stop),
        }
        if self.temperature:
            told |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "seed": self.seed}
        return told


@dataclass(frozen=True)
class Answer:
    """What the model said: the text before the stop marker, stripped, and the tokens that make it up.

    `log_probs` are the natural logarithms of the probabilities that the model gave to these tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] = ()


class Picker(LogitsProcessor):
    """Picks the next token of each row, and remembers it with its log-probability.

    A draw is the largest of the logits after Gumbel noise has been added (Gumbel 1954; Maddison, Tarlow and Minka,
    "A* sampling", 2014), which is exact sampling from their softmax.
    """

    def __init__(self, decoding: Decoding, never: int | None, seeds: Sequence[str] = ()) -> None:
        """Take the token that is `never` generated, and for draws what seeds each row."""
        self.decoding, self.never = decoding, never
        self._steps: list[tuple[list[int], list[float]]] = []
        self._random = [_generator(decoding.seed, seed) for seed in seeds] if decoding.temperature else []

    def __call__(self, input_ids: Int[Tensor, "n t"], scores: Float[Tensor, "n v"]) -> torch.FloatTensor:  # noqa: ARG002 (transformers' signature)
        """Return scores that are largest at the token picked."""
        # In place and without a copy: the vocabulary is large, and the loop waits.
        scores = scores.float()
        total = scores.logsumexp(-1, keepdim=True)
        if self.never is not None:
            # It is no word, and could not be read back.
            scores[:, self.never] = -math.inf
        wanted = self._drawn(scores) if self.decoding.temperature else scores
        best = wanted.argmax(-1, keepdim=True)
        self._steps.append((best[:, 0].tolist(), (scores.gather(1, best) - total)[:, 0].tolist()))
        return cast(torch.FloatTensor, wanted)

    @property
    def tokens(self) -> list[list[int]]:
        """Return by row the tokens picked so far; behind an answer's end they mean nothing."""
        return [list(row) for row in zip(*(tokens for tokens, _ in self._steps), strict=True)]

    @property
    def log_probs(self) -> list[list[float]]:
        """Return by row the log-probabilities of `tokens`."""
        return [list(row) for row in zip(*(log_probs for _, log_probs in self._steps), strict=True)]

    def _drawn(self, scores: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
        kept = (scores / self.decoding.temperature).log_softmax(-1)
        if 0 < self.decoding.top_k < kept.shape[1]:
            kept = kept.masked_fill(kept < kept.topk(self.decoding.top_k)[0][:, -1:], -math.inf)
        if self.decoding.top_p < 1:
            ordered, order = kept.softmax(-1).sort(descending=True)
            # A token goes when those before it have the probability already; the first never does.
            beyond = ordered.cumsum(-1) - ordered >= self.decoding.top_p
            kept = kept.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -math.inf)
        uniform = torch.stack([torch.rand(kept.shape[1], generator=g, dtype=torch.float64) for g in self._random])
        return kept - (-uniform.clamp(min=torch.finfo(torch.float64).tiny).log()).log().to(kept)


class Ending(StoppingCriteria):
    """Ends a row once its answer is over and, if asked, all of the answer's tokens have been read back by the model.

    Only then is the residual stream at the answer's last token there.
    """

    def __init__(self, model: Model, picker: Picker, reads_back: bool) -> None:
        self.tokenizer, self.ends, self.picker, self.reads_back = model.tokenizer, model.end_tokens, picker, reads_back
        self._done: set[int] = set()
        self._pieces: dict[int, str] = {}

    @property
    def steps(self) -> int:
        """Return the most steps that a model may need."""
        return self.picker.decoding.max_new_tokens + self.reads_back or 1

    def __call__(self, input_ids: Tensor, *_: object, **__: object) -> torch.BoolTensor:
        """Return which rows are done."""
        rows = self.picker.tokens
        self._done |= {i for i, row in enumerate(rows) if i not in self._done and self._ends(row)}
        done = [i in self._done for i in range(len(rows))]
        return cast(torch.BoolTensor, torch.tensor(done, device=input_ids.device))

    def _ends(self, picked: list[int]) -> bool:
        decoding, read = self.picker.decoding, len(picked) - 1
        spoken = picked[: decoding.max_new_tokens]
        if len(spoken) < decoding.max_new_tokens and spoken[-1] not in self.ends and not self._stopped(spoken):
            return False
        return not self.reads_back or len(cut(self.tokenizer, spoken, self.ends, decoding.stop).token_ids) <= read

    def _stopped(self, spoken: list[int]) -> bool:
        """Return whether a stop text stands in what was said; a miss costs steps, and changes no answer."""
        stop = self.picker.decoding.stop
        if not stop:
            return False
        # Only the tail can be new, and each token is spelled once: decoding every row at every step takes longer.
        tail = spoken[-max(map(len, stop)) - 1 :]
        for token in tail:
            if token not in self._pieces:
                self._pieces[token] = _decode(self.tokenizer, [token])
        # A token by itself may lose its space, and a letter of several tokens is none in any of them.
        text = "".join(self._pieces[token] for token in tail).replace(" ", "")
        if text.isascii() and not any(marker.replace(" ", "") in text for marker in stop):
            return False
        said = _decode(self.tokenizer, spoken)
        return any(marker in said for marker in stop)


def cut(tokenizer: PreTrainedTokenizerBase, tokens: list[int], ends: frozenset[int], stop: Sequence[str]) -> Answer:
    """Return the answer in generated `tokens`: what stands before the first end token and the first stop text.

    The answer's tokens are the fewest from the start that hold its text, so neither a stop text's tokens nor white
    space behind the answer belong to them; a token that holds the answer's end and the stop text's start does.
    """
    tokens = _before_end(tokens, ends)
    text = _decode(tokenizer, tokens)
    text = text[: min([text.index(marker) for marker in stop if marker in text], default=None)].rstrip()
    if not text.strip():
        return Answer("", ())
    size = next(k for k in range(1, len(tokens) + 1) if _decode(tokenizer, tokens[:k]).startswith(text))
    return Answer(text.strip(), tuple(tokens[:size]))


def _before_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def answers(model: Model, picker: Picker) -> list[Answer]:
    """Return the answer of each row that a picker picked."""
    if not picker.decoding.max_new_tokens:
        return [Answer("", ())] * len(picker.tokens)
    found: list[Answer] = []
    for tokens, log_probs in zip(picker.tokens, picker.log_probs, strict=True):
        answer = cut(model.tokenizer, tokens[: picker.decoding.max_new_tokens], model.end_tokens, picker.decoding.stop)
        found.append(Answer(answer.text, answer.token_ids, tuple(log_probs[: len(answer.token_ids)])))
    return found


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    decode = cast(Any, tokenizer).decode
    return str(decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _generator(seed: int, row: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
