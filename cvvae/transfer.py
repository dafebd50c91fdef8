"""Windows on their way to the device that computes, and back.

On CUDA they go through pinned memory on a stream of their own: the next window is sent, and the last result fetched,
while one is computed.  Elsewhere they are sent when their turn comes.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def sent(windows: Iterable[tuple[Tensor, int]], device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, int]]:
    """Each of ``windows`` on ``device`` in ``dtype``, with the number that comes with it."""
    if device.type != "cuda":
        # No loop, whose variable would hold one window while another is made.
        yield from map(lambda window: (window[0].to(device, dtype), window[1]), windows)
        return
    computing, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    ready = None
    for x, number in windows:
        if x.device.type == "cpu":
            x = x.to(dtype).pin_memory()
        copying.wait_stream(computing)
        with torch.cuda.stream(copying):
            x = x.to(device, dtype, non_blocking=True)
        x.record_stream(computing)
        arrived = copying.record_event()
        if ready is not None:
            yield _after(ready, computing)
        ready = x, number, arrived
    if ready is not None:
        yield _after(ready, computing)


def _after(ready: tuple[Tensor, int, torch.cuda.Event], computing: torch.cuda.Stream) -> tuple[Tensor, int]:
    x, number, arrived = ready
    computing.wait_event(arrived)
    return x, number


def fetched(pieces: Iterable[Tensor], device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    """Each of ``pieces`` on ``device`` in ``dtype``."""
    ready = None
    for piece in pieces:
        if piece.device.type != "cuda" or device.type != "cpu":
            yield piece.to(device, dtype)
            del piece
            continue
        copying = torch.cuda.Stream(piece.device) if ready is None else ready[2]
        copying.wait_stream(torch.cuda.current_stream(piece.device))
        with torch.cuda.stream(copying):
            copy = torch.empty(piece.shape, dtype=dtype, pin_memory=True).copy_(piece, non_blocking=True)
        piece.record_stream(copying)
        if ready is not None:
            ready[1].synchronize()
            yield ready[0]
        ready = copy, copying.record_event(), copying
    if ready is not None:
        ready[1].synchronize()
        yield ready[0]
