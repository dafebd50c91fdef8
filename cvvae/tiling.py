"""The chunk plan: how a clip is cut into windows and tiles, and how the pieces are joined.

Everything is counted in latents; one latent is 8 pixels and, after the first of a clip, 4 frames.
Encode, decode, the command line and the nodes all walk the same plan.

Windows share one latent (one frame), or more; tiles overlap; what is shared is cross-faded, and where it is
one latent that means the later window's is dropped.  At the default values this is the reference's plan
(AILab-CVC/CV-VAE models/modeling_vae.py), blending weights included.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .frames import SPACE_FACTOR, TIME_FACTOR, frames_of, latents_of

STATISTICS = ("tile", "window", "clip")


@dataclass(frozen=True)
class Tiling:
    """How a clip is cut; ``None`` as a size means do not cut.

    window_frames: 1 + 4n frames.  The published models were trained and are used with 17.
    tile_pixels: side of a square tile, a multiple of 8.
    overlap_pixels: what neighbouring tiles share, a multiple of 8, at most half a tile.
    overlap_frames: what neighbouring windows share and cross-fade, 1 + 4n frames, at most about half a window.
    even: tiles of equal size, as few and as large as ``tile_pixels`` allows, instead of a small one at the end.
    statistics: whose pixels a group norm is normalised by: the "tile"'s own, those of all tiles of a
        "window", or of the whole "clip".  The last two take a first pass to collect them.
    memory: bytes that computing may take beside weights, input and result: a number, a text such as "2 GB",
        "auto" (what is free on the device) or None (no limit).  It changes the time taken, not the numbers;
        only where a tile cannot be computed within it at all are smaller tiles used, and the log says so.

    Raises ValueError naming the field that cannot work.
    """

    window_frames: int | None = 17
    tile_pixels: int | None = 576
    overlap_pixels: int = 128
    overlap_frames: int = 1
    even: bool = False
    statistics: str = "tile"
    memory: int | str | None = "auto"

    def __post_init__(self):
        for name in ("window_frames", "tile_pixels", "overlap_pixels", "overlap_frames"):
            value, optional = getattr(self, name), not name.startswith("overlap")
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"Tiling.{name} is {value!r}; it must be a whole number"
                                 + (", or None to not cut." if optional else "."))
        if not isinstance(self.even, bool):
            raise ValueError(f"Tiling.even is {self.even!r}; it must be True or False.")
        if self.statistics not in STATISTICS:
            raise ValueError(f"Tiling.statistics is {self.statistics!r}; it must be one of {', '.join(STATISTICS)}.")
        parse_memory(self.memory)
        self._check_windows()
        self._check_tiles()

    def _check_windows(self) -> None:
        window, overlap = self.window_frames, self.overlap_frames
        if window is not None and (window < 5 or window % TIME_FACTOR != 1):
            raise ValueError(f"Tiling.window_frames is {window}; it must be 1 + 4n with n >= 1 "
                             "(5, 9, 13, 17, ...), because latents stand for groups of four frames.")
        if overlap < 1 or overlap % TIME_FACTOR != 1:
            raise ValueError(f"Tiling.overlap_frames is {overlap}; it must be 1 + 4n (1, 5, 9, ...): windows share "
                             "whole latents.")
        if window is not None and overlap > 1 + (window - 1) // 2:
            most = frames_of(1 + (latents_of(window) - 1) // 2)
            raise ValueError(f"Tiling.overlap_frames is {overlap}, more than half of window_frames = {window}; "
                             f"at most {most} works.")

    def _check_tiles(self) -> None:
        if self.tile_pixels is None:
            return
        if self.tile_pixels < 2 * SPACE_FACTOR or self.tile_pixels % SPACE_FACTOR:
            raise ValueError(f"Tiling.tile_pixels is {self.tile_pixels}; it must be a multiple of 8, at least 16.")
        if self.overlap_pixels < 0 or self.overlap_pixels % SPACE_FACTOR:
            raise ValueError(f"Tiling.overlap_pixels is {self.overlap_pixels}; it must be a multiple of 8, 0 or more: "
                             "overlaps are counted in latents.")
        if 2 * self.overlap_pixels > self.tile_pixels:
            raise ValueError(f"Tiling.overlap_pixels is {self.overlap_pixels}, more than half of tile_pixels = "
                             f"{self.tile_pixels}; at most {self.tile_pixels // 16 * 8} works.")

    @property
    def window(self) -> int | None:
        """Latents of a window."""
        return None if self.window_frames is None else latents_of(self.window_frames)

    @property
    def shared(self) -> int:
        """Latents that neighbouring windows share."""
        return latents_of(self.overlap_frames)


UNITS = {"": 1, "B": 1, "KB": 10 ** 3, "MB": 10 ** 6, "GB": 10 ** 9, "KIB": 2 ** 10, "MIB": 2 ** 20, "GIB": 2 ** 30}
SMALLEST_MEMORY = 64 * 2 ** 20


def parse_memory(memory: int | str | None) -> int | str | None:
    """Bytes of a :class:`Tiling`'s ``memory``; "auto" and None stay what they are.  Raises ValueError."""
    if memory is None or memory == "auto":
        return memory
    size = memory
    if isinstance(memory, str):
        number = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", memory)
        if number and number[2].upper() in UNITS:
            size = int(float(number[1]) * UNITS[number[2].upper()])
    if isinstance(size, bool) or not isinstance(size, int):
        raise ValueError(f"Tiling.memory is {memory!r}; it must be a number of bytes, a text such as '2 GB' or '800 MB', "
                         "'auto', or None for no limit.")
    if size < SMALLEST_MEMORY:
        raise ValueError(f"Tiling.memory is {memory!r}, {size} bytes; at least {SMALLEST_MEMORY} (64 MiB) are needed. "
                         "For gigabytes write, for example, '2 GB'.")
    return size


