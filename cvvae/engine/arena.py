"""Memory on the CPU that is used again and again, for what the engine keeps and for what lives a moment.

The C heap keeps what was given back, in holes that other sizes do not fit and that differ from window to window: of
a few, and at times of a hundred, that is more than the tensors.  And memory that comes fresh from the system for
each tensor costs more time than to fill it.  A GPU's caching allocator needs no such help.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

SMALL = 2 ** 20  # bytes; less finds room in the heap, often what was just given back and is still in the caches


class Arena:
    """First fit in large chunks; pages that were never written take no memory.

    A place is free again when its tensor, and every view of it, is gone.  That may be at any moment and in any thread,
    where the garbage collector finds it, so places only queue up and are free from the next call on.
    """

    CHUNK = 256 * 2 ** 20
    ALIGNMENT = 64

    def __init__(self):
        self.chunks: list[np.ndarray] = []
        self._gaps: list[tuple[int, int, int]] = []  # (chunk, first byte, byte behind the last), sorted
        self._returned: deque[tuple[int, int, int]] = deque()  # the same, to be joined with them

    @property
    def gaps(self) -> list[tuple[int, int, int]]:
        while self._returned:
            self._join(*self._returned.popleft())
        return self._gaps

    def empty(self, shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
        """Dense and not initialised; channels last for [T, C, H, W]."""
        size = prod(shape) * dtype.itemsize
        taken = -(-size // self.ALIGNMENT) * self.ALIGNMENT
        gaps = self.gaps
        for i, (chunk, start, stop) in enumerate(gaps):
            if stop - start >= taken:
                gaps[i:i + 1] = [(chunk, start + taken, stop)] if stop - start > taken else []
                break
        else:
            chunk, start = len(self.chunks), 0
            self.chunks.append(torch.empty(max(self.CHUNK, taken), dtype=torch.uint8).numpy())
            if taken < self.CHUNK:
                insort(gaps, (chunk, taken, self.CHUNK))
        # A tensor made from an array holds it until its memory is needed no more.
        place = self.chunks[chunk][start:start + size]
        finalize(place, self._returned.append, (chunk, start, start + taken)).atexit = False
        tensor = torch.from_numpy(place).view(dtype)
        if layout == torch.contiguous_format:
            return tensor.view(*shape)
        frames, channels, height, width = shape
        return tensor.view(frames, height, width, channels).permute(0, 3, 1, 2)

    def _join(self, chunk: int, start: int, stop: int) -> None:
        for gap in [gap for gap in self._gaps if gap[0] == chunk and (gap[1] == stop or gap[2] == start)]:
            self._gaps.remove(gap)
            start, stop = min(start, gap[1]), max(stop, gap[2])
        insort(self._gaps, (chunk, start, stop))


_scratch: ContextVar[Arena | None] = ContextVar("scratch", default=None)


@contextmanager
def scratch() -> Iterator[Arena]:
    """An arena for what is large of what :func:`empty` and :func:`empty_like` give on the CPU meanwhile."""
    arena = Arena()
    token = _scratch.set(arena)
    try:
        yield arena
    finally:
        _scratch.reset(token)


def empty(like: Tensor, shape: Sequence[int], layout: torch.memory_format) -> Tensor:
    """Room of ``like``'s dtype and device for something short-lived."""
    arena = _scratch.get()
    if arena is not None and like.device.type == "cpu" and prod(shape) * like.dtype.itemsize >= SMALL:
        return arena.empty(shape, like.dtype, layout)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def empty_like(x: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """The same in the layout of ``x``, by default of its shape."""
    return empty(x, x.shape if shape is None else shape, layout_of(x))


def layout_of(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
