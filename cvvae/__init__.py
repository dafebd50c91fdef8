"""CV-VAE: a video VAE whose latents an image VAE's models understand (arXiv 2405.20279)."""

from .checkpoint import CheckpointError, load, load_image_vae, save
from .config import Config
from .inflate import inflate
from .posterior import Posterior
from .tiling import Tiling
from .vae import ImageVAE, VideoVAE

__all__ = ["CheckpointError", "Config", "ImageVAE", "Posterior", "Tiling", "VideoVAE",
           "inflate", "load", "load_image_vae", "save"]
__version__ = "0.1.0"
