"""Compile every Triton kernel ahead of time for cards that need not be here, and table what the compilers made of it.

`python -m benchmarks.compiled` writes `docs/compiled-kernels.md`; with `--check` it compares with what stands there. No
time is measured: registers, spills, shared memory and the instructions for tensor cores are all that can be known
without a card.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from gapprobe.kernels import cosine_triton, logit_lens_triton, products_triton
from gapprobe.kernels.lens_parts import KEPT_ON_GPU

TABLE = Path(__file__).parents[1] / "docs" / "compiled-kernels.md"
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
ODD = ", odd width"
COSINES = {1: "cosine, raw", 2: "cosine, centred too", 3: "cosine, all three"}
# How many words the lens' walk keeps, and how many rows stand together: the last needs most.
LENSES = {"lens walk": (0, 1), "lens walk, best": (KEPT_ON_GPU, 1), "lens walk, best and divergence": (KEPT_ON_GPU, 16)}
NORM = "lens norm"
PROBLEMS = {torch.bfloat16: (16, 64), torch.float16: (64,), torch.float32: (16, 64)}  # float16 compiles like bfloat16


HEAD = """# Triton kernels, compiled ahead of time

`python -m benchmarks.compiled` made this with Triton {version}, which torch 2.13 for CUDA brings along. **Not yet timed
on a GPU, and not yet run on one**: none was at hand. Under Triton's interpreter the kernels agree with their float64
references (`tests/kernels/test_products.py`, `test_cosine_triton.py`, `test_logit_lens_triton.py`; the interpreter's
product of bfloat16 is wrong and is mended in the first).

- `logits` and `step` are one kernel of `kernels/products_triton.py`, the latter with the loss; `pull` goes back.
- `cosine` is `kernels/cosine_triton.py` with three, six or nine sums: raw cosines, centred ones too, standardised ones
  too. It has no problems and no use for tensor cores: it waits for memory.
- `lens` is `kernels/logit_lens_triton.py`, X being the words: the norm of a row of width 4,096, the targets' logits,
  and the walk over the vocabulary: as it is, with 16 best words, and with the divergence from the final layer too. All
  have a bias. Words in bfloat16 take three products, in float16 two. Other types are left out where they need less.
- X in 16 bits takes two products of 16 bits each, X in float32 three of TF32 on CUDA and one of float32 on ROCm.
- Programs are compiled for at most 16 problems and for 64 at a time. An odd width is one that 16 does not divide: X
  comes in number by number there, which will be slow.
- Spilled are bytes of stack (CUDA), or registers and bytes of scratch memory (ROCm). Tensor cores: instructions in the
  code, not how often they run. Float16 with 16 problems is left out: it compiles as bfloat16 does.
