"""Latents between latents: keyframes along a curve, cross-fades, and clips of another length.

Every latent belongs to exactly one segment [keyframe, next keyframe), so that none is shown twice, and at a
keyframe stands that keyframe, bit by bit.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .layout import LatentError, check, meeting

LERP, SLERP_FRAME, SLERP_POSITION, CATMULL_ROM = "lerp", "slerp per frame", "slerp per position", "Catmull-Rom"
CURVES = (LERP, SLERP_FRAME, SLERP_POSITION, CATMULL_ROM)

# From progress in time to progress of the picture, both 0 .. 1.
EASINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda u: u,
    "in": lambda u: u ** 2,
    "out": lambda u: 1 - (1 - u) ** 2,
    "in-out": lambda u: u ** 2 * (3 - 2 * u),
    "cubic": lambda u: torch.where(u < 0.5, 4 * u ** 3, 1 - 4 * (1 - u) ** 3),
    "hold": torch.floor,
}

# Below these slerp divides rounding errors by each other, and lerp is the same or as good.
SMALL_SINE = 1e-4  # of an angle
SMALL_LENGTH = 1e-15  # of a vector


def interpolate(keyframes: Sequence[Tensor], positions: Sequence[int], length: int, curve: str = LERP,
                easing: str = "linear", period: int | None = None) -> Tensor:
    """A clip of ``length`` latents [B, C, length, h, w] through keyframes [B, C, t, h, w] that begin at ``positions``.

    Between two keyframes the latents follow ``curve``; before the first and behind the last, these stay.  Keyframes of
    more than one latent are clips: they play from their position on, and where the next begins before one has ended, the
    two cross-fade (see :func:`crossfade`).

    positions: in latents, each larger than the one before.
    curve: "lerp" fades; "slerp per frame" and "slerp per position" turn the one into the other and keep the contrast of
        unlike latents, such as noise, which a fade loses (see :func:`blend`); "Catmull-Rom" passes the keyframes smoothly.
    easing: how time passes within each segment, one of EASINGS; "hold" jumps at the next keyframe.
    period: in latents; then the last keyframe leads back to the first, and latent ``period`` equals latent 0.
    Raises LatentError where keyframes or positions do not fit.
    """
    _check_choice(curve, easing)
    if len(keyframes) != len(positions):
        raise LatentError(f"{len(keyframes)} keyframes have {len(positions)} positions. Give each keyframe one.")
    keyframes = meeting(keyframes, "keyframe")
    track, knots = keyframes[0], list(range(positions[0], positions[0] + keyframes[0].shape[2]))
    for number, (clip, start) in enumerate(zip(keyframes[1:], positions[1:], strict=True), 2):
        before, overlap, end = positions[number - 2], knots[-1] + 1 - start, start + clip.shape[2]
        if start <= before:
            raise LatentError(f"keyframe {number} begins at latent {start} and keyframe {number - 1} at {before}. Each "
                              "needs a latent of its own, at least 4 frames after the one before.")
        if overlap > 0 and end - 1 <= knots[-1]:
            raise LatentError(f"keyframe {number} ends at latent {end - 1}, but what is before it ends at {knots[-1]}, so "
                              "the one cannot fade into the other. Move it back or trim the clip before it.")
        track = crossfade(track, clip, max(0, overlap), curve, easing)
        knots += range(start + max(0, overlap), end)
    if positions[0] < 0 or positions[-1] >= length:
        raise LatentError(f"keyframes begin at the latents {', '.join(map(str, positions))}; expected 0 to {length - 1}. "
                          "Make the clip longer or move them.")
    if period is not None and knots[-1] >= knots[0] + period:
        raise LatentError(f"the keyframes take {knots[-1] - knots[0] + 1} latents and the loop has {period}. Make the clip "
                          "longer.")
    return along(track, knots, range(length), curve, easing, period)


def spread(lengths: Sequence[int], length: int, loop: bool = False) -> list[int]:
    """Where keyframes of ``lengths`` latents begin, evenly spread over ``length``: the first at 0, the last ending it.

    loop: leave as much time behind the last, for the way back to the first.
    """
    gaps = len(lengths) - (not loop)
    free = length - sum(lengths)
    starts = [sum(lengths[:i]) + (math.floor(free * i / gaps + 0.5) if gaps else 0) for i in range(len(lengths))]
    if starts != sorted(set(starts)):
        raise LatentError(f"{len(lengths)} keyframes do not fit into {length} latents. Make the clip longer: each needs at "
                          "least 4 frames.")
    return starts


def crossfade(a: Tensor, b: Tensor, overlap: int, curve: str = LERP, easing: str = "linear") -> Tensor:
    """``a`` then ``b``, ``overlap`` latents of them at the same time: [B, C, ta + tb - overlap, h, w].

    The share of ``b`` grows from 0 in the first of these latents, so that its first latent, which stands for one
    frame only, is not seen; in the latent after the last it would be 1.
    """
    _check_choice(curve, easing)
    a, b = meeting([a, b], "clip")
    if not 0 <= overlap <= min(a.shape[2], b.shape[2] - 1):
        raise LatentError(f"clips of {a.shape[2]} and {b.shape[2]} latents cannot overlap by {overlap}: expected at most "
                          f"{min(a.shape[2], b.shape[2] - 1)}, so that the second is seen by itself in the end.")
    if overlap == 0:
        return torch.cat([a, b], dim=2)
    ahead = a.shape[2] - overlap
    faded = blend(a[:, :, ahead:], b[:, :, :overlap], fading(overlap, easing), curve)
    return torch.cat([a[:, :, :ahead], faded, b[:, :, overlap:]], dim=2)


def fading(overlap: int, easing: str) -> Tensor:
    """The share of what comes, in each of ``overlap`` latents: from 0, and 1 in the latent after the last."""
    return EASINGS[easing](torch.arange(overlap, dtype=torch.float64) / overlap)


def resample(latents: Tensor, length: int, curve: str = LERP) -> Tensor:
    """[B, C, t, h, w] -> [B, C, length, h, w] over the same time, with the same first and last latent.

    Also for clips of pixels.  Between the latents of a video lie latents its decoder never saw: motion of another
    speed is cleaner when frames are resampled.
    """
    _check_choice(curve, "linear")
    t = check(latents).shape[2]
    if length < 1:
        raise LatentError(f"length is {length}; a clip has at least 1 latent.")
    return along(latents, range(t), [k * (t - 1) / max(1, length - 1) for k in range(length)], curve)


def along(track: Tensor, knots: Sequence[float], times: Sequence[float], curve: str = LERP, easing: str = "linear",
          period: float | None = None) -> Tensor:
    """The curve through ``track`` [B, C, n, h, w], whose latents lie at the rising ``knots``, at ``times``.

    period: of a closed curve; it is longer than from the first knot to the last.
    """
    at = torch.tensor(knots, dtype=torch.float64)
    when = torch.tensor(times, dtype=torch.float64)
    if period is not None:
        when = at[0] + (when - at[0]) % period
        at = torch.cat([at, at[:1] + period])
    if len(at) == 1:
        return track.expand(-1, -1, len(when), -1, -1).clone()
    when = when.clamp(at[0], at[-1])
    segment = (torch.searchsorted(at, when, right=True) - 1).clamp(max=len(at) - 2)
    u = EASINGS[easing]((when - at[segment]) / (at[segment + 1] - at[segment]))
    if curve == CATMULL_ROM:
        return _catmull_rom(track, at, segment, u, period is not None)
    n = track.shape[2]
    return blend(track[:, :, segment % n], track[:, :, (segment + 1) % n], u, curve)


# -- curves ------------------------------------------------------------------------------------------


def blend(a: Tensor, b: Tensor, u: Tensor, curve: str = LERP) -> Tensor:
    """From ``a`` (u = 0) to ``b`` (u = 1), both [B, C, t, h, w], u [t]; where the two are equal nothing changes.

    "slerp per frame": the angle is that between the frames' latents less their mean in each channel, so that a
        frame's contrast goes from the one to the other in a straight line, and so does its colour.  What is equal in
        frames that differ elsewhere keeps its mean but not its contrast.
    "slerp per position": the angle is that between two vectors over the channels; their lengths go in a straight line.
    Where an angle has no plane (equal, opposite or zero), and for "Catmull-Rom", whose neighbours are unknown here,
    this is "lerp".
    """
    kind = a.dtype
    a, b = a.float(), b.float()
    u = u.to(a.device, torch.float32).view(-1, 1, 1)
    mixed = torch.lerp(a, b, u)
    if curve == SLERP_FRAME:
        mean_a, mean_b = (x.mean((3, 4), keepdim=True) for x in (a, b))
        mixed = _slerp(a - mean_a, b - mean_b, u, (1, 3, 4), mixed, torch.lerp(mean_a, mean_b, u))
    elif curve == SLERP_POSITION:
        mixed = _slerp(a, b, u, (1,), mixed)
    return mixed.to(kind)


def _slerp(a: Tensor, b: Tensor, u: Tensor, dims: tuple[int, ...], otherwise: Tensor,
           offset: Tensor | float = 0.0) -> Tensor:
    """Turn vectors over ``dims`` by an angle in proportion to u, add ``offset``; ``otherwise`` where that has no meaning."""
    length_a, length_b = (torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x in (a, b))
    unit_a, unit_b = a / length_a, b / length_b
    # Of sum and difference instead of acos of the product, which rounds to more than 1 and to angles of 0.
    angle = 2 * torch.atan2(torch.linalg.vector_norm(unit_a - unit_b, dim=dims, keepdim=True),
                            torch.linalg.vector_norm(unit_a + unit_b, dim=dims, keepdim=True))
    sine = torch.sin(angle)
    turned = (unit_a * torch.sin((1 - u) * angle) + unit_b * torch.sin(u * angle)) / sine
    turned = turned * torch.lerp(length_a, length_b, u) + offset
    turns = (torch.minimum(length_a, length_b) > SMALL_LENGTH) & (sine > SMALL_SINE)
    return torch.where(turns & (u > 0) & (u < 1), turned, otherwise)


def _catmull_rom(track: Tensor, at: Tensor, segment: Tensor, u: Tensor, closed: bool) -> Tensor:
    """Cubic pieces whose slope at a knot is that from its left neighbour to its right one (Catmull and Rom, 1974).

    Slopes are limited, value by value, as Fritsch and Carlson (1980) do: no value leaves the range of the two
    keyframes it is between, so that what two keyframes share does not waver on the way.
    """
    n, x, u = track.shape[2], track.float(), u.to(track.device, torch.float32).view(-1, 1, 1)
    widths = at.diff().to(x.device, torch.float32).view(-1, 1, 1)
    ends = torch.cat([x, x[:, :, :1]], dim=2) if closed else x
    rises = ends.diff(dim=2) / widths  # of each segment
    if closed:
        left, left_width = rises.roll(1, 2), widths.roll(1, 0)  # of the segment that ends at each knot
        slopes = _limited((left * left_width + rises * widths) / (left_width + widths), left, rises)
        slopes = torch.cat([slopes, slopes[:, :, :1]], dim=2)
    else:
        left, right = rises[:, :, :-1], rises[:, :, 1:]
        inner = (left * widths[:-1] + right * widths[1:]) / (widths[:-1] + widths[1:])
        slopes = torch.cat([rises[:, :, :1], _limited(inner, left, right), rises[:, :, -1:]], dim=2)
    smooth = u ** 2 * (3 - 2 * u)
    bent = widths[segment] * (u * (1 - u) ** 2 * slopes[:, :, segment] - u ** 2 * (1 - u) * slopes[:, :, segment + 1])
    return (torch.lerp(x[:, :, segment % n], x[:, :, (segment + 1) % n], smooth) + bent).to(track.dtype)


def _limited(slopes: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``slopes`` at most three times as steep as the segments on both sides, and flat where these rise and fall."""
    most = 3 * torch.minimum(left.abs(), right.abs())
    return torch.where(left * right > 0, slopes.clamp(-most, most), 0.0)


def _check_choice(curve: str, easing: str) -> None:
    if curve not in CURVES:
        raise LatentError(f"curve is {curve!r}; expected one of {', '.join(map(repr, CURVES))}.")
    if easing not in EASINGS:
        raise LatentError(f"easing is {easing!r}; expected one of {', '.join(map(repr, EASINGS))}.")
