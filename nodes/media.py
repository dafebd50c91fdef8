"""Sockets that take frames as IMAGE or as VIDEO, and the VIDEO that nodes give."""

from dataclasses import dataclass
from fractions import Fraction

from comfy_api.v0_0_2 import InputImpl, Types, io
from torch import Tensor

FPS = 24  # of frames that nobody gave a speed


@dataclass(frozen=True)
class Media:
    """What is wired into a socket of :func:`media_input`."""

    images: Tensor  # [T, H, W, C] in [0, 1]
    fps: Fraction | None = None  # of a video
    sound: dict | None = None  # of a video that has some: the host's AUDIO


def media_input(name: str, tooltip: str, optional: bool = False) -> io.Input:
    return io.MultiType.Input(name, types=[io.Image, io.Video], optional=optional, tooltip=tooltip)


def read_media(media) -> Media:
    """Images as they are; of a video all frames, its speed and its sound.  Raises ValueError where it has no frames."""
    if isinstance(media, Tensor):
        return Media(media)
    parts = media.get_components()
    if not len(parts.images):
        raise ValueError("The video that is connected has no frames. Choose another file, or trim less of it.")
    return Media(parts.images, parts.frame_rate, parts.audio)


def make_video(images: Tensor, fps: Fraction, sound: dict | None = None):
    """The host's VIDEO of [T, H, W, 3]; it is compressed when it is saved, not before."""
    return InputImpl.VideoFromComponents(Types.VideoComponents(images=images, frame_rate=fps, audio=sound))
