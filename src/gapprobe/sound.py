"""A sound in memory: what a file of one is read into, and what an audio-language model is given."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32


@dataclass(frozen=True, eq=False)
class Sound:
    """One channel of sound: samples between -1 and 1, so many a second."""

    samples: Float32[np.ndarray, " s"]
    rate: int

    @property
    def seconds(self) -> float:
        """Return how long it is."""
        return len(self.samples) / self.rate

    def at(self, rate: int) -> Sound:
        """Return the sound with another number of samples a second (polyphase filtering)."""
        if rate == self.rate:
            return self
        from scipy.signal import resample_poly

        shared = math.gcd(rate, self.rate)
        return Sound(np.asarray(resample_poly(self.samples, rate // shared, self.rate // shared), np.float32), rate)
