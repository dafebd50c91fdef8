"""The two passes over activations that are not convolutions: into a convolution, and for a group norm's statistics.

``EAGER`` runs them as torch's separate operations; ``compiled()`` has torch.compile make one kernel of each, which
reads and writes an activation once instead of two to four times.  That takes a C++ compiler on the CPU, Triton on a
GPU, and at the first use in a process the time to compile.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arena import empty, layout_of


class Passes(NamedTuple):
    """activate: (x, scale, shift, out) writes SiLU(x * scale + shift).

    sums: (x, pilot) -> sums of x - pilot along rows, and of its squares; float32.
    """

    activate: Callable[[Tensor, Tensor, Tensor, Tensor], object]
    sums: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _activate(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    F.silu(torch.addcmul(shift, x, scale, out=out), inplace=True)


def _activate_at_once(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    out.copy_(F.silu(x.float() * scale + shift))


def _sums(x: Tensor, pilot: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.sub(x, pilot, out=empty(pilot, x.shape, layout_of(x)))
    first = x.sum(3, keepdim=True)
    return first, x.square_().sum(3, keepdim=True)


def _sums_at_once(x: Tensor, pilot: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float() - pilot
    return x.sum(3, keepdim=True), x.square().sum(3, keepdim=True)


EAGER = Passes(_activate, _sums)


@cache
def compiled() -> Passes:
    return Passes(torch.compile(_activate_at_once, dynamic=True), torch.compile(_sums_at_once, dynamic=True))
