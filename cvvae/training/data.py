"""Batches of clips from videos and pictures.

Clip ``i`` of the batch of a step is a function of (seed, step, i) alone.  So there is nothing to save: a resumed run
sees what an uninterrupted one would have seen, and two processes with one clip each see the clips of one process
with two.
"""

import csv
import os
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..video import Frame, VideoError, VideoInfo, to_clip
from .config import Bucket, DataConfig
from .media import PICTURES, VIDEOS, Media, find_media

__all__ = ["PICTURES", "VIDEOS", "Batch", "ClipData", "DataError", "SkipReport", "load_clip", "loader"]

DRAWS = 20  # files tried for one clip before the run is given up
AHEAD = 2  # steps that are decoded before they are asked for, for each worker


class DataError(ValueError):
    """File after file could not be used."""


@dataclass
class Batch:
    """``clips`` [B, 3, T, H, W] in [-1, 1], and the files passed over on the way: name -> reason."""

    clips: Tensor
    failures: dict[str, str] = field(default_factory=dict)


class ClipData:
    """Random crops of random stretches of random files, grouped into the buckets' shapes.

    Only the stretch is decoded, and only its crop is held.  A file that cannot be decoded, or that is too short or
    too small for the bucket, is passed over for another draw, and the batch says so.
    """

    def __init__(self, config: DataConfig, seed: int):
        """Raises FileNotFoundError or ValueError where ``config`` names what is not there."""
        self.config = config
        self.seed = seed
        held_out = set(config.validation)
        found = find_media(config.sources)
        self.files = [media for media in found if media.stem not in held_out and media.weight > 0]
        self.validation_files = [media for media in found if media.stem in held_out]
        missing = held_out - {media.stem for media in self.validation_files}
        if missing:
            raise ValueError(f"data.validation names {', '.join(sorted(missing))}, found in none of the sources.")
        if not self.files:
            raise ValueError(f"No videos or pictures to train on in {', '.join(config.sources)}.")
        videos = [media for media in self.files if media.is_video]
        if not videos and any(bucket.frames > 1 for bucket in config.buckets):
            raise ValueError("A bucket of data.buckets asks for clips, but the sources hold pictures only.")
        self._for_pictures = _Weighted(self.files)
        self._for_clips = _Weighted(videos)
        self._infos: dict[Media, VideoInfo] = {}

    def bucket(self, step: int) -> Bucket:
        """The shape of the batches of ``step``, the same in every process."""
        rng = random.Random(f"{self.seed}:{step}")
        return rng.choices(self.config.buckets, [bucket.share for bucket in self.config.buckets])[0]

    def batch(self, step: int, part: int = 0) -> Batch:
        """Clips ``part * B`` to ``part * B + B - 1`` of ``step``.  Raises DataError after :data:`DRAWS` useless files."""
        bucket = self.bucket(step)
        failures: dict[str, str] = {}
        clips = [self._draw(bucket, random.Random(f"{self.seed}:{step}:{part * bucket.batch + k}"), failures)
                 for k in range(bucket.batch)]
        return Batch(torch.cat(clips), failures)

    def _draw(self, bucket: Bucket, rng: random.Random, failures: dict[str, str]) -> Tensor:
        """One clip [1, 3, T, H, W]; what is passed over is added to ``failures``."""
        candidates = self._for_pictures if bucket.frames == 1 else self._for_clips
        reasons = []
        for _ in range(DRAWS):
            media = candidates.draw(rng)
            try:
                return self._clip(media, bucket, rng)
            except (VideoError, OSError) as error:
                failures[media.name] = str(error)
                reasons.append(str(error))
        listed = list(dict.fromkeys(reasons))
        raise DataError(f"No clip of {bucket.frames} frames of {bucket.height} x {bucket.width} pixels in {DRAWS} files "
                        "drawn one after the other:\n  " + "\n  ".join(listed[:5])
                        + (f"\n  and {len(listed) - 5} more" if len(listed) > 5 else ""))

    def _clip(self, media: Media, bucket: Bucket, rng: random.Random) -> Tensor:
        """A random stretch of ``media``, its frames 1 .. max_stride apart, cropped to the bucket."""
        count, stride, start = bucket.frames, 1, 0
        if media.is_video:
            length = self._info(media).frames
            if length < count:
                raise VideoError(f"{media} has {length} frames; {count} are needed.")
            stride = rng.randint(1, self.config.max_stride)
            if count > 1:
                stride = min(stride, (length - 1) // (count - 1))
            start = rng.randrange(length - (count - 1) * stride)
        crop = _Crop(media, bucket, self.config.flip, rng)
        clip = [crop(frame) for frame in islice(self._frames(media, start, stride), count)]
        if len(clip) < count and start > 0:
            # Times are not evenly spread in every file, so the last frames may come earlier than counted.
            start = max(0, start - 2 * (count - len(clip)) * stride)
            clip = list(deque((crop(frame) for frame in self._frames(media, start, stride)), maxlen=count))
        if len(clip) < count:
            raise VideoError(f"{media} ends early: {len(clip)} of {count} frames could be decoded from frame {start} on.")
        return torch.stack(clip, dim=1)[None].float().div_(127.5).sub_(1)

    def _frames(self, media: Media, start: int, stride: int) -> Iterator[Frame]:
        """Frames ``start``, ``start + stride``, ... of ``media``; raises VideoError at one that the decoder made up."""
        # Half a frame early, because containers round the times of frames.
        seconds = float((start - Fraction(1, 2)) / self._info(media).fps) if start else 0.0
        for frame in media.frames(seconds, stride):
            if frame.damaged:
                raise VideoError(f"{media} is damaged near frame {start}.")
            yield frame

    def _info(self, media: Media) -> VideoInfo:
        if media not in self._infos:
            self._infos[media] = media.probe()
        return self._infos[media]

    def validation(self) -> list[tuple[str, Tensor]]:
        """(name, clip [1, 3, T, S, S]) of the held-out files: first frames, short side to S, centre crop.

        Raises VideoError naming a file that cannot be decoded: scores over fewer clips could not be compared.
        """
        held_out = self.validation_files[:self.config.validation_clips or None]
        return [(media.name, load_clip(media, self.config.validation_frames if media.is_video else 1,
                                       self.config.validation_size)) for media in held_out]


def load_clip(file: Path | Media, frames: int, size: int) -> Tensor:
    """The first ``frames`` frames, short side resized to ``size``, centre crop: [1, 3, T, size, size]."""
    media = file if isinstance(file, Media) else Media(Path(file).stem, Path(file))
    read = list(islice(media.frames(), frames))
    if len(read) < frames or any(frame.damaged for frame in read):
        sound = sum(not frame.damaged for frame in read)
        raise VideoError(f"{media} has {sound} frames that can be decoded; {frames} are needed.")
    clip = to_clip([frame.pixels for frame in read])[0].transpose(0, 1)
    return covering(clip, size, size).transpose(0, 1)[None].clamp(-1, 1)


def covering(images: Tensor, height: int, width: int) -> Tensor:
    """[N, 3, H, W] -> the middle [N, 3, height, width] of it, scaled to cover that."""
    scale = max(height / images.shape[-2], width / images.shape[-1])
    sides = max(height, round(images.shape[-2] * scale)), max(width, round(images.shape[-1] * scale))
    images = F.interpolate(images, sides, mode="bilinear", antialias=True)
    top, left = (sides[0] - height) // 2, (sides[1] - width) // 2
    return images[..., top:top + height, left:left + width]


class _Weighted:
    """Draws files by their weights."""

    def __init__(self, files: list[Media]):
        self._files = files
        self._sums = list(accumulate(media.weight for media in files))

    def draw(self, rng: random.Random) -> Media:
        return rng.choices(self._files, cum_weights=self._sums)[0]


class _Crop:
    """Cuts one window, chosen at the first frame, out of every frame: uint8 [H, W, 3] -> uint8 [3, h, w].

    Its shape is the bucket's, its size anything from the bucket's to the largest that fits; half of them are mirrored.
    """

    def __init__(self, media: Media, bucket: Bucket, flip: bool, rng: random.Random):
        self._media, self._bucket, self._flip, self._rng = media, bucket, flip, rng
        self._sides = None

    def __call__(self, frame: Frame) -> Tensor:
        sides = frame.pixels.shape[:2]
        if self._sides is None:
            self._choose(*sides)
        elif sides != self._sides:
            raise VideoError(f"{self._media} changes from {_size(*self._sides)} to {_size(*sides)} pixels.")
        window = torch.from_numpy(np.ascontiguousarray(frame.pixels[self._window])).permute(2, 0, 1)
        # Resized as bytes: eight times as fast as floats, and the frames were bytes before.
        piece = F.interpolate(window[None], (self._bucket.height, self._bucket.width), mode="bilinear", antialias=True)[0]
        return piece.flip(-1) if self._mirrored else piece

    def _choose(self, height: int, width: int) -> None:
        wanted = self._bucket
        largest = min(height / wanted.height, width / wanted.width)
        if largest < 1:
            raise VideoError(f"{self._media} has {_size(height, width)} pixels; "
                             f"{_size(wanted.height, wanted.width)} are needed.")
        rows = self._rng.randint(wanted.height, int(wanted.height * largest))
        columns = min(width, round(rows * wanted.width / wanted.height))
        top, left = self._rng.randint(0, height - rows), self._rng.randint(0, width - columns)
        self._mirrored = self._flip and self._rng.random() < 0.5
        self._window = slice(top, top + rows), slice(left, left + columns)
        self._sides = height, width


def _size(height: int, width: int) -> str:
    return f"{width} x {height}"


def loader(data: ClipData, start: int, steps: int, parts: list[int], workers: int) -> Iterator[tuple[int, list[Batch]]]:
    """(step, its batches of ``parts``) for each step from ``start`` to ``steps`` - 1, decoded ahead by ``workers``
    threads (0: decoded when asked for).  Closing the iterator ends them.  Raises DataError as :meth:`ClipData.batch`.

    Threads, because decoding and resizing leave Python's lock alone, and because new processes would have to import a
    whole ComfyUI around a trainer that runs in one.
    """
    if workers == 0:
        for step in range(start, steps):
            yield step, [data.batch(step, part) for part in parts]
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="clips")
    asked_for: deque[tuple[int, list[Future[Batch]]]] = deque()
    try:
        for step in range(start, steps):
            asked_for.append((step, [pool.submit(data.batch, step, part) for part in parts]))
            if len(asked_for) > AHEAD * workers:
                yield _arrived(*asked_for.popleft())
        while asked_for:
            yield _arrived(*asked_for.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _arrived(step: int, batches: list[Future[Batch]]) -> tuple[int, list[Batch]]:
    return step, [batch.result() for batch in batches]


class SkipReport:
    """A CSV (name, reason) of the files that were passed over, each once; goes on with what is there already."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._names: set[str] = set()
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                self._names = {row["name"] for row in csv.DictReader(file)}

    @property
    def count(self) -> int:
        """How many files are listed."""
        return len(self._names)

    def add(self, failures: dict[str, str]) -> None:
        """Append the names that are not listed yet."""
        new = {name: reason for name, reason in failures.items() if name not in self._names}
        if not new:
            return
        fresh = not self.path.exists()
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows(([("name", "reason")] if fresh else []) + list(new.items()))
        self._names.update(new)
