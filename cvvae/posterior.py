"""The diagonal Gaussian an encoder returns."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Posterior:
    """Mean and log-variance of latents, both [B, C, t, h, w] ([N, C, h, w] from an image VAE)."""

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)  # the bounds of latent-diffusion's distributions.py

    def mode(self) -> Tensor:
        """The most likely latents: what every ComfyUI VAE returns."""
        return self.mean

    def sample(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """Draw latents; ``generator`` makes the draw repeatable and lives on its own device.

        With one generator for each clip, what a clip draws does not depend on its batch.
        """
        if isinstance(generator, Sequence):
            noise = torch.stack([_noise(self.mean.shape[1:], each) for each in generator])
        else:
            noise = _noise(self.mean.shape, generator, self.mean.device)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)

    def kl(self) -> Tensor:
        """KL divergence from the unit Gaussian, averaged over every element (a scalar, in nats)."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


def _noise(shape: torch.Size, generator: torch.Generator | None, device: torch.device | None = None) -> Tensor:
    device = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
