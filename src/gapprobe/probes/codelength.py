"""How many bits the labels cost once the residuals are known: online code length, which rewards learning from few rows.

Source: Voita & Titov 2020, arXiv 2003.12298, section 2.2.2 (online coding).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gapprobe.errors import DataError
from gapprobe.probes.base import Probe, find_probe

# The paper's portions of the rows after which the probe is fitted anew.
PORTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5)


@dataclass(frozen=True)
class CodeLength:
    """Bits to send the labels of n rows.

    Attributes:
        bits: with the probe, block after block, each block coded by the fit to all rows before it.
        uniform: with one bit a label.
        blocks: rows of each block; the first is sent with one bit a label.
        bits_by_block: of each block.
    """

    bits: float
    uniform: float
    blocks: tuple[int, ...]
    bits_by_block: tuple[float, ...]

    @property
    def compression(self) -> float:
        """Return uniform over bits: 1 says that the residuals tell nothing."""
        return self.uniform / self.bits


def online_code(
    x: Float[Tensor, "n d"],
    target: Bool[np.ndarray, " n"],
    *,
    probe: str | Probe = "logistic",
    strength: float = 0.1,
    portions: Sequence[float] = PORTIONS,
    seed: int = 0,
) -> CodeLength:
    """Return the online code length of labels given residuals; all blocks are fitted in one call.

    Rows are sent in a random order. Until the rows sent hold both classes, labels cost one bit.

    Args:
        x: residuals.
        target: labels.
        probe: whose scores are log-odds.
        strength: of the probe.
        portions: of the rows after which the probe is fitted anew, rising, below 1.
        seed: of the order.

    Raises:
        DataError: labels of another length, portions that do not rise, or a probe whose scores are no log-odds.
    """
    found = find_probe(probe, ("rows",))
    if not found.calibrated:
        raise DataError(f"the scores of {found.name!r} are no log-odds, so they give no code; take the logistic probe")
    if len(target) != len(x):
        raise DataError(f"{len(target)} labels for {len(x)} rows")
    n = len(target)
    ends = [*dict.fromkeys(int(np.ceil(p * n)) for p in portions if 0 < p < 1), n]
    if list(portions) != sorted(portions) or not portions or not 0 < portions[0] <= portions[-1] < 1:
        raise DataError(f"portions must rise and lie between 0 and 1, got {tuple(portions)}")
    order = np.random.default_rng(seed).permutation(n)
    y = torch.from_numpy(target[order])
    known = [(start, stop) for start, stop in zip(ends, ends[1:], strict=False) if 0 < int(y[:start].sum()) < start]
    bits = {(start, stop): float(stop - start) for start, stop in zip([0, *ends], ends, strict=False)}
    if known:
        mask = torch.stack([torch.arange(n) < start for start, _ in known]).double()
        labels, strengths = y.expand(len(known), n), torch.full((len(known),), strength, dtype=torch.float64)
        scores = found.fit(x[order], labels, mask, strengths, seed).scores(x[order])
        cost = torch.nn.functional.softplus(torch.where(y, -scores, scores)) / np.log(2.0)
        bits |= {(a, b): float(cost[i, a:b].sum()) for i, (a, b) in enumerate(known)}
    parts = list(bits)
    return CodeLength(sum(bits.values()), float(n), tuple(b - a for a, b in parts), tuple(bits[part] for part in parts))
