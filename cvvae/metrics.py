"""How good a reconstruction is: PSNR, SSIM, colour, seams, and what tells where in time it is worse."""

import math

import torch
from torch import Tensor

from .frames import TIME_FACTOR, first_frame, frames_of
from .tiling import Tiling

SSIM_WINDOW = 11  # pixels: the side of the usual Gaussian window
WINDOW_STRIDE = Tiling().window_frames - Tiling().overlap_frames  # frames from one default window to the next: 16


def mse(a: Tensor, b: Tensor) -> float:
    """Mean squared error of clips in [-1, 1], clamped, on the [0, 1] scale."""
    return (_seen(a) - _seen(b)).square().mean().item() / 4


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of clips in [-1, 1], from the mean error over the whole clip."""
    return decibels(mse(a, b))


def decibels(error: float) -> float:
    """PSNR of a mean squared error on the [0, 1] scale."""
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity (kornia, 11x11 window), mean over the frames of clips [1, 3, T, H, W] in [-1, 1]."""
    from kornia.metrics import ssim as ssim_map  # imported when used: kornia takes seconds to load

    frames = [((clip[0].transpose(0, 1).float().clamp(-1, 1) + 1) / 2) for clip in (a, b)]
    return ssim_map(*frames, window_size=SSIM_WINDOW).mean().item()


def frame_mse(a: Tensor, b: Tensor) -> Tensor:
    """:func:`mse` of each frame of clips [B, 3, T, H, W]: [T]."""
    return (_seen(a) - _seen(b)).square().mean((0, 1, 3, 4)) / 4


def position_psnr(by_frame: Tensor) -> dict[str, float]:
    """PSNR in dB by place among the frames a latent stands for, from the :func:`frame_mse` of a whole clip.

    "frame_0" has a latent of its own; "position_1" to "position_4" are the four frames of each later one.
    """
    errors = by_frame.tolist()
    places = {"frame_0": errors[:1]} | {f"position_{k}": errors[k::TIME_FACTOR] for k in range(1, TIME_FACTOR + 1)}
    return {name: decibels(sum(found) / len(found)) for name, found in places.items() if found}


def colour_shift(a: Tensor, b: Tensor) -> float:
    """How far the mean colour of clip ``a`` is from ``b``'s, in 1/255: mean over the channels of its absolute value."""
    return (_seen(a) - _seen(b)).mean((0, 2, 3, 4)).abs().mean().item() * 127.5


def seam_ratio(found: Tensor, source: Tensor) -> float:
    """What window borders show of a reconstruction [B, 3, T, H, W]: 1 where nothing, NaN where there is no border.

    From frame to frame the error jumps; this is the mean |jump| at the borders of the windows a clip is cut into by
    default (frame 16k to 16k + 1), over the mean elsewhere.  Borders stay there however the clip was cut, so that
    ways to cut can be compared.
    """
    error = (found - source).float()
    jumps = error.diff(dim=2).abs().mean((0, 1, 3, 4))
    return ratio_at(jumps, window_borders(len(jumps)))


def window_borders(jumps: int) -> list[int]:
    """Which of the ``jumps`` from each frame to the next go from one window to another."""
    return list(range(WINDOW_STRIDE, jumps, WINDOW_STRIDE))


def ratio_at(values: Tensor, places: list[int]) -> float:
    """Mean of ``values`` at ``places`` over the mean elsewhere: 1 where nothing shows, NaN without places."""
    chosen = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    chosen[places] = True
    return (values[chosen].mean() / values[~chosen].mean()).item() if places else math.nan


def held(latents: Tensor, frames: int) -> Tensor:
    """What belongs to each latent, [t, ...], repeated for the frames it stands for: [frames, ...]."""
    return torch.cat([latents[k:k + 1].expand(frames_of(k + 1) - first_frame(k), *latents.shape[1:])
                      for k in range(len(latents))])[:frames]


def channel_statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of [N, C, h, w], each [C]."""
    deviation, mean = torch.std_mean(latents.float(), dim=(0, 2, 3), correction=0)
    return mean, deviation


def _seen(clip: Tensor) -> Tensor:
    """A clip as it is shown: beyond [-1, 1] is clamped."""
    return clip.float().clamp(-1, 1)
