"""What a contestant of the capture benchmark is, what it is given, and the contestants themselves.

Each is written as a careful user would write it: without gradients, without a cache that nobody reads, with the logits
of one token only, and with copies in place of views, which would hold whole activations.

Run as a module this file is the other end of `Elsewhere`: a contestant in a process of its own.
"""

from __future__ import annotations

import copy
import io
import json
import os
import sqlite3
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import PIL.Image
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchmarks._environment import environment
from benchmarks._measure import Cost, timed
from gapprobe.models.model import Model
from gapprobe.tasks.examples import Example

Inputs = dict[str, Tensor]
_REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    """What is to be kept of every batch, and how many tokens are answered."""

    name: str
    title: str
    positions: tuple[str, ...]
    new_tokens: int = 0


CASES = (
    Case("last", "Last token of the prompt, all layers", ("last_input",)),
    Case("all", "All tokens of the prompt, all layers", ("prompt",)),
    Case("answers", "Answers of 10 tokens; last token of prompt and of answer, all layers",
         ("last_input", "last_output"), 10),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that is decoded already: reading files is not what is measured."""

    name: str
    picture: PIL.Image.Image

    def read(self) -> bytes:
        """Return what tells it from others."""
        return self.picture.tobytes()

    def load(self) -> PIL.Image.Image:
        """Return the picture."""
        return self.picture


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, and the batches that everybody runs it on.

    Attributes:
        name, title: of the model.
        model: for those who hook or call it. Nobody may wrap it or change it.
        examples: in the order of the batches.
        batches: the tensors of the examples, encoded once, on the left padded.
    """

    name: str
    title: str
    model: Model
    examples: tuple[Example, ...]
    batches: tuple[Inputs, ...]

    @property
    def rows(self) -> int:
        """Return how many rows a batch has."""
        return len(self.batches[0]["input_ids"])

    def copied(self) -> Any:
        """Return the same model once more, with the same tensors: wrapped, it slows nobody else down."""
        hf = self.model.hf
        return copy.deepcopy(hf, {id(tensor): tensor for tensor in chain(hf.parameters(), hf.buffers())})

    def one_row(self) -> Subject:
        """Return the same with the first row only, to warm up on."""
        first = {name: tensor[:1] for name, tensor in self.batches[0].items()}
        return replace(self, examples=self.examples[:1], batches=(first,))


@dataclass(frozen=True, eq=False)
class Task:
    """One case on one subject."""

    subject: Subject
    case: Case
    lines: tuple[Int[Tensor, " m"], ...] = field(init=False)
    """By batch, which tokens of the prompts are kept, as row · t + column."""

    def __post_init__(self) -> None:
        """Look up the tokens."""
        masks = [batch["attention_mask"].bool() for batch in self.subject.batches]
        if self.case.name == "all":
            lines = [mask.flatten().nonzero()[:, 0] for mask in masks]
        else:
            lines = [torch.arange(1, len(mask) + 1) * mask.shape[1] - 1 for mask in masks]
        object.__setattr__(self, "lines", tuple(lines))

    @property
    def tokens(self) -> int:
        """Return how many tokens are kept, rather too many where answers end early."""
        return sum(map(len, self.lines)) * len(self.case.positions)

    @property
    def bytes(self) -> int:
        """Return how many bytes are kept."""
        model = self.subject.model
        return self.tokens * (model.n_layers + 1) * model.width * model.dtype.itemsize


@dataclass(frozen=True)
class Found:
    """What a contestant kept, in an order that all share: token after token, batch after batch.

    Attributes:
        layer: gives all tokens of a layer.
        layers: how many layers there are.
        answers: the tokens of each row's answer.
    """

    layer: Callable[[int], Float[Tensor, "m d"]]
    layers: int
    answers: list[list[int]] | None = None


class Contestant(ABC):
    """One way to get at residual streams."""

    name: ClassVar[str]
    label: ClassVar[str]
    """For readers who do not know the name."""
    module: ClassVar[str] = "gapprobe"
    """What must be importable."""
    distributions: ClassVar[tuple[str, ...]] = ()
    """Whose versions the results name."""
    cases: ClassVar[tuple[str, ...]] = ("last", "all")
    keeps: ClassVar[bool] = True
    """Whether it keeps what it sees; else there is nothing to check."""
    peer: ClassVar[bool] = True
    """Whether it is a way in which others do the whole job."""
    exact: ClassVar[bool] = True
    """Whether it must agree bit for bit: not with other attention or other shapes."""
    last_is_normed: ClassVar[bool] = False
    """Whether its last layer has gone through the final norm."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        """Prepare what is done once for a model; `folder` may hold files."""
        self.subject, self.folder = subject, folder
        self.model = subject.model
        self.cpu_elsewhere = 0.0
        """Processor seconds that the last run took in another process, what is outside the clock included."""

    @property
    def versions(self) -> dict[str, str]:
        """Return versions that the benchmark's own environment does not have."""
        return {}

    @abstractmethod
    def run(self, task: Task, folder: Path) -> Any:
        """Run all batches, and keep what is wanted in memory or in the empty `folder`."""

    def found(self, kept: Any, task: Task) -> Found:
        """Return what `run` kept; outside the clock. Only those that keep anything are asked."""
        raise NotImplementedError

    def measured(self, task: Task, folder: Path, memory: int) -> tuple[Any, Cost]:
        """Run, and return what was kept and what it took."""
        return timed(lambda: self.run(task, folder), memory)

    def close(self) -> None:  # noqa: B027 (most hold nothing that needs closing)
        """Let go of what was prepared."""


@torch.no_grad()
def forward(hf: Any, inputs: Inputs, **options: Any) -> Any:
    """Run the prompt and nothing else: no cache, the logits of one token, the positions that `generate` gives."""
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return hf(**inputs, position_ids=positions, **{"use_cache": False, "logits_to_keep": 1, **options})


def generate(model: Model, inputs: Inputs, steps: int) -> Int[Tensor, "n s"]:
    """Return the new tokens of greedy answers; behind an answer's end stands padding."""
    config = model.greedy(steps, eos_token_id=sorted(model.end_tokens), suppress_tokens=[model.media_token_id])
    with model.only_asked(config):
        out = model.hf.generate(**inputs, generation_config=config)
    prompt = inputs["input_ids"].shape[1]
    return out[:, prompt:] if out.shape[1] > prompt else out


def spoken(model: Model, tokens: Int[Tensor, "n s"], most: int) -> list[list[int]]:
    """Return each row's answer: what stands before an end token, and at most so many tokens."""
    rows = [row[:most] for row in tokens.tolist()]
    return [row[: next((i for i, token in enumerate(row) if token in model.end_tokens), len(row))] for row in rows]


@contextmanager
def hooks(model: Model, take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `take` with what enters the first block (0) and what block l returns (l)."""

    def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        take(0, given[0] if given else named["hidden_states"])

    def after(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            take(layer, output[0] if isinstance(output, tuple) else output)

        return hook

    blocks: Any = model.part(model.family.blocks)
    handles = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [block.register_forward_hook(after(layer)) for layer, block in enumerate(blocks, 1)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def joined(batches: Sequence[Sequence[Tensor]], answers: list[list[int]] | None = None) -> Found:
    """Return what was kept as lists of layers by batch."""
    return Found(lambda layer: torch.cat([batch[layer] for batch in batches]), len(batches[0]), answers)


def picked(hidden: Float[Tensor, "n t d"], lines: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
    """Copy some tokens out."""
    return hidden.reshape(-1, hidden.shape[-1])[lines]


class PlainForward(Contestant):
    """The model itself: the floor, and what any way to look inside adds to."""

    name = "plain-forward"
    label = "the model's forward, nothing kept"
    distributions = ("torch", "transformers", "numpy")
    keeps = peer = False

    def run(self, task: Task, folder: Path) -> None:
        """Run the prompts."""
        for inputs in task.subject.batches:
            forward(self.model.hf, inputs)


class PlainGenerate(Contestant):
    """The model's own `generate`, greedy: the floor of answering."""

    name = "plain-generate"
    label = "the model's generate, nothing kept"
    cases = ("answers",)
    keeps = peer = False

    def run(self, task: Task, folder: Path) -> None:
        """Answer the prompts."""
        for inputs in task.subject.batches:
            generate(self.model, inputs, task.case.new_tokens)


class BareHooks(Contestant):
    """A hook on every block that does nothing.

    Answering, it goes on for one step more, for without it the last token of an answer is never read.
    """

    name = "bare-hooks"
    label = "forward hooks that keep nothing"
    cases = ("last", "all", "answers")
    keeps = peer = False

    def run(self, task: Task, folder: Path) -> None:
        """Run with hooks."""
        for inputs in task.subject.batches:
            with hooks(self.model, lambda _layer, _hidden: None):
                if task.case.new_tokens:
                    generate(self.model, inputs, task.case.new_tokens + 1)
                else:
                    forward(self.model.hf, inputs)


class HooksKeep(Contestant):
    """A hook on every block that copies the wanted tokens into memory. All others are compared with it."""

    name = "hooks-keep"
    label = "forward hooks, kept in memory"
    cases = ("last", "all", "answers")
    peer = False

    def run(self, task: Task, folder: Path) -> Any:
        """Keep layers by batch; answering, by batch and step."""
        kept: list[Any] = []
        for inputs, lines in zip(task.subject.batches, task.lines, strict=True):
            if not task.case.new_tokens:
                layers: list[Tensor] = []
                with hooks(self.model, lambda _, hidden, to=layers, at=lines: to.append(picked(hidden, at))):
                    forward(self.model.hf, inputs)
                kept.append(layers)
                continue
            steps: list[list[Tensor]] = []

            def take(layer: int, hidden: Tensor, to: Any = steps, at: Tensor = lines) -> None:
                if layer == 0:
                    to.append([])
                to[-1].append(picked(hidden, at) if len(to) == 1 else hidden[:, 0].clone())

            with hooks(self.model, take):
                tokens = generate(self.model, inputs, task.case.new_tokens + 1)
            kept.append((steps, tokens))
        return kept

    def found(self, kept: Any, task: Task) -> Found:
        """Put the answers' last tokens behind the prompts', row by row."""
        if not task.case.new_tokens:
            return joined(kept)
        said = [spoken(self.model, tokens, task.case.new_tokens) for _, tokens in kept]
        batches: list[list[Tensor]] = []
        for (steps, _), answers in zip(kept, said, strict=True):
            # Token k of an answer is read in step k, counted from one: step 0 reads the prompt.
            places = dict.fromkeys((step, row) for row, answer in enumerate(answers) for step in (0, len(answer)))
            layers = range(len(steps[0]))
            batches.append([torch.stack([steps[step][layer][row] for step, row in places]) for layer in layers])
        return joined(batches, [answer for answers in said for answer in answers])


class OutputHiddenStates(Contestant):
    """What transformers hands out itself: all tokens of all layers at once. Its last layer is behind the final norm."""

    name = "output_hidden_states"
    label = "output_hidden_states=True, kept in memory"
    last_is_normed = True

    def __init__(self, subject: Subject, folder: Path) -> None:
        super().__init__(subject, folder)
        # Asked once, transformers leaves hooks in the model for good.
        self._hf = subject.copied()

    def run(self, task: Task, folder: Path) -> list[list[Tensor]]:
        """Keep layers by batch."""
        kept: list[list[Tensor]] = []
        for inputs, lines in zip(task.subject.batches, task.lines, strict=True):
            out = forward(self._hf, inputs, output_hidden_states=True)
            states = getattr(out, "hidden_states", None) or out.language_model_outputs.hidden_states
            kept.append([picked(hidden, lines) for hidden in states])
            del out, states
        return kept

    def found(self, kept: list[list[Tensor]], task: Task) -> Found:
        """Return what was kept."""
        return joined(kept)


class GenerateThenForward(Contestant):
    """What published code does: answer, then run prompt and answer once more with hooks. Kept in memory."""

    name = "generate-then-forward"
    label = "generate, then a second forward with hooks, kept in memory"
    cases = ("answers",)
    exact = False

    def run(self, task: Task, folder: Path) -> Any:
        """Keep layers by batch, and the new tokens."""
        kept: list[Any] = []
        for inputs in task.subject.batches:
            tokens = generate(self.model, inputs, task.case.new_tokens)
            answers = spoken(self.model, tokens, task.case.new_tokens)
            sizes, prompt = torch.tensor([len(answer) for answer in answers]), inputs["input_ids"].shape[1]
            real = torch.arange(tokens.shape[1]) < sizes[:, None]
            whole = inputs | {
                "input_ids": torch.cat([inputs["input_ids"], tokens], dim=1),
                "attention_mask": torch.cat([inputs["attention_mask"], real.long()], dim=1),
            }
            first = torch.arange(len(tokens)) * whole["input_ids"].shape[1] + prompt - 1
            lines = torch.stack([first, first + sizes], dim=1).flatten().unique()
            layers: list[Tensor] = []
            with hooks(self.model, lambda _, hidden, to=layers, at=lines: to.append(picked(hidden, at))):
                forward(self.model.hf, whole)
            kept.append((layers, answers))
        return kept

    def found(self, kept: Any, task: Task) -> Found:
        """Return what was kept."""
        return joined([layers for layers, _ in kept], [answer for _, answers in kept for answer in answers])


class VlmLensWay(Contestant):
    """What vlm-lens (commit ac8289a) does: every hook pickles its output into SQLite and commits, which syncs.

    With two kindnesses: it gets whole batches, where vlm-lens runs one prompt at a time, and it keeps what is wanted
    only, where vlm-lens keeps all tokens or their mean.
    """

    name = "vlm-lens-way"
    label = "hooks, torch.save into SQLite, a commit a hook"
    _TABLE = (
        "CREATE TABLE tensors (id INTEGER PRIMARY KEY, name TEXT NOT NULL, architecture TEXT NOT NULL, timestamp "
        "DATETIME DEFAULT CURRENT_TIMESTAMP, image_path TEXT NULL, prompt TEXT NOT NULL, label TEXT NULL, layer TEXT "
        "NOT NULL, pooling_method TEXT NULL, tensor_dim INTEGER NOT NULL, tensor BLOB NOT NULL)"
    )
    _INSERT = "INSERT INTO tensors (name, architecture, prompt, layer, tensor_dim, tensor) VALUES (?, ?, ?, ?, ?, ?)"

    def run(self, task: Task, folder: Path) -> Path:
        """Write a blob for each batch and layer."""
        path, name = folder / "vlm.db", type(self.model.hf).__name__
        with closing(sqlite3.connect(path)) as database:
            database.execute(self._TABLE)
            for number, (inputs, lines) in enumerate(zip(task.subject.batches, task.lines, strict=True)):

                def take(layer: int, hidden: Tensor, at: Tensor = lines, prompt: str = str(number)) -> None:
                    blob = io.BytesIO()
                    tokens = picked(hidden, at)
                    torch.save(tokens, blob)
                    line = (name, name, prompt, str(layer), tokens.shape[-1], blob.getvalue())
                    database.execute(self._INSERT, line)
                    database.commit()

                with hooks(self.model, take):
                    forward(self.model.hf, inputs)
        return path

    def found(self, kept: Path, task: Task) -> Found:
        """Read the blobs back."""

        def layer(number: int) -> Tensor:
            with closing(sqlite3.connect(kept)) as database:
                blobs = database.execute("SELECT tensor FROM tensors WHERE layer = ? ORDER BY id", [str(number)])
                return torch.cat([torch.load(io.BytesIO(blob)) for (blob,) in blobs])

        return Found(layer, self.model.n_layers + 1)


class TransformerLens(Contestant):
    """TransformerLens' `run_with_cache` through its bridge, on a copy of its own that shares the weights.

    Its attention is always eager.
    """

    name = "transformer-lens"
    label = "TransformerLens run_with_cache, kept in memory"
    module = "transformer_lens"
    distributions = ("transformer-lens",)
    exact = False

    def __init__(self, subject: Subject, folder: Path) -> None:
        super().__init__(subject, folder)
        source = import_module("transformer_lens.model_bridge.sources.transformers.source")
        bridge = import_module("transformer_lens.model_bridge").TransformerBridge
        # It reads its tokenizer from a folder; and where it finds no processor it would install torchvision.
        subject.model.tokenizer.save_pretrained(folder)
        words = type(subject.model.tokenizer).from_pretrained(folder)
        hf = subject.copied()
        hf.config = copy.deepcopy(hf.config)
        hf.config.architectures = [type(hf).__name__]
        with patch.object(source, "load_modality_processor", lambda *_: None):
            self._bridge = bridge.boot_transformers(str(folder), hf_model=hf, tokenizer=words, device="cpu")
        blocks = self.model.n_layers
        self._names = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(blocks))]

    @torch.no_grad()
    def run(self, task: Task, folder: Path) -> list[list[Tensor]]:
        """Keep layers by batch."""
        kept: list[list[Tensor]] = []
        options: dict[str, Any] = {"pos_slice": -1} if task.case.name == "last" else {}
        for inputs, lines in zip(task.subject.batches, task.lines, strict=True):
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            _, cache = self._bridge.run_with_cache(
                inputs["input_ids"],
                return_cache_object=False,
                names_filter=self._names,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=1,
                **{name: tensor for name, tensor in inputs.items() if name != "input_ids"},
                **options,
            )
            # A slice is a view of the whole.
            kept.append([cache[n].clone() if options else picked(cache[n], lines) for n in self._names])
            del cache
        return kept

    def found(self, kept: list[list[Tensor]], task: Task) -> Found:
        """Return what was kept."""
        width = task.subject.model.width
        return joined([[layer.reshape(-1, width) for layer in batch] for batch in kept])


