"""The fits of a sweep: every layer, several at once, each read when its turn comes and let go when it is done.

Memory does not grow with the number of fits: they are cut into parts, and of what a part says of all rows only that of
the rows it is judged on is kept.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor
from tqdm import tqdm

from gapprobe.errors import DataError
from gapprobe.probes.base import Fits, LinearFits, Probe, chunks
from gapprobe.probes.kept import Kept, Which
from gapprobe.probes.plan import Gathering, HeldOut, Problems
from gapprobe.probes.reading import Features, seen
from gapprobe.probes.tokens import Tokens, finite_rows

# Numbers of weights, scores and coefficients in a part. Not the machine's affair: the last bits of a fit depend on its
# part, and results must not depend on free memory.
PART = 1 << 25

Read = Callable[[str, int], Features]
Held = dict[tuple[str, str, int, str, Which], HeldOut]  # by view, position, layer, probe and cell


@dataclass(frozen=True)
class Source:
    """Where residuals come from.

    Attributes:
        read: returns those of all rows, at a position and after a layer.
        ids: of the rows, as the store that is read knows them.
        kept: where fitted layers are kept.
    """

    read: Read
    ids: Sequence[str]
    kept: Kept | None = None


@dataclass(frozen=True)
class View:
    """What probes are given to read: the layers themselves, or what a control puts in their place.

    Attributes:
        source: of the residuals.
        layers: which are read.
        problems: the fits.
        dimensions: of a random projection; None for the layer itself.
        linear: whether coefficients are held in memory where they are not kept on disk.
    """

    source: Source
    layers: Sequence[int]
    problems: Mapping[Which, Problems]
    dimensions: int | None = None
    linear: bool = False

    def by_seed(self) -> dict[int, dict[Which, Problems]]:
        """Return the fits of each seed, which is the probe's too."""
        out: dict[int, dict[Which, Problems]] = {}
        for which, split in self.problems.items():
            out.setdefault(which[2], {})[which] = split
        return out


def fit_all(
    views: Mapping[str, View],
    positions: Sequence[str],
    probes: Mapping[str, Probe],
    strengths: Mapping[str, tuple[float, ...]],
    jobs: int,
    progress: bool,
) -> Held:
    """Fit all probes at all places, `jobs` layers at once; each thread has one core, which is what narrow fits use.

    Raises:
        DataError: residuals that are NaN or infinite, or a fit that a probe refuses.
    """
    batches = {
        name: [(seed, own, _labels(own), _weights(own)) for seed, own in view.by_seed().items()]
        for name, view in views.items()
    }
    places = [(name, *at) for name, view in views.items() for at in product(positions, view.layers)]

    def fit(place: tuple[str, str, int]) -> Held:
        torch.set_num_threads(1)
        view_name, position, layer = place
        view = views[view_name]
        source, kept = view.source, view.source.kept
        x: Features | None = None
        out: Held = {}
        for (name, probe), (seed, own, labels, weights) in product(probes.items(), batches[view_name]):
            about = (labels, weights, source.ids, position, layer, seed, view.dimensions)
            mark = kept and kept.mark(probe, strengths[name], *about)
            known = kept.load(mark, list(own)) if kept and mark else None
            if known is None:
                x = _finite(source.read(position, layer), position, layer, source.ids) if x is None else x
                linear = view.linear or bool(mark)
                try:
                    features = seen(probe, x, position, view.dimensions, seed)
                    known = _fit(probe, features, own, labels, weights, strengths[name], seed, linear)
                except DataError as error:
                    raise DataError(f"layer {layer}, {name}: {error}") from error
                if kept and mark:
                    known = kept.save(mark, known)
            out |= {(view_name, position, layer, name, which): held for which, held in known.items()}
        return out

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(max_workers=jobs) as pool:
            parts = tqdm(pool.map(fit, places), total=len(places), desc="probes", unit="layer", disable=not progress)
            return {key: held for part in parts for key, held in part.items()}
    finally:
        torch.set_num_threads(threads)


def _labels(problems: Mapping[Which, Problems]) -> Bool[Tensor, "p n"]:
    return torch.from_numpy(np.concatenate([split.labels for split in problems.values()]))


def _weights(problems: Mapping[Which, Problems]) -> Float64[Tensor, "p n"]:
    return torch.cat([split.weights() for split in problems.values()])


def _fit(
    probe: Probe,
    x: Features,
    problems: Mapping[Which, Problems],
    labels: Bool[Tensor, "p n"],
    weights: Float64[Tensor, "p n"],
    strengths: Sequence[float],
    seed: int,
    linear: bool,
) -> dict[Which, HeldOut]:
    """Fit every problem at every strength in as few calls as memory allows: the fits of a call share X."""
    n, times = len(x), len(strengths)
    d = (x.values if isinstance(x, Tokens) else x).shape[1]
    gatherings = [Gathering(split, times) for split in problems.values()]
    owners = iter([gathering for gathering in gatherings for _ in gathering.problems.labels])
    for part in chunks(len(labels), fit_numbers(n, d, times), PART):
        each = torch.tensor(strengths, dtype=torch.float64).repeat(len(labels[part]))
        fits = probe.fit(
            x, labels[part].repeat_interleave(times, 0), weights[part].repeat_interleave(times, 0), each, seed
        )
        scores = fits.scores(x).numpy().reshape(-1, times, n)
        coefficients = _coefficients(fits, times) if linear else None
        for i, own in enumerate(scores):
            gathering = next(owners)
            kept = coefficients if gathering.wants_coefficients else None
            gathering.take(own, kept and (kept[0][i].copy(), kept[1][i].copy()))
    return {which: gathering.finish() for which, gathering in zip(problems, gatherings, strict=True)}


def _coefficients(
    fits: Fits, times: int
) -> tuple[Float64[np.ndarray, "p {times} d"], Float64[np.ndarray, "p {times}"]] | None:
    if not isinstance(fits, LinearFits):
        return None
    coef, intercept = fits.coef.numpy(), fits.intercept.numpy()
    return coef.reshape(-1, times, coef.shape[1]), intercept.reshape(-1, times)


def fit_numbers(n: int, d: int, strengths: int) -> int:
    """Return how many numbers a problem brings to a part: weights and scores by row, coefficients by feature."""
    return 2 * strengths * (n + d)


def _finite(x: Features, position: str, layer: int, ids: Sequence[str]) -> Features:
    finite = finite_rows(x)
    if not bool(finite.all()):
        bad = [ids[i] for i in torch.nonzero(~finite)[:, 0].tolist()]
        told = f"layer {layer}: {len(bad)} rows hold NaN or infinity at {position}, such as {bad[0]}; leave them out"
        raise DataError(told)
    return x
