"""What a sweep takes of memory, and how many layers at once it leaves room for: known before any fit."""

from collections.abc import Mapping
from dataclasses import dataclass

from gapprobe.errors import DataError
from gapprobe.files import told_bytes
from gapprobe.kernels.preconditioner import FEWEST, TOGETHER
from gapprobe.probes.base import ROOM
from gapprobe.probes.fitting import PART, View, fit_numbers

ITEM = 8  # bytes of a float64
SLACK = 1 << 26  # bytes that a thread's allocator keeps of what was freed
REPLICATES = 5  # arrays of all replicates and rows that a bootstrap holds beside its weights


@dataclass(frozen=True)
class Need:
    """Bytes of main memory.

    Attributes:
        layer: of one layer while it is fitted.
        kept: of what is kept until the end: scores of rows held out, labels and weights of all fits, coefficients.
        after: of the bootstrap, when no layer is fitted any more.
        what: is fitted, in words.
    """

    layer: int
    kept: int
    after: int
    what: str

    @classmethod
    def of(
        cls,
        views: Mapping[str, View],
        positions: int,
        strengths: Mapping[str, tuple[float, ...]],
        room: int,
        width: int,
        replicates: int,
        vectors: int | None = None,
    ) -> "Need":
        """Estimate, on the large side, the need of all probes (their `strengths`, by name) on all views.

        A layer has `vectors` residuals, or one a row; `room` is what a probe says that it takes (`Probe`).
        """
        most = max(map(len, strengths.values()))
        tried = sum(map(len, strengths.values()))
        n = len(next(iter(views.values())).source.ids)
        layer = kept = fits = 0
        for view in views.values():
            d = view.dimensions or width
            # As it was read, and what fits make of it: two float32 copies, and a float64 one of the rows of a problem.
            features = (vectors or n) * (width + (3 if view.dimensions else 2) * d)
            for own in view.by_seed().values():
                count = sum(len(split.labels) for split in own.values())
                runs = sum(1 + len(split.cut.inner) + len(split.shuffled) for split in own.values())
                part = min(count * fit_numbers(n, d, most), PART + fit_numbers(n, d, most))
                # The iterative kernels hold directions and histories of the problems they fit together, in float32 and
                # then in float64; closed forms a few matrices of the narrower side.
                working = 2 * min(count * most * (8 * n + 16 * d), ROOM) + 8 * min(n, d) ** 2
                # Hessians that folds share, and their factors, in float32.
                working += min(count * most * d * d, TOGETHER) if n >= FEWEST * d else 0
                # Of each cell, scores by run, and coefficients: gathered, stacked and written.
                gathered = most * (runs * n + 3 * d * sum(len(split.cut.inner) for split in own.values()))
                layer = max(layer, SLACK + room + ITEM * (features + 2 * part + working + gathered))
                fits += count
                kept += count * n * (ITEM + 2)
                for split in own.values():
                    held = (1 + len(split.shuffled)) * n + view.linear * len(split.cut.inner) * (width + 1)
                    kept += ITEM * tried * positions * len(view.layers) * (held + n)
        what = f"{n:,} rows x {width:,} wide x {fits:,} fits at up to {most} strengths"
        return cls(layer, kept, ITEM * n * replicates * REPLICATES, what)

    def jobs(self, wanted: int, free: int) -> int:
        """Return how many layers can be fitted at once, `wanted` at most.

        Raises:
            DataError: not even one.
        """
        room = free - self.kept
        if self.layer > room or self.after > room:
            largest = f"one layer of {self.what} takes about {told_bytes(self.layer)} of memory"
            mend = "sweep fewer rows, splits, targets, seeds or permutations at a time"
            if self.after > self.layer:
                largest, mend = f"the bootstrap takes about {told_bytes(self.after)} of memory", "use fewer replicates"
            if self.kept > self.layer:
                mend += ", or fewer layers, positions, probes or strengths"
            raise DataError(
                f"{largest}, and {told_bytes(self.kept)} more for the scores of all layers; {told_bytes(free)} are "
                f"free: {mend}"
            )
        return max(1, min(wanted, room // max(self.layer, 1)))
