"""Capturing residual streams: ours, other ways, bare hooks and the model itself, on the same batches.

    python -m benchmarks.capture [--quick] [--runs N] [--json FILE] [--folder DIR] [--only NAME ...] [--models NAME ...]
    python -m benchmarks.capture --table FILE.json [--docs docs]

What each operation and figure means is in `benchmarks/README.md`; the contestants are in `capture_contestants`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import PIL.Image
import psutil
import torch
import tyro
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from benchmarks import _measure
from benchmarks._measure import Cost, machine, tell, versions
from benchmarks._outcome import Runs, WrongResult, by_operation, goals_section, judged, keep, refuse_unknown, write
from benchmarks._render import markdown
from benchmarks.capture_contestants import (
    CASES,
    CONTESTANTS,
    BareHooks,
    Contestant,
    Found,
    Gapprobe,
    HooksKeep,
    Picture,
    PlainForward,
    PlainGenerate,
    Subject,
    Task,
)
from gapprobe.demo import FOLDER as DEMO
from gapprobe.models.loading import load_model
from gapprobe.models.model import Model
from gapprobe.study.config import load_config
from gapprobe.study.study import Study
from gapprobe.tasks.examples import Example
from gapprobe.tracing.answers import Decoding
from gapprobe.tracing.batch import Batches
from gapprobe.tracing.plan import batches as planned
from gapprobe.tracing.plan import row_ids
from gapprobe.tracing.positions import parse_positions
from gapprobe.tracing.run import capture

OURS = Gapprobe.name
# What goals allow: time over bare hooks, memory over the model's own (the queue apart), and growth between two points.
_TIME, _MEMORY, _GROWTH = 1.05, 1.1, 1.05
# What the writer of a store promises to hold at most: two shards, and what is on its way to the disk.
_SHARD, _ON_THE_WAY = 256 << 20, 12 << 20
_FLAT = (50, 500)
# Cores that others may keep busy. With more, torch's threads wait for each other: ten times as slow has been seen.
_QUIET = 0.1
SUBJECTS = {
    "smollm2": "LLaVA around a language model of SmolLM2-135M's shape, random weights, batches of 8",
    "llava": "the demo's LLaVA (2M parameters), batches of 32",
    "instructblip": "the demo's InstructBLIP (2.6M parameters), batches of 32",
}
TITLES = {
    **{f"{case.name}-{name}": f"{case.title}: {title}" for name, title in SUBJECTS.items() for case in CASES},
    **{f"start-{name}": f"Before the first batch, once a run: {title}" for name, title in SUBJECTS.items()},
    "flat-llava": f"{_FLAT[1]} batches of 2 rows: resident memory stays",
}


@dataclass
class Options:
    """Time capturing residual streams."""

    quick: bool = False
    """Few batches and two rounds, so that what is done once a run weighs much; prints the results."""
    runs: int | None = None
    """Rounds; five, or two with --quick."""
    folder: Path = Path()
    """A folder on the disk to be measured; the working folder by default. What is written there is taken away again."""
    only: tuple[str, ...] = ()
    """Names of contestants; all by default. Floors, bare-hooks and hooks-keep always run."""
    models: tuple[str, ...] = ()
    """Names of models; all by default."""
    dtype: str = "float32"
    """Of weights and activations: float32 or bfloat16."""
    json: Path | None = None
    """Write the results here. A full run writes to benchmarks/results/ by default; a file is never written over."""
    table: Path | None = None
    """Measure nothing: render the table of these results."""
    docs: Path = Path("docs")
    """Where the table goes."""


def smollm2(count: int, dtype: str) -> tuple[Model, list[Example]]:
    """Return LLaVA with 64 image tokens a picture and a language model of SmolLM2-135M's shape, and examples for it.

    Weights are random, so that nothing has to be fetched; every word of the vocabulary is one token.
    """
    torch.manual_seed(0)
    special = ("<pad>", "<s>", "</s>", "<image>")
    words = [*special, *(f"w{i}" for i in range(len(special), 49_152))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=["<image>"], **names)
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    side, patch_size = 112, 14
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=side,
        patch_size=patch_size,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=3, image_token_index=3, tie_word_embeddings=True
    )
    hf = LlavaForConditionalGeneration(config).to(getattr(torch, dtype))
    size = {"height": side, "width": side}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    draw = np.random.default_rng(0)
    examples: list[Example] = []
    for number in range(count):
        chosen = draw.integers(len(special), len(words), draw.integers(20, 41))
        picture = PIL.Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8))
        examples.append(Example(" ".join(f"w{i}" for i in chosen), Picture(f"noise-{number}", picture)))
    return load_model(hf, processor=processor), examples


def demo(name: str, count: int, dtype: str) -> tuple[Model, list[Example]]:
    """Return a model of the demo and the first of its questions about pictures."""
    study = Study(load_config(DEMO / f"{name}.toml"), Path(), progress=False)
    pictures: dict[str, Picture] = {}
    calls: dict[tuple[str, str], Example] = {}
    for trial in study.trials:
        for call in trial.calls:
            if call.image is not None and len(calls) < count:
                image = call.image
                picture = pictures.setdefault(image.name, Picture(image.name, image.load()))
                calls[call.text, image.name] = Example(call.text, picture)
    return load_model(DEMO / "models" / name, dtype=dtype), list(calls.values())


def make_subject(name: str, batches: int, dtype: str) -> Subject:
    """Return a model and so many batches, all encoded."""
    rows = 8 if name == "smollm2" else 32
    model, examples = smollm2(batches * rows, dtype) if name == "smollm2" else demo(name, batches * rows, dtype)
    # In the order in which gapprobe runs them, with the rows of each batch that it puts together.
    ids = row_ids(examples, parse_positions(["last_input"]), Decoding(0))
    ordered = [[examples[i] for i in batch] for batch in planned(examples, ids, rows)]
    encoded = [model.encode([e.text for e in some], [e.image.load() for e in some if e.image]) for some in ordered]
    return Subject(name, SUBJECTS[name], model, tuple(e for some in ordered for e in some), tuple(encoded))


class Benchmark:
    """All contestants on the same batches, in turn, round by round."""

    def __init__(self, folder: Path, contestants: Sequence[type[Contestant]], runs: int) -> None:
        self.folder = folder
        self.contestants = contestants
        self.runs = runs
        self.timings = Runs()
        self.left_out: dict[str, str] = {}
        self.data: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, str] = {}
        self._order = random.Random(0)

    def run(self, subject: Subject) -> None:
        """Run all cases on one model.

        Raises:
            WrongResult: a contestant kept other values than it should.
        """
        folder = self.folder / subject.name
        folder.mkdir()
        ready = self._prepared(subject, folder)
        try:
            for each in ready:
                self.versions |= each.versions
            for case in CASES:
                taking_part = [each for each in ready if case.name in each.cases]
                self._case(Task(subject, case), taking_part, folder)
        finally:
            for each in ready:
                each.close()
            shutil.rmtree(folder)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the results, by operation, then contestant."""
        return self.timings.rows(list(TITLES), [each.name for each in self.contestants], floor_of)

    def flat(self, model: Model, examples: Sequence[Example]) -> None:
        """Capture many batches of two rows, and look at the resident memory after some of them and after all."""
        count, whole, resident = 0, Batches.rows, {}

        def watched(batches: Batches, *arguments: Any) -> Any:
            nonlocal count
            rows = whole(batches, *arguments)
            count += 1
            if count in (1, *range(_FLAT[0], _FLAT[1] + 1, _FLAT[0])):
                resident[count] = _measure._resident_now()
            return rows

        out = self.folder / "flat"
        with patch.object(Batches, "rows", watched):
            store, cost = _measure.timed(
                lambda: capture(
                    model, examples, out, positions=["last_input"], batch_size=2, max_new_tokens=0, progress=False
                )
            )
        early, late = (resident[at] for at in _FLAT)
        check = f"{len(store):,} rows stored; resident memory after {_FLAT[0]} batches {early / 1e6:.1f} MB, after "
        check += f"{_FLAT[1]} batches {late / 1e6:.1f} MB: {late / early - 1:+.1%}"
        timings = self.timings.add("flat-llava", OURS, cost, said=f", {check}")
        timings.check, timings.more = check, {"others": [0.0], "resident_bytes": resident}
        shutil.rmtree(out)

    def _prepared(self, subject: Subject, folder: Path) -> list[Contestant]:
        """Return the contestants that can run this model."""
        found: list[Contestant] = []
        for contestant in self.contestants:
            own = folder / f"of-{contestant.name}"
            own.mkdir()
            warm_up = Task(subject.one_row(), next(case for case in CASES if case.name in contestant.cases))
            each: Contestant | None = None
            try:
                each = contestant(subject, own)
                if isinstance(each, Gapprobe):
                    self._start(each, warm_up, own)
                else:
                    each.measured(warm_up, own, 1 << 20)
            # Whatever it is, it keeps this contestant from running this model and nobody else.
            except Exception as error:
                if each is not None:
                    each.close()
                if not contestant.peer:
                    raise
                self.left_out[f"{contestant.name}, {subject.name}"] = f"{type(error).__name__}: {error!s:.300}"
                tell(f"{contestant.name} is left out of {subject.name}: {error!s:.300}")
            else:
                found.append(each)
        return found

    def _start(self, ours: Gapprobe, task: Task, folder: Path) -> None:
        parts = ours.start(task, folder)
        cost = Cost(sum(parts.values()), 0.0, 0)
        timings = self.timings.add(f"start-{task.subject.name}", OURS, cost, said=f", {parts}")
        timings.check, timings.more = "once; nothing is kept", {"others": [0.0], "parts": parts}

    def _case(self, task: Task, contestants: Sequence[Contestant], folder: Path) -> None:
        operation = f"{task.case.name}-{task.subject.name}"
        self.data[operation] = {
            "rows": len(task.subject.examples),
            "batches": len(task.subject.batches),
            "padded_tokens": sum(batch["input_ids"].numel() for batch in task.subject.batches),
            "kept_tokens": task.tokens,
            "kept_bytes": task.bytes,
            "bytes_a_batch": -(-task.bytes // len(task.subject.batches)),
        }
        right = HooksKeep(task.subject, folder)
        expected = right.found(right.run(task, folder), task)
        # Once for what is kept, once for what is on its way to the disk, once for the model's own.
        memory = 2 * task.bytes + (128 << 20)
        for _ in range(self.runs):
            for contestant in self._order.sample(contestants, len(contestants)):
                out = folder / "run"
                out.mkdir()
                # What others left to be written is not this one's to wait for.
                os.sync()
                begin = _busy()
                kept, cost = contestant.measured(task, out, memory)
                spent, own, passed = (after - before for after, before in zip(_busy(), begin, strict=True))
                others = max(0.0, spent - own - contestant.cpu_elsewhere) / passed
                check = "nothing is kept"
                if contestant.keeps:
                    check = _checked(contestant, task, contestant.found(kept, task), expected)
                del kept
                shutil.rmtree(out)
                timings = self.timings.add(operation, contestant.name, cost, said=f", others {others:.2f} cores")
                timings.check = check
                timings.more.setdefault("others", []).append(round(others, 2))


def _busy() -> tuple[float, float, float]:
    """Return processor time of the whole machine and of this process, and the time."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Guests are counted among users.
    whole = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return whole - idle, time.process_time(), time.perf_counter()


def _checked(contestant: Contestant, task: Task, found: Found, expected: Found) -> str:
    """Compare what a contestant kept with what hooks keep.

    Raises:
        WrongResult: it is something else.
    """
    model = task.subject.model
    who = f"{contestant.name}, {task.case.name}, {task.subject.name}"
    if found.layers != expected.layers or found.answers is not None and found.answers != expected.answers:
        raise WrongResult(f"{who}: {found.layers} layers for {expected.layers}, or other answers than generate gives")
    # Rounding errors of a few eps in every block, that add up like a random walk.
    bound = 16 * torch.finfo(model.dtype).eps * expected.layers**0.5
    differing, error = 0, 0.0
    for layer in range(expected.layers):
        ours, theirs = found.layer(layer), expected.layer(layer)
        if ours.shape != theirs.shape:
            raise WrongResult(f"{who}: layer {layer} has shape {tuple(ours.shape)}, not {tuple(theirs.shape)}")
        normed = contestant.last_is_normed and layer == expected.layers - 1
        if normed:
            with torch.no_grad():
                theirs = model.part(model.family.final_norm)(theirs)
        if not torch.equal(ours, theirs):
            differing += 1
            error = max(error, _distance(ours, theirs))
            if contestant.exact and not normed or not error <= bound:
                raise WrongResult(f"{who}: layer {layer} is another, by {error:.2g} of the length of a vector")
    what = f"{expected.layers} layers of {len(theirs):,} tokens compared with hooks-keep"
    said = "" if found.answers is None else f", {len(found.answers):,} answers token for token"
    last = ", its last layer with ours behind the final norm" if contestant.last_is_normed else ""
    if not differing:
        return f"{what}{last}{said}, bit for bit: equal"
    least = f"by at most {error:.2g} of a vector's length (bound {bound:.2g})"
    return f"{what}{last}{said}: {differing} layers differ, {least}"


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the largest distance of two tokens' vectors over the root mean square length of a vector."""
    a, b = a.double(), b.double()
    return ((a - b).norm(dim=-1).max() / b.square().sum(-1).mean().sqrt()).nan_to_num(nan=torch.inf).item()


def floor_of(operation: str) -> str | None:
    """Return the contestant that is the limit of an operation."""
    case = operation.split("-")[0]
    return None if case in ("start", "flat") else PlainGenerate.name if case == "answers" else PlainForward.name


def goals(rows: Sequence[Mapping[str, Any]], data: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what was aimed at, what came out, and whether it is met."""
    found: list[dict[str, Any]] = []
    for operation, by_name in by_operation(rows).items():
        ours = by_name[OURS]
        if operation == "flat-llava":
            early, late = (ours["resident_bytes"][at] for at in _FLAT)
            what = f"resident memory after {_FLAT[1]} batches over that after {_FLAT[0]}"
            found.append(judged(operation, what, late / early, 3, at_most=_GROWTH))
        if not (floor := floor_of(operation)):
            continue
        seconds = {name: median(row["seconds"]) for name, row in by_name.items()}
        bare = BareHooks.name
        goal = judged(operation, f"time over {bare}", seconds[OURS] / seconds[bare], 3, at_most=_TIME)
        goal["processor"] = round(median(ours["cpu_seconds"]) / median(by_name[bare]["cpu_seconds"]), 3)
        goal["over_floor"] = round(seconds[OURS] / seconds[floor], 3)
        goal["fastest_runs"] = round(min(ours["seconds"]) / min(by_name[bare]["seconds"]), 3)
        found.append(goal)
        queue = min(2 * _SHARD, data[operation]["kept_bytes"]) + _ON_THE_WAY
        allowed = _MEMORY * by_name[floor]["peak_bytes"] + queue
        what = f"memory over {_MEMORY} x {floor} and the queue"
        goal = judged(operation, what, ours["peak_bytes"] / allowed, 3, at_most=1.0)
        found.append(goal | {"peak_bytes": ours["peak_bytes"], "allowed_bytes": round(allowed)})
        for contestant in CONTESTANTS:
            if contestant.keeps and contestant.name in by_name and contestant.name != OURS:
                ratio = seconds[OURS] / seconds[contestant.name]
                goal = judged(operation, f"time over {contestant.name}", ratio, 3, at_most=1.0)
                found.append(goal if contestant.peer else goal | {"met": None})
    return found


def benchmark(options: Options) -> dict[str, Any]:
    """Run everything; return the results as in `benchmarks/README.md`.

    Raises:
        WrongResult: a contestant kept other values than it should.
        SystemExit: a name is none.
    """
    refuse_unknown("contestant", options.only, [each.name for each in CONTESTANTS])
    refuse_unknown("model", options.models, list(SUBJECTS))
    always = {PlainForward.name, PlainGenerate.name, BareHooks.name, HooksKeep.name, OURS}
    chosen = [each for each in CONTESTANTS if not options.only or each.name in {*options.only, *always}]
    left_out = {each.name: reason for each in chosen if (reason := _missing(each))}
    contestants = [each for each in chosen if each.name not in left_out]
    options.folder.mkdir(parents=True, exist_ok=True)
    described, begun = machine(options.folder), time.perf_counter()
    count = {"smollm2": 1 if options.quick else 6}
    shapes: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="gapprobe-benchmark-", dir=options.folder) as inside:
        run = Benchmark(Path(inside).resolve(), contestants, options.runs or (2 if options.quick else 5))
        for name in options.models or SUBJECTS:
            subject = make_subject(name, count.get(name, 4 if options.quick else 40), options.dtype)
            model = subject.model
            shapes[name] = {
                "title": subject.title,
                "parameters": model.parameters,
                "layers": model.n_layers + 1,
                "width": model.width,
                "dtype": str(model.dtype).removeprefix("torch."),
                "attention": model.attention,
                "rows_a_batch": subject.rows,
            }
            run.run(subject)
            if name == "llava":
                run.flat(*demo(name, 2 * _FLAT[1], options.dtype))
            del subject, model
    rows = run.rows()
    return {
        "machine": described,
        "versions": versions([name for each in contestants for name in each.distributions])
        | {f"{name} (in an environment of its own)": version for name, version in run.versions.items()},
        "models": shapes,
        "data": run.data,
        "threads": torch.get_num_threads(),
        "minutes": round((time.perf_counter() - begun) / 60, 1),
        "labels": {each.name: each.label for each in contestants},
        "left_out": left_out | run.left_out,
        "goals": goals(rows, run.data),
        "rows": rows,
    }


def render(source: Path, folder: Path) -> None:
    """Write the table of results into a folder."""
    results = json.loads(source.read_text(encoding="utf-8"))
    about = "Each contestant runs the same batches on the same models, in turn."
    text = markdown(results, TITLES, OURS, f"Capture benchmark ({source.stem})", about)
    text += goals_section(results["goals"], "at most", lambda goal: str(goal["at_most"]))
    write(folder / "capture-benchmark.md", text)


def main(options: Options) -> None:
    """Measure, or render what was measured."""
    if options.table:
        render(options.table, options.docs)
        return
    results = keep("capture", options, lambda: benchmark(options))
    others = [share for row in results["rows"] for share in row["others"]]
    if loud := sum(share > _QUIET for share in others):
        tell(f"{loud} of {len(others)} runs had others beside them on more than {_QUIET} cores: their times are void")


def _missing(contestant: type[Contestant]) -> str:
    """Return why a contestant cannot run at all; an empty text when it can."""
    # Not imported yet: what one imports another has not to wait for.
    found = importlib.util.find_spec(contestant.module)
    return "" if found else f"cannot be imported: there is no {contestant.module}"


if __name__ == "__main__":
    main(tyro.cli(Options))