class Nnterp(Contestant):
    """nnterp's accessors in a trace of nnsight, kept in memory."""

    name = "nnterp"
    label = "nnterp, kept in memory"
    module = "nnterp"
    distributions = ("nnterp", "nnsight")

    def __init__(self, subject: Subject, folder: Path) -> None:
        super().__init__(subject, folder)
        wrap, words = import_module("nnterp").StandardizedTransformer, subject.model.tokenizer
        try:
            self._model = wrap(subject.model.hf, tokenizer=words)
        except import_module("nnterp.rename_utils").RenamingError:
            # Its check runs a text alone, and looks for the unembedding in one place.
            self._model = wrap(subject.model.hf, tokenizer=words, check_renaming=False)

    @torch.no_grad()
    def run(self, task: Task, folder: Path) -> list[list[Tensor]]:
        """Keep layers by batch; the final norm and the logits are left out."""
        kept: list[list[Tensor]] = []
        for inputs, lines in zip(task.subject.batches, task.lines, strict=True):
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            given, layers = dict(inputs), []
            with self._model.trace(given, position_ids=positions, use_cache=False) as tracer:
                layers.append(picked(self._model.layers_input[0], lines))
                for layer in range(self._model.num_layers):
                    layers.append(picked(self._model.layers_output[layer], lines))
                tracer.stop()
            kept.append(layers)
        return kept

    def found(self, kept: list[list[Tensor]], task: Task) -> Found:
        """Return what was kept."""
        return joined(kept)


