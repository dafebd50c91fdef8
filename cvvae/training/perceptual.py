"""Perceptual distances: LPIPS (package lpips), or MS-SSIM (kornia), which needs no weights."""

from pathlib import Path

import torch
from torch import Tensor, autocast, nn

from .config import ConfigError, LossConfig

# torchvision's files of the backbones: where torch.hub keeps them, and where they come from.
BACKBONES = {"vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
             "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"}


def make_perceptual(config: LossConfig) -> nn.Module | None:
    """What ``loss.perceptual`` asks for: a module of two batches [N, 3, H, W] in [-1, 1] that gives their mean distance.

    Raises ConfigError where its package or weights are missing.
    """
    if config.perceptual == "none":
        return None
    if config.perceptual == "ms-ssim":
        return MSSSIM()
    return LPIPS(config.lpips_net, config.lpips_weights)


class LPIPS(nn.Module):
    """LPIPS of the package lpips (Zhang et al. 2018), frozen, with gradients for its inputs.

    net: "vgg" or "alex".  weights: file of the backbone's torchvision weights; empty looks where
    :func:`download_backbone` puts it.  Nothing is downloaded here.
    """

    def __init__(self, net: str = "vgg", weights: str | Path = ""):
        super().__init__()
        instead = "or train with loss.perceptual = 'ms-ssim', which needs neither package nor weights."
        try:
            import lpips
        except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises the latter
            raise ConfigError(f"LPIPS was asked for, but the package cannot be imported ({error}): "
                              f"pip install lpips torchvision, {instead}") from None
        path = Path(weights) if weights else backbone_path(net)
        if not path.is_file():
            raise ConfigError(f"LPIPS was asked for, but its backbone's weights are not there: {path}. Fetch them by "
                              f"`python -m cvvae download-lpips --net {net}`, name a copy in loss.lpips_weights or "
                              f"--lpips-weights, {instead}")
        # pnet_rand: the package would download the backbone otherwise.  Its own heads come with it.
        self.distance = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        state = torch.load(path, map_location="cpu", weights_only=True)
        network = self.distance.net
        try:
            network.load_state_dict({name: state[_torchvision_name(name)] for name in network.state_dict()})
        except (KeyError, RuntimeError) as error:
            raise ConfigError(f"{path} does not hold torchvision's weights of {net}: {error}.") from None
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "LPIPS":
        """Stays as it is: its dropout would make the distance random."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with autocast(a.device.type, enabled=False):
            return self.distance(a.float(), b.float()).mean()


class MSSSIM(nn.Module):
    """1 - multi-scale SSIM (kornia), without the L1 that is usually mixed in: that is a term of its own here."""

    def __init__(self):
        super().__init__()
        from kornia.losses import MS_SSIMLoss  # imported when used: kornia takes seconds to load

        self.distance = MS_SSIMLoss(alpha=1.0, compensation=1.0)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with autocast(a.device.type, enabled=False):
            return self.distance((a.float() + 1) / 2, (b.float() + 1) / 2)


def backbone_path(net: str) -> Path:
    """Where torch.hub keeps the backbone's file."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(BACKBONES[net]).name


def download_backbone(net: str) -> Path:
    """Fetch the backbone's weights from PyTorch's server, checked against the hash in its name; returns the file."""
    path = backbone_path(net)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = path.stem.rpartition("-")[2]
    torch.hub.download_url_to_file(BACKBONES[net], str(path), digest)  # by way of a temporary file
    return path


def _torchvision_name(name: str) -> str:
    """"slice2.5.weight" of the package is "features.5.weight" of torchvision."""
    _, layer, kind = name.split(".")
    return f"features.{layer}.{kind}"