- `tests/kernels/test_compiled.py` compiles again: nothing spills, shared memory is there, tensor cores are used. With
  the Triton named above every number must be as it is here."""


@dataclass(frozen=True)
class Target:
    """A card: how it is named to the compiler, and the shared memory that a program may have there."""

    name: str
    gpu: GPUTarget
    shared: int
    tensor: str


# Shared memory: CUDA C++ programming guide, table of compute capabilities (per block, opt-in); 64 KiB of LDS in CDNA 3.
TARGETS = (
    Target("sm_80", GPUTarget("cuda", 80, 32), 163 << 10, r"\bmma\.sync"),
    Target("sm_90", GPUTarget("cuda", 90, 32), 227 << 10, r"\bmma\.sync|\bwgmma\.mma_async"),
    Target("sm_100", GPUTarget("cuda", 100, 32), 227 << 10, r"\bmma\.sync|\btcgen05\.mma"),
    Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 << 10, r"\bv_mfma_\w+"),
)


@dataclass(frozen=True)
class Compiled:
    """One line of the table."""

    kernel: str
    x: str
    problems: int
    target: str
    registers: int
    spilled: int
    shared: int
    tensor: int
    kinds: str


def faults(line: Compiled) -> list[str]:
    """Return what no kernel may do on any target, whatever compiled it."""
    limit = next(target.shared for target in TARGETS if target.name == line.target)
    told = f"{line.kernel}, {line.x}, {line.problems} problems, {line.target}"
    return [
        f"{told}: {fault}"
        for wrong, fault in (
            (line.spilled > 0, f"{line.spilled} bytes or registers are spilled"),
            (line.shared > limit, f"{line.shared} bytes of shared memory, {limit} are there"),
            (_multiplies(line) and line.tensor == 0, "no instruction for tensor cores"),
        )
        if wrong
    ]


def _multiplies(line: Compiled) -> bool:
    """Tell whether tensor cores are wanted: products of 16 bits; cosines and norms have none, they wait for memory."""
    return not line.x.startswith("float32") and line.kernel not in (*COSINES.values(), NORM)


def sources(target: Target) -> Iterator[tuple[str, str, int, ASTSource, dict[str, Any]]]:
    """Yield every kernel as the launchers call it, with any number of rows, and with widths that 16 divides or not."""
    rocm = target.gpu.backend == "hip"
    for kernel in ("logits", "step", "pull"):
        for dtype in TYPES:
            for problems in PROBLEMS[dtype]:
                x = str(dtype).removeprefix("torch.")
                yield kernel, x, problems, *_source(kernel, dtype, problems, rocm, aligned=True)
        yield kernel, f"bfloat16{ODD}", 64, *_source(kernel, torch.bfloat16, 64, rocm, aligned=False)
    for variants, kernel in COSINES.items():
        for dtype in TYPES:
            yield kernel, str(dtype).removeprefix("torch."), 0, *_cosine(variants, dtype, aligned=True)
        yield kernel, f"bfloat16{ODD}", 0, *_cosine(variants, torch.bfloat16, aligned=False)
    yield from _lenses(target)


def _source(
    kernel: str, dtype: torch.dtype, problems: int, rocm: bool, aligned: bool
) -> tuple[ASTSource, dict[str, Any]]:
    size = products_triton.blocks(kernel, dtype, problems, rocm=rocm, aligned=aligned)
    constants: dict[str, Any] = {
        "PRECISION": products_triton.precision(dtype, rocm=rocm),
        "ROWS": size.rows,
        "WIDTH": size.width,
        "PROBLEMS": size.problems,
    }
    function = products_triton.pull_kernel if kernel == "pull" else products_triton.logits_kernel
    if kernel != "pull":
        constants["FUSED"] = kernel == "step"
    if kernel == "logits":
        constants |= dict.fromkeys(("turned", "sign", "weight", "residual", "share", "slope"))
    if dtype == torch.float32:
        constants["low"] = None
    signature: dict[str, str] = {}
    for name in function.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("x", "high", "low"):
            signature[name] = TYPES[dtype]
        elif name in ("n", "d", "q", "line", "x_row", "x_layer") or (name == "share" and kernel == "pull"):
            signature[name] = "i64" if name == "x_layer" else "i32"
        else:
            signature[name] = "*fp32"
    # What Triton learns of the arguments when it launches: 16 divides all but these.
    unknown = ["n", "q"] if aligned else ["n", "q", "d", "x_row", "x_layer"]
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and name not in unknown
    }
    constexprs = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
    return source, size.options


def _cosine(variants: int, dtype: torch.dtype, aligned: bool) -> tuple[ASTSource, dict[str, Any]]:
    constants: dict[str, Any] = {
        "VARIANTS": variants,
        "ROWS": cosine_triton.ROWS,
        "WIDTH": cosine_triton.width(variants),
    }
    constants |= dict.fromkeys([*(("high", "low") if variants < 2 else ()), *(("scale",) if variants < 3 else ())])
    kinds = dict.fromkeys(("left", "right"), TYPES[dtype]) | dict.fromkeys(("n", "d", "left_row", "right_row"), "i32")
    function = cosine_triton.sums_kernel
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in function.arg_names}
    unknown = ["n"] if aligned else ["n", "d", "left_row", "right_row"]
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and name not in unknown
    }
    constexprs = {(function.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes), cosine_triton.OPTIONS


def _lenses(target: Target) -> Iterator[tuple[str, str, int, ASTSource, dict[str, Any]]]:
    """Yield the lens' kernels for bfloat16, and for other words what needs most."""
    *fewer, everything = LENSES
    for kernel in (NORM, "lens aim", *fewer):
        yield kernel, "bfloat16", 0, *_lens(kernel, torch.bfloat16, target)
    for dtype in TYPES:
        x = str(dtype).removeprefix("torch.")
        yield everything, x, 0, *_lens(everything, dtype, target)
        if dtype != torch.float16:
            yield everything, f"{x}, capped", 0, *_lens(everything, dtype, target, capped=True)
    yield everything, f"bfloat16{ODD}", 0, *_lens(everything, torch.bfloat16, target, aligned=False)