class Elsewhere(Contestant):
    """A contestant whose requirements clash with ours: it runs in an environment and a process of its own, in turn.

    torch and transformers are the same as here. It gets the model and the batches in a
    file, measures itself with the same clock, and gives back what it kept.
    """

    inner: ClassVar[type[Contestant]]
    requirements: ClassVar[tuple[str, ...]]

    def __init__(self, subject: Subject, folder: Path) -> None:
        super().__init__(subject, folder)
        python = environment(folder.parents[1] / f"{self.name}-environment", self.requirements)
        send(subject, folder / "subject.pt")
        command = [str(python), "-m", __name__, self.inner.__name__, str(folder)]
        variables = os.environ | {"PYTHONPATH": f"{_REPOSITORY}{os.pathsep}{_REPOSITORY / 'src'}"}
        self._log = (folder / "log.txt").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            command, cwd=_REPOSITORY, env=variables, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        self._versions: dict[str, str] = self._told()

    def _told(self) -> Any:
        """Return the next thing that the other process says."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise RuntimeError((self._log.read().strip().splitlines() or ["it ended without a word"])[-1])
        return json.loads(line)

    @property
    def versions(self) -> dict[str, str]:
        """Return the versions there, where they are not ours."""
        return self._versions

    def run(self, task: Task, folder: Path) -> Path:
        """Run there."""
        return self.measured(task, folder, 0)[0]

    def measured(self, task: Task, folder: Path, memory: int) -> tuple[Path, Cost]:
        """Have it measured there."""
        kept = folder / "kept.pt"
        asked = {"case": task.case.name, "rows": len(task.subject.examples), "memory": memory, "out": str(kept)}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        told = self._told()
        self.cpu_elsewhere = told.pop("whole")
        return kept, Cost(**told)

    def found(self, kept: Path, task: Task) -> Found:
        """Read what it kept."""
        layers = torch.load(kept)
        return Found(lambda layer: layers[layer], len(layers))

    def close(self) -> None:
        """End the process."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()
        self._log.close()


