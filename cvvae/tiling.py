"""The chunk plan: how a clip is cut into windows and tiles, and how the pieces are joined.

Everything is counted in latents; one latent is 8 pixels and, after the first of a clip, 4 frames.
Encode, decode, the command line and the nodes all walk the same plan.

Windows share one latent (one frame): the later window computes it again and drops it.  Tiles overlap
and are blended.  At the default values this is the reference's plan (AILab-CVC/CV-VAE
models/modeling_vae.py), blending weights included.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .frames import SPACE_FACTOR, TIME_FACTOR, first_frame, frames_of


@dataclass(frozen=True)
class Tiling:
    """Sizes of the pieces; ``None`` means do not cut.

    window_frames: 1 + 4n frames.  The published models were trained and are used with 17.
    tile_pixels: side of a square tile, a multiple of 8.
    overlap_pixels: what neighbouring tiles share, a multiple of 8, at most half a tile.

    Raises ValueError naming the field that cannot work.
    """

    window_frames: int | None = 17
    tile_pixels: int | None = 576
    overlap_pixels: int = 128

    def __post_init__(self):
        for name in ("window_frames", "tile_pixels", "overlap_pixels"):
            value = getattr(self, name)
            if value is None and name != "overlap_pixels":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"Tiling.{name} is {value!r}; it must be a whole number"
                                 + ("." if name == "overlap_pixels" else ", or None to not cut."))
        if self.window_frames is not None and (self.window_frames < 5 or self.window_frames % TIME_FACTOR != 1):
            raise ValueError(f"Tiling.window_frames is {self.window_frames}; it must be 1 + 4n with n >= 1 "
                             "(5, 9, 13, 17, ...), because latents stand for groups of four frames.")
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


WHOLE = Tiling(window_frames=None, tile_pixels=None)


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

    def new_latents(self) -> slice:
        """Where this window's own latents go, without the shared one."""
        return slice(self.start + self.before, self.stop)

    def new_frames(self) -> slice:
        """Where this window's own frames go."""
        return slice(first_frame(self.start + self.before), frames_of(self.stop))


def spans(length: int, size: int | None, overlap: int) -> list[Span]:
    """Cut ``length`` latents into spans of ``size`` sharing ``overlap``; the last one is as long as what is left."""
    if size is None or length <= size:
        return [Span(0, length)]
    stride = size - overlap
    starts = range(0, length - overlap, stride)
    return [Span(start, min(start + size, length),
                 before=overlap if start else 0,
                 after=overlap if start + size < length else 0) for start in starts]


@dataclass(frozen=True)
class Tile:
    """One spatial piece of a window."""

    rows: Span
    cols: Span

    def weight(self, scale: int) -> Tensor:
        """Blending weight [h, w] (float32) of this tile at ``scale`` elements per latent: 1, or 8 for pixels.

        The weights of all tiles sum to one everywhere.  Both axes ramp linearly from 0 to (n-1)/n across
        the n shared elements.  The reference blends a row of tiles with the row above after that row has
        been blended across its columns, which applies the column ramp twice in the rows handed down; the
        last factor is that, kept so that the same weights give the same pixels.
        """
        rise_y, fall_y = _ramps(self.rows, scale)
        rise_x, fall_x = _ramps(self.cols, scale)
        weight = (rise_y * fall_y)[:, None] * (rise_x * fall_x)[None, :]
        if self.rows.after:
            handed_down = slice(len(fall_y) - self.rows.after * scale, None)
            weight[handed_down] *= (rise_x * (2 - fall_x))[None, :]
        return weight


def _ramps(span: Span, scale: int) -> tuple[Tensor, Tensor]:
    """Rising and falling ramps along ``span``, both 1 where nothing is shared."""
    rise, fall = torch.ones(len(span) * scale), torch.ones(len(span) * scale)
    if span.before:
        n = span.before * scale
        rise[:n] = torch.arange(n) / n
    if span.after:
        n = span.after * scale
        fall[-n:] = 1 - torch.arange(n) / n
    return rise, fall


@dataclass(frozen=True)
class Plan:
    """All windows of a clip and all tiles of each window."""

    windows: list[Span]
    tiles: list[Tile]

    def __len__(self) -> int:
        return len(self.windows) * len(self.tiles)


def make_plan(t: int, h: int, w: int, tiling: Tiling | None) -> Plan:
    """Plan ``t`` x ``h`` x ``w`` latents; a ``tiling`` of None cuts nothing."""
    tiling = tiling or WHOLE
    window = None if tiling.window_frames is None else 1 + (tiling.window_frames - 1) // TIME_FACTOR
    tile = None if tiling.tile_pixels is None else tiling.tile_pixels // SPACE_FACTOR
    overlap = tiling.overlap_pixels // SPACE_FACTOR
    rows, cols = spans(h, tile, overlap), spans(w, tile, overlap)
    return Plan(spans(t, window, 1), [Tile(r, c) for r in rows for c in cols])
