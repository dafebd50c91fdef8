"""How much memory computing takes, and how large strips and tiles may be for it.

Counted for one tile of one window at full resolution, where nearly all of it is.  The factors were measured
on the CPU (``benchmarks/memory.py``) at several sizes, widths and budgets.
"""

import dataclasses
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import psutil
import torch
from torch import nn

from ..config import Config
from ..frames import SPACE_FACTOR, frames_of
from ..tiling import Tile, Tiling, equal_in_turn, make_plan, parse_memory

log = logging.getLogger(__name__)

# A strip of a full-resolution layer: on the CPU what its caches hold, of a clip, which is convolved a few frames
# at a time, twice that; elsewhere enough to keep a GPU busy.
STRIP_BYTES_CPU = 16 * 10 ** 6
# In layers of few channels kernels are small, and to transform them again for more strips costs little: there as many
# bytes, of the layer itself, as leave the short-lived tensors of all layers about equally large.
STRIP_BYTES_CPU_NARROW, NARROW = 9 * 10 ** 6, 64
STRIP_BYTES_CPU_PICTURE = 2 ** 23  # 32 rows of 512 pixels and 128 channels
STRIP_BYTES_ELSEWHERE = 256 * 10 ** 6
LOW_STRIP = 8  # rows; in lower ones the rows that neighbours share cost too much
LOW_STRIP_PICTURE = 4  # rows; as many as Winograd's method makes at once
LOWEST_STRIP = 2  # rows; where memory is short
# Where strips are computed again each takes such a part of the memory, and on a GPU no fewer rows than so many if that
# can be: strips of two rows took it three times as long.
SHARE_AGAIN, SHARE_AGAIN_CPU = 100, 250
LOW_STRIP_AGAIN = 4
# Strips, with their borders, that are in flight while everything needed again is kept; and layers, where they are not cut.
# Not on the CPU.
SHALLOW_ENCODER, SHALLOW_DECODER = 4, 6
UNCUT_ENCODER, UNCUT_DECODER = 2.5, 4
# On the CPU, by "encodes" and "is a picture": some layers where they are small, else so many bytes and a share of a layer,
# at most so many bytes, because strips are no larger.
IN_FLIGHT_CPU = {(True, True): (4.0, 40 * 10 ** 6, 0.7, 160 * 10 ** 6),
                 (False, True): (5.0, 55 * 10 ** 6, 0.6, 125 * 10 ** 6),
                 (True, False): (5.0, 60 * 10 ** 6, 0.3, 300 * 10 ** 6),
                 (False, False): (5.0, 50 * 10 ** 6, 0.35, 300 * 10 ** 6)}
DEEP = 13  # layers at full resolution that are in flight where it is not, each with some rows of several strips
HOLES = 1 / 8  # of a budget, which the CPU's heap keeps between tensors it gave back
HALF_ENCODER, HALF_DECODER = 1.55, 2.2  # times that in half precision, which a CPU's libraries convert from and to
SCRATCH = 160 * 10 ** 6  # kernels being folded, and what the libraries set aside
KERNELS_ENCODER, KERNELS_DECODER = 3, 6  # copies of the largest kernel that this amounts to on the CPU
FREE_SHARE = 0.8  # of what is free on a GPU; other programs draw there too
FREE_SHARE_CPU = 0.5
STILLS = 4  # pictures, or their tiles, that a GPU computes together: of one it waits for Python to launch kernels
SMALLEST_TILE = 128  # pixels; group norms and attention see too little in smaller ones


