"""Batches of clips from videos and pictures.

Batch number ``step`` is a function of (seed, step) alone: nothing to save, so a resumed run sees what an
uninterrupted one would have seen.
"""

import random
from collections import OrderedDict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..video import VideoError, VideoInfo, probe, read_frames, to_clip
from .config import Bucket, DataConfig

VIDEOS = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class ClipData:
    """Random crops of random stretches of random files, grouped into the buckets' shapes.

    Short files are decoded once and kept up to ``cache_gb``; of long ones only the stretch is read.
    """

    CACHED_FRAMES = 300  # a file with more is not held whole

    def __init__(self, config: DataConfig, seed: int):
        self.config = config
        self.seed = seed
        held_out = set(config.validation)
        found = [file for source in config.sources for file in _media_files(Path(source))]
        self.files = [file for file in found if file.stem not in held_out]
        self.validation_files = [file for file in found if file.stem in held_out]
        missing = held_out - {file.stem for file in self.validation_files}
        if missing:
            raise ValueError(f"data.validation names {', '.join(sorted(missing))}, found in none of the sources.")
        if not self.files:
            raise ValueError(f"No videos or pictures to train on in {', '.join(config.sources)}.")
        self.videos = [file for file in self.files if file.suffix.lower() in VIDEOS]
        if not self.videos and any(bucket.frames > 1 for bucket in config.buckets):
            raise ValueError("A bucket asks for clips, but the sources hold pictures only.")
        self._cache = _FrameCache(config.cache_gb)
        self._infos: dict[Path, VideoInfo] = {}

    def batch(self, step: int) -> Tensor:
        """The clips [B, 3, T, S, S] of ``step``, in [-1, 1]."""
        rng = random.Random(f"{self.seed}:{step}")
        bucket = rng.choices(self.config.buckets, [bucket.share for bucket in self.config.buckets])[0]
        return torch.cat([self._draw(bucket, rng) for _ in range(bucket.batch)])

    def _draw(self, bucket: Bucket, rng: random.Random) -> Tensor:
        """One clip; a file that is too short or too small for the bucket is passed over for another."""
        candidates = self.files if bucket.frames == 1 else self.videos
        for _ in range(100):
            frames = self._stretch(rng.choice(candidates), bucket.frames, rng)
            if frames is not None and min(frames.shape[1:3]) >= bucket.size:
                return _crop(frames, bucket.size, rng)
        raise ValueError(f"No file found with {bucket.frames} frames of {bucket.size} px in 100 tries.")

    def _stretch(self, file: Path, count: int, rng: random.Random) -> np.ndarray | None:
        """``count`` frames [T, H, W, 3] of ``file``, 1 .. max_stride apart; None where it is too short."""
        info = self._info(file)
        held = None if info.frames > self.CACHED_FRAMES else self._cache.get(file)
        length = info.frames if held is None else len(held)
        if length < count:
            return None
        stride = rng.randint(1, self.config.max_stride)
        if count > 1:
            stride = min(stride, (length - 1) // (count - 1))
        reach = (count - 1) * stride + 1
        start = rng.randrange(length - reach + 1)
        if held is not None:
            return held[start:start + reach:stride]
        read = [frame.pixels for frame in islice(read_frames(file, float(start / info.fps)), reach)]
        return np.stack(read[::stride]) if len(read) == reach else None

    def _info(self, file: Path) -> VideoInfo:
        if file not in self._infos:
            self._infos[file] = probe(file)
        return self._infos[file]

    def validation(self) -> list[tuple[str, Tensor]]:
        """(name, clip [1, 3, T, S, S]) of the held-out files: first frames, short side to S, centre crop."""
        clips = []
        for file in self.validation_files:
            wanted = self.config.validation_frames if file.suffix.lower() in VIDEOS else 1
            clips.append((file.stem, load_clip(file, wanted, self.config.validation_size)))
        return clips


def load_clip(file: Path, frames: int, size: int) -> Tensor:
    """The first ``frames`` frames, short side resized to ``size``, centre crop: [1, 3, T, size, size]."""
    pixels = [frame.pixels for frame in islice(read_frames(file), frames)]
    if len(pixels) < frames:
        raise VideoError(f"{file} has {len(pixels)} frames; {frames} are needed.")
    clip = to_clip(pixels)[0].transpose(0, 1)
    height, width = clip.shape[-2:]
    scale = size / min(height, width)
    shape = max(size, round(height * scale)), max(size, round(width * scale))
    clip = F.interpolate(clip, shape, mode="bilinear", antialias=True)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return clip[:, :, top:top + size, left:left + size].transpose(0, 1)[None].clamp(-1, 1)


def _media_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise FileNotFoundError(f"data.sources: no such file or folder: {source}.")
    return sorted(file for file in source.rglob("*") if file.suffix.lower() in VIDEOS + PICTURES)


def _crop(frames: np.ndarray, size: int, rng: random.Random) -> Tensor:
    """A random square between ``size`` and the whole short side, resized to ``size``, mirrored half the time."""
    height, width = frames.shape[1:3]
    side = rng.randint(size, min(height, width))
    top, left = rng.randint(0, height - side), rng.randint(0, width - side)
    clip = to_clip(frames[:, top:top + side, left:left + side])[0].transpose(0, 1)
    if side != size:
        clip = F.interpolate(clip, (size, size), mode="bilinear", antialias=True)
    if rng.random() < 0.5:
        clip = clip.flip(-1)
    return clip.transpose(0, 1)[None].clamp(-1, 1)


class _FrameCache:
    """Decoded files, the least recently used dropped when over the limit."""

    def __init__(self, gigabytes: float):
        self.limit = int(gigabytes * 1e9)
        self.held: OrderedDict[Path, np.ndarray] = OrderedDict()

    def get(self, file: Path) -> np.ndarray:
        if file in self.held:
            self.held.move_to_end(file)
            return self.held[file]
        frames = [frame.pixels for frame in read_frames(file)]
        if not frames:
            raise VideoError(f"{file} holds no frame that can be decoded.")
        self.held[file] = np.stack(frames)
        while len(self.held) > 1 and sum(array.nbytes for array in self.held.values()) > self.limit:
            self.held.popitem(last=False)
        return self.held[file]
