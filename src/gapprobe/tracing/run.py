"""Capture: run a model over examples and write answers, log-probabilities and residual streams to a store.

Each batch is answered first, then traced once with its answers behind the prompts (teacher forcing), so that the last
tokens of prompt and answer come from one pass over the same sequence.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor
from tqdm import tqdm

from gapprobe.errors import ConfigError, DataError
from gapprobe.models.check import check_model
from gapprobe.models.model import Model, positions_of
from gapprobe.models.trace import trace
from gapprobe.store.format import DTYPES, ROLES, StoredRow, StoreHeader, Value
from gapprobe.store.reader import Store, open_store
from gapprobe.store.writer import StoreWriter
from gapprobe.tasks.examples import Example
from gapprobe.tracing.answers import Answer, generate
from gapprobe.tracing.plan import BYTES, DiskNeed, batches, row_ids

# Positions by name, and the role of the token there.
POSITIONS: Mapping[str, str] = {"last_input": "answer_cue", "last_output": "answer"}
# A killed run loses at most the work of this many seconds, and what is being written.
SEAL_SECONDS = 30.0


def capture(
    model: Model,
    examples: Sequence[Example],
    out: str | Path,
    *,
    layers: str | Sequence[int] = "all",
    positions: Sequence[str] = ("last_input", "last_output"),
    batch_size: int = 32,
    max_new_tokens: int = 10,
    stop: str | None = "###",
    dtype: str = "float32",
    progress: bool = True,
) -> Store:
    """Answer every example greedily and store its residual streams. The same call goes on where a stopped one was.

    An example that cannot be run (unreadable image, image token in the prompt, too long) becomes a row without tokens
    that says why, in the columns `error` and `error_kind` ("image" or "prompt"); the run goes on.

    Args:
        model: from `load_model`. It is checked (`check_model`) before anything is written.
        examples: what to run; several with the same text and image are run once.
        out: folder of the store.
        layers: "all" or numbers; 0 is the embeddings with the image features merged, l the residual stream after the
            l-th block.
        positions: `last_input`, the prompt's last token, and `last_output`, the answer's last token before the stop
            marker; a row with an empty answer has no `last_output`.
        batch_size: rows run at once.
        max_new_tokens: longest answer.
        stop: text that ends an answer, or None.
        dtype: of the stored residuals, "float32", "bfloat16" or "float16"; the model's own is chosen when it is loaded.
        progress: show a progress bar.

    Returns:
        The store. Its rows have all columns of the examples, and `text`, `answer`, `answer_token_ids`,
        `answer_logprobs` (natural logarithms, of the same tokens), `n_input_tokens`, `error`, `error_kind`.

    Raises:
        ConfigError: an unknown layer, position or dtype.
        ModelError: the model does not pass its check.
        StoreError: the store in `out` belongs to another model or other settings.
        OutputError: the disk has no room; the message says for how much.
    """
    if dtype not in BYTES:
        raise ConfigError(f"dtype {dtype!r} must be one of {', '.join(BYTES)}")
    if batch_size < 1 or max_new_tokens < 1:
        raise ConfigError(f"batch_size {batch_size} and max_new_tokens {max_new_tokens} must be at least 1")
    run = _Run(model, _layers(layers, model.n_layers), _positions(positions), max_new_tokens, stop, dtype)
    check_model(model).require()
    ids = row_ids(examples, run.positions, run.generation)
    plan = batches(examples, ids, batch_size)
    with StoreWriter(out, run.header()) as writer:
        stored = writer.ids
        rows = sum(len(batch) for batch in plan)
        missing = sum(ids[i] not in stored for batch in plan for i in batch)
        DiskNeed(missing, len(run.layers), len(run.positions), model.width, dtype).require(Path(out))
        name = f"capture {model.family.name}"
        bar = tqdm(total=rows, initial=rows - missing, unit="row", desc=name, disable=not progress)
        sealed = time.monotonic()
        with bar:
            for batch in plan:
                wanted = [i for i in batch if ids[i] not in stored]
                if not wanted:
                    continue
                # The whole batch, so that each row is what an uninterrupted run gives; the writer leaves out the rest.
                writer.append(run.batch([examples[i] for i in batch], [ids[i] for i in batch]))
                bar.update(len(wanted))
                if time.monotonic() - sealed > SEAL_SECONDS:
                    writer.flush(wait=False)
                    sealed = time.monotonic()
    return open_store(out)


@dataclass(frozen=True)
class _Run:
    """The settings of one run, and what they make of a batch."""

    model: Model
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    new: int
    stop: str | None
    dtype: str

    @property
    def generation(self) -> dict[str, str | int | float]:
        """Return how answers are made, as the header of the store records it."""
        return generation_settings(self.new, self.stop)

    def header(self) -> StoreHeader:
        """Return the header of the store."""
        return StoreHeader(
            model=self.model.describe(),
            processor=self.model.processor_fingerprint,
            attention=self.model.attention,
            padding_side="left",
            dtype=self.dtype,
            layers=self.layers,
            width=self.model.width,
            positions=self.positions,
            generation=self.generation,
            versions={name: version(name) for name in ("torch", "transformers", "nnsight")},
        )

    def batch(self, examples: Sequence[Example], ids: Sequence[str]) -> list[StoredRow]:
        """Return the row of each example; those that cannot be run have no tokens."""
        failed: dict[int, StoredRow] = {}
        images: dict[int, PIL.Image.Image | None] = {}
        for i, example in enumerate(examples):
            kind = "prompt"
            try:
                self.model.refuse_text(example.text)
                kind = "image"
                images[i] = example.image.load() if example.image else None
            except DataError as error:
                failed[i] = self._failed(ids[i], example, str(error), kind)
        inputs = self._encode(examples, images)
        if inputs is not None:
            lengths = inputs["attention_mask"].sum(1).tolist()
            reasons = self.model.refuse_long(inputs, self.new)
            for i, length, reason in zip(list(images), lengths, reasons, strict=True):
                if reason is not None:
                    failed[i] = self._failed(ids[i], examples[i], reason, "prompt", length)
                    del images[i]
            if any(reasons):
                inputs = self._encode(examples, images)
        fine = iter(self._answered([examples[i] for i in images], [ids[i] for i in images], inputs) if inputs else [])
        return [failed[i] if i in failed else next(fine) for i in range(len(examples))]

    def _encode(
        self, examples: Sequence[Example], images: Mapping[int, PIL.Image.Image | None]
    ) -> dict[str, Tensor] | None:
        if not images:
            return None
        pictures = [image for image in images.values() if image is not None]
        return self.model.encode([examples[i].text for i in images], pictures or None)

    def _answered(self, examples: Sequence[Example], ids: Sequence[str], inputs: dict[str, Tensor]) -> list[StoredRow]:
        answers = generate(self.model, inputs, max_new_tokens=self.new, stop=self.stop)
        spoken = torch.tensor([len(answer.token_ids) for answer in answers])
        longest = int(spoken.max())
        width = inputs["input_ids"].shape[1]
        whole = _with_answers(inputs, answers, longest, self.model.pad_token_id)
        # The last column of the prompt is the same in every row: batches are padded on the left.
        offsets = {"last_input": torch.zeros_like(spoken), "last_output": spoken}
        # In the order of the sequence, not of the caller: this is how a row's tokens stand in the store.
        names = [name for name in POSITIONS if name in self.positions]
        columns = torch.stack([width - 1 + offsets[name] for name in names], dim=1)
        traced = trace(self.model, whole, columns.to(inputs["input_ids"].device), self.layers, last=longest + 1)
        log_probs = traced.logits.float().log_softmax(-1).cpu()
        residual = traced.residual.to(DTYPES[self.dtype][1]).cpu()
        tokens = whole["input_ids"].cpu().gather(1, columns)
        prompt = inputs["attention_mask"].sum(1).cpu()
        places = torch.stack([prompt - 1 + offsets[name] for name in names], dim=1)
        roles = torch.tensor([ROLES[POSITIONS[name]] for name in names], dtype=torch.uint8)
        marks = torch.tensor([1 << self.positions.index(name) for name in names], dtype=torch.uint8)
        rows: list[StoredRow] = []
        for i, (example, id_, answer) in enumerate(zip(examples, ids, answers, strict=True)):
            size = len(answer.token_ids)
            scores = log_probs[i, :size].gather(1, torch.tensor(answer.token_ids, dtype=torch.int64)[:, None])[:, 0]
            here = [t for t, name in enumerate(names) if name != "last_output" or size]
            found: dict[str, Value] = {
                "answer": answer.text,
                "answer_token_ids": list(answer.token_ids),
                "answer_logprobs": scores.tolist(),
                "n_input_tokens": int(prompt[i]),
            }
            columns_ = _columns(example, found)
            kept = residual[i][:, here]
            rows.append(StoredRow(id_, columns_, kept, tokens[i, here], places[i, here], roles[here], marks[here]))
        return rows

    def _failed(self, id_: str, example: Example, error: str, kind: str, length: int | None = None) -> StoredRow:
        found: dict[str, Value] = {"error": error, "error_kind": kind, "n_input_tokens": length}
        residual = torch.empty(len(self.layers), 0, self.model.width, dtype=DTYPES[self.dtype][1])
        numbers, codes = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.uint8)
        return StoredRow(id_, _columns(example, found), residual, numbers, numbers, codes, codes)


def generation_settings(max_new_tokens: int = 10, stop: str | None = "###") -> dict[str, str | int | float]:
    """Return how answers are made, in the form that `row_id` and the header of a store take."""
    return {"method": "greedy", "max_new_tokens": max_new_tokens, "stop": stop or ""}


def _columns(example: Example, found: Mapping[str, Value]) -> dict[str, Value]:
    """Return the row of the table; every row has every column."""
    own: dict[str, Value] = {
        "text": example.text,
        "answer": None,
        "answer_token_ids": None,
        "answer_logprobs": None,
        "n_input_tokens": None,
        "error": None,
        "error_kind": None,
    }
    return {**example.columns, **own, **found}


def _with_answers(inputs: dict[str, Tensor], answers: Sequence[Answer], longest: int, pad: int) -> dict[str, Tensor]:
    """Return the batch with each answer behind its prompt, padded behind the answers and masked there."""
    ids = torch.full((len(answers), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, answer in enumerate(answers):
        ids[i, : len(answer.token_ids)] = torch.tensor(answer.token_ids, dtype=torch.int64)
        mask[i, : len(answer.token_ids)] = 1
    whole = {
        "input_ids": torch.cat([inputs["input_ids"], ids.to(inputs["input_ids"])], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], mask.to(inputs["attention_mask"])], dim=1),
    }
    return inputs | whole | {"position_ids": positions_of(whole["attention_mask"])}


def _layers(layers: str | Sequence[int], n_layers: int) -> tuple[int, ...]:
    chosen = tuple(range(n_layers + 1)) if isinstance(layers, str) else tuple(sorted(set(layers)))
    if (isinstance(layers, str) and layers != "all") or not chosen or chosen[0] < 0 or chosen[-1] > n_layers:
        raise ConfigError(f"layers {layers!r} must be 'all' or numbers from 0 (embeddings) to {n_layers} (last block)")
    return chosen


def _positions(positions: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in positions if name not in POSITIONS]
    if unknown or not positions or len(set(positions)) != len(positions):
        raise ConfigError(f"positions {list(positions)} must be some of {', '.join(POSITIONS)}, each once")
    return tuple(positions)
