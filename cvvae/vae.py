"""The autoencoders people use: encode and decode whole clips, window by window and tile by tile."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import engine
from .config import Config
from .frames import SPACE_FACTOR, frames_of, latent_side, latents_of, padded_frames, padded_size, pictures_of
from .model import Decoder, Encoder
from .posterior import Posterior
from .tiling import WHOLE, Span, Tile, Tiling, equal_in_turn, make_plan
from .transfer import fetched, sent

MODES = ("video", "image")
EXECUTORS = ("fast", "compiled", "plain")
Progress = Callable[[int, int], None]
Check = Callable[[], None]


def nothing() -> None:
    """The default of progress and cancel callbacks."""


class Autoencoder(nn.Module):
    """An encoder and a decoder with their :class:`Config`; in eval mode as built.

    executor: what runs them where no gradient is needed: "fast" (:mod:`cvvae.engine`), "compiled" (the same with
        torch.compile, which takes seconds to minutes at the first use and a compiler; not on a GPU where the engine has
        kernels of its own), or "plain", the modules themselves.  All give the same numbers, to rounding.
    weights_of: where the engine gets a layer's weights; ComfyUI moves them around.
    """

    def __init__(self, config: Config, ops=nn):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, ops)
        self.decoder = Decoder(config, ops)
        self.executor = "fast"
        self.weights_of: engine.Weights = engine.own_weights
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

    def _compute(self, network: nn.Module, x: Tensor, stills: bool, fast: bool, memory: int | None = None,
                 check: Check = nothing, statistics: engine.Statistics | None = None,
                 folded: engine.Folded | None = None) -> Tensor:
        """Run ``network`` on [1, C, T, H, W]: a clip, or T independent images ("stills"); ``fast``: by the engine."""
        if fast:
            return engine.run(network, x, stills, memory, check, self.weights_of, statistics, self.executor == "compiled",
                              folded)
        check()
        return torch.cat([network(part) for part in x.split(1, dim=2)], dim=2) if stills else network(x)

    def _uses_engine(self, network: nn.Module) -> bool:
        if self.executor not in EXECUTORS:
            raise ValueError(f"executor is {self.executor!r}; it must be one of {', '.join(map(repr, EXECUTORS))}.")
        return self.executor != "plain" and engine.knows(network)


class ImageVAE(Autoencoder):
    """A KL image VAE of the SD layout (f8): the teacher a video VAE is inflated from and regularized by."""

    BATCH = 8  # images per forward pass: enough to keep a GPU busy, few enough for its memory

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Posterior:
        """[N, 3, H, W] in [-1, 1], H and W >= 8 -> posterior of [N, C, h, w]; edges repeat up to a multiple of 8."""
        _check(frames, 4, 3, "frames [N, 3, H, W]")
        _check_size(*frames.shape[-2:])
        return Posterior(self._stills(self.encoder, frames, _pad_to_8))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, 3, 8h, 8w] in about [-1, 1] (not clamped)."""
        _check(latents, 4, self.config.latent_channels, f"latents [N, {self.config.latent_channels}, h, w]")
        return self._stills(self.decoder, latents, lambda x: x)

    def _stills(self, network: nn.Module, images: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
        fast = self._uses_engine(network)
        done = [self._compute(network, prepare(part.transpose(0, 1)[None].to(self.device, self.dtype)), True, fast)
                for part in images.split(self.BATCH)]
        return torch.cat(done, dim=2)[0].transpose(0, 1).to(images.device)


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
               device: torch.device | None = None, tiling: Tiling | None = None, check: Check = nothing) -> Posterior:
        """Encode [B, 3, T, H, W] in [-1, 1], any T >= 1, H and W >= 8.

        Time is padded by repeating the last frame up to 1 + 4n, space by repeating the edge up to a
        multiple of 8.  mode="image" encodes every frame by itself (T latents).

        progress: called with (pieces done, pieces in all) after each tile; may raise to cancel.
        check: called many times within a tile; may raise to cancel.
        device: where to compute; by default where the weights are.  One window at a time goes there.
        tiling: instead of the model's own.
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
        run = Run(self, self.encoder, tiling or self.tiling, (t, h, w), device, check, pictures_of(mode, batch, t))
        run.fill(moments, clip, frames, progress)
        return Posterior(moments)

    @torch.no_grad()
    def decode(self, latents: Tensor, frames: int | None = None, size: tuple[int, int] | None = None,
               mode: str = "video", progress: Progress | None = None, device: torch.device | None = None,
               tiling: Tiling | None = None, check: Check = nothing) -> Tensor:
        """Decode [B, C, t, h, w]: t latents to 4t - 3 frames, or with mode="image" to t independent images.

        frames, size: what to trim the result to, T and (H, W), to undo the padding of :meth:`encode`.
        progress, device, tiling, check: as in :meth:`encode`.
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
        run = Run(self, self.decoder, tiling or self.tiling, (t, h, w), device, check, pictures_of(mode, batch, t))
        run.fill(clip, latents, frames, progress)
        return clip

    def reconstruct(self, clip: Tensor, mode: str = "video") -> Tensor:
        """Encode (posterior mode) and decode: a clip of the same shape."""
        _check(clip, 5, 3, "a clip [B, 3, T, H, W]")
        *_, frames, height, width = clip.shape
        return self.decode(self.encode(clip, mode).mode(), frames, (height, width), mode)

    def encode_stream(self, parts: Iterable[Tensor], progress: Callable[[], None] | None = None,
                      check: Check = nothing) -> Iterator[Tensor]:
        """Encode a clip that arrives as parts [1, 3, n, H, W]; yields latents (mode) [1, C, k, h, w] as windows fill.

        Joined, they equal ``encode(clip).mode()``; only one window of frames is held.  ``progress`` is
        called after each tile.  Raises ValueError for parts that do not fit, and for statistics of the
        whole clip, which a stream does not have.
        """
        window = self.tiling.window_frames if self.tiling else None
        shared = self.tiling.overlap_frames if self.tiling else 1
        windows = _windows(parts, window, shared, 3, "a part of a clip [1, 3, n, H, W]", "The clip has no frames.")
        shape, device, windows = _first_of(windows)
        _check_size(*shape[-2:])
        t = latents_of(shape[2])
        size = t, *map(latent_side, shape[-2:])
        run = Run(self, self.encoder, self.tiling, size, None, check, pictures_of("video", 1, t))
        moments = run.pieces(windows, progress or nothing)
        yield from fetched((Posterior(part).mode() for part in moments), device, self.dtype)

    def decode_stream(self, parts: Iterable[Tensor], progress: Callable[[], None] | None = None,
                      check: Check = nothing) -> Iterator[Tensor]:
        """Decode latents that arrive as parts [1, C, k, h, w]; yields frames [1, 3, n, 8h, 8w] as windows fill.

        Joined, they equal ``decode(latents)``; only one window is held.  Otherwise as :meth:`encode_stream`.
        """
        window = self.tiling.window if self.tiling else None
        shared = self.tiling.shared if self.tiling else 1
        channels = self.config.latent_channels
        windows = _windows(parts, window, shared, channels, f"a part of latents [1, {channels}, k, h, w]",
                           "There are no latents to decode.")
        shape, device, windows = _first_of(windows)
        run = Run(self, self.decoder, self.tiling, tuple(shape[2:]), None, check, pictures_of("video", 1, shape[2]))
        yield from fetched(run.pieces(windows, progress or nothing), device, self.dtype)


