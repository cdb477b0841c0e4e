"""Tiles of matrix products in LLVM's own language: sums that stay in registers while rows stream by.

What `products_cpu` is made of: a few rows of the left side times some rows of the right one (`DOTS`), or times some
vectors of its columns (`COMBINED`). Sums are taken in the type of the result, float32 or float64; the right side is
widened as it is read. Both tiles ask the memory for what comes after them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, no_type_check

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

_TARGET: Any = cpu_target.target_context  # the processor that is compiled for
BYTES = 64 if "+avx512f" in _TARGET.codegen().magic_tuple()[2] else 32  # of a vector
# Rows of the left side in a tile, at most, and rows of the right side, or vectors of its columns: all sums, and what is
# added to them, fit into the registers.
DOTS = (5, 5) if BYTES == 64 else (6, 2)
COMBINED = (6, 4) if BYTES == 64 else (6, 2)

_INDEX, _INT = ir.IntType(64), ir.IntType(32)
_FUSED = ("contract",)  # a product is rounded with the sum it is added to, where the CPU can
# How LLVM names a kind of number, and its bytes; 16-bit kinds are those of `compiled.flat`.
_KINDS: dict[Any, tuple[str, int]] = {
    types.uint16: ("i16", 2),
    types.int16: ("i16", 2),
    types.float32: ("f32", 4),
    types.float64: ("f64", 8),
}
FIRST, SECOND = 3, 2  # levels of the cache, as LLVM counts them


def shares(count: int) -> list[int]:
    """Return how many of so many things one pass of several does, for any number of passes."""
    return sorted({-(-count // passes) for passes in range(1, count + 1)})


@intrinsic
@no_type_check
def address(_context, array, _at):
    """Return the address of a number of an array, None of None: what a tile is told."""
    if array == types.none:
        return types.none(array, types.int64), lambda context, *_: context.get_dummy_value()
    signature = types.CPointer(array.dtype)(array, types.int64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(context.make_array(signature.args[0])(context, builder, args[0]).data, [args[1]])

    return signature, generate


@intrinsic
@no_type_check
def add_dots(_context, rows, left, left_step, right, right_step, across, soon, fetches, centre, e, out, out_step):
    """Add to `out` the dot products of some rows of both sides, over `e` numbers; `centre` is taken off the right.

    The memory is asked for `fetches` rows of the right side from `soon` on, as `shares` has them.
    """
    signature = types.void(rows, left, left_step, right, right_step, across, soon, fetches, centre, e, out, out_step)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, left, left_step, right, right_step, across, soon, fetches, centre, e, out, out_step = args
        tile = _Tile(builder, signature.args[10].dtype)
        kind, wide = signature.args[3].dtype, signature.args[10].dtype
        rest = builder.srem(e, _INDEX(tile.lanes))
        whole = builder.sub(e, rest)
        last = builder.sub(across, _INDEX(1))

        def of(count: int) -> None:
            sums = tile.zeros(count, DOTS[1])
            lefts = [builder.gep(left, [builder.mul(_INDEX(i), left_step)]) for i in range(count)]
            rights = []
            for j in range(DOTS[1]):  # the last one in place of those that are not there
                which = builder.select(builder.icmp_signed("<", _INDEX(j), last), _INDEX(j), last)
                rights.append(builder.gep(right, [builder.mul(which, right_step)]))

            def add(k: Any, mask: Any = None) -> None:
                columns = [tile.load(builder.gep(row, [k]), kind, mask) for row in rights]
                if signature.args[8] != types.none:
                    off = tile.load(builder.gep(centre, [k]), wide, mask)
                    columns = [builder.fsub(column, off) for column in columns]
                for row, own in zip(lefts, sums, strict=True):
                    factor = tile.load(builder.gep(row, [k]), wide, mask)
                    for place, column in zip(own, columns, strict=True):
                        tile.add_product(place, factor, column)

            def go(fetched: int) -> None:
                ahead = [builder.gep(soon, [builder.mul(_INDEX(j), right_step)]) for j in range(fetched)]
                with cgutils.for_range_slice(builder, _INDEX(0), whole, _INDEX(tile.lanes), _INDEX) as (k, _):
                    for row in ahead:
                        tile.fetch(builder.gep(row, [k]), SECOND)
                    add(k)

            tile.for_count(fetches, shares(DOTS[1]), go)
            with builder.if_then(builder.icmp_signed(">", rest, _INDEX(0))):
                add(whole, tile.first(rest))
            for i, own in enumerate(sums):
                to = builder.gep(out, [builder.mul(_INDEX(i), out_step)])
                for j in range(0, DOTS[1], 2):
                    pair = [own[j], own[min(j + 1, DOTS[1] - 1)]]
                    tile.add_pair(tile.totals(*pair), builder.gep(to, [_INDEX(j)]), builder.sub(across, _INDEX(j)))

        tile.for_count(rows, range(1, DOTS[0] + 1), of)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
@no_type_check
def add_combined(
    _context, rows, left, left_row, left_step, right, right_step, columns, soon, fetches, centre, n, out, out_step
):
    """Add to `out` sums over `n` rows of the right side, each times a number of the left one.

    `columns` are those that are left of the row: a tile is as wide as there are. In a whole one the memory is asked for
    `fetches` vectors of every row from `soon` on, as `shares` has them.
    """
    signature = types.void(
        rows, left, left_row, left_step, right, right_step, columns, soon, fetches, centre, n, out, out_step
    )

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, left, left_row, left_step, right, right_step, columns, soon, fetches, centre, n, out, out_step = args
        tile = _Tile(builder, signature.args[11].dtype)
        kind, wide = signature.args[4].dtype, signature.args[11].dtype

        def of(count: int, vectors: int, last: Any = None) -> None:
            sums, masks = tile.zeros(count, vectors), [None] * (vectors - 1) + [last]
            lefts = [builder.gep(left, [builder.mul(_INDEX(i), left_row)]) for i in range(count)]
            lanes = [_INDEX(j * tile.lanes) for j in range(vectors)]
            off = None
            if signature.args[9] != types.none:
                off = [tile.load(builder.gep(centre, [j]), wide, mask) for j, mask in zip(lanes, masks, strict=True)]

            def go(fetched: int) -> None:
                with cgutils.for_range_slice(builder, _INDEX(0), n, _INDEX(1), _INDEX) as (k, _):
                    at = builder.mul(k, right_step)
                    row, ahead = builder.gep(right, [at]), builder.gep(soon, [at])
                    for j in lanes[:fetched]:
                        tile.fetch(builder.gep(ahead, [j]), FIRST)
                    numbers = [
                        tile.load(builder.gep(row, [j]), kind, mask) for j, mask in zip(lanes, masks, strict=True)
                    ]
                    if off is not None:
                        numbers = [builder.fsub(number, less) for number, less in zip(numbers, off, strict=True)]
                    for own_left, own in zip(lefts, sums, strict=True):
                        factor = builder.load(builder.gep(own_left, [builder.mul(k, left_step)]))
                        factor = tile.spread(factor, tile.vector)
                        for place, number in zip(own, numbers, strict=True):
                            tile.add_product(place, factor, number)

            if last is None:
                tile.for_count(fetches, shares(vectors), go)
            else:
                go(0)
            for i, own in enumerate(sums):
                for j, place, mask in zip(lanes, own, masks, strict=True):
                    to = builder.gep(out, [builder.add(builder.mul(_INDEX(i), out_step), j)])
                    tile.store(builder.fadd(tile.load(to, wide, mask), builder.load(place)), to, mask)

        heights = range(1, COMBINED[0] + 1)
        full = builder.icmp_signed(">=", columns, _INDEX(COMBINED[1] * tile.lanes))
        with builder.if_else(full) as (then, otherwise):
            with then:
                tile.for_count(rows, heights, lambda count: of(count, COMBINED[1]))
            with otherwise:
                vectors = builder.sdiv(builder.add(columns, _INDEX(tile.lanes - 1)), _INDEX(tile.lanes))
                before = builder.mul(builder.sub(vectors, _INDEX(1)), _INDEX(tile.lanes))
                mask = tile.first(builder.sub(columns, before))

                def narrow(width: int) -> None:
                    tile.for_count(rows, heights, lambda count: of(count, width, mask))

                tile.for_count(vectors, range(1, COMBINED[1] + 1), narrow)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
@no_type_check
def turn(_context, rows, rows_step, out, out_step):
    """Write a square of numbers, as wide as a vector, with rows and columns exchanged."""
    signature = types.void(rows, rows_step, out, out_step)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, rows_step, out, out_step = args
        tile = _Tile(builder, signature.args[0].dtype)
        lanes = tile.lanes
        lines = [tile.load(builder.gep(rows, [builder.mul(_INDEX(i), rows_step)]), tile.number) for i in range(lanes)]
        # Squares of half the size change places, in all squares at once, until they are single numbers.
        half = lanes // 2
        while half:
            for i in (i for i in range(lanes) if not i & half):
                pair = lines[i], lines[i + half]
                lines[i] = tile.picked(*pair, [j + (lanes - half if j & half else 0) for j in range(lanes)])
                lines[i + half] = tile.picked(*pair, [j + (lanes if j & half else half) for j in range(lanes)])
            half //= 2
        for i, line in enumerate(lines):
            tile.store(line, builder.gep(out, [builder.mul(_INDEX(i), out_step)]))
        return context.get_dummy_value()

    return signature, generate


class _Tile:
    """Vectors of one type of number, and what is done with them."""

    def __init__(self, builder: Any, number: Any) -> None:
        self.b, self.number = builder, number
        self.size = _KINDS[number][1]
        scalar = ir.FloatType() if number == types.float32 else ir.DoubleType()
        self.lanes = BYTES // self.size
        self.vector = ir.VectorType(scalar, self.lanes)

    def for_count(self, count: Any, counts: Iterable[int], make: Callable[[int], None]) -> None:
        """Make the code for each of these counts, and go to that of this count."""
        done = self.b.append_basic_block("done")
        choice = self.b.switch(count, done)
        for i in counts:
            block = self.b.append_basic_block(f"of{i}")
            choice.add_case(_INDEX(i), block)
            self.b.position_at_end(block)
            make(i)
            self.b.branch(done)
        self.b.position_at_end(done)

    def zeros(self, rows: int, vectors: int) -> list[list[Any]]:
        """Return places for sums, 0 now; the compiler keeps them in registers."""
        sums = [[cgutils.alloca_once(self.b, self.vector) for _ in range(vectors)] for _ in range(rows)]
        for place in (place for row in sums for place in row):
            self.b.store(ir.Constant(self.vector, [0.0] * self.lanes), place)
        return sums

    def first(self, count: Any) -> Any:
        """Return a mask of the first lanes."""
        lanes = ir.VectorType(_INDEX, self.lanes)
        return self.b.icmp_signed("<", ir.Constant(lanes, list(range(self.lanes))), self.spread(count, lanes))

    def spread(self, value: Any, vector: ir.VectorType) -> Any:
        """Return a vector whose lanes are all one value."""
        none = ir.Constant(vector, ir.Undefined)
        lane = self.b.insert_element(none, value, _INT(0))
        return self.b.shuffle_vector(lane, none, ir.Constant(ir.VectorType(_INT, self.lanes), [0] * self.lanes))

    def load(self, pointer: Any, kind: Any, mask: Any = None) -> Any:
        """Return numbers that lie side by side, as the tile's own."""
        name, size = _KINDS[kind]
        held = ir.VectorType(pointer.type.pointee, self.lanes)
        at = self.b.bitcast(pointer, held.as_pointer())
        if mask is None:
            found = self.b.load(at, align=size)
        else:
            arguments = [at, _INT(size), mask, ir.Constant(held, None)]
            found = self._call(f"llvm.masked.load.v{self.lanes}{name}.p0", held, arguments)
        single = ir.VectorType(ir.FloatType(), self.lanes)
        if kind == types.uint16:
            words = ir.VectorType(_INT, self.lanes)
            shifted = self.b.shl(self.b.zext(found, words), ir.Constant(words, [16] * self.lanes))
            found = self.b.bitcast(shifted, single)
        elif kind == types.int16:
            found = self.b.fpext(self.b.bitcast(found, ir.VectorType(ir.HalfType(), self.lanes)), single)
        return found if found.type == self.vector else self.b.fpext(found, self.vector)

    def store(self, value: Any, pointer: Any, mask: Any = None) -> None:
        """Write numbers side by side."""
        at = self.b.bitcast(pointer, self.vector.as_pointer())
        if mask is None:
            self.b.store(value, at, align=self.size)
        else:
            name = f"llvm.masked.store.v{self.lanes}{_KINDS[self.number][0]}.p0"
            self._call(name, ir.VoidType(), [value, at, _INT(self.size), mask])

    def add_product(self, place: Any, a: Any, b: Any) -> None:
        """Add a product to a sum: one instruction where the CPU has it."""
        self.b.store(self.b.fadd(self.b.fmul(a, b, flags=_FUSED), self.b.load(place), flags=_FUSED), place)

    def fetch(self, pointer: Any, level: int) -> None:
        """Ask the memory for what is read soon, as far as this level of the cache."""
        at = self.b.bitcast(pointer, ir.IntType(8).as_pointer())
        self._call("llvm.prefetch.p0", ir.VoidType(), [at, _INT(0), _INT(level), _INT(1)])

    def totals(self, first: Any, second: Any) -> Any:
        """Return the sums over the lanes of two vectors, as one short vector: halves of both are added at once."""
        a, b = self.b.load(first), self.b.load(second)
        low = [start + i for start in (0, self.lanes) for i in range(self.lanes // 2)]
        while True:
            both = self.b.fadd(self.picked(a, b, low), self.picked(a, b, [i + len(low) // 2 for i in low]))
            if both.type.count == 2:
                return both
            a, b = both, both
            low = [i for i in range(both.type.count) if i % (both.type.count // 2) < both.type.count // 4]

    def add_pair(self, totals: Any, pointer: Any, count: Any) -> None:
        """Add two numbers, or the first, or none, to what is there."""
        with self.b.if_else(self.b.icmp_signed(">=", count, _INDEX(2)), likely=True) as (both, fewer):
            with both:
                at = self.b.bitcast(pointer, totals.type.as_pointer())
                self.b.store(self.b.fadd(self.b.load(at, align=self.size), totals), at, align=self.size)
            with fewer, self.b.if_then(self.b.icmp_signed("==", count, _INDEX(1))):
                self.b.store(self.b.fadd(self.b.load(pointer), self.b.extract_element(totals, _INT(0))), pointer)

    def picked(self, a: Any, b: Any, lanes: list[int]) -> Any:
        """Return lanes of two vectors, the second's counted on from the first's."""
        return self.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(lanes)), lanes))

    def _call(self, name: str, returned: ir.Type, arguments: list[Any]) -> Any:
        kind = ir.FunctionType(returned, [argument.type for argument in arguments])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), arguments)
