"""Videos and pictures on disk: read and written frame by frame with PyAV, never held whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from .checkpoint import partial_path

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}


class VideoError(ValueError):
    """A file that cannot be read as video, or written."""


@dataclass
class Frame:
    """One decoded picture: ``pixels`` uint8 [H, W, 3], shown at ``time`` seconds.

    ``damaged``: the decoder made up what the file lacks.
    """

    pixels: np.ndarray
    time: Fraction | None
    damaged: bool = False


Source = str | os.PathLike | BinaryIO  # a file object is read from where its ``seek`` and ``read`` lead


def _name(source: Source) -> str:
    return str(source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", source))


@contextmanager
def _reading(source: Source):
    name = _name(source)
    try:
        container = av.open(str(source) if isinstance(source, (str, os.PathLike)) else source)
    except FileNotFoundError:
        raise FileNotFoundError(f"No such file: {name}.") from None
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"{name} cannot be read as a video or picture: {error.strerror or error}.") from None
    with container:
        if not container.streams.video:
            raise VideoError(f"{name} holds no video stream.")
        if container.streams.video[0].codec_context is None:
            raise VideoError(f"{name}: this FFmpeg has no decoder for its video stream.")
        yield container


@dataclass(frozen=True)
class VideoInfo:
    """What the container says; ``frames`` is 0 where it does not."""

    fps: Fraction
    frames: int
    has_audio: bool


def probe(source: Source) -> VideoInfo:
    """Frame rate, frame count and audio of a file.  Raises VideoError or FileNotFoundError."""
    with _reading(source) as container:
        stream = container.streams.video[0]
        fps = stream.average_rate or stream.guessed_rate or Fraction(25)
        frames = stream.frames or (round(container.duration / av.time_base * fps) if container.duration else 0)
        return VideoInfo(Fraction(fps), frames, bool(container.streams.audio))


def count_packets(source: Source) -> int:
    """Frames of a file whose container does not say: its packets, read through without decoding."""
    with _reading(source) as container:
        try:
            return sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))
        except av.error.FFmpegError as error:
            raise VideoError(f"{_name(source)} breaks off while being read: {error.strerror or error}.") from None


def read_frames(source: Source, start: float = 0.0, step: int = 1, threads: int = 0,
                size: tuple[int, int] | None = None) -> Iterator[Frame]:
    """Decode frame by frame, upright, from ``start`` seconds on (seeks to the key frame before it).

    Of every ``step`` frames the first is given; ``threads`` decode (0: as many as there are cores); ``size``
    (height, width, before turning upright) shrinks each picture, whatever its shape.
    Raises VideoError for a file without a video stream, or one that breaks off while being decoded.
    """
    shrink = {} if size is None else {"height": size[0], "width": size[1], "interpolation": "AREA"}
    with _reading(source) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
        converter = VideoReformatter()  # one for all frames: setting it up costs as much as converting a frame
        origin = stream.start_time or 0
        reached = 0
        try:
            if start > 0:
                container.seek(origin + int(start / stream.time_base), stream=stream, backward=True)
            for frame in container.decode(stream):
                time = None if frame.pts is None else (frame.pts - origin) * stream.time_base
                if time is not None and time < Fraction(start).limit_denominator(10**6):
                    continue
                reached += 1
                if (reached - 1) % step:
                    continue
                pixels = converter.reformat(frame, format="rgb24", **shrink).to_ndarray()
                turns = round(getattr(frame, "rotation", 0) / 90) % 4
                yield Frame(np.rot90(pixels, turns) if turns else pixels, time, frame.is_corrupt)
        except av.error.FFmpegError as error:
            raise VideoError(f"{_name(source)} breaks off while being decoded: {error.strerror or error}.") from None


def to_clip(frames: list[np.ndarray] | np.ndarray) -> Tensor:
    """uint8 frames [H, W, 3] -> a clip [1, 3, T, H, W] in [-1, 1], float32."""
    stacked = torch.from_numpy(np.stack(frames))
    return stacked.permute(3, 0, 1, 2)[None].float().div_(127.5).sub_(1)


def to_frames(clip: Tensor) -> np.ndarray:
    """A clip [1, 3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3], clamped and rounded."""
    levels = clip[0].permute(1, 2, 3, 0).float().add(1).mul(127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).cpu().numpy()


class VideoWriter:
    """Write H.264 frame by frame, with the audio of another file copied alongside.

    lossless: FFV1 instead, which keeps every value; for ``.mkv`` files.

    The file gets its name when :meth:`close` has finished it; until then, and after an error, there is
    only a hidden temporary file, which is removed.  Use as a context manager.
    """

    def __init__(self, path: str | os.PathLike, fps: Fraction, audio_from: str | os.PathLike | None = None,
                 lossless: bool = False):
        self.path = Path(path)
        self.lossless = lossless
        if self.path.suffix.lower() not in CONTAINERS:
            raise VideoError(f"{path}: cannot write a {self.path.suffix or 'nameless'} file; "
                             f"expected one of {', '.join(CONTAINERS)}.")
        if not self.path.parent.is_dir():
            raise VideoError(f"{path}: the folder {self.path.parent} does not exist.")
        self.fps = Fraction(fps)
        self._partial = partial_path(self.path)
        self._container = av.open(str(self._partial), "w", format=CONTAINERS[self.path.suffix.lower()])
        self._stream = None
        self._written = 0
        self._audio = _AudioCopy(audio_from, self._container) if audio_from else None

    def write(self, pixels: np.ndarray, time: Fraction | None = None) -> None:
        """Add one uint8 frame [H, W, 3], shown at ``time`` seconds (by default, the next tick of ``fps``)."""
        if self._stream is None:
            self._stream = self._open_stream(*pixels.shape[:2])
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        time = self._written / self.fps if time is None else time
        frame.time_base = self._stream.codec_context.time_base
        frame.pts = round(time / frame.time_base)
        self._written += 1
        self._mux(self._stream.encode(frame))
        if self._audio:
            self._audio.copy_until(time)

    def _open_stream(self, height: int, width: int):
        stream = self._container.add_stream("ffv1" if self.lossless else "libx264", rate=self.fps)
        stream.height, stream.width = height, width
        if self.lossless:
            stream.pix_fmt = "bgr0"
        else:
            # 4:2:0 halves the sides, so odd sizes keep their pixels only in 4:4:4.
            stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
            # x264 would look 40 frames ahead, and hold more memory than the windows of a clip.
            stream.options = {"crf": "14", "preset": "medium", "rc-lookahead": "16"}
        # A whole number of ticks per frame at a constant rate, and at least 10,000 a second for variable rates.
        ticks = self.fps.numerator * -(-10_000 // self.fps.numerator)
        stream.codec_context.time_base = Fraction(1, ticks)
        return stream

    def _mux(self, packets) -> None:
        for packet in packets:
            # Only the last frame's duration is not the distance to the next one; without it the rate comes out wrong.
            packet.duration = round(1 / self.fps / packet.time_base)
            self._container.mux(packet)

    def close(self) -> None:
        """Finish the file and give it its name."""
        if self._stream is None:
            raise VideoError(f"{self.path}: no frame was written.")
        self._mux(self._stream.encode(None))
        if self._audio:
            self._audio.copy_until(None)
        self._container.close()
        os.replace(self._partial, self.path)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, error_type, *_) -> None:
        try:
            if error_type is None:
                self.close()
            else:
                self._container.close()
        finally:
            if self._audio:
                self._audio.close()
            self._partial.unlink(missing_ok=True)


class _AudioCopy:
    """Copies the packets of another file's first audio stream, a little ahead of the video."""

    def __init__(self, path: str | os.PathLike, target):
        self._source = av.open(str(path))
        self._packets = None
        if self._source.streams.audio:
            stream = self._source.streams.audio[0]
            video = self._source.streams.video[0]
            # Picture times are counted from the first frame, so sound is too.
            self._origin = round((video.start_time or 0) * video.time_base / stream.time_base)
            self._target_stream = target.add_stream_from_template(stream)
            self._target = target
            self._packets = (packet for packet in self._source.demux(stream) if packet.dts is not None)
            self._next = next(self._packets, None)

    def copy_until(self, time: Fraction | None) -> None:
        """Copy packets up to ``time`` seconds, or all that are left."""
        while self._packets is not None and self._next is not None:
            packet = self._next
            if time is not None and (packet.dts - self._origin) * packet.time_base > time:
                return
            self._next = next(self._packets, None)
            packet.pts -= self._origin
            packet.dts -= self._origin
            packet.stream = self._target_stream
            self._target.mux(packet)

    def close(self) -> None:
        self._source.close()