class NnterpElsewhere(Elsewhere):
    """nnterp 1.3 needs a part of nnsight that 0.8 no longer has."""

    name = "nnterp"
    label = "nnterp, kept in memory"
    inner = Nnterp
    requirements = ("nnterp==1.3.0", "nnsight<0.8")


@dataclass(frozen=True, eq=False)
class Encoded(Model):
    """A model that gives out batches that were encoded before, as all contestants get them."""

    ready: dict[tuple[str | int, ...], Inputs] = field(default_factory=dict, repr=False)

    def encode(
        self, texts: Sequence[str], media: Sequence[Any] | None = None, *, device: torch.device | str | None = None
    ) -> Inputs:
        """Return the tensors of a batch, from the shelf where they are on it."""
        found = self.ready.get(key_of(texts, media or ()))
        return dict(found) if found else super().encode(texts, media, device=device)


def key_of(texts: Sequence[str], images: Sequence[PIL.Image.Image]) -> tuple[str | int, ...]:
    """Return what a batch is known by: `Picture` always gives the same object."""
    return (*texts, *map(id, images))


class Gapprobe(Contestant):
    """Ours: `capture` into a fresh store, synced, from the first batch until the store is open.

    What comes before the first batch (the check of the model, fingerprints, the plan) is in `start`.
    """

    name = "gapprobe"
    label = "gapprobe capture, on disk"
    distributions = ("gapprobe", "nnsight", "safetensors")
    cases = ("last", "all", "answers")
    peer = False

    def __init__(self, subject: Subject, folder: Path) -> None:
        super().__init__(subject, folder)
        ready: dict[tuple[str | int, ...], Inputs] = {}
        size = subject.rows
        for number, inputs in enumerate(subject.batches):
            some = subject.examples[number * size : (number + 1) * size]
            ready[key_of([e.text for e in some], [e.image.load() for e in some if e.image])] = inputs
        model, hf = subject.model, subject.copied()
        self.model = Encoded(hf, model.processor, model.family, model.source, model.revision, model.files, ready=ready)
        self._run = import_module("gapprobe.tracing.run")
        self._need = import_module("gapprobe.tracing.plan").Need
        self.before = Cost(0.0, 0.0, 0)
        """What the last run took before its first batch."""

    def run(self, task: Task, folder: Path) -> Any:
        """Capture."""
        return self._run.capture(
            self.model,
            task.subject.examples,
            folder / "store",
            positions=task.case.positions,
            batch_size=task.subject.rows,
            max_new_tokens=task.case.new_tokens,
            stop=None,
            dtype=str(self.model.dtype).removeprefix("torch."),
            progress=False,
        )

    def measured(self, task: Task, folder: Path, memory: int) -> tuple[Any, Cost]:
        """Count from the first batch on."""
        times: list[tuple[float, float]] = []
        require, passed = self._need.require, SimpleNamespace(require=lambda: None)

        def watched(need: Any, *arguments: Any) -> None:
            # The last thing before the first batch.
            require(need, *arguments)
            times.append((time.perf_counter(), time.process_time()))

        def work() -> Any:
            times.append((time.perf_counter(), time.process_time()))
            return self.run(task, folder)

        with patch.object(self._need, "require", watched), patch.object(self._run, "check_model", lambda _: passed):
            store, cost = timed(work, memory)
        self.before = Cost(times[1][0] - times[0][0], times[1][1] - times[0][1], 0)
        return store, Cost(
            cost.seconds - self.before.seconds, cost.cpu_seconds - self.before.cpu_seconds, cost.peak_bytes
        )

    def start(self, task: Task, folder: Path) -> dict[str, float]:
        """Return the seconds of what is done once a model, then once a run, before the first batch."""
        check, model = import_module("gapprobe.models.check").check_model, self.model
        # In a process of its own: here others may have imported what nnsight needs.
        asked = (
            "import time, torch, transformers; t = time.perf_counter(); import nnsight; print(time.perf_counter() - t)"
        )
        told = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout
        parts = {"import of nnsight": round(float(told), 4)}
        for name, work in (
            ("wrapping the model", lambda: model.traced),
            ("check of the model", lambda: check(model).require()),
            ("fingerprint of the weights", lambda: model.weights_fingerprint),
            ("fingerprints of configuration and processor", lambda: (model.describe(), model.processor_fingerprint)),
        ):
            begin = time.perf_counter()
            work()
            parts[name] = round(time.perf_counter() - begin, 4)
        self.measured(task, folder, 1 << 20)
        parts["each run: ids, plan, need, header, writer"] = round(self.before.seconds, 4)
        return parts

    def found(self, kept: Any, task: Task) -> Found:
        """Read the store back."""
        answers = None
        if task.case.new_tokens:
            answers = [list(map(int, row)) for row in kept.table.column("answer_token_ids").to_pylist()]
        return Found(kept.layer, len(kept.header.layers), answers)


