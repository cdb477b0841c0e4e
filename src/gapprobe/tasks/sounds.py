"""Where sounds come from: WAV files. Each is read when it is needed, so that a bad one costs its own rows alone."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from gapprobe.errors import DataError
from gapprobe.files import read_bytes
from gapprobe.sound import Sound


@runtime_checkable
class SoundSource(Protocol):
    """A sound that can be named without being read."""

    @property
    def name(self) -> str:
        """A name that is unique among the sounds of a study."""
        ...

    def read(self) -> bytes:
        """Return the file's bytes. Raises DataError when there are none."""
        ...

    def load(self) -> Sound:
        """Return the sound. Raises DataError when it cannot be decoded."""
        ...


@dataclass(frozen=True)
class SoundFile:
    """A sound in a WAV file (integer or float samples, any number of channels), or its bytes from a table (`data`)."""

    name: str
    path: Path | None = None
    data: bytes | None = None

    def read(self) -> bytes:
        """Return the bytes of the file."""
        return read_bytes(f"sound {self.name}", self.path, self.data)

    def load(self) -> Sound:
        """Return the sound, its channels averaged."""
        from scipy.io import wavfile

        content = self.read()
        try:
            with warnings.catch_warnings():
                # Chunks that are not sound (a title, say) are passed over.
                warnings.simplefilter("ignore", wavfile.WavFileWarning)
                rate, samples = wavfile.read(io.BytesIO(content))
        # Its reader answers damaged files with nearly any exception.
        except Exception as error:
            raise DataError(f"sound {self.name} cannot be decoded as WAV: {error}") from error
        if not len(samples):
            raise DataError(f"sound {self.name} has no samples")
        if samples.dtype == np.uint8:
            samples = samples.astype(np.float32) / 128 - 1
        elif np.issubdtype(samples.dtype, np.integer):
            samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
        mono = samples.astype(np.float32).reshape(len(samples), -1).mean(axis=1, dtype=np.float32)
        if not np.isfinite(mono).all():
            raise DataError(f"sound {self.name} has samples that are no numbers")
        return Sound(mono, int(rate))
