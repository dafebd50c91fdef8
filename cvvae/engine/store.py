"""Where kept strips lie: how much of them there may be, and on the CPU memory that is used again and again."""

from bisect import insort

import torch
from torch import Tensor


class Store:
    """Holds strips up to ``limit`` bytes; None is no limit.

    On the CPU they are copied into an arena of its own.  Left in the C heap between the short-lived tensors
    of the layers they tear it into holes that add half again to the peak, and memory that comes fresh from
    the system for every strip costs more time than the copy.  A GPU's caching allocator needs no such help.
    """

    def __init__(self, limit: int | None):
        self.limit = limit
        self.held = 0
        self.arena = Arena()

    def has_room(self, size: int) -> bool:
        return self.limit is None or self.held + size <= self.limit

    def keep(self, x: Tensor) -> Tensor:
        """``x``, held from now on, whether or not there is room."""
        self.held += x.nbytes
        return self.arena.take(x) if x.device.type == "cpu" else x

    def release(self, x: Tensor) -> None:
        """Give back what :meth:`keep` returned."""
        self.held -= x.nbytes
        if x.device.type == "cpu":
            self.arena.give(x)


class Arena:
    """First fit in large chunks; pages that were never written take no memory."""

    CHUNK = 256 * 2 ** 20
    ALIGNMENT = 64

    def __init__(self):
        self.chunks: list[Tensor] = []
        self.gaps: list[tuple[int, int, int]] = []  # (chunk, first byte, byte behind the last), sorted
        self.places: dict[int, tuple[int, int, int]] = {}  # the same for what is taken, by address

    def take(self, x: Tensor) -> Tensor:
        """A dense copy of ``x``, [T, C, H, W] with its channels where they are."""
        size = -(-x.nbytes // self.ALIGNMENT) * self.ALIGNMENT
        for i, (chunk, start, stop) in enumerate(self.gaps):
            if stop - start >= size:
                self.gaps[i:i + 1] = [(chunk, start + size, stop)] if stop - start > size else []
                break
        else:
            chunk, start = len(self.chunks), 0
            self.chunks.append(torch.empty(max(self.CHUNK, size), dtype=torch.uint8))
            if size < self.CHUNK:
                insort(self.gaps, (chunk, size, self.CHUNK))
        place = self.chunks[chunk][start:start + x.nbytes].view(x.dtype)
        if x.stride(1) == 1:
            frames, channels, height, width = x.shape
            place = place.view(frames, height, width, channels).permute(0, 3, 1, 2)
        else:
            place = place.view(x.shape)
        self.places[place.data_ptr()] = (chunk, start, start + size)
        return place.copy_(x)

    def give(self, x: Tensor) -> None:
        chunk, start, stop = self.places.pop(x.data_ptr())
        for gap in [gap for gap in self.gaps if gap[0] == chunk and (gap[1] == stop or gap[2] == start)]:
            self.gaps.remove(gap)
            start, stop = min(start, gap[1]), max(stop, gap[2])
        insort(self.gaps, (chunk, start, stop))
