"""Other packages' lenses on the trained LLaVA of the demo, word for word beside ours: an oracle, not a race.

    python -m benchmarks.lens_oracles [--json FILE]
    python -m benchmarks.lens_oracles --table FILE.json [--docs docs]

nnterp and tuned-lens do not import beside our nnsight and TransformerLens, so each runs in an environment of its own
(`lens_elsewhere`), which takes minutes to make. TransformerLens is asked in the tests.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

import gapprobe as gp
from benchmarks._environment import environment
from benchmarks._measure import machine, versions
from benchmarks._outcome import WrongResult, keep, write
from benchmarks._render import section
from gapprobe.demo import FOLDER
from gapprobe.lens.logit import LensReading
from gapprobe.models.model import Model
from gapprobe.store.reader import Store

REQUIREMENTS = {
    "nnterp": ("nnterp==1.3.0", "nnsight<0.8"),
    "tuned-lens": ("tuned-lens==0.2.0", "transformer-lens<3", "numpy<2", "pyarrow<21"),
}
TEXTS = [
    f"Question: What is {number} {change}? Answer:"
    for number in ("two", "three", "four", "seven", "nine")
    for change in ("doubled", "plus one", "squared")
]
ROUNDING = 2e-5  # of float32 logits of about 10
TOP = 10


@dataclass
class Options:
    """Compare our lens with nnterp's and tuned-lens' on the demo's LLaVA."""

    json: Path | None = None
    """Write the results here; into benchmarks/results/ by default. A file is never written over."""
    table: Path | None = None
    """Compare nothing: render the table of these results."""
    docs: Path = Path("docs")
    """Where the table goes."""
    quick: bool = False
    """Print the results."""


def compared(name: str, ours: LensReading, theirs: Float[Tensor, "n l v"]) -> dict[str, Any]:
    """Return how far our reading is from all of another package's log-probabilities.

    Raises:
        WrongResult: further than rounding brings it.
    """
    theirs = theirs.double().movedim(1, 0)
    targets = torch.from_numpy(ours.targets).expand(len(theirs), -1, -1).long()
    own = theirs.gather(2, targets.clamp(min=0))
    entropy = -(theirs.exp() * theirs).sum(2)
    best = theirs.topk(ours.top_words.shape[2], dim=2)
    there = targets >= 0
    rank = torch.from_numpy(ours.rank).long()
    # By how much the words at most differ that one ranks before the target and the other behind it.
    least, most = (1 + (theirs[..., None, :] > own[..., None] + off).sum(3) for off in (2 * ROUNDING, -2 * ROUNDING))
    offs = {
        "log-probability": (torch.from_numpy(ours.log_prob) - own).where(there, 0.0).abs().max(),
        "entropy": (torch.from_numpy(ours.entropy) - entropy).abs().max(),
        "best words": (torch.from_numpy(ours.top_log_prob) - best.values).abs().max(),
    }
    found = {what: float(off) for what, off in offs.items()}
    for what, off in found.items():
        if not off <= ROUNDING * (1 + (float(entropy.max()) if what == "entropy" else 0.0)):
            raise WrongResult(f"{name}: {what} differs by {off:.1e}")
    if wrong := int((there & ((rank < least) | (rank > most))).sum()):
        raise WrongResult(f"{name}: {wrong} ranks differ that no rounding explains")
    same = 1 + (theirs[..., None, :] > own[..., None]).sum(3)
    return {
        "oracle": name,
        "layers": len(theirs),
        "tokens": theirs.shape[1],
        "words": theirs.shape[2],
        "off": found,
        "ranks": int(there.sum()),
        "ranks_same": int((there & (rank == same)).sum()),
        "words_same": float((torch.from_numpy(ours.top_words) == best.indices).double().mean()),
    }


