"""Videos as clips to encode for a dataset, read and resized in a thread beside the model."""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch

from .frames import SPACE_FACTOR
from .training.data import covering
from .training.media import Media
from .video import VideoError

AHEAD = 2  # parts of clips decoded before they are asked for
PART = 16  # frames read at a time where a whole video is one clip
CAPTION = ".txt"  # beside a video, with its name


class DatasetError(ValueError):
    """A folder of latents that does not fit what is asked of it."""


@dataclass(frozen=True)
class Settings:
    """How videos become clips, and clips files.  ``frames`` 0 encodes each video as one clip, however long."""

    frames: int = 0  # 1 + 4n; what is left at a video's end is counted, not encoded
    stride: int = 1  # frames are taken this far apart
    height: int = 0  # resized to cover height x width, then cropped in the middle; 0 keeps the size
    width: int = 0
    dtype: str = "float16"  # of the stored latents
    files_per_shard: int = 16

    def __post_init__(self):
        if self.frames < 0 or self.frames and self.frames % 4 != 1:
            raise DatasetError(f"frames is {self.frames}; expected 1 + 4n, or 0 for whole videos.")
        if self.stride < 1 or self.files_per_shard < 1:
            raise DatasetError(f"stride is {self.stride}, files_per_shard {self.files_per_shard}; expected 1 or more.")
        if bool(self.height) != bool(self.width) or self.height % 8 or self.width % 8 or min(self.height, self.width) < 0:
            raise DatasetError(f"The size is {self.height} x {self.width}; expected multiples of 8, or 0 x 0 to keep sizes.")
        if self.dtype not in ("float16", "bfloat16", "float32"):
            raise DatasetError(f"dtype is {self.dtype!r}; expected float16, bfloat16 or float32.")


@dataclass
class Progress:
    """What a process did.  ``decoding``: seconds that the reading thread worked, beside the model."""

    shards: int = 0
    clips: int = 0
    frames: int = 0
    left_over: int = 0  # frames at ends of videos, fewer than Settings.frames
    seconds: float = 0.0
    decoding: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)  # source -> reason


@dataclass(frozen=True)
class Begin:
    """A clip begins: the ``piece``-th of the file that has ``number`` in its shard.  Parts of frames and END follow."""

    number: int
    media: Media
    piece: int
    start: int
    fps: Fraction
    height: int
    width: int
    caption: str


@dataclass(frozen=True)
class Failure:
    """A file that cannot be read any further; the clip that has begun is given up."""

    source: str
    reason: str


END = object()  # of a clip
_DONE = object()  # of everything


def read_clips(group: list[Media], settings: Settings, progress: Progress) -> Iterator:
    """For each clip Begin, parts uint8 [n, H, W, 3] and END; Failure for a file that goes no further."""
    for number, media in enumerate(group):
        try:
            yield from _read_file(media, number, settings, progress)
        except (VideoError, OSError) as error:
            yield Failure(str(media), str(error))


def _read_file(media: Media, number: int, settings: Settings, progress: Progress) -> Iterator:
    fps = media.probe().fps / settings.stride if media.is_video else Fraction(1)
    caption = _caption(media)
    whole = settings.frames == 0 or not media.is_video
    held: list[np.ndarray] = []
    piece = read = 0
    shape = None
    for frame in media.frames(step=settings.stride):
        place = f"{media}, frame {read * settings.stride}"
        shape = shape or frame.pixels.shape
        if frame.damaged:
            raise VideoError(f"{place}: the file is damaged there.")
        if frame.pixels.shape != shape:
            raise VideoError(f"{place}: the picture size changes there.")
        held.append(_resized(frame.pixels, settings))
        if min(held[0].shape[:2]) < SPACE_FACTOR:
            raise VideoError(f"{media} has {shape[1]} x {shape[0]} pixels; a latent takes {SPACE_FACTOR}.")
        if read == 0 and whole or not whole and len(held) == settings.frames:
            start = (read + 1 - len(held)) * settings.stride
            yield Begin(number, media, piece, start, fps, *held[0].shape[:2], caption)
        read += 1
        if len(held) == (PART if whole else settings.frames):
            yield np.stack(held)
            held = []
            if not whole:
                yield END
                piece += 1
    if not read:
        raise VideoError(f"{media} holds no frame that can be decoded.")
    if whole:
        if held:
            yield np.stack(held)
        yield END
        return
    progress.left_over += len(held)
    if not piece:
        raise VideoError(f"{media} has {len(held)} frames at stride {settings.stride}; a clip takes {settings.frames}.")


def _resized(pixels: np.ndarray, settings: Settings) -> np.ndarray:
    """uint8 [H, W, 3] -> the middle of it, scaled to cover the settings' size."""
    height, width = settings.height, settings.width
    if not height or pixels.shape[:2] == (height, width):
        return pixels
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    return covering(image, height, width)[0].permute(1, 2, 0).numpy()


def _caption(media: Media) -> str:
    """The text beside a file, in a ``.txt`` with its name; empty without one."""
    path = media.path.with_suffix(CAPTION)
    return path.read_text(encoding="utf-8").strip() if not media.member and path.is_file() else ""


def ahead(events: Iterator, progress: Progress) -> Iterator:
    """``events``, read ahead by a thread; closing the iterator ends it."""
    ready: queue.Queue = queue.Queue(AHEAD)
    closed = threading.Event()

    def put(item) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            while True:
                began = time.monotonic()
                event = next(events, _DONE)
                progress.decoding += time.monotonic() - began
                if not put(event) or event is _DONE:
                    return
        except BaseException as error:  # handed to the thread that can tell the user
            put(error)

    thread = threading.Thread(target=read, name="frames", daemon=True)
    thread.start()
    try:
        while (event := ready.get()) is not _DONE:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        closed.set()
        thread.join()
