"""The frame map: how many latents a clip of T frames has, and which frames a latent stands for.

Latent 0 stands for frame 0; latent k >= 1 stands for the four frames 4k-3 .. 4k (paper, section 3.2).
This is the only place that knows it.
"""

TIME_FACTOR = 4
SPACE_FACTOR = 8


def latents_of(frames: int) -> int:
    """Latents that ``frames`` >= 1 frames take, the last group padded to four."""
    return 1 + -(-(frames - 1) // TIME_FACTOR)


def frames_of(latents: int) -> int:
    """Frames that ``latents`` >= 1 latents decode to in video mode."""
    return 1 + TIME_FACTOR * (latents - 1)


def padded_frames(frames: int) -> int:
    """``frames`` rounded up to the next 1 + 4n, the clip lengths that survive a round trip."""
    return frames_of(latents_of(frames))


def latent_of(frame: int) -> int:
    """The latent that stands for frame number ``frame`` >= 0."""
    return latents_of(frame + 1) - 1


def first_frame(latent: int) -> int:
    """First frame that latent number ``latent`` stands for."""
    return max(0, TIME_FACTOR * latent - TIME_FACTOR + 1)


def latent_side(pixels: int) -> int:
    """Latents along a side of ``pixels``, the last one padded to eight."""
    return -(-pixels // SPACE_FACTOR)


def padded_size(pixels: int) -> int:
    """``pixels`` rounded up to the next multiple of 8."""
    return latent_side(pixels) * SPACE_FACTOR


def pictures_of(mode: str, clips: int, latents: int) -> int | None:
    """How many independent pictures ``clips`` of ``latents`` are; None if they are none.  A clip of one frame is one."""
    return clips * latents if mode == "image" or latents == 1 else None
