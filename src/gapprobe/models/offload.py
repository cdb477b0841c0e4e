"""From the device to main memory, a layer at a time, so that nothing kept waits on the device for its neighbours."""

from __future__ import annotations

from math import prod

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


class Room:
    """Main memory that is used again, batch after batch: touching fresh memory costs more than copying into it."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, int, int], dtype: torch.dtype, pinned: bool) -> Shaped[Tensor, "l m d"]:
        """Return room of this shape, whatever it holds; what was returned before is not to be read any more."""
        size = prod(shape) * dtype.itemsize
        if size > len(self._bytes):
            # Batches come sorted, each a little longer than the last. The old room goes before there is a new one.
            self._bytes = torch.empty(0, dtype=torch.uint8)
            self._bytes = torch.empty(size + size // 4, dtype=torch.uint8, pin_memory=pinned)
        return self._bytes[:size].view(dtype).view(shape)


class Offload:
    """Room for some tokens of every layer, filled layer by layer.

    On a GPU the room should be pinned; the copies run on a stream of their own beside the next block. On a CPU each is
    one gather straight into its place.
    """

    def __init__(self, room: Shaped[Tensor, "l m d"]) -> None:
        self.filled = 0
        self._room = room
        # One a device: the blocks of a large model may lie on several.
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def full(self) -> bool:
        """Return whether every layer has come."""
        return self.filled == len(self._room)

    def take(self, hidden: Float[Tensor, "*n d"], lines: Int[Tensor, " m"]) -> None:
        """Copy some tokens of the next layer; `lines` counts them over the whole batch."""
        flat, out = hidden.reshape(-1, hidden.shape[-1]), self._room[self.filled]
        self.filled += 1
        lines = lines.to(flat.device)
        if flat.device.type != "cuda":
            if flat.dtype == out.dtype and flat.device.type == "cpu":
                torch.index_select(flat, 0, lines, out=out)
            else:
                out.copy_(flat[lines])
            return
        stream = self._streams.setdefault(flat.device, torch.cuda.Stream(flat.device))
        chosen = flat[lines].to(out.dtype)
        stream.wait_stream(torch.cuda.current_stream(flat.device))
        with torch.cuda.stream(stream):
            out.copy_(chosen, non_blocking=True)
        # The allocator must not hand the memory on before the copy has read it.
        chosen.record_stream(stream)

    def result(self) -> Shaped[Tensor, "l m d"]:
        """Return all layers, once they have arrived."""
        for stream in self._streams.values():
            stream.synchronize()
        return self._room
