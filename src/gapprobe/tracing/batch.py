"""One batch: the model is run on what was prepared, and the rows of the store are made of what it said and showed."""

from __future__ import annotations

import errno
import gc
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from gapprobe.models.model import Model
from gapprobe.models.offload import Room
from gapprobe.models.sites import IN_TOWER, Site
from gapprobe.models.trace import Traced, trace
from gapprobe.store.format import DTYPES, ROLES, StoredRow, Value
from gapprobe.tasks.examples import Example
from gapprobe.tracing.answers import Answer, Decoding, Ending, Picker, answers
from gapprobe.tracing.positions import Position
from gapprobe.tracing.prompts import Failure, Preparation, Prepared, Prompts, marked

Place = Callable[[int], Tensor]


@dataclass
class Batches:
    """What a run makes of its batches; of a site in the tower, of one example at a time.

    Attributes:
        model: the model.
        layers: numbers of the layers to keep, rising.
        positions: what tokens to keep.
        decoding: how answers are made.
        dtype: of what is stored.
        site: where in the model states are read.
        width: of a state there.
        limit: the most rows that fitted into memory at once, once too many were tried.
    """

    model: Model
    layers: tuple[int, ...]
    positions: tuple[Position, ...]
    decoding: Decoding
    dtype: str
    site: Site
    width: int
    limit: int | None = field(default=None, init=False)
    _room: Room = field(default_factory=Room, init=False)

    @cached_property
    def preparation(self) -> Preparation:
        """Return what is made of examples before the model reads them."""
        return Preparation(self.model, self.positions, self.decoding.max_new_tokens, self.site)

    def rows(
        self,
        examples: Sequence[Example],
        ids: Sequence[str],
        prepared: Prepared | None = None,
        place: Place | None = None,
    ) -> list[StoredRow]:
        """Return the row of each example; those that cannot be run have no tokens.

        Rows hold until the next batch, whose residuals take their place.

        Args:
            examples: the batch.
            ids: of its rows.
            prepared: what `preparation` made of the batch, if that is done already.
            place: gives memory for the residuals of so many tokens, `[l m d]`, where the rows would best lie.
        """
        prepared = prepared or self.preparation(examples)
        found = {i: self._failed(ids[i], examples[i], failure) for i, failure in prepared.failed.items()}
        if prepared.prompts:
            found |= self._answered(prepared.prompts, examples, ids, place)
        return [found[i] for i in range(len(examples))]

    def sizes(self, examples: Sequence[Example], ids: Sequence[str]) -> list[int]:
        """Return how many tokens each of the examples that can be run will keep, if its answer is as long as it can be.

        Of a site in the tower the examples are run, for only the model knows.
        """
        if self.site in IN_TOWER:
            each = (self.rows([example], [id_])[0] for example, id_ in zip(examples, ids, strict=True))
            return [len(row.token_ids) for row in each if row.columns["error"] is None]
        fine = self.preparation(examples).prompts
        heard = int((self._heard(len(self.model.starts), self.decoding.max_new_tokens) > 0).sum())
        return [int((marks > 0).sum()) + heard for marks in fine.marks] if fine else []

    def _answered(
        self, prompts: Prompts, examples: Sequence[Example], ids: Sequence[str], place: Place | None
    ) -> dict[int, StoredRow]:
        """Run the prompts, in halves and quarters where the memory does not hold them at once."""
        whole = range(len(prompts.numbers))
        size = min(self.limit or len(whole), len(whole))
        found: dict[int, StoredRow] = {}
        start = 0
        while start < len(whole):
            part = whole[start : start + size]
            # Parts of a batch must not take each other's place.
            alone = len(part) == len(whole)
            some = prompts if alone else self._some(prompts, part, examples)
            rows = self._run(some, examples, ids, partial(self._space, place) if alone else lambda _: None)
            if rows is not None:
                found |= rows
                start += size
            elif len(part) == 1:
                i = prompts.numbers[start]
                length = len(prompts.tables[start])
                told = f"the memory does not hold this example alone ({length} tokens)"
                found[i] = self._failed(ids[i], examples[i], Failure(told, "memory", length))
                start += 1
            else:
                size = self.limit = (len(part) + 1) // 2
                warnings.warn(
                    f"the memory does not hold {len(part)} rows at once; from here {size} are run", stacklevel=2
                )
        return found

    def _some(self, prompts: Prompts, part: Sequence[int], examples: Sequence[Example]) -> Prompts:
        """Return some of the prompts, padded among themselves."""
        chosen = [prompts.numbers[k] for k in part]
        media = [medium.load() for i in chosen if (medium := examples[i].medium) is not None]
        return Prompts(
            tuple(chosen),
            self.model.encode([examples[i].text for i in chosen], media or None, device="cpu"),
            tuple(prompts.tables[k] for k in part),
            tuple(prompts.marks[k] for k in part),
        )

    def _space(self, place: Place | None, tokens: int) -> Tensor | None:
        """Return memory for what is kept of prompts; None where only the model knows how much that is."""
        if self.site in IN_TOWER:
            return None
        pinned = self.model.hf.device.type == "cuda"
        if place is not None and not pinned:
            return place(tokens)
        return self._room.take((len(self.layers), tokens, self.width), DTYPES[self.dtype][1], pinned)

    def _run(
        self, prompts: Prompts, examples: Sequence[Example], ids: Sequence[str], space: Callable[[int], Tensor | None]
    ) -> dict[int, StoredRow] | None:
        """Return the rows of prompts; None if they take more memory than there is."""
        try:
            picker = Picker(self.decoding, self.model.media_token_id, [ids[i] for i in prompts.numbers])
            ending = Ending(self.model, picker, any(position.answers for position in self.positions))
            mask = prompts.inputs["attention_mask"].bool()
            keep = np.concatenate(
                [np.flatnonzero(mask[row])[marks > 0] + row * mask.shape[1] for row, marks in enumerate(prompts.marks)]
            )
            traced = trace(
                self.model,
                prompts.inputs,
                torch.from_numpy(keep),
                self.layers,
                picker=picker,
                ending=ending,
                steps=ending.steps,
                dtype=DTYPES[self.dtype][1],
                site=self.site,
                out=space(len(keep)),
            )
        except (RuntimeError, MemoryError, OSError) as error:
            if not _lacks_memory(error):
                raise
        else:
            return self._stored(prompts, traced, answers(self.model, picker), examples, ids)
        # Behind the handler, whose traceback holds on to what filled the memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _stored(
        self,
        prompts: Prompts,
        traced: Traced,
        said: Sequence[Answer],
        examples: Sequence[Example],
        ids: Sequence[str],
    ) -> dict[int, StoredRow]:
        rows: dict[int, StoredRow] = {}
        # What an encoder-decoder's decoder reads first is no token of the answer.
        lead = len(self.model.starts)
        taken = 0
        for row, (i, table, marks, answer) in enumerate(
            zip(prompts.numbers, prompts.tables, prompts.marks, said, strict=True)
        ):
            found: dict[str, Value] = {
                "answer": answer.text,
                "answer_token_ids": list(answer.token_ids),
                "answer_logprobs": list(answer.log_probs),
                "n_input_tokens": len(table),
            }
            if self.site in IN_TOWER:
                rows[i] = self._in_tower(ids[i], _columns(examples[i], found), traced)
                continue
            asked = np.flatnonzero(marks)
            heard = self._heard(lead, len(answer.token_ids))
            kept = np.flatnonzero(heard)
            prompt = traced.prompt[:, taken : taken + len(asked)]
            taken += len(asked)
            spelled = np.array([*self.model.starts, *answer.token_ids], dtype=np.int64)
            roles = np.array([ROLES["start"]] * lead + [ROLES["answer"]] * len(answer.token_ids), dtype=np.uint8)
            boxes = table.boxes[asked][table.roles[asked] == ROLES["image"]]
            if boxes.any():
                found["image_boxes"] = boxes.ravel().tolist()
            heard_of = table.boxes[asked][table.roles[asked] == ROLES["audio"]]
            if heard_of.any():
                found["audio_spans"] = heard_of[:, [0, 2]].ravel().tolist()
            rows[i] = StoredRow(
                ids[i],
                _columns(examples[i], found),
                torch.cat([prompt, traced.spoken[kept, :, row].transpose(0, 1)], dim=1) if len(kept) else prompt,
                torch.from_numpy(np.concatenate([table.ids[asked], spelled[kept]])),
                torch.from_numpy(np.concatenate([asked, len(table) + kept])),
                torch.from_numpy(np.concatenate([table.roles[asked], roles[kept]])),
                torch.from_numpy(np.concatenate([marks[asked], heard[kept]])),
            )
        return rows

    def _heard(self, lead: int, spoken: int) -> UInt8[np.ndarray, " t"]:
        """Return the marks of what the decoder read one by one: `lead` tokens before the answer, and the answer."""
        first = [np.arange(lead) if position.of in ("start", "all") else _NONE for position in self.positions]
        then = [position.in_answer(spoken) + lead for position in self.positions]
        return marked(lead + spoken, [np.concatenate(both) for both in zip(first, then, strict=True)])

    def _in_tower(self, id_: str, columns: dict[str, Value], traced: Traced) -> StoredRow:
        """Return the row of a picture's tokens as the tower, the bridge or the Q-Former has them."""
        size = traced.prompt.shape[1]
        role = "query" if self.site == "queries" else "audio" if self.model.family.modality == "audio" else "image"
        return StoredRow(
            id_,
            columns,
            traced.prompt,
            torch.full((size,), self.model.media_token_id or 0),
            torch.arange(size),
            torch.full((size,), ROLES[role], dtype=torch.uint8),
            torch.ones(size, dtype=torch.uint8),
        )

    def _failed(self, id_: str, example: Example, failure: Failure) -> StoredRow:
        found: dict[str, Value] = {
            "error": failure.error,
            "error_kind": failure.kind,
            "n_input_tokens": failure.tokens,
        }
        residual = torch.empty(len(self.layers), 0, self.width, dtype=DTYPES[self.dtype][1])
        numbers, codes = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.uint8)
        return StoredRow(id_, _columns(example, found), residual, numbers, numbers, codes, codes)


_NONE = np.empty(0, dtype=np.int64)


def _lacks_memory(error: BaseException) -> bool:
    # On a CPU torch says it in a plain RuntimeError, and a map of memory in an OSError.
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


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
