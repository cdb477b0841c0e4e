import io
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

from gapprobe.errors import DataError
from gapprobe.sound import Sound
from gapprobe.tasks.examples import Example
from gapprobe.tasks.images import ImageFile
from gapprobe.tasks.sounds import SoundFile

TONE = np.sin(np.linspace(0, 60, 800)).astype(np.float32) * 0.5


def wav(samples: np.ndarray, rate: int = 8000) -> bytes:
    buffer = io.BytesIO()
    wavfile.write(buffer, rate, samples)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("samples", "step"),
    [
        (TONE, 0.0),
        (TONE.astype(np.float64), 1e-7),
        ((TONE * 32768).astype(np.int16), 1 / 32768),
        ((TONE * 2**31).astype(np.int32), 1e-6),
        ((TONE * 128 + 128).astype(np.uint8), 1 / 128),
        (np.stack([TONE * 1.5, TONE * 0.5], axis=1), 1e-7),
    ],
)
def test_all_kinds_of_samples_are_the_same_sound(samples: np.ndarray, step: float) -> None:
    found = SoundFile("tone", data=wav(samples)).load()
    assert (found.rate, found.seconds) == (8000, 0.1)
    assert found.samples.dtype == np.float32
    assert np.abs(found.samples - TONE).max() <= step


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(TONE))
    assert np.array_equal(SoundFile("a", tmp_path / "a.wav").load().samples, TONE)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "zero bytes"),
        (b"RIFFnothing", "cannot be decoded as WAV"),
        (wav(TONE)[:60], "sound x"),
        (wav(TONE[:0]), "no samples"),
        (wav(np.array([0.0, np.nan], np.float32)), "no numbers"),
    ],
)
def test_bad_files_are_named(data: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        SoundFile("x", data=data).load()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sound x cannot be read"):
        SoundFile("x", tmp_path / "none.wav").load()


def test_another_rate() -> None:
    sound = Sound(TONE, 8000)
    assert sound.at(8000) is sound
    assert len(sound.at(16000).samples) == 1600
    assert sound.at(16000).seconds == sound.seconds


def test_an_example_has_an_image_or_a_sound() -> None:
    sound, image = SoundFile("s", data=b"x"), ImageFile("i", data=b"x")
    assert Example("a", sound=sound).medium is sound
    assert Example("a", image).medium is image
    with pytest.raises(DataError, match="not both"):
        Example("a", image, sound=sound)
