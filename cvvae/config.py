"""What a network is made of: its variant, its widths, and the conventions each variant follows."""

from dataclasses import asdict, dataclass

LEVELS = 4  # three halvings of height and width: f8


@dataclass(frozen=True)
class Conventions:
    """How the layers of one family behave where its state dict cannot tell."""

    norm_eps: float
    space_padding: str  # "zeros" | "replicate": what stands beyond the border of a frame
    decoder_time_padding: str  # "zeros" | "replicate"; encoders always repeat the first frame
    temporal: bool = True  # False: every kernel is 2-D and frames never meet
    temporal_attention: str = "none"  # "none" | "chained" | "gated": see model.TemporalAttention
    latent_shift: bool = False  # a folded post_quant_conv: see model.Decoder


CONVENTIONS = {
    # A KL image VAE of the SD layout, quant convs folded (CompVis/latent-diffusion autoencoder.py).
    "image": Conventions(1e-6, "zeros", "replicate", temporal=False, latent_shift=True),
    # Published vae3d and vae3d_v1-1 (AILab-CVC/CV-VAE models/vae_models.py).
    "v1": Conventions(1e-5, "zeros", "zeros", temporal_attention="chained"),
    # Published vae3d_sd3 (AILab-CVC/CV-VAE models/vae_models3d_sd3.py).
    "sd3": Conventions(1e-6, "replicate", "replicate"),
    # Grown from an image VAE by cvvae.inflate: its norms and its zero border, so that one frame gives the
    # image VAE's numbers; time is padded by repeating frames, so that an image is a clip that stands still.
    "inflated": Conventions(1e-6, "zeros", "replicate", temporal_attention="gated", latent_shift=True),
}


@dataclass(frozen=True)
class Config:
    """Shape of an autoencoder; read off its tensors by :mod:`cvvae.checkpoint`."""

    variant: str  # a key of CONVENTIONS
    latent_channels: int
    widths: tuple[int, ...]  # channels per level, full resolution first
    blocks: int  # residual blocks per encoder level; decoder levels have one more
    norm_groups: int = 32  # in every published model; others store it, see vae.Autoencoder

    @property
    def conventions(self) -> Conventions:
        return CONVENTIONS[self.variant]

    def describe(self) -> dict:
        """JSON-ready form, with the conventions spelled out, for file metadata and ``cvvae info``."""
        return asdict(self) | {"conventions": asdict(self.conventions)}
