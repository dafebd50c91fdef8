"""How good a reconstruction is: PSNR, SSIM, and compatibility with an image VAE."""

import math

import torch
from torch import Tensor

from .frames import first_frame, frames_of
from .vae import ImageVAE, VideoVAE

SSIM_WINDOW = 11  # pixels: the side of the usual Gaussian window


def mse(a: Tensor, b: Tensor) -> float:
    """Mean squared error of clips in [-1, 1], clamped, on the [0, 1] scale."""
    difference = a.float().clamp(-1, 1) - b.float().clamp(-1, 1)
    return difference.square().mean().item() / 4


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


@torch.no_grad()
def image_vae_psnr(image_vae: ImageVAE, clip: Tensor) -> float:
    """PSNR of the image VAE applied to each frame of a clip [1, 3, T, H, W]."""
    frames = clip[0].transpose(0, 1)
    return psnr(image_vae.decode(image_vae.encode(frames).mode()), frames)


@torch.no_grad()
def compatibility_psnr(vae: VideoVAE, image_vae: ImageVAE, clip: Tensor) -> float:
    """PSNR of the video latents decoded by the image VAE, against every frame each latent stands for."""
    latents = vae.encode(clip).mode()[0].transpose(0, 1)
    decoded = image_vae.decode(latents)
    frames = clip[0].transpose(0, 1)
    counterparts = torch.cat([decoded[k:k + 1].expand(frames_of(k + 1) - first_frame(k), -1, -1, -1)
                              for k in range(len(decoded))])[:len(frames)]
    return psnr(counterparts[..., :frames.shape[-2], :frames.shape[-1]], frames)
