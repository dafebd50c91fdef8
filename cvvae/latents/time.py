"""Cutting, joining and turning clips of latents without losing the frame map.

Latent 0 stands for one frame, each other latent for four (:mod:`cvvae.frames`).  A latent of one kind in the place of
the other is decoded to frames that stand still or run too fast; what each function does about it, it says.

``decode`` and ``encode`` turn latents [B, C, t, h, w] into clips [B, 3, 4t - 3, H, W] and back.  With them frames go
where no latent can: :func:`reencode` and :func:`one_frame_latent`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..frames import TIME_FACTOR
from .interpolation import LERP, blend, crossfade, fading
from .layout import LatentError, check, meeting

Coder = Callable[[Tensor], Tensor]

CONTEXT = 4  # latents to both sides that are decoded with one: a window of the checkpoints is five


def trim(latents: Tensor, start: int, stop: int) -> Tensor:
    """Latents ``start`` to ``stop - 1``.  With start > 0 the new first latent shows only the last of its four frames,
    and may remember the other three: see :func:`one_frame_latent`."""
    t = check(latents).shape[2]
    if not 0 <= start < stop <= t:
        raise LatentError(f"cannot take the latents {start} to {stop - 1} of a clip that has {t}, numbered 0 to {t - 1}.")
    return latents[:, :, start:stop].clone()


def reverse(latents: Tensor) -> Tensor:
    """The last latent first.  Right for independent images; in a video each latent's four frames still run forward."""
    return check(latents).flip(2)


def join(clips: Sequence[Tensor], overlap: int = 0, curve: str = LERP, easing: str = "linear",
         keep_first: bool = False) -> Tensor:
    """One clip after the other, all neighbours cross-fading over ``overlap`` latents (see :func:`crossfade`).

    Without an overlap every clip but the first goes without its first latent, which stands for one frame: then every
    latent stands where it did, and only that frame is lost.  A clip of a single latent stays, for four frames.
    keep_first: keep all latents; for independent images.
    """
    clips = meeting(clips, "clip")
    joined = clips[0]
    for clip in clips[1:]:
        joined = crossfade(joined, clip if overlap else body(clip, keep_first), overlap, curve, easing)
    return joined.clone()


def insert(latents: Tensor, clip: Tensor, at: int, keep_first: bool = False) -> Tensor:
    """``clip`` before latent number ``at``; without its first latent, as in :func:`join`, except where it comes first."""
    latents, clip = meeting([latents, clip], "clip")
    _check_place(at, latents.shape[2])
    if at == 0:
        return join([clip, latents], keep_first=keep_first)
    return torch.cat([latents[:, :, :at], body(clip, keep_first), latents[:, :, at:]], dim=2)


def replace(latents: Tensor, clip: Tensor, at: int, keep_first: bool = False) -> Tensor:
    """``clip`` in the place of as many latents from number ``at``; without its first latent, as in :func:`insert`."""
    latents, clip = meeting([latents, clip], "clip")
    _check_place(at, latents.shape[2] - 1)
    new = clip if at == 0 else body(clip, keep_first)
    behind = at + new.shape[2]
    if behind > latents.shape[2]:
        raise LatentError(f"{new.shape[2]} latents from number {at} on reach behind the end of a clip of "
                          f"{latents.shape[2]}. Trim what is put in, or begin earlier.")
    return torch.cat([latents[:, :, :at], new, latents[:, :, behind:]], dim=2)


def there_and_back(latents: Tensor, closed: bool = True) -> Tensor:
    """Forward, then backward to where it began: 2t - 1 latents; without the last of these, if not ``closed``.

    Played in a loop, a video must be closed and lose its last frame, which is its first: 8 (t - 1) frames.  On the way
    back each latent's four frames still run forward.
    """
    t = check(latents).shape[2]
    return torch.cat([latents, latents[:, :, 0 if closed else 1:max(0, t - 1)].flip(2)], dim=2)


def seamless(latents: Tensor, overlap: int, closed: bool = True, curve: str = LERP, easing: str = "linear") -> Tensor:
    """A loop: latents ``overlap`` to the end, whose last ``overlap`` fade into the first, t - overlap of them.

    closed: its first latent once more at the end.  Of a video played in a loop this must be there, and the last frame,
        which is the first, cut off: then 4 (t - overlap) frames follow each other without a jump.
    """
    t = check(latents).shape[2]
    if not 0 < overlap < t - overlap:
        raise LatentError(f"a clip of {t} latents cannot fade into itself over {overlap}; expected 1 to {(t - 1) // 2}.")
    # The end turns into what was before the loop's first latent.
    end = blend(latents[:, :, t - overlap:], latents[:, :, :overlap], fading(overlap, easing), curve)
    looped = torch.cat([latents[:, :, overlap:t - overlap], end], dim=2)
    return torch.cat([looped, looped[:, :, :1]], dim=2) if closed else looped


# -- through frames ----------------------------------------------------------------------------------


def one_frame_latent(latents: Tensor, at: int, decode: Coder, encode: Coder) -> Tensor:
    """[B, C, 1, h, w]: what stands for the last frame of latent ``at`` alone, for a clip that begins with it.

    The latents around are decoded, and encoded again from that frame on.
    """
    before = min(at, CONTEXT)
    clip = decode(check(latents)[:, :, at - before:at + CONTEXT + 1])
    return encode(clip[:, :, TIME_FACTOR * before:])[:, :, :1].to(latents)


def reencode(latents: Tensor, clip: Tensor, encode: Coder, before: int = 0, behind: int = 0) -> Tensor:
    """The latents of ``clip`` [B, 3, T, H, W], of which the first ``before`` and last ``behind`` are those of ``latents``.

    What these stand for must be the same frames.  The others are encoded from the last frame that is known before them.
    """
    start = TIME_FACTOR * max(0, before - 1)
    stop = clip.shape[2] - TIME_FACTOR * behind
    new = encode(clip[:, :, start:stop]).to(latents)
    kept = [latents[:, :, :before], new[:, :, min(1, before):], latents[:, :, latents.shape[2] - behind:]]
    return torch.cat(kept, dim=2)


def body(clip: Tensor, keep_first: bool = False) -> Tensor:
    """What of ``clip`` follows other latents: all but the first, which stands for one frame; a single latent stays."""
    return clip if keep_first or clip.shape[2] == 1 else clip[:, :, 1:]


def _check_place(at: int, last: int) -> None:
    if not 0 <= at <= last:
        raise LatentError(f"there is no latent number {at} here; expected 0 to {last}.")
