"""The two passes over activations that are not convolutions: into a convolution, and for a group norm's statistics.

``EAGER`` runs them as torch's separate operations; ``compiled()`` has torch.compile make one kernel of each, which
reads and writes an activation once instead of two to four times.  That takes a C++ compiler on the CPU, Triton on a
GPU, and at the first use in a process the time to compile.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arena import empty, layout_of

CACHED = 2 ** 21  # bytes of frames that a CPU takes through all operations of a pass before the next ones


class Passes(NamedTuple):
    """activate: (x, scale, shift, out) writes SiLU(x * scale + shift).

    sums: (x, pilot) -> sums of x - pilot along rows, and of its squares; float32.
    """

    activate: Callable[[Tensor, Tensor, Tensor, Tensor], object]
    sums: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _activate(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    for frames, times, plus, made in _in_parts(x, scale, shift, out):
        F.silu(torch.addcmul(plus, frames, times, out=made), inplace=True)


def _activate_at_once(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    out.copy_(F.silu(x.float() * scale + shift))


def _sums(x: Tensor, pilot: Tensor) -> tuple[Tensor, Tensor]:
    # Written in the layout that is read: torch sums ten times slower from channels last to channels first.
    first, second = (empty(pilot, (*x.shape[:3], 1), layout_of(x)) for _ in range(2))
    for frames, minus, plain, squared in _in_parts(x, pilot, first, second):
        part = torch.sub(frames, minus, out=empty(minus, frames.shape, layout_of(x)))
        torch.sum(part, 3, keepdim=True, out=plain)
        torch.sum(part.square_(), 3, keepdim=True, out=squared)
    return first, second


def _sums_at_once(x: Tensor, pilot: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float() - pilot
    return x.sum(3, keepdim=True), x.square().sum(3, keepdim=True)


def _in_parts(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Frames of ``x``, on a CPU few enough at a time to stay in its caches, and of ``others`` [1 or T, ...] the same."""
    count = x.shape[0] if x.device.type != "cpu" else max(1, CACHED // x[0].nbytes)
    return zip(*(each.expand(x.shape[0], -1, -1, -1).split(count) for each in (x, *others)), strict=True)


EAGER = Passes(_activate, _sums)


@cache
def compiled() -> Passes:
    return Passes(torch.compile(_activate_at_once, dynamic=True), torch.compile(_sums_at_once, dynamic=True))
