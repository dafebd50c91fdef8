"""The loss of one batch: reconstruction + KL + regularization through the frozen image decoder.

Paper, section 3.3 and eq. 2-3 with lambda2 = 0 ("2D Dec"), its best setting (table 6).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..frames import TIME_FACTOR
from ..posterior import Posterior
from ..vae import Autoencoder, ImageVAE
from .config import LossConfig


def map_frames(clip: Tensor, mapping: str, generator: torch.Generator | None = None) -> Tensor:
    """psi of the paper: [B, 3, T, H, W] with T = 4t - 3 -> the frame [B, 3, t, H, W] each latent must decode to.

    Latent 0 keeps frame 0; of each following group of four frames "random" takes one, drawn for every
    clip and group; "slice" the last, "average" the mean.  "first" keeps frame 0 only (t = 1).
    """
    first, rest = clip[:, :, :1], clip[:, :, 1:]
    if mapping == "first" or rest.shape[2] == 0:
        return first
    groups = rest.unflatten(2, (-1, TIME_FACTOR))  # [B, 3, t - 1, 4, H, W]
    if mapping == "average":
        chosen = groups.mean(3)
    elif mapping == "slice":
        chosen = groups[:, :, :, -1]
    else:
        batch, _, count = groups.shape[:3]
        index = torch.randint(TIME_FACTOR, (batch, count), generator=generator, device=clip.device)
        index = index[:, None, :, None, None, None].expand(-1, 3, -1, 1, *groups.shape[-2:])
        chosen = groups.gather(3, index).squeeze(3)
    return torch.cat([first, chosen], dim=2)


class Objective(nn.Module):
    """Student and frozen teacher in one module; ``forward`` returns every loss of a batch.

    teacher: None while training an image VAE, which has nobody to stay compatible with.
    """

    def __init__(self, student: Autoencoder, teacher: ImageVAE | None, config: LossConfig):
        super().__init__()
        self.student = student
        self.config = config
        self.teacher = teacher.eval().requires_grad_(False) if teacher is not None else None

    def forward(self, clip: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """clip: [B, 3, T, H, W] in [-1, 1], T = 1 + 4n.  Returns scalars; "total" is what to minimise."""
        posterior = Posterior(self.student.encoder(clip))
        latents = posterior.sample(generator)
        losses = {
            "reconstruction": F.l1_loss(self.student.decoder(latents).float(), clip),
            "kl": posterior.kl(),
        }
        total = losses["reconstruction"] + self.config.kl * losses["kl"]
        if self.teacher is not None and self.config.regularizer > 0:
            target = map_frames(clip, self.config.mapping, generator)
            losses["regularizer"] = F.l1_loss(self._teacher_decode(latents[:, :, :target.shape[2]]), target)
            total = total + self.config.regularizer * losses["regularizer"]
        return losses | {"total": total}

    def _teacher_decode(self, latents: Tensor) -> Tensor:
        """Each latent by itself through the image decoder: [B, C, t, h, w] -> [B, 3, t, H, W]."""
        images = latents.transpose(1, 2).flatten(0, 1)[:, :, None]
        frames = self.teacher.decoder(images)[:, :, 0].float()
        return frames.unflatten(0, (latents.shape[0], -1)).transpose(1, 2)

