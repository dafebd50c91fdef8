"""The loss of a batch of latents: the objective the sampler itself was trained with, whatever it predicts.

A sampler of ComfyUI brings a ``model_sampling``, which says how it is used: what its network is given (``calculate_input``,
``timestep``) and what clean latents follow from what the network says (``calculate_denoised``),

    denoised = c_skip(sigma) noisy + c_out(sigma) output.

Solved for the output that gives the clean latents back, that is the target: the noise for an eps model, v for a v model,
the preconditioned target of EDM (Karras et al. 2022, eq. 8).  Its mean squared error is the loss those are trained with.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import NoiseConfig


class NoiseLevels:
    """The distribution of sigma in training, by its quantiles."""

    def __init__(self, sampling: nn.Module, config: NoiseConfig):
        self.sampling, self.mean, self.std = sampling, config.mean, config.std
        self.lognormal = config.distribution == "lognormal"
        if config.distribution == "auto":
            self.lognormal = not hasattr(sampling, "num_timesteps")  # only schedules of discrete steps have a number

    def __call__(self, quantile: Tensor) -> Tensor:
        """[B] in [0, 1) -> sigma [B]."""
        sigmas = self.sampling.sigmas.to(quantile.device)
        if self.lognormal:
            return (self.mean + self.std * torch.special.ndtri(quantile)).exp().clamp(sigmas[0], sigmas[-1])
        return sigmas[(quantile * len(sigmas)).long().clamp(max=len(sigmas) - 1)]


def target(sampling: nn.Module, sigma: Tensor, noisy: Tensor, clean: Tensor) -> Tensor:
    """What the network must say of ``noisy`` for ``clean`` [N, C, h, w] to follow; sigma [N]."""
    skipped = sampling.calculate_denoised(sigma, torch.zeros_like(noisy), noisy)
    c_out = sampling.calculate_denoised(sigma, torch.ones_like(noisy), torch.zeros_like(noisy))
    return (clean - skipped) / c_out


class Objective(nn.Module):
    """The UNet with what is trained of it; ``forward`` returns the loss of a batch.

    unet: called as ComfyUI's are.  sampling: the model's ``model_sampling``.  motion: what runs inside ``unet`` without
    being part of it; here it only follows to the device.  Latents are those the network works in (scaled by the model's
    factor).
    """

    names = ["total"]

    def __init__(self, unet: nn.Module, adapter: nn.Module, sampling: nn.Module, noise: NoiseConfig,
                 motion: nn.Module | None = None):
        super().__init__()
        self.unet, self.adapter, self.sampling, self.motion = unet, adapter, sampling, motion
        self.levels = NoiseLevels(sampling, noise)

    def forward(self, latents: Tensor, conditions: dict[str, Tensor], seeds: Sequence[int], step: int) -> dict[str, Tensor]:
        """latents [B, C, t, h, w]; seeds: one for each clip, of its noise and level, which all its frames share."""
        generators = [torch.Generator(latents.device).manual_seed(seed) for seed in seeds]
        quantile = torch.stack([torch.rand((), generator=generator, device=latents.device)
                                for generator in generators])
        noise = torch.stack([torch.randn(clip.shape, generator=generator, device=latents.device)
                             for clip, generator in zip(latents, generators, strict=True)])
        return {"total": self.loss(latents, conditions, self.levels(quantile), noise)}

    def loss(self, latents: Tensor, conditions: dict[str, Tensor], sigma: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of the output; sigma [B], noise as latents."""
        frames = latents.shape[2]
        clean, sigma = as_frames(latents), sigma.repeat_interleave(frames)
        noisy = self.sampling.noise_scaling(sigma[:, None, None, None], as_frames(noise), clean)
        output = self.output(noisy, sigma, conditions, frames)
        return F.mse_loss(output.float(), target(self.sampling, sigma, noisy, clean))

    def output(self, noisy: Tensor, sigma: Tensor, conditions: dict[str, Tensor], frames: int) -> Tensor:
        """What the network says of ``noisy`` [B t, C, h, w], given each clip's conditions (see ``conditions.py``)."""
        given = {name: tensor.repeat_interleave(frames, 0) for name, tensor in conditions.items()}
        x = self.sampling.calculate_input(sigma, noisy)
        if "concat" in given:
            x = torch.cat([x, given.pop("concat")], dim=1)
        return self.unet(x, self.sampling.timestep(sigma).float(), num_video_frames=frames, transformer_options={}, **given)


def as_frames(latents: Tensor) -> Tensor:
    """[B, C, t, h, w] -> [B t, C, h, w], as samplers take them."""
    return latents.transpose(1, 2).flatten(0, 1)
