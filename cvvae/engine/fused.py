"""The passes between convolutions as kernels for a GPU, written in Triton: each reads and writes an activation once.

Of torch's own operations none takes a group norm, SiLU and padding in one go, and those that broadcast over channels
or write into a padded buffer run at a sixth to a third of a GPU's bandwidth: they took four fifths of the time.

Activations are [T, C, H, W] with any strides; they are fast where channels come last.  Every kernel walks tiles of
COLUMNS pixels of a row, or of a frame, and CHANNELS channels.
"""

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from .passes import Border, Moments, Passes

COLUMNS, CHANNELS, WARPS = 32, 128, 4
PIXELS, MEASURED = 64, 512  # that one program takes behind a convolution, and where it makes sums of them
AT_A_TIME = 16  # of those
PARTS = 64  # of those that are added up at a time
KEYS, WARPS_OF_KEYS = 2048, 8  # of a row of scores

_compiled: dict[tuple, CompiledKernel | None] = {}  # None in Triton's interpreter
# Whether kernels can be launched by what Triton compiled; on AMD's GPUs that depends on more than is looked at here.
_short = torch.version.hip is None


@triton.jit(do_not_specialize=["frames", "height", "width", "rows_out", "columns_out", "front", "top", "left", "factors"])
def _bordered(x, out, scale, shift, frames, height, width, channels, x_frame, x_channel, x_row, x_column,
              rows_out, columns_out, out_frame, out_channel, out_row, out_column, front, top, left, factors,
              NORMALISED: tl.constexpr, BLACK_TIME: tl.constexpr, BLACK_SPACE: tl.constexpr,
              COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """A part of one row of ``out``, which begins ``front`` frames, ``top`` rows and ``left`` columns outside ``x``."""
    line = tl.program_id(0)
    frame, row = (line // rows_out).to(tl.int64), (line % rows_out).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    seen_frame = tl.minimum(tl.maximum(frame - front, 0), frames - 1)
    seen_row = tl.minimum(tl.maximum(row - top, 0), height - 1)
    seen_column = tl.minimum(tl.maximum(column - left, 0), width - 1)
    seen = x + seen_frame * x_frame + seen_row * x_row + seen_column[:, None] * x_column + channel[None] * x_channel
    end = columns_out
    if BLACK_TIME:
        end = tl.where(seen_frame == frame - front, end, 0)
    if BLACK_SPACE:
        end = tl.where(seen_row == row - top, end, 0)
        end = tl.where(seen_column == column - left, end, 0)
    known = (column < end)[:, None] & (channel < channels)[None]
    value = tl.load(seen, known, other=0)
    if NORMALISED:
        factor = seen_frame * factors + channel
        times = tl.load(scale + factor, channel < channels, other=0)
        plus = tl.load(shift + factor, channel < channels, other=0)
        value = value.to(tl.float32) * times[None] + plus[None]
        value = tl.where(known, value / (1 + tl.exp(-value)), 0)
    place = out + frame * out_frame + row * out_row + column[:, None] * out_column + channel[None] * out_channel
    tl.store(place, value.to(out.dtype.element_ty), (column < columns_out)[:, None] & (channel < channels)[None])


@triton.jit(do_not_specialize=["rows", "width"])
def _interleaved(made, bias, out, rows, width, channels, made_frame, made_channel, made_row, made_column,
                 out_frame, out_channel, out_row, out_column, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """A part of one row of ``out``, each pixel from its phase of ``made``, and bias."""
    line = tl.program_id(0)
    frame, row = (line // rows).to(tl.int64), (line % rows).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (column < width)[:, None] & (channel < channels)[None]
    row_there, column_there = row + 1, column + 1
    phase = 2 * (row_there % 2) + column_there % 2
    seen = made + frame * made_frame + (row_there // 2) * made_row + (column_there // 2)[:, None] * made_column
    value = tl.load(seen + (phase[:, None] * channels + channel[None]) * made_channel, inside, other=0).to(tl.float32)
    value += tl.load(bias + channel, channel < channels, other=0).to(tl.float32)[None]
    place = out + frame * out_frame + row * out_row + column[:, None] * out_column + channel[None] * out_channel
    tl.store(place, value.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "width", "programs"])
def _finished(x, y, bias, parts, rows, width, channels, programs, x_frame, x_channel, x_row, x_column,
              y_frame, y_channel, y_row, y_column, BIASED: tl.constexpr, ADDED: tl.constexpr, MEASURED: tl.constexpr,
              PIXELS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """Adds bias and ``y`` to PIXELS pixels of a frame of ``x``; and how many these are, their mean and the squares around
    it go into parts [T, programs, 3, C], float32."""
    line = tl.program_id(0)
    frame, number = (line // programs).to(tl.int64), line % programs
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    start = number * PIXELS
    count = tl.minimum(rows * width - start, PIXELS)
    x += frame * x_frame + channel * x_channel
    y += frame * y_frame + channel * y_channel
    offset = tl.zeros([CHANNELS], tl.float32)
    if BIASED:
        offset += tl.load(bias + channel, channel < channels, other=0).to(tl.float32)
    if MEASURED:
        # Squares are summed around a first guess of the mean; around zero they would lose the digits that count.
        first_row, first_column = start // width, start % width
        guess = tl.load(x + first_row * x_row + first_column * x_column, channel < channels, other=0).to(tl.float32)
        if ADDED:
            other = y + first_row * y_row + first_column * y_column
            guess += tl.load(other, channel < channels, other=0).to(tl.float32)
        guess += offset
        first = tl.zeros([COLUMNS, CHANNELS], tl.float32)
        second = tl.zeros([COLUMNS, CHANNELS], tl.float32)
    for begin in range(0, PIXELS, COLUMNS):
        pixel = begin + tl.arange(0, COLUMNS)
        inside = (pixel < count)[:, None] & (channel < channels)[None]
        row, column = (start + pixel) // width, (start + pixel) % width
        place = x[None] + (row * x_row + column * x_column)[:, None]
        value = tl.load(place, inside, other=0)
        if BIASED or ADDED:
            value = value.to(tl.float32) + offset[None]
            if ADDED:
                value += tl.load(y[None] + (row * y_row + column * y_column)[:, None], inside, other=0).to(tl.float32)
            value = value.to(x.dtype.element_ty)
            tl.store(place, value, inside)
        if MEASURED:
            step = tl.where(inside, value.to(tl.float32) - guess[None], 0)
            first += step
            second += step * step
    if MEASURED:
        mean, square = tl.sum(first, 0) / count, tl.sum(second, 0)
        place = parts + (frame * programs + number) * 3 * channels + channel
        tl.store(place, tl.zeros([CHANNELS], tl.float32) + count, channel < channels)
        tl.store(place + channels, guess + mean, channel < channels)
        tl.store(place + 2 * channels, square - mean * mean * count, channel < channels)


@triton.jit(do_not_specialize=["entries"])
def _affine(parts, weight, bias, missing, affine, entries, channels, eps, size, MISSING: tl.constexpr, SIZE: tl.constexpr,
            PARTS: tl.constexpr):
    """Factors and summands of one group's channels from ``entries`` parts, in double precision.

    missing: bias that the values measured lack; it is in the summands.
    """
    frame, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own = tl.arange(0, SIZE)
    channel = group * size + own
    pixels = tl.zeros([PARTS, SIZE], tl.float64)
    first = tl.zeros([PARTS, SIZE], tl.float64)
    second = tl.zeros([PARTS, SIZE], tl.float64)
    plus = tl.zeros([SIZE], tl.float64)
    if MISSING:
        plus += tl.load(missing + channel, own < size, other=0).to(tl.float64)
    for offset in range(0, entries, PARTS):
        entry = offset + tl.arange(0, PARTS)
        inside = (entry < entries)[:, None] & (own < size)[None]
        place = parts + (frame * entries + entry)[:, None] * 3 * channels + channel[None]
        count = tl.load(place, inside, other=0).to(tl.float64)
        mean = tl.load(place + channels, inside, other=0).to(tl.float64) + plus[None]
        pixels += count
        first += count * mean
        second += tl.load(place + 2 * channels, inside, other=0).to(tl.float64) + count * mean * mean
    all_pixels = tl.sum(tl.sum(pixels, 1), 0)
    mean = tl.sum(tl.sum(first, 1), 0) / all_pixels
    variance = tl.sum(tl.sum(second, 1), 0) / all_pixels - mean * mean
    scale = tl.load(weight + channel, own < size, other=0).to(tl.float64) / tl.sqrt(tl.maximum(variance, 0) + eps)
    shift = tl.load(bias + channel, own < size, other=0).to(tl.float64) + (plus - mean) * scale
    place = affine + frame * channels + channel
    tl.store(place, scale.to(tl.float32), own < size)
    tl.store(place + tl.num_programs(0) * channels, shift.to(tl.float32), own < size)


@triton.jit(do_not_specialize=["keys", "row_length"])
def _shares(scores, shares, sums, keys, row_length, factor, KEYS: tl.constexpr):
    """One row of ``scores``, ``row_length`` long, of which the first ``keys`` count."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * row_length
    shares += row * row_length
    largest = tl.full([KEYS], float("-inf"), tl.float32)
    for start in range(0, keys, KEYS):
        key = start + tl.arange(0, KEYS)
        largest = tl.maximum(largest, tl.load(scores + key, key < keys, other=float("-inf")))
    largest = tl.max(largest, 0)
    total = tl.zeros([KEYS], tl.float32)
    for start in range(0, row_length, KEYS):
        key = start + tl.arange(0, KEYS)
        share = tl.exp((tl.load(scores + key, key < keys, other=float("-inf")) - largest) * factor)
        total += share
        tl.store(shares + key, share.to(shares.dtype.element_ty), key < row_length)
    tl.store(sums + row, tl.sum(total, 0))


def bordered(pieces: Iterable[tuple[int, Tensor]], start: int, stop: int, height: int, border: Border,
             affine: tuple[Tensor, Tensor] | None, out: Tensor) -> None:
    """See :class:`.passes.Passes`."""
    scale, shift = affine or (out, out)
    for row, piece in pieces:
        # The first and the last piece bring the border above and below.
        first = start if row == max(start, 0) else row
        behind = row + piece.shape[2]
        last = stop if behind == min(stop, height) else behind
        place = out[:, :, first - start:last - start]
        frames, channels, rows, width = piece.shape
        _launch(
            _bordered, _grid(place), piece, place, scale, shift, frames, rows, width, channels, *piece.stride(),
            *place.shape[2:], *place.stride(), border.time[0], row - first, border.space[0],
            channels if scale.shape[0] > 1 else 0,
            NORMALISED=affine is not None, BLACK_TIME=border.time_mode == "zeros", BLACK_SPACE=border.space_mode == "zeros",
            COLUMNS=COLUMNS, CHANNELS=CHANNELS, num_warps=WARPS)


def add(x: Tensor, y: Tensor | None, bias: Tensor | None, moments: "FusedMoments | None" = None) -> None:
    """See :class:`.passes.Passes`."""
    if y is None and bias is None and moments is None:
        return
    frames, channels, rows, width = x.shape
    pixels = PIXELS if moments is None else MEASURED
    programs = triton.cdiv(rows * width, pixels)
    parts = x
    if moments is not None:
        parts = x.new_empty((frames, programs, 3, channels), dtype=torch.float32)
        moments.parts.append(parts)
    other = x if y is None else y
    _launch(
        _finished, (frames * programs, triton.cdiv(channels, CHANNELS), 1), x, other, x if bias is None else bias, parts,
        rows, width, channels, programs, *x.stride(), *other.stride(),
        BIASED=bias is not None, ADDED=y is not None, MEASURED=moments is not None, PIXELS=pixels, COLUMNS=AT_A_TIME,
        CHANNELS=CHANNELS, num_warps=WARPS)


def interleaved(made: Tensor, bias: Tensor, out: Tensor) -> None:
    """See :class:`.passes.Passes`."""
    _launch(_interleaved, _grid(out), made, bias, out, *out.shape[2:], out.shape[1], *made.stride(), *out.stride(),
            COLUMNS=COLUMNS, CHANNELS=CHANNELS, num_warps=WARPS)


def shares(scores: Tensor, keys: int, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :class:`.passes.Passes`."""
    out, sums = torch.empty_like(scores, dtype=dtype), scores.new_empty(*scores.shape[:-1], 1)
    _launch(_shares, (sums.numel(), 1, 1), scores, out, sums, keys, scores.shape[-1], factor, KEYS=KEYS,
            num_warps=WARPS_OF_KEYS)
    return out, sums


def _launch(kernel: triton.JITFunction, grid: tuple[int, int, int], *values: Tensor | float, num_warps: int,
            **constants: int) -> None:
    """``kernel[grid](*values, **constants)``, but what Triton compiled once is launched without asking it again.

    It takes 30 to 60 microseconds to find that out, longer than many of these kernels run.  Which variant fits depends
    on types and constants, on pointers' being multiples of 16, and on whole numbers' being that, 1, or beyond 32 bits.
    """
    kinds = [("one" if value == 1 else (value % 16 == 0) + 2 * (value >> 31)) if value.__class__ is int
             else None if value.__class__ is float else (value.dtype, value.data_ptr() % 16) for value in values]
    key = id(kernel), values[0].device, *constants.values(), *kinds
    compiled = _compiled.get(key) if _short else None
    if compiled is None:
        _compiled[key] = kernel[grid](*values, num_warps=num_warps, **constants)
    else:
        compiled[grid](*values, *constants.values())


def _grid(x: Tensor) -> tuple[int, int, int]:
    frames, channels, rows, width = x.shape
    return frames * rows, triton.cdiv(width, COLUMNS), triton.cdiv(channels, CHANNELS)


class FusedMoments(Moments):
    """From sums of up to MEASURED pixels, which are added up in double precision when all are there.

    missing: bias that the values lack, which :meth:`affine` brings.
    """

    def __init__(self, by_frame: bool):
        self.by_frame = by_frame
        self.parts: list[Tensor] = []
        self.missing: Tensor | None = None

    def add(self, strip: Tensor) -> None:
        add(strip, None, None, self)

    def _entries(self) -> Tensor:
        """[1 or T, entries, 3, C]"""
        parts = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, dim=1)
        return parts if self.by_frame else parts.flatten(0, 1)[None]

    @property
    def count(self) -> int:
        return round(self._entries()[0, :, 0, 0].double().sum().item())

    def mean_and_square(self) -> tuple[Tensor, Tensor]:
        count, mean, square = self._entries().double().unbind(2)
        sums = (count * mean).sum(1), (square + count * mean.square()).sum(1)
        return tuple((total / count.sum(1))[:, :, None, None] for total in sums)

    def affine(self, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
        entries = self._entries()
        frames, count, _, channels = entries.shape
        size = channels // groups
        made = entries.new_empty((2, frames, channels, 1, 1))
        missing = bias if self.missing is None else self.missing
        _launch(_affine, (frames, groups, 1), entries, weight, bias, missing, made, count, channels, eps, size,
                MISSING=self.missing is not None, SIZE=triton.next_power_of_2(size), PARTS=PARTS, num_warps=WARPS)
        return made.unbind()


FUSED = Passes(bordered, add, interleaved, FusedMoments, shares, late_bias=True)


def try_out(device: torch.device) -> None:
    """Compile and run each kernel; raises what Triton does where it or its compiler does not work."""
    global _short
    _run_all(device)
    try:
        _run_all(device)
    except (TypeError, AttributeError):  # Triton's launchers took other values until 3.3, and may again
        _short = False


def _run_all(device: torch.device) -> None:
    x, bias = torch.zeros(1, 1, 1, 1, device=device), torch.zeros(1, device=device)
    moments = FusedMoments(by_frame=False)
    add(x, x, bias, moments)
    affine = moments.affine(bias, bias, 1, 1.0)
    bordered([(0, x)], 0, 1, 1, Border((0, 0), "zeros"), affine, x.clone())
    interleaved(x.new_zeros(1, 4, 2, 2), bias, x.new_empty(1, 1, 2, 2))
    shares(x[0, 0], 1, 1.0, x.dtype)
