"""What a sweep has fitted, kept on disk, so that one that was stopped goes on.

One safetensors file for each position, layer and probe, named by a hash of all that its numbers depend on.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xxhash
from jaxtyping import Bool, Float64
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from gapprobe.errors import DataError
from gapprobe.files import as_output_error, write_bytes
from gapprobe.probes.base import Probe
from gapprobe.probes.coefficients import Stored
from gapprobe.probes.plan import HeldOut

Which = tuple[str, str, int]  # target, split and seed
PARTS = ("scores", "shuffled", "inner_auc")
LAYOUT = 2  # of the files; another layout is another name
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class Kept:
    """A folder of fitted layers.

    Attributes:
        folder: where.
        store: what tells apart the residuals that were fitted; see `Store.content`.
    """

    def __init__(self, folder: Path, store: str) -> None:
        self.folder, self.store = folder, store
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{folder} is a file; name a folder for what the sweep keeps")

    def mark(
        self,
        probe: Probe,
        strengths: Sequence[float],
        labels: Bool[Tensor, "p n"],
        weights: Float64[Tensor, "p n"],
        ids: Sequence[str],
        position: str,
        layer: int,
        seed: int,
        dimensions: int | None,
    ) -> str | None:
        """Return the name of a layer's numbers: a hash of all that they depend on; None where that cannot be told.

        A function is known by where it lies in memory, which another one may have in another process.
        """
        settings = {name: repr(value) for name, value in sorted(vars(probe).items())}
        if any(ADDRESS.search(told) for told in settings.values()):
            return None
        kind = (LAYOUT, probe.name, type(probe).__module__, type(probe).__qualname__, settings)
        said = (version("gapprobe"), self.store, kind, tuple(strengths), tuple(ids), seed, dimensions)
        hashed = xxhash.xxh3_128(repr(said).encode())
        hashed.update(np.packbits(labels.numpy()).tobytes())
        hashed.update(weights.numpy().tobytes())
        hashed.update(f"{position} {layer}".encode())
        return hashed.hexdigest()

    def load(self, mark: str, cells: Sequence[Which]) -> dict[Which, HeldOut] | None:
        """Return what is kept under a name, or None; a file that cannot be read is fitted again."""
        path = self.folder / f"{mark}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(str(path), framework="numpy") as file:
                names = set(file.keys())
                out: dict[Which, HeldOut] = {}
                for i, which in enumerate(cells):
                    scores, shuffled, inner_auc = (file.get_tensor(f"{i}.{part}") for part in PARTS)
                    linear = Stored(path, str(i)) if f"{i}.coef" in names else None
                    out[which] = HeldOut(scores, shuffled, inner_auc, linear)
                return out
        except (SafetensorError, OSError):
            return None

    def save(self, mark: str, held: Mapping[Which, HeldOut]) -> dict[Which, HeldOut]:
        """Keep a layer's numbers; the file appears whole or not at all. Returns them with coefficients on disk only.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
        """
        with as_output_error(f"cannot make {self.folder}", lambda: "Layers fitted before are safe."):
            self.folder.mkdir(parents=True, exist_ok=True)
        path, arrays, out = self.folder / f"{mark}.safetensors", dict[str, np.ndarray](), dict[Which, HeldOut]()
        for i, (which, own) in enumerate(held.items()):
            arrays |= {f"{i}.{part}": getattr(own, part) for part in PARTS}
            if own.linear is not None:
                arrays |= own.linear.load().arrays(str(i))
            out[which] = replace(own, linear=own.linear and Stored(path, str(i)))
        write_bytes(path, save(arrays))
        return out
