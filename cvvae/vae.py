"""The autoencoders people use: encode and decode whole clips, window by window and tile by tile."""

from collections.abc import Callable, Iterable, Iterator
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config
from .frames import SPACE_FACTOR, frames_of, latent_side, latents_of, padded_frames, padded_size
from .model import Decoder, Encoder
from .posterior import Posterior
from .tiling import Tile, Tiling, make_plan

MODES = ("video", "image")
Progress = Callable[[int, int], None]


class Autoencoder(nn.Module):
    """An encoder and a decoder with their :class:`Config`; in eval mode as built."""

    def __init__(self, config: Config, ops=nn):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, ops)
        self.decoder = Decoder(config, ops)
        if config.norm_groups != Config.norm_groups:
            # Nothing else in the tensors tells it, and a bare state dict must be enough to load a model.
            self.register_buffer("norm_groups", torch.tensor(config.norm_groups))
        self.eval()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class ImageVAE(Autoencoder):
    """A KL image VAE of the SD layout (f8): the teacher a video VAE is inflated from and regularized by."""

    BATCH = 8  # images per forward pass: enough to keep a GPU busy, few enough for its memory

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Posterior:
        """[N, 3, H, W] in [-1, 1], H and W >= 8 -> posterior of [N, C, h, w]; edges repeat up to a multiple of 8."""
        _check(frames, 4, 3, "frames [N, 3, H, W]")
        _check_size(*frames.shape[-2:])
        moments = [self.encoder(_pad_to_8(self._as_clip(part))) for part in frames.split(self.BATCH)]
        return Posterior(torch.cat(moments)[:, :, 0].to(frames.device))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, 3, 8h, 8w] in about [-1, 1] (not clamped)."""
        _check(latents, 4, self.config.latent_channels, f"latents [N, {self.config.latent_channels}, h, w]")
        frames = [self.decoder(self._as_clip(part)) for part in latents.split(self.BATCH)]
        return torch.cat(frames)[:, :, 0].to(latents.device)

    def _as_clip(self, x: Tensor) -> Tensor:
        return x[:, :, None].to(self.device, self.dtype)


class VideoVAE(Autoencoder):
    """A CV-VAE: 4x in time, 8x8 in space, latents in an image VAE's space.

    ``tiling`` says how clips are cut (see :class:`Tiling`; None does not cut).  Group norms and attention
    see one window and tile at a time, so it is part of the result, not only of the memory.
    """

    def __init__(self, config: Config, ops=nn):
        super().__init__(config, ops)
        self.tiling: Tiling | None = Tiling()

    @torch.no_grad()
    def encode(self, clip: Tensor, mode: str = "video", progress: Progress | None = None,
               device: torch.device | None = None) -> Posterior:
        """Encode [B, 3, T, H, W] in [-1, 1], any T >= 1, H and W >= 8.

        Time is padded by repeating the last frame up to 1 + 4n, space by repeating the edge up to a
        multiple of 8.  mode="image" encodes every frame by itself (T latents).

        progress: called with (pieces done, pieces in all) after each tile; may raise to cancel.
        device: where to compute; by default where the weights are.  One window at a time goes there.
        Returns the posterior of [B, C, t, h, w] on the clip's device, in the weights' dtype.
        Raises ValueError for a shape or mode that cannot be encoded.
        """
        _check(clip, 5, 3, "a clip [B, 3, T, H, W]")
        _check_mode(mode)
        batch, _, frames, height, width = clip.shape
        _check_size(height, width)
        h, w = latent_side(height), latent_side(width)
        t = latents_of(frames) if mode == "video" else frames
        moments = torch.empty(batch, 2 * self.config.latent_channels, t, h, w, dtype=self.dtype, device=clip.device)
        plan = make_plan(t if mode == "video" else 1, h, w, self.tiling)
        step = _counter(progress, batch * len(plan) * (1 if mode == "video" else frames))
        for source, target in _clips(clip, moments, mode):
            for window in plan.windows:
                piece = self.encode_window(source[:, :, window.frames()], plan.tiles, step, device)
                target[:, :, window.new_latents()] = piece[:, :, window.before:]
        return Posterior(moments)

    @torch.no_grad()
    def decode(self, latents: Tensor, frames: int | None = None, size: tuple[int, int] | None = None,
               mode: str = "video", progress: Progress | None = None, device: torch.device | None = None) -> Tensor:
        """Decode [B, C, t, h, w]: t latents to 4t - 3 frames, or with mode="image" to t independent images.

        frames, size: what to trim the result to, T and (H, W), to undo the padding of :meth:`encode`.
        progress, device: as in :meth:`encode`.
        Returns [B, 3, T, H, W] in about [-1, 1] (not clamped), on the latents' device, in the weights' dtype.
        Raises ValueError for a shape, mode, frames or size that do not fit.
        """
        channels = self.config.latent_channels
        _check(latents, 5, channels, f"latents [B, {channels}, t, h, w]")
        _check_mode(mode)
        batch, _, t, h, w = latents.shape
        most = frames_of(t) if mode == "video" else t
        frames = most if frames is None else frames
        if not (isinstance(frames, Integral) and 1 <= frames <= most):
            raise ValueError(f"frames={frames} asked, but {t} latents decode to {most} frames in {mode} mode; "
                             f"ask for 1 to {most}.")
        height, width = (h * SPACE_FACTOR, w * SPACE_FACTOR) if size is None else size
        if (latent_side(height), latent_side(width)) != (h, w):
            raise ValueError(f"size={size} asked, but latents of {h}x{w} hold {h * SPACE_FACTOR}x{w * SPACE_FACTOR} "
                             "pixels; a size within 7 pixels below that can be trimmed to.")
        clip = torch.empty(batch, 3, frames, height, width, dtype=self.dtype, device=latents.device)
        plan = make_plan(t if mode == "video" else 1, h, w, self.tiling)
        step = _counter(progress, batch * len(plan) * (1 if mode == "video" else frames))
        for source, target in _clips(latents, clip, mode):
            for window in plan.windows:
                piece = self.decode_window(source[:, :, window.latents()], plan.tiles, step, device)
                place = target[:, :, window.new_frames()]
                place.copy_(piece[:, :, window.before:][:, :, :place.shape[2], :height, :width])
        return clip

    def reconstruct(self, clip: Tensor, mode: str = "video") -> Tensor:
        """Encode (posterior mode) and decode: a clip of the same shape."""
        _check(clip, 5, 3, "a clip [B, 3, T, H, W]")
        *_, frames, height, width = clip.shape
        return self.decode(self.encode(clip, mode).mode(), frames, (height, width), mode)

    @torch.no_grad()
    def encode_stream(self, parts: Iterable[Tensor], progress: Callable[[], None] | None = None) -> Iterator[Tensor]:
        """Encode a clip that arrives as parts [1, 3, n, H, W]; yields latents (mode) [1, C, k, h, w] as windows fill.

        Joined, they equal ``encode(clip).mode()``; only one window of frames is held.  ``progress`` is
        called after each tile.
        """
        window_frames = self.tiling.window_frames if self.tiling else None
        expected = "a part of a clip [1, 3, n, H, W]"
        for frames, before in _windows(parts, window_frames, 3, expected, "The clip has no frames."):
            height, width = frames.shape[-2:]
            _check_size(height, width)
            tiles = make_plan(1, latent_side(height), latent_side(width), self.tiling).tiles
            moments = self.encode_window(frames, tiles, progress or _no_step)
            yield Posterior(moments).mode().to(frames.device, self.dtype)[:, :, before:]

    @torch.no_grad()
    def decode_stream(self, parts: Iterable[Tensor], progress: Callable[[], None] | None = None) -> Iterator[Tensor]:
        """Decode latents that arrive as parts [1, C, k, h, w]; yields frames [1, 3, n, 8h, 8w] as windows fill.

        Joined, they equal ``decode(latents)``; only one window is held.
        """
        window = latents_of(self.tiling.window_frames) if self.tiling and self.tiling.window_frames else None
        channels = self.config.latent_channels
        expected = f"a part of latents [1, {channels}, k, h, w]"
        for latents, before in _windows(parts, window, channels, expected, "There are no latents to decode."):
            tiles = make_plan(1, *latents.shape[-2:], self.tiling).tiles
            frames = self.decode_window(latents, tiles, progress or _no_step)
            yield frames.to(latents.device, self.dtype)[:, :, before:]

    def encode_window(self, frames: Tensor, tiles: list[Tile], step: Callable[[], None],
                      device: torch.device | None = None) -> Tensor:
        """Moments [1, 2C, t, h, w] of one window [1, 3, T, H, W], tile by tile; ``step`` is called after each."""
        frames = _pad_to_8(_pad_time(frames.to(device or self.device, self.dtype)))
        return _join(tiles, 1, lambda tile: self.encoder(frames[..., tile.rows.pixels(), tile.cols.pixels()]), step)

    def decode_window(self, latents: Tensor, tiles: list[Tile], step: Callable[[], None],
                      device: torch.device | None = None) -> Tensor:
        """Frames [1, 3, 4t - 3, 8h, 8w] of one window [1, C, t, h, w], tile by tile."""
        latents = latents.to(device or self.device, self.dtype)
        return _join(tiles, SPACE_FACTOR,
                     lambda tile: self.decoder(latents[..., tile.rows.latents(), tile.cols.latents()]), step)


def _join(tiles: list[Tile], scale: int, compute: Callable[[Tile], Tensor], step: Callable[[], None]) -> Tensor:
    """Compute every tile and blend: in float32, as the reference does, whatever the tiles' dtype."""
    if len(tiles) == 1:
        whole = compute(tiles[0])
        step()
        return whole
    height, width = tiles[-1].rows.stop * scale, tiles[-1].cols.stop * scale
    whole = None
    for tile in tiles:
        piece = compute(tile)
        if whole is None:
            whole = torch.zeros(*piece.shape[:-2], height, width, dtype=torch.float32, device=piece.device)
        place = whole[..., tile.rows.start * scale:tile.rows.stop * scale, tile.cols.start * scale:tile.cols.stop * scale]
        place.addcmul_(piece.float(), tile.weight(scale).to(piece.device))
        step()
    return whole