CONTESTANTS: tuple[type[Contestant], ...] = (
    PlainForward,
    PlainGenerate,
    BareHooks,
    HooksKeep,
    OutputHiddenStates,
    GenerateThenForward,
    NnterpElsewhere,
    TransformerLens,
    VlmLensWay,
    Gapprobe,
)


def send(subject: Subject, file: Path) -> None:
    """Write a subject for another process. A model that was pickled whole would not be quite itself there."""
    hf: Any = subject.model.hf
    parts = {"kind": type(hf), "config": hf.config, "state": hf.state_dict(), "buffers": dict(hf.named_buffers())}
    torch.save(parts | {"subject": replace(subject, model=replace(subject.model, hf=None))}, file)


def received(file: Path) -> Subject:
    """Return a subject that another process sent."""
    parts = torch.load(file, weights_only=False)
    hf = parts["kind"](parts["config"]).eval().requires_grad_(False)
    hf.load_state_dict(parts["state"], assign=True)
    for name, tensor in parts["buffers"].items():
        module, _, last = name.rpartition(".")
        setattr(hf.get_submodule(module), last, tensor)
    subject: Subject = parts["subject"]
    return replace(subject, model=replace(subject.model, hf=hf))


def serve(name: str, folder: Path) -> None:
    """Be the process of an `Elsewhere`: measure whatever case is asked for, line by line, until nobody asks."""
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What libraries print must not come in between.
    os.dup2(2, 1)
    subject = received(folder / "subject.pt")
    contestant = globals()[name](subject, folder)
    version = import_module("importlib.metadata").version
    print(json.dumps({d: version(d) for d in contestant.distributions}), file=told, flush=True)
    tasks: dict[tuple[str, int], Task] = {}
    for line in sys.stdin:
        asked, begin = json.loads(line), time.process_time()
        key = (asked["case"], asked["rows"])
        if key not in tasks:
            case = next(case for case in CASES if case.name == asked["case"])
            tasks[key] = Task(subject if asked["rows"] > 1 else subject.one_row(), case)
        kept, cost = contestant.measured(tasks[key], folder, max(asked["memory"], 1 << 20))
        found = contestant.found(kept, tasks[key])
        torch.save([found.layer(layer) for layer in range(found.layers)], asked["out"])
        del kept, found
        print(json.dumps(vars(cost) | {"whole": time.process_time() - begin}), file=told, flush=True)


if __name__ == "__main__":
    # Under its own name, by which the file of the subject knows its classes.
    import_module("benchmarks.capture_contestants").serve(sys.argv[1], Path(sys.argv[2]))