@dataclasses.dataclass(frozen=True)
class Footprint:
    """One tile: frames, height and width in pixels, channels at full resolution, bytes per value."""

    encodes: bool
    frames: int
    height: int
    width: int
    channels: int  # of the residual blocks
    widest: int  # what a decoder's last up-sampler brings there
    deepest: int  # in the middle, where kernels are largest
    itemsize: int
    device: str

    @property
    def row(self) -> int:
        """Bytes of a row of a full-resolution layer, over all frames."""
        return self.frames * self.width * self.channels * self.itemsize

    def kept(self) -> int:
        """Bytes of activations at the peak when all that is needed again is kept."""
        return self.frames * self.height * self.width * max(self.widest, 2 * self.channels) * self.itemsize

    def peak(self) -> int:
        """Bytes taken when there is no limit."""
        if self.device == "cpu":
            layer = self.height * self.frames * self.width * self.channels * torch.float32.itemsize
            layers, least, share, most = IN_FLIGHT_CPU[self.encodes, self.frames == 1]
            in_flight = min(layers * layer, least + share * layer, most)
            if self.itemsize < torch.float32.itemsize:
                in_flight *= HALF_ENCODER if self.encodes else HALF_DECODER
            kernels = KERNELS_ENCODER if self.encodes else KERNELS_DECODER
            return int(self.kept() + in_flight + kernels * 27 * self.deepest ** 2 * self.itemsize)
        return self._peak_elsewhere(self._strip_bytes())

    def _peak_elsewhere(self, strip: int) -> int:
        rows = min(self.height, self._rows_of(strip, self._low()))
        if rows == self.height:
            in_flight = UNCUT_ENCODER if self.encodes else UNCUT_DECODER
        else:
            in_flight = SHALLOW_ENCODER if self.encodes else SHALLOW_DECODER
        return self.kept() + SCRATCH + int(in_flight * (rows + 2) * self.row)

    def least(self) -> int:
        """Bytes below which computing strips again would cost more than smaller tiles do.

        Then not even what the last up-sampler starts from could be kept.
        """
        return min(self.peak(), self._deep(LOWEST_STRIP) + self._start())

    def _start(self) -> int:
        return self.kept() // 6  # what the last up-sampler starts from, an eighth of its result, and some more

    def plan(self, memory: int | None) -> tuple[Callable[[int, int, int], int], int | None]:
        """How to compute within ``memory``: (frames, width, channels) of a layer -> rows of a strip, and bytes to keep."""
        if memory is not None and self.device == "cpu":
            memory -= int(memory * HOLES)
        if memory is None or memory >= self.peak():
            return partial(self._rows, self._strip_bytes()), None
        if self.device != "cpu":
            # Lower strips cost a GPU less than computing strips again does: a tenth of the time at a quarter of the height.
            for strip in (self._strip_bytes() // part for part in (2, 4, 8)):
                if memory >= self._peak_elsewhere(strip):
                    return partial(self._rows, strip), None
        # As few rows in smaller layers too: there are many more of them, and what they hold adds up.
        rows = self._rows_again(memory)
        return lambda *_: rows, max(0, memory - self._deep(rows))

    def _rows_again(self, memory: int) -> int:
        if self.device != "cpu":
            rows = self._rows_of(min(self._strip_bytes(), memory // SHARE_AGAIN), LOW_STRIP_AGAIN)
            if self._deep(rows) + self._start() <= memory:
                return rows
        return self._rows_of(min(self._strip_bytes(), memory // SHARE_AGAIN_CPU), LOWEST_STRIP)

    def _rows(self, strip: int, frames: int, width: int, channels: int) -> int:
        rows = self._strip(frames, width, self.channels, strip, self._low())
        if self.device == "cpu" and self.frames > 1 and channels <= NARROW:
            rows = min(rows, self._strip(frames, width, channels, STRIP_BYTES_CPU_NARROW, self._low()))
        return rows

    def _deep(self, rows: int) -> int:
        return SCRATCH + DEEP * (3 * rows + 8) * self.row

    def _strip_bytes(self) -> int:
        if self.device != "cpu":
            layer = self.row * self.height
            # A layer little larger than a strip is one: launching kernels twice would take longer.
            return layer if 1 < layer / STRIP_BYTES_ELSEWHERE < 1.5 else STRIP_BYTES_ELSEWHERE
        return STRIP_BYTES_CPU_PICTURE if self.frames == 1 else STRIP_BYTES_CPU

    def _low(self) -> int:
        return LOW_STRIP_PICTURE if self.frames == 1 else LOW_STRIP

    def _rows_of(self, size: int, lowest: int) -> int:
        return self._strip(self.frames, self.width, self.channels, size, lowest)

    def _strip(self, frames: int, width: int, channels: int, size: int, lowest: int) -> int:
        """Rows of about ``size`` bytes, as many times ``lowest`` as that gives, at least once."""
        row = frames * width * channels * self.itemsize
        return max(1, size // row // lowest) * lowest


def footprint(config: Config, encodes: bool, size: tuple[int, int, int], dtype: torch.dtype,
              device: torch.device) -> Footprint:
    """Of a tile of ``size`` = t, h, w latents."""
    t, h, w = size
    widest = config.widths[0] if encodes else max(config.widths[:2])
    return Footprint(encodes, frames_of(t), h * SPACE_FACTOR, w * SPACE_FACTOR, config.widths[0], widest,
                     config.widths[-1], dtype.itemsize, device.type)


class Together(NamedTuple):
    """How independent pictures are computed: so many at once, so many equal tiles of each, and bytes of folded kernels
    that are kept from one pass to the next, 0 where none are."""

    pictures: int
    tiles: int
    folded: int


def together(config: Config, encodes: bool, pictures: int, tiles: list[Tile], shared: bool, dtype: torch.dtype,
             device: torch.device, memory: int | None, folded: Callable[[], int]) -> Together:
    """The most that fits ``memory`` of ``pictures`` that are cut into ``tiles``.

    shared: tiles share statistics, and are computed one by one.
    folded: how many bytes all folded kernels take.
    """
    one = footprint(config, encodes, (1, len(tiles[0].rows), len(tiles[0].cols)), dtype, device)

    def fits(count: int, more: int = 0) -> bool:
        return memory is None or dataclasses.replace(one, frames=count).peak() + more <= memory

    # On the CPU one by one: more would not fit its caches.
    equal = max(map(len, equal_in_turn(tiles, STILLS)))
    most = 1 if device.type == "cpu" or shared else min(STILLS, pictures * equal)
    at_once = next((count for count in range(most, 1, -1) if fits(count)), 1)
    at_once_of_each = at_once // min(pictures, at_once)
    kernels = folded() if pictures * len(tiles) > at_once or shared else 0  # else each is folded once anyway
    return Together(min(pictures, at_once), at_once_of_each, kernels if fits(at_once, kernels) else 0)


def folded_bytes(network: nn.Module, dtype: torch.dtype) -> int:
    """Of all 3x3 kernels of ``network``, folded for stills."""
    layers = (layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Conv3d))
    return sum(9 * math.prod(layer.weight.shape[:2]) for layer in layers if layer.kernel_size[-1] == 3) * dtype.itemsize


def working_memory(config: Config, encodes: bool, size: tuple[int, int, int], pictures: int | None, dtype: torch.dtype,
                   device: torch.device, tiling: Tiling, folded: Callable[[], int]) -> int:
    """Bytes on ``device`` beside weights and result, to encode or decode ``size`` = t, h, w latents as ``tiling`` says.

    One tile's activations, beside one window's frames; or of so many independent ``pictures`` what is computed together,
    and the bytes ``folded`` gives, of all folded kernels, where these are kept.
    """
    t, h, w = size
    memory = parse_memory(tiling.memory)
    limit = memory if isinstance(memory, int) else None
    plan = make_plan(1, h, w, tiling)
    tiles = plan.tiles
    frames = 1 if pictures else min(t, tiling.window or t)
    tile = footprint(config, encodes, (frames, len(tiles[0].rows), len(tiles[0].cols)), dtype, device)
    if pictures:
        shared = plan.passes(tiling.statistics) > 1
        pictures, at_once, kept = together(config, encodes, pictures, tiles, shared, dtype, device, limit, folded)
        peak = dataclasses.replace(tile, frames=pictures * at_once).peak() + kept
    else:
        pictures, peak = frames_of(frames), tile.peak()
    window = 3 * pictures * h * w * SPACE_FACTOR ** 2 * torch.float32.itemsize
    return (peak if limit is None else min(peak, limit)) + window


def budget(memory: int | str | None, device: torch.device) -> int | None:
    """Bytes that a :class:`Tiling`'s ``memory`` means on ``device`` now; None is no limit."""
    memory = parse_memory(memory)
    return free(device) if memory == "auto" else memory


def free(device: torch.device) -> int | None:
    """Bytes that may be used on ``device``; None where it cannot be asked."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available * FREE_SHARE_CPU)
    if device.type == "cuda":
        unused = torch.cuda.mem_get_info(device)[0]
        held = torch.cuda.memory_stats_as_nested_dict(device)  # the flat form takes a tenth of a millisecond
        unused += held["reserved_bytes"]["all"]["current"] - held["allocated_bytes"]["all"]["current"]
        return int(unused * FREE_SHARE)
    if device.type == "mps":
        return int((torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()) * FREE_SHARE)
    return None


def fitting(tiling: Tiling, memory: int | None, config: Config, encodes: bool, size: tuple[int, int, int],
            dtype: torch.dtype, device: torch.device) -> Tiling:
    """``tiling``, or if its tiles cannot be computed within ``memory``, the same with smaller ones; the log says so.

    size: of a whole window, t, h, w in latents.
    """
    if memory is None:
        return tiling
    t, h, w = size
    side = min(tiling.tile_pixels or SPACE_FACTOR * max(h, w), SPACE_FACTOR * max(h, w))

    def fits(side: int) -> bool:
        tile = (t, *(min(latents, side // SPACE_FACTOR) for latents in (h, w)))
        return footprint(config, encodes, tile, dtype, device).least() <= memory

    smaller = side
    while smaller > SMALLEST_TILE and not fits(smaller):
        smaller -= SPACE_FACTOR
    if smaller == side:
        return tiling
    overlap = min(tiling.overlap_pixels, smaller // 4 // SPACE_FACTOR * SPACE_FACTOR)
    log.warning("CV-VAE has %d MB to work with, too little for tiles of %d pixels (%d frames, %s); using tiles of %d. "
                "Group norms then see less of the picture, so the result differs slightly.", memory // 10 ** 6, side,
                frames_of(t), str(dtype).removeprefix("torch."), smaller)
    return dataclasses.replace(tiling, tile_pixels=smaller, overlap_pixels=overlap)