def _windows(parts: Iterable[Tensor], size: int | None, channels: int, expected: str,
             nothing: str) -> Iterator[tuple[Tensor, int]]:
    """Re-cut ``parts`` along time into windows of ``size`` that share one; with how many each shares with the last."""
    held, before = None, 0
    for part in parts:
        _check(part, 5, channels, expected)
        held = part if held is None else torch.cat([held, part], dim=2)
        # A window is full only once something beyond it is there: its last element opens the next one.
        while size is not None and held.shape[2] > size:
            yield held[:, :, :size], before
            held, before = held[:, :, size - 1:], 1
    if held is None:
        raise ValueError(nothing)
    yield held, before


def _no_step() -> None:
    pass


def _clips(source: Tensor, target: Tensor, mode: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair what is computed by itself with where it goes: each clip, or in image mode each of its frames."""
    for b in range(source.shape[0]):
        if mode == "video":
            yield source[b:b + 1], target[b:b + 1]
        else:
            for k in range(target.shape[2]):
                yield source[b:b + 1, :, k:k + 1], target[b:b + 1, :, k:k + 1]


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return step


def _pad_time(clip: Tensor) -> Tensor:
    missing = padded_frames(clip.shape[2]) - clip.shape[2]
    return torch.cat([clip, clip[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2) if missing else clip


def _pad_to_8(clip: Tensor) -> Tensor:
    height, width = clip.shape[-2:]
    missing = padded_size(width) - width, padded_size(height) - height
    return F.pad(clip, (0, missing[0], 0, missing[1], 0, 0), mode="replicate") if any(missing) else clip


def _check(x: Tensor, ndim: int, channels: int, expected: str) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"Expected {expected}, found {type(x).__name__}.")
    if x.ndim != ndim or x.shape[1] != channels or not x.is_floating_point() or 0 in x.shape:
        raise ValueError(f"Expected {expected} of floating-point values, none of the sizes 0; "
                         f"found shape {list(x.shape)} of {str(x.dtype).removeprefix('torch.')}.")


def _check_size(height: int, width: int) -> None:
    if min(height, width) < SPACE_FACTOR:
        raise ValueError(f"Frames of {height}x{width} are too small: height and width must be at least 8 pixels.")


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be 'video' (one clip) or 'image' (independent images).")