class Run:
    """A clip's way through the encoder or the decoder, window by window; or that of independent pictures.

    size: t, h, w in latents of the clip, or of a window where the clip's length is not known yet.
    pictures: how many independent ones it is, where it is no clip.
    """

    def __init__(self, vae: VideoVAE, network: nn.Module, tiling: Tiling | None, size: tuple[int, int, int],
                 device: torch.device | None, check: Check, pictures: int | None):
        self.vae, self.network, self.device, self.check = vae, network, device or vae.device, check
        self.encodes = network is vae.encoder
        self.stills = pictures is not None
        tiling = tiling or WHOLE
        if self.stills and tiling.statistics == "clip":
            tiling = replace(tiling, statistics="window")  # each picture is a clip of one
        of_clip = (1 if self.stills else size[0], *size[1:])
        self.memory = None
        self.fast = vae._uses_engine(network)
        if self.fast:
            window = (min(of_clip[0], tiling.window or of_clip[0]), *size[1:])
            self.memory = engine.budget(tiling.memory, self.device)
            tiling = engine.fitting(tiling, self.memory, vae.config, self.encodes, window, vae.dtype, self.device)
        self.tiling = tiling
        self.plan = make_plan(*of_clip, tiling)
        self.passes = self.plan.passes(tiling.statistics)
        self.together, self.folded = engine.Together(1, 1, 0), None
        if self.fast and self.stills:
            self.together = engine.together(vae.config, self.encodes, pictures, self.plan.tiles, self.passes > 1, vae.dtype,
                                            self.device, self.memory, partial(engine.folded_bytes, network, vae.dtype))
        if self.together.folded:
            # For as long as this run, in which the weights stay as they are.
            self.folded = {}
            self.memory = self.memory and self.memory - self.together.folded

    def fill(self, target: Tensor, source: Tensor, frames: int, progress: Progress | None) -> None:
        """``target`` [B, C, T, H, W] from ``source``, as far as ``frames`` of each clip need it."""
        if self.stills:
            self._fill_pictures(target, source[:, :, :frames], progress)
            return
        cut = Span.frames if self.encodes else Span.latents
        needed = [window for window in self.plan.windows if window.frames().start + (window.before > 0) < frames]
        step = _counter(progress, source.shape[0] * len(needed) * len(self.plan.tiles) * self.passes)
        for clip, place in zip(source.split(1), target.split(1), strict=True):
            windows = [(clip[:, :, cut(window)], window.before) for window in needed]
            _fill(place, fetched(self.pieces(windows, step), target.device, target.dtype))

    def _fill_pictures(self, target: Tensor, source: Tensor, progress: Progress | None) -> None:
        sources, places = ([picture for clip in x for picture in clip.unbind(1)] for x in (source, target))
        size = self.together.pictures
        groups = [sources[start:start + size] for start in range(0, len(sources), size)]
        step = _counter(progress, len(groups) * len(self.plan.tiles) * self.passes)
        windows = ((torch.stack(group, dim=1)[None], 0) for group in groups)
        pieces = fetched(self.pieces(windows, step), target.device, target.dtype)
        for place, made in zip(places, chain.from_iterable(piece[0].unbind(1) for piece in pieces), strict=True):
            place.copy_(made[:, :place.shape[1], :place.shape[2]])

    def pieces(self, windows: Iterable[tuple[Tensor, int]], step: Callable[[], None]) -> Iterator[Tensor]:
        """Moments or frames in order, as windows are done; ``windows`` are inputs with the latents shared with the last.

        ``step`` is called after each tile.
        """
        statistics = None
        if self.tiling.statistics == "clip" and not isinstance(windows, list):
            raise ValueError("Tiling.statistics is 'clip', but the clip is still coming in; statistics of the whole clip "
                             "need all of it. Use 'tile' or 'window' here, or encode() and decode().")
        if self.tiling.statistics == "clip" and self.passes == 2:
            statistics = engine.Statistics()
            for x, _ in sent(windows, self.device, self.vae.dtype):
                self._window(x, statistics, step)
            statistics.pool()
        shared = 1 if self.stills else self.tiling.shared
        keep = shared if self.encodes else frames_of(shared)
        held = None
        for x, before in sent(windows, self.device, self.vae.dtype):
            piece = self._window(x, statistics, step)
            del x
            if before and keep == 1:
                piece = piece[:, :, 1:]
            elif before:
                # Weights 0 to (n-1)/n of the new window across what is shared, as tiles have them in space.
                weight = torch.arange(keep, device=piece.device)[:, None, None] / keep
                piece[:, :, :keep] = held.float().lerp(piece[:, :, :keep].float(), weight)
            if keep > 1:
                held = piece[:, :, -keep:]
                piece = piece[:, :, :-keep]
            if piece.shape[2]:
                yield piece
            del piece  # nothing is held while the next window comes in and is computed
        if keep > 1:
            yield held

    @torch.no_grad()  # here, because around a generator it would hold what was yielded last
    def _window(self, x: Tensor, statistics: engine.Statistics | None, step: Callable[[], None]) -> Tensor:
        if self.encodes:
            x = _pad_to_8(x if self.stills else _pad_time(x))
        if statistics is None and self.tiling.statistics == "window" and len(self.plan.tiles) > 1:
            statistics = engine.Statistics()
            for tile in self.plan.tiles:
                self._tiles(x, statistics, [tile])
                step()
            statistics.pool()
        scale = 1 if self.encodes else SPACE_FACTOR
        # No closure: an error's frames keep theirs, and with it the window, for as long as the error is kept.
        groups = equal_in_turn(self.plan.tiles, self.together.tiles)  # those of pictures are as many stills
        whole = _join(groups, scale, partial(self._tiles, x, statistics), step)
        if self.vae.dtype == torch.float16 and not whole.isfinite().all() and x.isfinite().all():
            raise FloatingPointError(f"{'Encoding' if self.encodes else 'Decoding'} in float16 gave values that are not "
                                     "finite: these weights need a wider range. Load the model in bfloat16 or float32.")
        return whole

    def _tiles(self, x: Tensor, statistics: engine.Statistics | None, tiles: list[Tile]) -> Tensor:
        """Of a clip one; of pictures several, one behind the other along time."""
        parts = []
        for tile in tiles:
            rows, cols = ((span.pixels() if self.encodes else span.latents()) for span in (tile.rows, tile.cols))
            parts.append(x[..., rows, cols])
        part = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return self.vae._compute(self.network, part, self.stills, self.fast, self.memory, self.check, statistics,
                                 self.folded)


