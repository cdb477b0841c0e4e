"""Capture: run a model over examples and write answers, log-probabilities and residual streams to a store."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from importlib.metadata import version
from itertools import repeat
from pathlib import Path

import torch
from tqdm import tqdm

from gapprobe.ahead import ahead
from gapprobe.errors import ConfigError
from gapprobe.files import free_memory, told_bytes
from gapprobe.models.check import check_model, some_media
from gapprobe.models.model import Model
from gapprobe.models.sites import IN_TOWER, Site, layers_of
from gapprobe.models.trace import trace
from gapprobe.store.format import DTYPES, StoreHeader
from gapprobe.store.reader import Store, open_store
from gapprobe.store.writer import StoreWriter
from gapprobe.tasks.examples import Example
from gapprobe.tracing.answers import Decoding
from gapprobe.tracing.batch import Batches
from gapprobe.tracing.plan import Need, batches, row_ids
from gapprobe.tracing.positions import Position, Positions, parse_positions
from gapprobe.tracing.prompts import Prepared
from gapprobe.tracing.tokens import TEXT_ROLES

# A killed run loses at most the work of this many seconds, and what is being written.
SEAL_SECONDS = 30.0


def capture(
    model: Model,
    examples: Sequence[Example],
    out: str | Path,
    *,
    layers: str | Sequence[int] = "all",
    positions: Positions | None = None,
    site: Site = "residual",
    batch_size: int = 32,
    max_new_tokens: int = 10,
    stop: str | Sequence[str] | None = "###",
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: str = "float32",
    progress: bool = True,
) -> Store:
    """Answer every example and store its residual streams. The same call goes on where a stopped one was.

    Prompt and answer are one pass of the model's own `generate`, traced on the way. An example that cannot be run
    (unreadable image, image token in the prompt, too long, too large for the memory) becomes a row without tokens that
    says why, in the columns `error` and `error_kind` ("image", "sound", "prompt", "processor" or "memory"), and the run
    goes on.

    Args:
        model: from `load_model`. It is checked (`check_model`) before anything is written.
        examples: what to run; several with the same text and image are run once.
        out: folder of the store.
        layers: "all" or numbers; 0 is the embeddings with the image features merged, l the residual stream after the
            l-th block.
        positions: which tokens to keep, at most 8 choices; by default `last_input` and `last_output`, the last token of
            the prompt and that of the answer before the stop text. `prompt`, `answer` and `all` are all tokens of
            these; a role (`image`, `question`, `entity`, `reference`, `system`, `answer_cue`, `query`, of an
            encoder-decoder `start`) those that have it; each perhaps with an index or slice, `entity[-1]`,
            `prompt[-5:]`. A mapping gives choices names of their own, and may hold functions from `TokenTable` to
            indices or truth values.
        site: where states are read: `residual`, the stream after embeddings (layer 0) and after each block; `middle`,
            the stream between a block's attention and MLP; `attention` and `mlp`, what these add to it; or, of the
            picture's own tokens in place of the prompt's, and then all of them and one example at a time, `vision`
            (what the tower's first block reads and each block returns), `bridge` (what enters the language model),
            `queries` (of a Q-Former). A store holds one site.
        batch_size: rows run at once; fewer where the memory does not hold them.
        max_new_tokens: longest answer; 0 reads the prompts only.
        stop: text or texts that end an answer, or None.
        temperature: 0 takes the most probable token; above, answers are drawn (`Decoding`).
        top_k: draw from the k most probable tokens only; 0 is from all.
        top_p: draw from the fewest tokens that together have at least this probability.
        seed: of the draws; a row's do not depend on its batch.
        dtype: of the stored residuals, "float32", "bfloat16" or "float16"; the model's own is chosen when it is loaded.
        progress: show a progress bar.

    Returns:
        The store. Its rows have all columns of the examples, and `text`, `answer`, `answer_token_ids`,
        `answer_logprobs` (natural logarithms, of the same tokens), `n_input_tokens`, `error`, `error_kind`; where image
        tokens were kept, `image_boxes`: for each of them, in order, left, top, right and bottom of its place as shares
        of the picture, and no area where it has none.

    Raises:
        ConfigError: an unknown layer, position, role or dtype.
        ModelError: the model does not pass its check.
        StoreError: the store in `out` belongs to another model or other settings.
        OutputError: the disk has no room; the message says for how much.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} must be one of {', '.join(DTYPES)}")
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size} must be at least 1")
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    decoding = Decoding(max_new_tokens, stops, temperature, top_k, top_p, seed)
    chosen = _positions(positions, site, decoding)
    numbers = _layers(layers, layers_of(model, site))
    _refuse_roles(examples)
    check_model(model).require()
    run = Batches(model, numbers, chosen, decoding, dtype, site, _width(model, site))
    ids = row_ids(examples, chosen, decoding)
    # The states of a tower do not tell whose they are.
    size = 1 if site in IN_TOWER else batch_size
    plan = batches(examples, ids, size)
    with StoreWriter(out, header_of(run)) as writer:
        stored = writer.ids
        missing = [i for batch in plan for i in batch if ids[i] not in stored]
        need = Need.of(run, examples, ids, missing, size)
        need.require(Path(out), free_memory())
        total = sum(len(batch) for batch in plan)
        name = f"capture {model.family.name}"
        bar = tqdm(total=total, initial=total - len(missing), unit="row", desc=name, disable=not progress)
        sealed = time.monotonic()
        # Whole batches, so that each row is what an uninterrupted run gives; the writer leaves out what it has.
        plan = [batch for batch in plan if any(ids[i] not in stored for i in batch)]
        with bar, closing(_prepared(run, plan, examples)) as coming:
            if missing and progress:
                # How long it takes the bar says from the first batch on.
                bar.write(f"{name}: {need.what}, about {told_bytes(need.bytes)}", file=sys.stderr)
            for batch, prepared in zip(plan, coming, strict=True):
                some = [examples[i] for i in batch]
                writer.append(run.rows(some, [ids[i] for i in batch], prepared, writer.place))
                bar.update(sum(ids[i] not in stored for i in batch))
                if time.monotonic() - sealed > SEAL_SECONDS:
                    writer.flush(wait=False)
                    sealed = time.monotonic()
    return open_store(out)


