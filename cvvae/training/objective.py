"""The loss of one batch: reconstruction, KL, regularization through the frozen image VAE, and a GAN.

Paper, section 3.3 and eq. 1-3.  Every term is a mean, where the reference sums over a frame (loss classes of
lvdm/modules/losses/discriminator_loss.py): weights then hold for any clip and latent size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..frames import TIME_FACTOR
from ..posterior import Posterior
from ..vae import Autoencoder, ImageVAE
from .adversarial import Adversary
from .config import LossConfig, at_step
from .perceptual import make_perceptual

DISTANCES = {"l1": F.l1_loss, "l2": F.mse_loss}


def map_frames(clip: Tensor, mapping: str, generators: Sequence[torch.Generator] = ()) -> Tensor:
    """psi of the paper: [B, 3, T, H, W] with T = 4t - 3 -> the frame [B, 3, t, H, W] each latent must decode to.

    Latent 0 keeps frame 0; of each following group of four frames "random" takes one, drawn for every
    clip and group; "slice" the last, "average" the mean.  "first" keeps frame 0 only (t = 1).
    generators: one for each clip, on its device; "random" draws from them.
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
        count = groups.shape[2]
        index = torch.stack([torch.randint(TIME_FACTOR, (count,), generator=generator, device=clip.device)
                             for generator in generators])
        index = index[:, None, :, None, None, None].expand(-1, 3, -1, 1, *groups.shape[-2:])
        chosen = groups.gather(3, index).squeeze(3)
    return torch.cat([first, chosen], dim=2)


