"""Where image tokens lie in the picture: for each family's way of cutting it up, boxes as shares of width and height.

A box is left, top, right, bottom; a token without a place, such as the end of a line, has a box without area.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jaxtyping import Float
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

if TYPE_CHECKING:
    from gapprobe.models.model import Model

Boxes = Float[np.ndarray, "k 4"]
Inputs = dict[str, Tensor]


def grid(rows: int, columns: int, *, line_ends: bool = False) -> Boxes:
    """Return the boxes of a grid over the whole picture, row by row; each row perhaps ended by a token of its own."""
    y, x = np.divmod(np.arange(rows * columns), columns)
    boxes = np.stack([x / columns, y / rows, (x + 1) / columns, (y + 1) / rows], axis=1)
    if not line_ends:
        return boxes
    ended = np.concatenate([boxes.reshape(rows, columns, 4), np.zeros((rows, 1, 4))], axis=1)
    return ended.reshape(-1, 4)


def square(model: Model, inputs: Inputs, row: int, size: tuple[int, int]) -> Boxes | None:
    """One square grid over the picture, or over its middle where the processor crops (LLaVA-1.5's does)."""
    count = _count(model, inputs, row)
    side = math.isqrt(count)
    if side * side != count:
        return None
    left, top, right, bottom = _crop(cast(Any, model.processor).image_processor, size)
    scale, shift = np.array([right - left, bottom - top] * 2), np.array([left, top] * 2)
    return grid(side, side) * scale + shift


def qwen(model: Model, inputs: Inputs, row: int, _size: tuple[int, int]) -> Boxes | None:
    """One grid over the whole picture, as fine as the picture is large: Qwen-VL merges 2 x 2 patches to a token."""
    merge = int(cast(Any, model.processor).image_processor.merge_size)
    _, rows, columns = (int(number) for number in inputs["image_grid_thw"][row])
    return grid(rows // merge, columns // merge)


def anyres(model: Model, inputs: Inputs, _row: int, size: tuple[int, int]) -> Boxes | None:
    """The whole picture in a square grid, then in a finer one of its shape with line ends (LLaVA-NeXT, OneVision)."""
    processor = cast(Any, model.processor)
    width, height = size
    tile_height, tile_width = inputs["pixel_values"].shape[-2:]
    base = (
        math.isqrt(int(processor.num_image_tokens))
        if getattr(processor, "num_image_tokens", None)
        else tile_height // int(processor.patch_size)
    )
    best = select_best_resolution((height, width), processor.image_processor.image_grid_pinpoints)
    # The one place that knows how much of the padded tiles the model throws away.
    words, lines = processor._get_unpadded_features(
        height, width, base, base, best[0] // tile_height, best[1] // tile_width
    )
    return np.concatenate([grid(base, base), grid(lines, words // lines, line_ends=True)])


def idefics(model: Model, inputs: Inputs, row: int, size: tuple[int, int]) -> Boxes | None:
    """Tiles in rows, each a square grid, then the whole picture in one (Idefics3, SmolVLM)."""
    images = cast(Any, model.processor).image_processor
    width, height = size
    asked = {"size": images.size, "max_image_size": images.max_image_size}
    _, rows, columns = images.get_number_of_image_patches(height, width, asked)
    return _tiled(rows, columns, _count(model, inputs, row))


def internvl(model: Model, inputs: Inputs, row: int, size: tuple[int, int]) -> Boxes | None:
    """Tiles in rows, then the whole picture, unless the only tile is the whole picture (InternVL)."""
    images = cast(Any, model.processor).image_processor
    width, height = size
    tile = images.size["height"], images.size["width"]
    columns, rows = get_optimal_tiled_canvas((height, width), tile, images.min_patches, images.max_patches)
    count = _count(model, inputs, row)
    if count == int(cast(Any, model.processor).image_seq_length):
        rows = columns = 0
    return _tiled(rows, columns, count)


def sound(model: Model, inputs: Inputs, row: int, _size: tuple[int, int]) -> Boxes | None:
    """All of a sound, from left to right (Qwen2-Audio)."""
    return grid(1, _count(model, inputs, row))


def _tiled(rows: int, columns: int, count: int) -> Boxes | None:
    """Return the boxes of so many rows and columns of tiles and of the whole picture, all with as many tokens."""
    side = math.isqrt(count // (rows * columns + 1))
    if side * side * (rows * columns + 1) != count:
        return None
    whole, tiles = grid(side, side), grid(rows, columns) if rows else np.empty((0, 4))
    inside = [
        np.array([tile[0], tile[1], tile[0], tile[1]]) + whole / np.array([columns, rows, columns, rows])
        for tile in tiles
    ]
    return np.concatenate([*inside, whole])


def _count(model: Model, inputs: Inputs, row: int) -> int:
    return int((inputs["input_ids"][row] == model.media_token_id).sum())


def _crop(images: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return which part of the picture an image processor looks at."""
    crop = getattr(images, "crop_size", None)
    if not getattr(images, "do_center_crop", False) or not crop:
        return 0.0, 0.0, 1.0, 1.0
    width, height = size
    asked = images.size
    if asked.get("shortest_edge"):
        scale = asked["shortest_edge"] / min(size)
        wide, high = int(width * scale), int(height * scale)
    else:
        wide, high = asked["width"], asked["height"]
    left, top = (wide - crop["width"]) // 2 / wide, (high - crop["height"]) // 2 / high
    return left, top, left + crop["width"] / wide, top + crop["height"] / high


LAYOUTS: Mapping[str, Callable[[Model, Inputs, int, tuple[int, int]], Boxes | None]] = {
    "square": square,
    "qwen": qwen,
    "anyres": anyres,
    "idefics": idefics,
    "internvl": internvl,
    "sound": sound,
}
