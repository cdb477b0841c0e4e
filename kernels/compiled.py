"""Loops that numba compiles for this machine's CPU: what no call of torch or numpy does in one sweep over memory.

A loop over the numbers of a row becomes vector instructions where the compiler may add up in an order of its own
(`sweep`). Which order depends on the CPU, as it does in a BLAS, and on nothing else: equal bytes in, equal bytes out.
NaN and infinities stay what they are. Functions whose every rounding counts are `exact`; called from a sweep, they keep
it. Machine code is kept beside the sources, or in the user's cache where these cannot be written to, and made anew when
a function's own file changes: after a change to this one, `touch` the files that import it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import Any, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Shaped
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

WORTH_A_THREAD = 1 << 18  # numbers: less takes no longer than handing it over


def sweep(function: Callable[..., Any]) -> Any:
    """Compile a loop whose sums may be taken in any order. It frees the interpreter while it runs."""
    return _jit(function, {"reassoc", "contract", "nsz"})


def exact(function: Callable[..., Any]) -> Any:
    """Compile a function whose operations are taken as they are written, but for a product that is added."""
    return _jit(function, {"contract"})


def _jit(function: Callable[..., Any], fastmath: set[str]) -> Any:
    options: dict[str, Any] = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to keep it in: it is compiled anew in every process
        return numba.njit(**options)(function)


def flat(x: Shaped[Tensor, "n d"]) -> tuple[np.ndarray, int]:
    """Return the memory of rows as a sweep takes it, and how many numbers lie from one row to the next.

    16-bit floats become integers, which tell `wide` which they are; what is neither 16 bits nor float32 is narrowed.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        x = x.float()
    line, (step, _) = memory(x)
    return line, step


def memory(x: Shaped[Tensor, "n d"], *, straight: bool = True) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the memory of a matrix as one axis, 16-bit floats as in `flat`, and the steps of its rows and columns.

    One axis: of a matrix with steps the compiler would not know that a row's numbers are neighbours. They are made so
    where they are not, unless `straight` is False.
    """
    (n, d), (row, step) = x.shape, x.stride()
    if straight and d > 1 and step != 1:
        x, row, step = x.contiguous(), d, 1
    line = x.detach().as_strided((1 + (n - 1) * row + (d - 1) * step if n and d else 0,), (1,))
    integers = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
    return (line.view(integers[x.dtype]) if x.dtype in integers else line).numpy(), (row, step)


@intrinsic
@no_type_check
def wide(_context, number):
    """Return a number of `flat` as float32: uint16 is bfloat16, int16 is float16; float64 stays what it is."""
    as_float = ir.FloatType()
    make = {
        types.uint16: lambda b, x: b.bitcast(b.shl(b.zext(x, ir.IntType(32)), ir.IntType(32)(16)), as_float),
        types.int16: lambda b, x: b.fpext(b.bitcast(x, ir.HalfType()), as_float),
        types.float32: lambda _, x: x,
        types.float64: lambda _, x: x,
    }[number]
    kind = types.float64 if number == types.float64 else types.float32
    return kind(number), lambda _, builder, __, args: make(builder, args[0])


@intrinsic
@no_type_check
def bits(_context, _number):
    """Return the bits of a float32 as int32."""
    return types.int32(types.float32), lambda _, builder, __, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
@no_type_check
def from_bits(_context, _number):
    """Return the float32 that has these bits."""
    return types.float32(types.int32), lambda _, builder, __, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
@no_type_check
def larger(_context, _a, _b):
    """Return the larger of two, the second also where either is NaN: one instruction, and no branch."""
    signature = types.float32(types.float32, types.float32)
    return signature, lambda _, builder, __, args: builder.select(builder.fcmp_ordered(">", *args), *args)


@sweep
@no_type_check
def dot(a, b):
    """Return the sum of products of two lines of numbers, in their own precision."""
    total = a.dtype.type(0)
    for j in range(np.uintp(len(a))):  # of an index that might be negative the compiler would make a gather
        total += a[j] * b[j]
    return total


def by_rows(run: Callable[[int, int], None], rows: int, width: int, worth: int | None = None) -> None:
    """Call `run(first, last)` for parts of the rows, one to each of torch's threads where that pays.

    It does from `worth` numbers a thread on, `WORTH_A_THREAD` by default.
    """
    threads = min(torch.get_num_threads(), rows, rows * width // (worth or WORTH_A_THREAD))
    if threads <= 1:
        run(0, rows)
        return
    cuts = [rows * i // threads for i in range(threads + 1)]
    others = [_pool(threads - 1).submit(run, *part) for part in pairwise(cuts[1:])]
    try:
        run(0, cuts[1])
    finally:
        wait(others)  # they write into memory that the caller owns
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads that wait for work: to start them anew takes as long as many a sweep."""
    return ThreadPoolExecutor(threads, "gapprobe-sweep")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
