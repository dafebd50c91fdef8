"""The passes over activations that are not convolutions: into one, behind one, and for a group norm's statistics.

They are torch's separate operations here, or what torch.compile makes of them: that reads and writes an activation
once instead of two to four times, and takes a compiler and, at the first use in a process, time.  For CUDA there are
kernels of our own, :mod:`.fused`.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arena import empty, layout_of

log = logging.getLogger(__name__)

CACHED = 2 ** 21  # bytes of an activation that a CPU takes through all operations of a pass before the next ones
FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # others would lose digits: kernels compute in float32


@dataclass(frozen=True)
class Border:
    """What a convolution's input gets around it: pixels and frames before and behind, and what they hold."""

    space: tuple[int, int]
    space_mode: str  # "zeros" | "replicate"
    time: tuple[int, int] = (0, 0)
    time_mode: str = "replicate"


Activate = Callable[[Tensor, Tensor, Tensor, Tensor], object]
Sums = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Shares = Callable[[Tensor, int, float, torch.dtype], tuple[Tensor, Tensor]]


class Moments:
    """Sums over rows, and over frames unless ``by_frame``, of an activation's channels, as strips come in."""

    def __init__(self, by_frame: bool, sums: Sums):
        self.dims = (2, 3) if by_frame else (0, 2, 3)
        self.sums = sums
        self.count = 0
        self.pilot: Tensor | None = None

    def add(self, strip: Tensor) -> None:
        if self.pilot is None:
            # Squares are summed around a first guess of the mean; around zero they would lose the digits that count.
            self.pilot = strip.float().mean(self.dims, keepdim=True)
            self.first = self.second = 0
        first, second = self.sums(strip, self.pilot)
        self.first = self.first + _exact(first).sum(self.dims, keepdim=True)
        self.second = self.second + _exact(second).sum(self.dims, keepdim=True)
        self.count += strip.numel() // self.pilot.numel()

    def mean_and_square(self) -> tuple[Tensor, Tensor]:
        """Mean of x and of x squared, [1 or T, C, 1, 1]."""
        pilot = _exact(self.pilot)
        first, second = self.first / self.count, self.second / self.count
        return pilot + first, second + 2 * pilot * first + pilot.square()

    def affine(self, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
        """A group norm as a factor and a summand for each channel (and frame), [1 or T, C, 1, 1], float32."""
        return affine_of(*self.mean_and_square(), weight, bias, groups, eps)


def affine_of(mean: Tensor, square: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """The same of means of x and of x squared, [1 or T, C, 1, 1]."""
    grouped = (mean.shape[0], groups, -1)
    mean, square = (value.reshape(grouped).mean(-1, keepdim=True) for value in (mean, square))
    scale = ((square - mean.square()).clamp(min=0) + eps).rsqrt()
    scale = weight.to(scale).reshape(grouped[1:]) * scale
    shift = bias.to(scale).reshape(grouped[1:]) - mean * scale
    return tuple(value.flatten(1).float()[:, :, None, None] for value in (scale, shift))


def _exact(x: Tensor) -> Tensor:
    """In double precision, where the device has it."""
    return x if x.device.type == "mps" else x.double()


class Passes(NamedTuple):
    """bordered: (pieces, start, stop, height, border, affine, out) writes rows ``start`` to ``stop`` of an activation of
    ``height`` rows, which may lie outside it, with ``border`` into ``out``; through a norm's factors and summands and SiLU
    where there is an ``affine``.  pieces: its rows, in order, as (first row, [T, C, rows, W]).

    add: (x, y, bias, moments) adds y and bias, where there are, to x, and measures it where there are moments.
    interleaved: (made, bias, out) writes the picture twice as large whose pixels are ``made`` [T, 4K, H + 1, W + 1], see
    kernels.phases.  None: up-sampling takes another way.
    moments: by frame or not -> what measures an activation.
    shares: (scores, keys, factor, dtype) -> exp(factor * scores), by row as shares of its largest, of ``dtype``, and their
    sum, float32.  scores: [..., K] float32, of which the first ``keys`` count.  None: attention takes another way.
    late_bias: biases are added behind convolutions, by ``add``.
    """

    bordered: Callable[[Iterable[tuple[int, Tensor]], int, int, int, Border, tuple[Tensor, Tensor] | None, Tensor], None]
    add: Callable[[Tensor, Tensor | None, Tensor | None, Moments | None], None]
    interleaved: Callable[[Tensor, Tensor, Tensor], None] | None
    moments: Callable[[bool], Moments]
    shares: Shares | None
    late_bias: bool


def _bordered(activate: Activate, pieces: Iterable[tuple[int, Tensor]], start: int, stop: int, height: int,
              border: Border, affine: tuple[Tensor, Tensor] | None, out: Tensor) -> None:
    left, front = border.space[0], border.time[0]
    frames, width = out.shape[0] - sum(border.time), out.shape[3] - sum(border.space)
    clip = out[front:front + frames]
    for row, piece in pieces:
        place = clip[:, :, row - start:row - start + piece.shape[2], left:left + width]
        if affine is None:
            place.copy_(piece)
        else:
            activate(piece, *affine, place)
    top, bottom = max(start, 0) - start, min(stop, height) - start
    _fill(clip[:, :, top:bottom], 3, left, left + width, border.space_mode)
    _fill(clip, 2, top, bottom, border.space_mode)
    _fill(out, 0, front, front + frames, border.time_mode)


def _fill(x: Tensor, dim: int, start: int, stop: int, mode: str) -> None:
    """Fill what of ``x`` lies before ``start`` and from ``stop`` on, along ``dim``."""
    for place, edge in ((slice(0, start), start), (slice(stop, None), stop - 1)):
        outside = x[(slice(None),) * dim + (place,)]
        if outside.numel() == 0:
            continue
        if mode == "zeros":
            outside.zero_()
        else:
            outside.copy_(x.narrow(dim, edge, 1).expand_as(outside))


def _add(x: Tensor, y: Tensor | None, bias: Tensor | None, moments: Moments | None) -> None:
    if y is not None:
        x += y
    if bias is not None:
        x += bias[:, None, None]
    if moments is not None:
        moments.add(x)


def interleaved(made: Tensor, bias: Tensor, out: Tensor) -> None:
    """See :class:`Passes`."""
    frames, channels = out.shape[:2]
    whole = empty(made, (frames, channels, 2 * made.shape[2], 2 * made.shape[3]), torch.channels_last)
    places = whole.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
    phases = made.permute(0, 2, 3, 1).unflatten(3, (2, 2, channels)).permute(0, 1, 3, 2, 4, 5)
    torch.add(phases, bias, out=places)
    out.copy_(whole[:, :, 1:-1, 1:-1])


def activate(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """SiLU(x * scale + shift) into ``out``."""
    for frames, times, plus, made in _in_parts(x, scale, shift, out):
        F.silu(torch.addcmul(plus, frames, times, out=made), inplace=True)


def _activate_at_once(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    out.copy_(F.silu(x.float() * scale + shift))


def sums(x: Tensor, pilot: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of x - pilot along rows, and of its squares; float32."""
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
    """``x``, on a CPU in frames, or rows of a frame, few enough to stay in its caches; and of ``others``, which lack
    frames and rows or have as many, the same."""
    frames, _, rows, _ = x.shape
    whole = [each.expand(frames, -1, rows, -1) for each in (x, *others)]
    if x.device.type == "cpu":
        frames, rows = max(1, CACHED // x[0].nbytes), max(1, CACHED // x[0, :, 0].nbytes)
    for some in zip(*(each.split(frames) for each in whole), strict=True):
        yield from zip(*(each.split(rows, 2) for each in some), strict=True)


def _passes(activate: Activate, sums: Sums, interleaves: bool) -> Passes:
    return Passes(partial(_bordered, activate), _add, interleaved if interleaves else None, partial(Moments, sums=sums),
                  shares=None, late_bias=False)


EAGER = _passes(activate, sums, interleaves=False)
ELSEWHERE = _passes(activate, sums, interleaves=True)


@cache
def _compiled() -> tuple[Activate, Sums]:
    return torch.compile(_activate_at_once, dynamic=True), torch.compile(_sums_at_once, dynamic=True)


def passes_for(x: Tensor, compiled: bool = False) -> Passes:
    """What does best where ``x`` is; ``compiled`` has torch.compile make its kernels where we have none of our own."""
    if x.device.type == "cuda" and x.dtype in FUSED_DTYPES and can_fuse(x.device):
        from .fused import FUSED

        return FUSED
    if compiled:
        return _passes(*_compiled(), interleaves=x.device.type != "cpu")
    return EAGER if x.device.type == "cpu" else ELSEWHERE


@cache
def can_fuse(device: torch.device) -> bool:
    """Whether Triton is there and works; if not, the log says what is missing."""
    try:
        from .fused import try_out

        try_out(device)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # Triton's own, a missing compiler's, a driver's
        log.warning("CV-VAE runs without its fused kernels, which takes two to three times as long: Triton, on Windows the "
                    "package triton-windows, cannot be used (%s: %s).", type(error).__name__, error)
        return False
    return True