WHOLE = Tiling(window_frames=None, tile_pixels=None)
# The reference's pieces with more of them shared, at up to four times its time: docs/performance.md has the numbers.
QUALITY = Tiling(overlap_frames=5, overlap_pixels=288)


@dataclass(frozen=True)
class Span:
    """Latents ``start`` .. ``stop`` (exclusive) along one axis, sharing some with the piece before and after."""

    start: int
    stop: int
    before: int = 0  # latents shared with the previous span
    after: int = 0  # latents shared with the next one

    def __len__(self) -> int:
        return self.stop - self.start

    def pixels(self) -> slice:
        return slice(self.start * SPACE_FACTOR, self.stop * SPACE_FACTOR)

    def latents(self) -> slice:
        return slice(self.start, self.stop)

    def frames(self) -> slice:
        """Frames the encoder needs for this window: the last frame of each latent but a leading shared one."""
        return slice(self.start * TIME_FACTOR, frames_of(self.stop))


def spans(length: int, size: int | None, overlap: int, even: bool = False) -> list[Span]:
    """Cut ``length`` latents into spans of ``size`` sharing ``overlap``; the last one is as long as what is left.

    even: no more spans than that, but all of the same size, or one less.
    """
    if size is None or length <= size:
        return [Span(0, length)]
    stride = size - overlap
    if even:
        count = -(-(length - overlap) // stride)
        stride = -(-(length - overlap) // count)
        size = stride + overlap
    starts = range(0, length - overlap, stride)
    return [Span(start, min(start + size, length),
                 before=overlap if start else 0,
                 after=overlap if start + size < length else 0) for start in starts]


@dataclass(frozen=True)
class Tile:
    """One spatial piece of a window."""

    rows: Span
    cols: Span

    def weight(self, scale: int, device: torch.device | None = None) -> Tensor:
        """Blending weight [h, w] (float32) of this tile at ``scale`` elements per latent: 1, or 8 for pixels.

        The weights of all tiles sum to one everywhere.  Both axes ramp linearly from 0 to (n-1)/n across
        the n shared elements.  The reference blends a row of tiles with the row above after that row has
        been blended across its columns, which applies the column ramp twice in the rows handed down; the
        last factor is that, kept so that the same weights give the same pixels.
        """
        rise_y, fall_y = _ramps(self.rows, scale, device)
        rise_x, fall_x = _ramps(self.cols, scale, device)
        weight = (rise_y * fall_y)[:, None] * (rise_x * fall_x)[None, :]
        if self.rows.after:
            handed_down = slice(len(fall_y) - self.rows.after * scale, None)
            weight[handed_down] *= (rise_x * (2 - fall_x))[None, :]
        return weight


def equal_in_turn(tiles: list[Tile], most: int) -> list[list[Tile]]:
    """``tiles`` in their order, those of one size that follow each other together, but no more than ``most``."""
    groups: list[list[Tile]] = []
    for tile in tiles:
        last = groups[-1] if groups else []
        equal = last and (len(last[0].rows), len(last[0].cols)) == (len(tile.rows), len(tile.cols))
        if equal and len(last) < most:
            last.append(tile)
        else:
            groups.append([tile])
    return groups


@lru_cache(maxsize=64)
def _ramps(span: Span, scale: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Rising and falling ramps along ``span``, both 1 where nothing is shared."""
    rise, fall = torch.ones(2, len(span) * scale, device=device)
    if span.before:
        n = span.before * scale
        rise[:n] = torch.arange(n, device=device) / n
    if span.after:
        n = span.after * scale
        fall[-n:] = 1 - torch.arange(n, device=device) / n
    return rise, fall


@dataclass(frozen=True)
class Plan:
    """All windows of a clip and all tiles of each window."""

    windows: list[Span]
    tiles: list[Tile]

    def __len__(self) -> int:
        return len(self.windows) * len(self.tiles)

    def passes(self, statistics: str) -> int:
        """How often each tile is computed: twice where :attr:`Tiling.statistics` are shared with others."""
        shared = {"tile": 1, "window": len(self.tiles), "clip": len(self)}[statistics]
        return 2 if shared > 1 else 1


def make_plan(t: int, h: int, w: int, tiling: Tiling | None) -> Plan:
    """Plan ``t`` x ``h`` x ``w`` latents; a ``tiling`` of None cuts nothing."""
    tiling = tiling or WHOLE
    tile = None if tiling.tile_pixels is None else tiling.tile_pixels // SPACE_FACTOR
    overlap = tiling.overlap_pixels // SPACE_FACTOR
    rows, cols = (spans(side, tile, overlap, tiling.even) for side in (h, w))
    return Plan(spans(t, tiling.window, tiling.shared), [Tile(r, c) for r in rows for c in cols])