def asked(name: str, folder: Path) -> None:
    """Have a package read what is in a folder.

    Raises:
        RuntimeError: its environment cannot be made, or it fails there.
    """
    python = environment(folder.parent / f"{name}-environment", REQUIREMENTS[name])
    script = str(Path(__file__).with_name("lens_elsewhere.py"))
    done = subprocess.run([str(python), script, name, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {(done.stderr.strip().splitlines() or ['it ended without a word'])[-1]}")


def with_nnterp(folder: Path, model: Model, store: Store) -> list[dict[str, Any]]:
    """Compare with nnterp: the last token of every text, after every block."""
    shutil.copytree(FOLDER / "models" / "llava", folder)
    (folder / "texts.json").write_text(json.dumps(store.rows["text"].tolist()), encoding="utf-8")
    asked("nnterp", folder)
    words = [model.first_token(word) for word in ("eight", "four", "nine")]
    targets = np.tile(np.array(words), (len(store), 1))
    ours = gp.logit_lens(
        store, model, targets, position="last_input", layers=store.header.layers[1:], top_k=TOP, divergence=False
    )
    theirs = load_file(folder / "found.safetensors")["probabilities"].double().log()
    return [compared("nnterp: logit lens of the LLaVA", ours, theirs)]


def with_tuned_lens(folder: Path, model: Model, store: Store) -> list[dict[str, Any]]:
    """Compare with tuned-lens: every token at every layer, by the logit lens and by a lens that it made and saved."""
    hf = model.hf
    language = LlamaForCausalLM(hf.config.text_config)
    language.model.load_state_dict(hf.model.language_model.state_dict())
    language.lm_head.load_state_dict(hf.lm_head.state_dict())
    language.save_pretrained(folder / "language")
    tokens = [store.row(id_).token_ids.tolist() for id_ in store.ids]
    (folder / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")
    asked("tuned-lens", folder)
    found: list[dict[str, Any]] = []
    for name, lens in (("logit", "logit"), ("tuned", gp.load_tuned_lens(folder / "lens"))):
        ours = gp.logit_lens(store, model, "next", lens=lens, top_k=TOP, divergence=False)
        theirs = load_file(folder / f"{name}.safetensors")["log_probabilities"]
        found.append(compared(f"tuned-lens: trajectory of {name} lens", ours, theirs))
    return found


def benchmark() -> dict[str, Any]:
    """Compare everything; return the results.

    Raises:
        WrongResult: a reading differs.
    """
    model = gp.load_model(FOLDER / "models" / "llava", attention="eager")
    examples = [gp.Example(text) for text in TEXTS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = gp.capture(
            model,
            examples,
            folder / "store",
            positions=["prompt", "last_input"],
            max_new_tokens=0,
            dtype="float32",
            progress=False,
        )
        (folder / "tuned").mkdir()
        rows = with_nnterp(folder / "nnterp", model, store) + with_tuned_lens(folder / "tuned", model, store)
    return {
        "machine": machine(Path()),
        "versions": versions(("torch", "transformers", "gapprobe")),
        "requirements": REQUIREMENTS,
        "rows": rows,
    }


def render(source: Path, folder: Path) -> None:
    """Write the table of results into a folder."""
    results = json.loads(source.read_text(encoding="utf-8"))
    asked_for = "; ".join(" ".join(each) for each in results["requirements"].values())
    about = (
        f"# What other lenses read ({source.stem})\n\nThe demo's trained LLaVA, {len(TEXTS)} texts, float32. Each "
        f"package runs in an environment of its own ({asked_for}) and shares no code with ours: `python -m "
        "benchmarks.lens_oracles`. Ranks that differ are of words that lie within rounding of each other.\n"
    )
    columns: Sequence[str] = (
        "oracle",
        "layers x tokens x words",
        "log-probability off by",
        "entropy",
        "best words",
        "ranks",
    )
    rows = [
        (
            row["oracle"],
            f"{row['layers']} x {row['tokens']} x {row['words']:,}",
            *(f"{row['off'][what]:.1e}" for what in ("log-probability", "entropy", "best words")),
            f"{row['ranks_same']:,} of {row['ranks']:,} the same",
        )
        for row in results["rows"]
    ]
    write(folder / "lens-oracles.md", about + section("At most", columns, rows))


def main(options: Options) -> None:
    """Compare, or render what was compared."""
    if options.table:
        render(options.table, options.docs)
    else:
        keep("lens-oracles", options, benchmark)


if __name__ == "__main__":
    main(tyro.cli(Options))
