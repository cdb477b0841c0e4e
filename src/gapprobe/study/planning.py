"""What a study will take before anything runs, and how far it has come. Weights are neither read nor fetched.

A plan knows the model by its configuration and processor: parameters by the shapes of its tensors, tokens by encoding a
sample of the prompts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gapprobe.errors import ConfigError, DataError
from gapprobe.files import told_bytes, told_count
from gapprobe.study.asking import POSITIONS
from gapprobe.tasks.examples import Example

if TYPE_CHECKING:
    from gapprobe.models.model import Model
    from gapprobe.study.study import Study

SAMPLE = 32  # prompts that are encoded to know how long they are
OPTION_TOKENS = 12  # of an option with its letter, at a guess: what is asked with options is not made up for a plan


@dataclass(frozen=True)
class Step:
    """One step of a plan: how many rows it makes or reads, and what that costs.

    Attributes:
        name: of the step.
        rows: calls that are run, or rows that are read.
        tokens: that the model reads and writes for them; 0 where it does not run.
        disk: bytes.
        detail: what is done, in words.
    """

    name: str
    rows: int
    tokens: int
    disk: int
    detail: str


@dataclass(frozen=True)
class Plan:
    """What a study will take.

    Attributes:
        study: its name.
        model: what is run, in words.
        parameters: of the model.
        weights: bytes of its weights in the study's dtype.
        memory: bytes of the weights and of a batch's keys and values; activations come on top.
        steps: in their order.
    """

    study: str
    model: str
    parameters: int
    weights: int
    memory: int
    steps: tuple[Step, ...]

    @property
    def forward_passes(self) -> int:
        """Return how many prompts the model reads."""
        return sum(step.rows for step in self.steps if step.tokens)

    @property
    def flops(self) -> int:
        """Return the floating-point operations of all forward passes: two a parameter and token."""
        return 2 * self.parameters * sum(step.tokens for step in self.steps)

    @property
    def disk(self) -> int:
        """Return the bytes of all stores."""
        return sum(step.disk for step in self.steps)

    def hours(self, tflops: float) -> float:
        """Return the time of the forward passes at this many TFLOP/s, in hours: a lower bound."""
        return self.flops / (tflops * 1e12) / 3600

    def told(self, tflops: float, basis: str) -> str:
        """Return the plan in words.

        Args:
            tflops: floating-point operations a second of the device, in 1e12.
            basis: where that number is from.
        """
        millions = self.parameters / 1e6
        size = f"{millions / 1e3:.1f} billion" if millions >= 1e3 else f"{millions:.1f} million"
        lines = [
            f"{self.study}: {self.model}, {size} parameters",
            f"{'step':10} {'rows':>9} {'tokens':>13} {'disk':>10}  what",
            *map(_line, self.steps),
            f"forward passes {self.forward_passes:,}, disk {told_bytes(self.disk)}, memory of the device above "
            f"{told_bytes(self.memory)} (weights {told_bytes(self.weights)}, and a batch's keys and values)",
            f"at least {_duration(self.hours(tflops))} at {tflops:,.3g} TFLOP/s ({basis}): decoding a token at a time, "
            "a device waits for its memory",
        ]
        return "\n".join(lines)


def plan(study: Study, model: Model) -> Plan:
    """Return what a study will take.

    Args:
        study: not yet run.
        model: from `load_model(…, device="meta")`: shapes and processor, no weights.

    Raises:
        DataError: none of the sampled examples can be encoded.
    """
    from gapprobe.tracing.plan import Need

    config = study.config
    calls = study.calls
    length = _tokens(model, calls)
    layers = model.n_layers + 1 if config.layers == "all" else len(config.layers)
    size = torch.empty(0, dtype=model.dtype).element_size()
    trials = len(study.trials)

    def asked(name: str, rows: int, prompt: float, layers: int, tokens: int, told: str) -> Step:
        dtype = str(model.dtype).removeprefix("torch.")
        need = Need(rows, layers, float(tokens), tokens, model.width, dtype, config.batch_size)
        return Step(name, rows, round(rows * (prompt + config.max_new_tokens)), need.bytes, told)

    told = f"{told_count(trials, 'trial')}, {layers} layers x {len(POSITIONS)} tokens x {model.width} wide"
    steps = [asked("capture", len(calls), length, layers, len(POSITIONS), told)]
    if config.samples is not None:
        shown = len({(trial.visual.text, trial.image.name) for trial in study.trials})
        told = f"{config.samples.count} answers drawn to each of {told_count(shown, 'visual call')}"
        steps.append(asked("draws", shown * config.samples.count, length, 1, 1, told))
    if config.choices is not None:
        told = f"at most: the calls once more, with {config.choices.options} options"
        steps.append(asked("choices", len(calls), length + OPTION_TOKENS * config.choices.options, 1, 1, told))
    splits = told_count(len(config.probe.splits), "split")
    controls = told_count(len(config.probe.controls), "control")
    steps += [
        Step("gap", trials, 0, 0, "accuracies, which trials count, the gap"),
        Step("judges", trials, 0, 0, "the same by both judges"),
        Step("probe", trials, 0, 0, f"at most: {layers} layers, {splits}, {controls}"),
        Step("recipe", trials, 0, 0, "at most: the published probe, and what of it leaks"),
        Step("lens", 2 * trials, 0, 0, f"at most: {layers} layers in four conventions"),
        Step("cosine", 2 * trials, 0, 0, f"at most: {layers} layers, visual with full information"),
        Step("selective", trials, 0, 0, "at most: risk and coverage by every confidence"),
    ]
    weights = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    # Keys and values of every layer, at most as wide as the stream.
    cache = config.batch_size * (length + config.max_new_tokens) * 2 * model.n_layers * model.width * size
    return Plan(
        config.name,
        f"{config.model} ({type(model.hf).__name__}, {str(model.dtype).removeprefix('torch.')})",
        model.parameters,
        weights,
        round(weights + cache),
        tuple(steps),
    )


def measured_tflops(device: str, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Return how many 1e12 operations a second matrix products reach on a device, from a few of them.

    Raises:
        ConfigError: the device cannot be used here.
    """
    place = "cuda" if device in ("auto", "spread") and torch.cuda.is_available() else device
    place = "cpu" if place in ("auto", "spread") else place
    n = 1024 if place == "cpu" else 8192
    try:
        a = torch.ones(n, n, dtype=dtype, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {device!r} is not here, so its speed cannot be measured; say it with --tflops "
            f"({str(error).splitlines()[0]:.80})"
        ) from error
    wait = torch.cuda.synchronize if place.startswith("cuda") else lambda: None
    out = a @ a
    wait()
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        torch.matmul(a, a, out=out)
        wait()
        done += 1
    return 2 * n**3 * done / (time.perf_counter() - start) / 1e12


