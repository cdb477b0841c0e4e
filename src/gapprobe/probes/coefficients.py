"""Coefficients of the fits that scored held-out rows: in memory, or in a safetensors file until they are asked for."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from safetensors import SafetensorError, safe_open

from gapprobe.errors import DataError


@dataclass(frozen=True)
class Linear:
    """The fits of one layer that scored held-out rows, in raw residual coordinates, at each strength and outer fold.

    The score of a row x that outer fold f holds out is `coef[s, f] @ x + intercept[s, f]`, in float64.

    Attributes:
        coef: weight of every raw feature.
        intercept: free term.
    """

    coef: Float64[np.ndarray, "s f d"]
    intercept: Float64[np.ndarray, "s f"]

    def load(self) -> "Linear":
        """Return itself."""
        return self

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Return what stands in a file under a name."""
        return {f"{name}.coef": self.coef, f"{name}.intercept": self.intercept}


@dataclass(frozen=True)
class Stored:
    """Coefficients that lie in a file.

    Attributes:
        path: a safetensors file.
        name: that they have in it.
    """

    path: Path
    name: str

    def load(self) -> Linear:
        """Read them.

        Raises:
            DataError: the file is gone, or holds something else by now.
        """
        try:
            with safe_open(str(self.path), framework="numpy") as file:
                coef, intercept = (file.get_tensor(f"{self.name}.{part}") for part in ("coef", "intercept"))
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"{self.path}: the coefficients of this sweep cannot be read: {error}; run the sweep again"
            ) from error
        sound = coef.ndim == 3 and coef.shape[:2] == intercept.shape and coef.dtype == intercept.dtype == np.float64
        if not sound:
            raise DataError(f"{self.path} holds no coefficients under {self.name}; run the sweep again")
        return Linear(coef, intercept)
