"""Inflation: a video VAE that starts as an image VAE (paper, section 3.2).

2-D kernels become 3-D ones whose other temporal taps are zero.  A causal kernel gets its 2-D kernel in
the last tap (the present frame), a centred one in the middle tap; a temporal up-sampler gets it once for
each of the two frames it unfolds into.  Temporal attention starts silent (gamma_t = 0).

So before any training: one frame gives the image VAE's numbers, the decoder holds each latent for its
four frames, and latent k is the image latent of frame 4k up to the group norms, which pool over time.
The zero borders of the image VAE are kept at any number of channels, unlike the published z=16 model,
which repeats the border and therefore cannot reproduce SD3's image VAE.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from .vae import ImageVAE, VideoVAE


def inflate(image_vae: ImageVAE) -> VideoVAE:
    """Build the video VAE (variant "inflated") of ``image_vae``, on its device and in its dtype.

    Raises TypeError for anything but a :class:`cvvae.ImageVAE`.
    """
    if not isinstance(image_vae, ImageVAE):
        raise TypeError(f"inflate takes an image VAE (cvvae.load_image_vae), found {type(image_vae).__name__}.")
    with torch.device(image_vae.device):
        vae = VideoVAE(replace(image_vae.config, variant="inflated"))
    vae.to(image_vae.dtype)
    image_state = image_vae.state_dict()
    for name, tensor in vae.state_dict().items():
        if name in image_state:
            tensor.copy_(_inflated(name, image_state[name], tensor.shape))
    _start_silent(vae.decoder.mid.attn_1)
    return vae


def _inflated(name: str, source: Tensor, shape: torch.Size) -> Tensor:
    """Spread a 2-D layer's tensor over the shape of its 3-D counterpart."""
    if source.shape == shape:
        return source
    if shape[0] == 2 * source.shape[0]:  # a temporal up-sampler: one copy for each frame it unfolds into
        source = torch.cat([source, source])
    if source.ndim == 1:
        return source
    kernel = source.new_zeros(shape)
    taps = shape[2]
    kernel[:, :, taps - 1 if name.startswith("encoder.") else taps // 2] = source
    return kernel


def _start_silent(attention: nn.Module) -> None:
    """Temporal attention has no image counterpart: fresh projections behind a closed gate."""
    for layer in (attention.q_t, attention.k_t, attention.v_t, attention.proj_out_t):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(attention.gamma_t)