def _prepared(run: Batches, plan: Sequence[Sequence[int]], examples: Sequence[Example]) -> Generator[Prepared | None]:
    """Yield the batches of a plan, each prepared while a GPU has the one before; on a CPU None, for it has no time."""
    if not _beside(run.model):
        yield from repeat(None, len(plan))
        return
    yield from ahead(run.preparation.apart(), ([examples[i] for i in batch] for batch in plan))


def _beside(model: Model) -> bool:
    """Return whether batches are prepared while the model runs."""
    return model.hf.device.type != "cpu"


def header_of(run: Batches) -> StoreHeader:
    """Return the header of the store that a run writes."""
    return StoreHeader(
        model=run.model.describe() | ({} if run.site == "residual" else {"site": run.site}),
        processor=run.model.processor_fingerprint,
        attention=run.model.attention,
        padding_side="left",
        dtype=run.dtype,
        layers=run.layers,
        width=run.width,
        positions=tuple(position.name for position in run.positions),
        generation=run.decoding.described | {f"position.{p.name}": p.rule for p in run.positions if p.renamed},
        versions={name: version(name) for name in ("torch", "transformers", "nnsight")},
    )


def _layers(layers: str | Sequence[int], known: range) -> tuple[int, ...]:
    chosen = tuple(known) if isinstance(layers, str) else tuple(sorted(set(layers)))
    if (isinstance(layers, str) and layers != "all") or not chosen or any(layer not in known for layer in chosen):
        raise ConfigError(f"layers {layers!r} must be 'all' or numbers from {known[0]} to {known[-1]} (last block)")
    return chosen


def _positions(positions: Positions | None, site: Site, decoding: Decoding) -> tuple[Position, ...]:
    if site in IN_TOWER:
        if positions is not None:
            raise ConfigError(f"the site {site!r} has no tokens of a prompt to choose from: all of its own are kept")
        return parse_positions(["all"])
    chosen = parse_positions(("last_input", "last_output") if positions is None else positions)
    for position in chosen:
        if position.of == "answer" and not decoding.max_new_tokens:
            raise ConfigError(f"position {position.name!r} is in the answer, but max_new_tokens is 0")
    return chosen


def _width(model: Model, site: Site) -> int:
    if site not in IN_TOWER:
        return model.width
    inputs = model.encode(["What is this?"], (some_media(model.family.modality) or [])[:1])
    return trace(
        model, inputs, torch.empty(0, dtype=torch.int64), (layers_of(model, site)[0],), site=site
    ).prompt.shape[2]


def _refuse_roles(examples: Sequence[Example]) -> None:
    for example in examples:
        for role, spans in example.spans.items():
            if role not in TEXT_ROLES:
                raise ConfigError(f"role {role!r} of an example's spans must be one of {', '.join(TEXT_ROLES)}")
            if any(not 0 <= a <= b <= len(example.text) for a, b in spans):
                raise ConfigError(
                    f"spans {list(spans)} of role {role!r} lie outside their text of {len(example.text)} characters: "
                    f"{example.text!r:.80}"
                )