class Objective(nn.Module):
    """Student, frozen teacher and discriminator in one module; ``forward`` returns every loss of a batch.

    One forward for everything, so that nothing goes around DistributedDataParallel's wrapper.

    teacher: None while training an image VAE, which has nobody to stay compatible with.
    train: ``ModelConfig.train``.  With "decoder" the latents cannot move, so the terms that would move them (KL,
        decoder regularization, outliers, statistics) are left out.
    """

    def __init__(self, student: Autoencoder, teacher: ImageVAE | None, config: LossConfig, train: str = "all"):
        super().__init__()
        self.student = student
        self.config = config
        self.teacher = teacher.eval().requires_grad_(False) if teacher is not None else None
        self.perceptual = make_perceptual(config)
        self.adversary = Adversary(config) if config.gan != "none" else None
        self.moves_latents = train != "decoder"
        regularizer = config.regularizer if teacher is not None else "none"
        self.regularizes_encoder = regularizer in ("decoder", "both") and self.moves_latents  # through the image decoder
        self.regularizes_decoder = regularizer in ("encoder", "both")  # through the image encoder
        self.logvars = nn.ParameterDict()
        if config.learn_logvar:
            names = ["reconstruction"] + ["decoder"] * self.regularizes_encoder + ["encoder"] * self.regularizes_decoder
            self.logvars.update({name: nn.Parameter(torch.zeros(())) for name in names})

    @property
    def names(self) -> list[str]:
        """Of all the losses that :meth:`forward` may return, in the order of the log's columns."""
        config = self.config
        asked = {"total": True, "reconstruction": True, "perceptual": self.perceptual is not None, "kl": self.moves_latents,
                 "decoder_regularizer": self.regularizes_encoder, "encoder_regularizer": self.regularizes_decoder,
                 "outliers": self._wants(config.outliers), "statistics": self._wants(config.statistics),
                 "generator": self.adversary is not None, "discriminator": self.adversary is not None,
                 "adaptive_weight": self.adversary is not None and config.gan_adaptive}
        names = [name for name, wanted in asked.items() if wanted]
        return names + [f"logvar_{name}" for name in self.logvars]

    def train(self, mode: bool = True) -> "Objective":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, clip: Tensor, seeds: Sequence[int], step: int) -> dict[str, Tensor]:
        """The losses of ``clip`` [B, 3, T, H, W] in [-1, 1], T = 1 + 4n, all scalars.

        seeds: one for each clip; posterior noise and the choice of frames come from them, so that a clip's losses do not
            depend on what shares its batch.
        step: schedules and the start of the GAN go by it.

        To be minimised: "total" by the student's weights, "discriminator" (where given) by the discriminator's.
        Neither has a gradient for the other's.
        """
        config = self.config
        generators = [torch.Generator(clip.device).manual_seed(seed) for seed in seeds]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.moves_latents):
            posterior = Posterior(self.student.encoder(clip))
        latents = posterior.sample(generators)
        target = None
        if self.teacher is not None and (self.regularizes_encoder or self.regularizes_decoder
                                         or self._wants(config.statistics)):
            target = map_frames(clip, config.mapping, generators)
        decoded = self.student.decoder(latents).float()

        losses = {"reconstruction": DISTANCES[config.reconstruction](decoded, clip)}
        pixels = losses["reconstruction"]
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(_as_images(decoded), _as_images(clip))
            pixels = pixels + at_step(config.perceptual_weight, step) * losses["perceptual"]
        pixels = self._scaled(pixels, "reconstruction")
        total = pixels
        if self.moves_latents:
            losses["kl"] = posterior.kl()
            total = total + at_step(config.kl, step) * losses["kl"]
        if self.regularizes_encoder:
            images = self._teacher_decode(latents[:, :, :target.shape[2]])
            losses["decoder_regularizer"] = DISTANCES[config.regularizer_loss](images, target)
            total = total + (at_step(config.decoder_weight, step)
                             * self._scaled(losses["decoder_regularizer"], "decoder"))
        if self.regularizes_decoder:
            again = self.student.decoder(self._teacher_encode(target).sample(generators)).float()
            # "first" gives one frame; the other choices the whole clip.
            losses["encoder_regularizer"] = DISTANCES[config.regularizer_loss](again, clip[:, :, :again.shape[2]])
            total = total + (at_step(config.encoder_weight, step)
                             * self._scaled(losses["encoder_regularizer"], "encoder"))
        if self._wants(config.outliers):
            losses["outliers"] = outliers(latents, config.outlier_sigmas)
            total = total + at_step(config.outliers, step) * losses["outliers"]
        if self._wants(config.statistics):
            losses["statistics"] = statistics_gap(posterior.mean, self._teacher_encode(target).mean)
            total = total + at_step(config.statistics, step) * losses["statistics"]
        if self.adversary is not None:
            weight = at_step(config.gan_weight, step)
            judged = self.adversary(decoded, clip, pixels, self.student.decoder.conv_out.weight, weight, step)
            total = total + judged.pop("student")
            losses |= judged
        logvars = {f"logvar_{name}": value.detach() for name, value in self.logvars.items()}
        return {"total": total} | losses | logvars

    def _wants(self, schedule) -> bool:
        return self.moves_latents and schedule != 0

    def _scaled(self, loss: Tensor, name: str) -> Tensor:
        """Negative log-likelihood under a learned variance; ``loss`` itself where none is learned."""
        if name not in self.logvars:
            return loss
        return loss / self.logvars[name].exp() + self.logvars[name]

    def _teacher_decode(self, latents: Tensor) -> Tensor:
        """Each latent by itself through the image decoder: [B, C, t, h, w] -> [B, 3, t, H, W]."""
        frames = self.teacher.decoder(_as_images(latents)[:, :, None])[:, :, 0].float()
        return frames.unflatten(0, (latents.shape[0], -1)).transpose(1, 2)

    @torch.no_grad()
    def _teacher_encode(self, frames: Tensor) -> Posterior:
        """Each frame by itself through the image encoder: [B, 3, t, H, W] -> posterior of [B, C, t, h, w]."""
        moments = self.teacher.encoder(_as_images(frames)[:, :, None])[:, :, 0]
        return Posterior(moments.unflatten(0, (frames.shape[0], -1)).transpose(1, 2))


def outliers(latents: Tensor, sigmas: float) -> Tensor:
    """Mean of what each latent value exceeds ``sigmas`` deviations from its channel's mean by, clip by clip."""
    latents = latents.float()
    deviation, mean = torch.std_mean(latents, dim=(2, 3, 4), keepdim=True)
    return F.relu((latents - mean).abs() - sigmas * deviation).mean()


def statistics_gap(latents: Tensor, expected: Tensor) -> Tensor:
    """Squared gaps of each channel's mean and deviation to ``expected``'s, in its deviations; channels' and clips' mean."""
    deviation, mean = torch.std_mean(latents.float(), dim=(2, 3, 4))
    expected_deviation, expected_mean = torch.std_mean(expected.float(), dim=(2, 3, 4))
    gaps = torch.stack([mean - expected_mean, deviation - expected_deviation]) / expected_deviation
    return gaps.square().sum(0).mean()


def _as_images(clip: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B T, C, H, W]."""
    return clip.transpose(1, 2).flatten(0, 1)
