"""Whole videos through a video VAE, from file to file, holding one window at a time."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import metrics
from .checkpoint import write_whole
from .frames import latent_side, latents_of
from .vae import VideoVAE
from .video import Frame, VideoError, VideoWriter, probe, read_frames, to_clip, to_frames

PART = 4  # frames handed on together: what one more latent needs
Step = Callable[[], None]


@dataclass
class Report:
    """What :func:`reconstruct` did."""

    frames: int
    height: int
    width: int
    latent_shape: tuple[int, ...]
    psnr: float
    ssim: float
    seconds: float

    @property
    def ratio(self) -> float:
        """Pixel values for one latent value."""
        return self.frames * self.height * self.width * 3 / math.prod(self.latent_shape)


@dataclass
class LatentClip:
    """Latents [1, C, t, h, w] of a file, and what is needed to give the clip back as it was."""

    latents: Tensor
    times: list[Fraction | None]  # when each frame is shown, in seconds
    height: int
    width: int
    fps: Fraction


def reconstruct(vae: VideoVAE, source: str | Path, target: str | Path, step: Step | None = None) -> Report:
    """Encode and decode ``source`` into the video file ``target``: same size, frames, frame times and audio.

    step: called after each tile of each window; may raise to cancel, which leaves no ``target``.
    Raises VideoError or FileNotFoundError.
    """
    started = time.monotonic()
    pending: deque[Frame] = deque()  # read, not yet compared with what comes back
    shape = squared_error = similarity = 0
    latent_frames = written = 0

    def remember(frames: Iterator[Frame]) -> Iterator[Frame]:
        for frame in frames:
            pending.append(frame)
            yield frame

    def count(parts: Iterable[Tensor]) -> Iterator[Tensor]:
        nonlocal latent_frames
        for part in parts:
            latent_frames += part.shape[2]
            yield part

    with VideoWriter(target, probe(source).fps, audio_from=source) as writer:
        latents = count(vae.encode_stream(_parts(remember(read_frames(source))), step))
        for picture in _pictures(vae.decode_stream(latents, step)):
            if not pending:
                continue  # encode padded it
            original = pending.popleft()
            height, width, _ = shape = original.pixels.shape
            (decoded,) = to_frames(picture[..., :height, :width])
            del picture  # a view of its clip
            writer.write(decoded, original.time)
            error, likeness = _compared(decoded, original.pixels)
            squared_error += error
            similarity += likeness
            written += 1
    height, width, _ = shape
    latent_shape = (vae.config.latent_channels, latent_frames, latent_side(height), latent_side(width))
    return Report(written, height, width, latent_shape, metrics.decibels(squared_error / written),
                  similarity / written, time.monotonic() - started)


def _pictures(clips: Iterator[Tensor]) -> Iterator[Tensor]:
    """Frames of clips, one by one.  None is kept while the next clip is computed: that is when memory is scarce."""
    for clip in clips:
        yield from clip.split(1, dim=2)
        del clip


def _compared(decoded: np.ndarray, original: np.ndarray) -> tuple[float, float]:
    """Mean squared error and SSIM of a frame; SSIM NaN if it is too small for its window."""
    a, b = to_clip([decoded]), to_clip([original])
    return metrics.mse(a, b), metrics.ssim(a, b) if min(a.shape[-2:]) >= metrics.SSIM_WINDOW else math.nan


def encode_file(vae: VideoVAE, source: str | Path, step: Step | None = None) -> LatentClip:
    """Encode a video or picture file (posterior mode); frames are streamed, latents held."""
    times: list[Fraction | None] = []
    size = (0, 0)

    def note(frames: Iterator[Frame]) -> Iterator[Frame]:
        nonlocal size
        for frame in frames:
            times.append(frame.time)
            size = frame.pixels.shape[:2]
            yield frame

    latents = torch.cat(list(vae.encode_stream(_parts(note(read_frames(source))), step)), dim=2)
    return LatentClip(latents, times, *size, probe(source).fps)


def decode_file(vae: VideoVAE, clip: LatentClip, target: str | Path, audio_from: str | Path | None = None,
                step: Step | None = None) -> None:
    """Decode latents into a video file, as long and as large as the clip they were encoded from."""
    written = 0
    with VideoWriter(target, clip.fps, audio_from) as writer:
        for part in vae.decode_stream([clip.latents], step):
            for pixels in to_frames(part[..., :clip.height, :clip.width])[:len(clip.times) - written]:
                writer.write(pixels, clip.times[written])
                written += 1


def save_latents(clip: LatentClip, path: str | Path) -> None:
    """Write a ``.safetensors`` holding ``latents`` and, in its metadata, frames, size and frame rate."""
    times = torch.tensor([-1.0 if moment is None else float(moment) for moment in clip.times], dtype=torch.float64)
    facts = {"frames": str(len(clip.times)), "height": str(clip.height), "width": str(clip.width), "fps": str(clip.fps)}
    write_whole(path, lambda partial: save_file({"latents": clip.latents.contiguous(), "times": times}, partial, facts))


def load_latents(path: str | Path) -> LatentClip:
    """Read what :func:`save_latents` wrote.  Raises VideoError or FileNotFoundError."""
    if not Path(path).exists():
        raise FileNotFoundError(f"No such file: {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            latents, times = file.get_tensor("latents"), file.get_tensor("times")
        clip = LatentClip(latents, [None if t < 0 else Fraction(t).limit_denominator(90000) for t in times.tolist()],
                          int(facts["height"]), int(facts["width"]), Fraction(facts["fps"]))
    except (SafetensorError, KeyError, ValueError) as error:
        raise VideoError(f"{path} does not hold latents written by `python -m cvvae encode` ({error}).") from None
    if latents.shape[2] != latents_of(len(clip.times)):
        raise VideoError(f"{path} holds {latents.shape[2]} latents for {len(clip.times)} frames; it is damaged.")
    return clip


def _parts(frames: Iterator[Frame]) -> Iterator[Tensor]:
    """Frames as clips of a few; refuses a change of size in the middle, which no latent can follow."""
    held: list[np.ndarray] = []
    shape = None
    for frame in frames:
        shape = shape or frame.pixels.shape
        if frame.pixels.shape != shape:
            raise VideoError(f"The picture size changes from {shape[1]}x{shape[0]} to {frame.pixels.shape[1]}x"
                             f"{frame.pixels.shape[0]} within the file; cut it there first.")
        held.append(frame.pixels)
        if len(held) == PART:
            yield to_clip(held)
            held = []
    if held:
        yield to_clip(held)
    if shape is None:
        raise VideoError("The file holds no frame that can be decoded.")