def _join(groups: list[list[Tile]], scale: int, compute: Callable[[list[Tile]], Tensor],
          step: Callable[[], None]) -> Tensor:
    """Compute every tile and blend: in float32, as the reference does, whatever the tiles' dtype."""
    if len(groups) == len(groups[0]) == 1:
        whole = compute(groups[0])
        step()
        return whole
    end = groups[-1][-1]
    height, width = end.rows.stop * scale, end.cols.stop * scale
    whole = None
    for tiles in groups:
        made = compute(tiles)
        for tile, piece in zip(tiles, made.chunk(len(tiles), dim=2), strict=True):
            if whole is None:
                whole = torch.zeros(*piece.shape[:-2], height, width, dtype=torch.float32, device=piece.device)
            place = whole[..., tile.rows.start * scale:tile.rows.stop * scale,
                          tile.cols.start * scale:tile.cols.stop * scale]
            place.addcmul_(piece.float(), tile.weight(scale, piece.device))
            step()
        del made, piece
    return whole


def _windows(parts: Iterable[Tensor], size: int | None, shared: int, channels: int, expected: str,
             none: str) -> Iterator[tuple[Tensor, int]]:
    """Re-cut ``parts`` along time into windows of ``size``; with how many each shares with the last, ``shared`` or 0."""
    held: list[Tensor] = []
    before = 0
    for part in parts:
        _check(part, 5, channels, expected)
        held.append(part)
        del part
        # A window is full only once something beyond it is there: its last elements open the next one.
        while size is not None and (length := sum(part.shape[2] for part in held)) > size:
            window, held = [torch.cat(_cut(held, 0, size), dim=2)], _cut(held, size - shared, length)
            yield window.pop(), before  # so that only the one who computes has it
            before = shared
    if not held:
        raise ValueError(none)
    yield torch.cat(held, dim=2), before


def _first_of(windows: Iterator[tuple[Tensor, int]]) -> tuple[torch.Size, torch.device, Iterator[tuple[Tensor, int]]]:
    """Shape and device of the first of ``windows``, and all of them.  Nothing keeps the first one."""
    first = next(windows)
    # As an iterator, because chain keeps what it is given, and a list would keep the window.
    return first[0].shape, first[0].device, chain(iter([first]), windows)


def _cut(parts: list[Tensor], start: int, stop: int) -> list[Tensor]:
    """Elements ``start`` to ``stop`` along time of what ``parts`` are together, without copying any."""
    found = []
    for part in parts:
        found.append(part[:, :, max(start, 0):max(stop, 0)])
        start, stop = start - part.shape[2], stop - part.shape[2]
    return [part for part in found if part.shape[2]]


def _fill(target: Tensor, pieces: Iterable[Tensor]) -> None:
    """Put ``pieces`` one after the other into ``target``, as far as it reaches in time, height and width."""
    done = 0
    for piece in pieces:
        place = target[:, :, done:done + piece.shape[2]]
        place.copy_(piece[:, :, :place.shape[2], :place.shape[3], :place.shape[4]])
        done += piece.shape[2]


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
