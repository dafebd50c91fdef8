"""The GAN: a 3-D patch discriminator and its game with the video VAE.

The paper inflates LDM's patch discriminator to three dimensions (section 3.3); this one is built in three
dimensions.  It learns on every batch, not on every second one as in the reference.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import Conv3d, GroupNorm, LeakyReLU

from .config import LossConfig

LARGEST_WEIGHT = 1e4  # of the adaptive weight, as in latent-diffusion


class PatchDiscriminator(nn.Module):
    """Says for each patch of a clip how real it looks: [B, 3, T, H, W] -> [B, 1, T', H', W'].

    ``layers`` halvings of height and width, the first two after the first of time too.  Group norm and not
    batch norm, so that a clip is judged alike in any batch.
    """

    def __init__(self, channels: int = 64, layers: int = 4):
        super().__init__()
        blocks = [_conv(3, channels, time_stride=1), LeakyReLU(0.2)]
        for k in range(1, layers):
            wider = channels * 2 if k <= 3 else channels
            blocks += [_conv(channels, wider, time_stride=2 if k <= 2 else 1), GroupNorm(8, wider), LeakyReLU(0.2)]
            channels = wider
        self.body = nn.Sequential(*blocks)
        self.score = Conv3d(channels, 1, 3, padding=1, padding_mode="replicate")
        for module in self.modules():
            if isinstance(module, Conv3d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, clip: Tensor) -> Tensor:
        return self.score(self.body(clip))


def _conv(in_channels: int, out_channels: int, time_stride: int) -> Conv3d:
    return Conv3d(in_channels, out_channels, (3, 4, 4), (time_stride, 2, 2), 1, padding_mode="replicate")


class Adversary(nn.Module):
    """The discriminator with its losses."""

    def __init__(self, config: LossConfig):
        super().__init__()
        self.config = config
        self.discriminator = PatchDiscriminator(config.gan_channels, config.gan_layers)

    def active(self, step: int) -> bool:
        return step >= self.config.gan_start

    def forward(self, decoded: Tensor, clip: Tensor, pixels: Tensor, last_layer: Tensor, weight: float,
                step: int) -> dict[str, Tensor]:
        """Scalars: "student", to be added to the student's loss; "discriminator", to be minimised by the discriminator.

        pixels: the student's reconstruction loss, last_layer: the weight its gradient is measured at.
        weight: of the GAN, before it is adapted.
        """
        config = self.config
        if not self.active(step):
            # Every weight takes part in every step: DistributedDataParallel waits for all of them.
            nothing = sum(parameter.sum() for parameter in self.discriminator.parameters()) * 0
            return {"student": pixels.new_zeros(()), "discriminator": nothing}
        real = self._loss(self.discriminator(clip).float(), real=True)
        if config.gan_passes == 1:
            # The student plays the discriminator's own loss on its clips: one pass, its gradient turned for the student.
            scale = torch.ones((), device=decoded.device)
            fake = self._loss(self.discriminator(_ScaleGradient.apply(decoded, scale)).float(), real=False)
            student = -fake
            adapted = self._adapted(weight, pixels, student, last_layer)
            scale.copy_(-2 * adapted)  # twice, for the half of the discriminator's loss
            counted = pixels.new_zeros(())  # what the student minimises reaches it through the turned gradient
        else:
            # Detached weights on the one side, a detached clip on the other: neither loss reaches the other's weights.
            student = self._student_loss(decoded)
            adapted = self._adapted(weight, pixels, student, last_layer)
            fake = self._loss(self.discriminator(decoded.detach()).float(), real=False)
            counted = adapted * student
        losses = {"student": counted, "generator": student.detach(), "discriminator": 0.5 * (real + fake)}
        return losses | ({"adaptive_weight": adapted} if config.gan_adaptive else {})

    def _loss(self, scores: Tensor, real: bool) -> Tensor:
        """The discriminator's: it wants high scores for real clips and low ones for decoded ones."""
        signed = -scores if real else scores
        return F.relu(1 + signed).mean() if self.config.gan == "hinge" else F.softplus(signed).mean()

    def _student_loss(self, decoded: Tensor) -> Tensor:
        weights = {name: tensor.detach() for name, tensor in self.discriminator.named_parameters()}
        scores = functional_call(self.discriminator, weights, (decoded,)).float()
        return -scores.mean() if self.config.gan == "hinge" else F.softplus(-scores).mean()

    def _adapted(self, weight: float, pixels: Tensor, student: Tensor, last_layer: Tensor) -> Tensor:
        """``weight`` times the ratio of both losses' gradients at ``last_layer`` (VQGAN, eq. 7; without a gradient)."""
        if not self.config.gan_adaptive or not torch.is_grad_enabled():
            return pixels.new_full((), weight)
        norms = [_mean_over_processes(torch.autograd.grad(loss, last_layer, retain_graph=True)[0]).norm()
                 for loss in (pixels, student)]
        return (norms[0] / (norms[1] + 1e-4)).clamp(max=LARGEST_WEIGHT) * weight


class _ScaleGradient(torch.autograd.Function):
    """Its argument; what comes back is multiplied by ``scale``, a scalar tensor that may still change until then."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


def _mean_over_processes(gradient: Tensor) -> Tensor:
    """So that several processes find the weight that one with all their clips would."""
    if dist.is_initialized():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return gradient