def _lens(
    kernel: str, dtype: torch.dtype, target: Target, *, aligned: bool = True, capped: bool = False
) -> tuple[ASTSource, dict[str, Any]]:
    """Return a kernel of the lens for words of a type, with bias."""
    card = {"gfx942": "rocm", "sm_80": "other"}.get(target.name, "roomy")
    constants = logit_lens_triton.blocks(dtype, card, plain=aligned and not capped) | {"CAPPED": capped}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    function = logit_lens_triton.aim_kernel
    if kernel == NORM:
        function = logit_lens_triton.norm_kernel
        constants, options = {"NORM": logit_lens_triton.NORMS["layer"], "BLOCK": 4096}, {"num_warps": 8}
    if kernel in LENSES:
        function = logit_lens_triton.walk_kernel
        kept, group = LENSES[kernel]
        constants |= {"KEPT": kept, "GROUP": group} | ({"crosseds": None} if group == 1 else {})
    # Float16 is the sum of two numbers, float32 of one.
    constants |= dict.fromkeys(["low", "rest"][{torch.float32: 0, torch.float16: 1}.get(dtype, 2) :])
    kinds = dict.fromkeys(("x", "gain", "shift", "bias", "high", "low", "rest", "weight"), TYPES[dtype])
    kinds |= dict.fromkeys(("v", "d", "line", "q", "m", "w_row", "share"), "i32") | dict.fromkeys(
        ("eps", "cap"), "fp32"
    )
    kinds |= dict.fromkeys(("local", "above", "places"), "*i32") | {"order": "*i64"}
    unknown = ["v", "q", "m", "eps", "cap"] + ([] if aligned else ["d", "w_row"])
    return _described(function, constants, kinds, unknown), options


def _described(
    function: JITFunction[Any], constants: dict[str, Any], kinds: dict[str, str], unknown: list[str]
) -> ASTSource:
    """Return a kernel with what Triton learns of its arguments when it launches: 16 divides all but the unknown."""
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and name not in unknown
    }
    constexprs = {(names.index(name),): value for name, value in constants.items() if name in names}
    return ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)


def compile_all() -> list[Compiled]:
    """Compile all for all targets, afresh."""
    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope():
        knobs.cache.dir = cache
        return [_compile(target, *rest) for target in TARGETS for rest in sources(target)]


def document(lines: list[Compiled]) -> str:
    """Return the document."""
    parts = [HEAD.format(version=triton.__version__)]
    for target in TARGETS:
        unit = "registers of vectors" if target.gpu.backend == "hip" else "registers"
        parts += ["", f"## {target.name}, at most {target.shared:,} bytes of shared memory", ""]
        parts += [f"| kernel | X | problems | {unit} | spilled | shared memory | tensor cores |"]
        parts += ["|---|---|---|---|---|---|---|"]
        parts += [_row(line) for line in lines if line.target == target.name]
    return "\n".join(parts) + "\n"


def _row(line: Compiled) -> str:
    kernel, x, problems, _, registers, spilled, shared, tensor, kinds = astuple(line)
    return f"| {kernel} | {x} | {problems or ''} | {registers} | {spilled} | {shared:,} | {tensor} {kinds} |"


def main() -> None:
    """Write the table, or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compile and compare, write nothing")
    check = parser.parse_args().check
    lines = compile_all()
    complaints = [fault for line in lines for fault in faults(line)]
    text = document(lines)
    if check and f"Triton {triton.__version__}," in TABLE.read_text() and text != TABLE.read_text():
        complaints.append(f"{TABLE.name} is no longer what this Triton makes: python -m benchmarks.compiled")
    if not check:
        TABLE.write_text(text)
        print(text)
    if complaints:
        sys.exit("\n".join(complaints))


def _compile(
    target: Target, kernel: str, x: str, problems: int, source: ASTSource, options: dict[str, Any]
) -> Compiled:
    # Later versions of Triton will not fuse products and sums unless asked to.
    made = triton.compile(source, target=target.gpu, options=options | {"enable_fp_fusion": True})
    if target.gpu.backend == "hip":
        text = made.asm["amdgcn"]
        registers = int(_found(r"\.vgpr_count:\s*(\d+)", text))
        spilled = int(_found(r"\.vgpr_spill_count:\s*(\d+)", text)) + int(
            _found(r"\.private_segment_fixed_size:\s*(\d+)", text)
        )
    else:
        text = made.asm["ptx"]
        registers, spilled = _resources(made.asm["cubin"])
    kinds = re.findall(target.tensor, text)
    named = "+".join(sorted({kind.replace("v_mfma", "mfma").split(".")[0].split("_")[0] for kind in kinds}))
    return Compiled(kernel, x, problems, target.name, registers, spilled, made.metadata.shared, len(kinds), named)


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's output has no {pattern}")
    return match[1]


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers a thread and bytes of stack, which is where spills go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(_found(r"REG:(\d+)", told)), int(_found(r"STACK:(\d+)", told)) + int(_found(r"LOCAL:(\d+)", told))


if __name__ == "__main__":
    main()
