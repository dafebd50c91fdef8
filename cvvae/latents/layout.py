"""The two layouts of latents, and the check that several of them fit together."""

from collections.abc import Sequence

from torch import Tensor


class LatentError(ValueError):
    """Latents, or what is asked of them, do not fit; the message says what was found, expected, and what to do."""


def to_clips(batch: Tensor, clips: int = 1) -> Tensor:
    """Frames as batch [clips * t, C, h, w], one clip after the other -> [clips, C, t, h, w]."""
    check(batch, 4, "latents [t, C, h, w]")
    if batch.shape[0] % clips:
        raise LatentError(f"{batch.shape[0]} latents cannot be {clips} clips of one length. Choose a number of clips that "
                          f"divides {batch.shape[0]}.")
    return batch.unflatten(0, (clips, -1)).movedim(1, 2)


def to_batch(clips: Tensor) -> Tensor:
    """[B, C, t, h, w] -> [B * t, C, h, w], one clip after the other."""
    check(clips)
    return clips.movedim(2, 1).flatten(0, 1)


def check(latents: Tensor, dimensions: int = 5, wanted: str = "latents [B, C, t, h, w]") -> Tensor:
    """``latents``, if it has these dimensions and something in it."""
    if latents.ndim != dimensions or not latents.is_floating_point():
        raise LatentError(f"Expected {wanted} of floating-point numbers, found shape {list(latents.shape)} of "
                          f"{latents.dtype}.")
    if 0 in latents.shape:
        raise LatentError(f"Expected {wanted}, found nothing in them: shape {list(latents.shape)}.")
    return latents


def meeting(clips: Sequence[Tensor], what: str) -> list[Tensor]:
    """``clips`` [B, C, any t, h, w] on the device and in the type of the first, one clip repeated where others have B.

    what: the name of one of them in messages, such as "keyframe".
    """
    first, batch = check(clips[0]), max(clip.shape[0] for clip in clips)
    for number, clip in enumerate(clips, 1):
        check(clip)
        size, wanted = (clip.shape[1], *clip.shape[3:]), (first.shape[1], *first.shape[3:])
        if size[0] != wanted[0]:
            raise LatentError(f"{what} {number} has {size[0]} channels and {what} 1 has {wanted[0]}: they belong to "
                              "different families of models. Encode both with the VAE of one family.")
        if size != wanted:
            raise LatentError(f"{what} {number} is {size[2]} x {size[1]} latents ({8 * size[2]} x {8 * size[1]} pixels) and "
                              f"{what} 1 is {wanted[2]} x {wanted[1]} ({8 * wanted[2]} x {8 * wanted[1]} pixels). Scale the "
                              "pictures to one size before they are encoded.")
        if clip.shape[0] not in (1, batch):
            raise LatentError(f"{what} {number} holds {clip.shape[0]} clips where another holds {batch}. Use one clip, or "
                              "the same number everywhere.")
    return [clip.to(first.device, first.dtype).expand(batch, *(-1,) * 4) for clip in clips]