def status(study: Study) -> list[tuple[str, str]]:
    """Return every step of a study with how far it is: rows captured, "done", "to do", or what has changed since."""
    from gapprobe.store.reader import open_store
    from gapprobe.study.served import ServedStudy

    if isinstance(study, ServedStudy):
        return study.stand()
    folder = study.store_folder
    wanted = set(study.rows.values())
    if not (folder / "store.json").exists():
        return [("capture", f"0 of {len(wanted):,} rows"), *((name, "to do") for name in study.step_names)]
    store = open_store(folder)
    there = wanted & set(store.ids)
    # A store in which nothing is sealed yet has no columns either.
    failed = int(store.rows["error"].loc[sorted(there)].notna().sum()) if there else 0
    bad = f", {failed:,} could not be run" if failed else ""
    found = [("capture", f"{len(there):,} of {len(wanted):,} rows{bad}")]
    return found + [(name, study.step_state(name, store)) for name in study.step_names]


def _tokens(model: Model, calls: list[Example]) -> float:
    """Return how many tokens a prompt has, in the mean of a sample."""
    some = [calls[i] for i in sorted({len(calls) * k // SAMPLE for k in range(SAMPLE)})]
    lengths: list[int] = []
    refused = ""
    for call in some:
        try:
            inputs = model.encode([call.text], [call.image.load()] if call.image else None)
            lengths.append(inputs["input_ids"].shape[1])
        except DataError as error:  # an image that cannot be read costs its own rows only
            refused = str(error)
    if not lengths:
        raise DataError(f"none of {len(some)} sampled prompts can be encoded: {refused}")
    return sum(lengths) / len(lengths)


def _line(step: Step) -> str:
    tokens, disk = (f"{step.tokens:,}", told_bytes(step.disk)) if step.tokens else ("", "")
    return f"{step.name:10} {step.rows:>9,} {tokens:>13} {disk:>10}  {step.detail}"


def _duration(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:,.1f} minutes" if hours > 1 / 60 else "a minute"
