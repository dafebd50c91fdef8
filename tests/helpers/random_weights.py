"""Small deterministic weights for every video variant, so that the tests need no weight file."""

import math
import zlib
from functools import lru_cache

import torch
from torch import Tensor

import cvvae
from cvvae import keys

WIDTHS = (32, 32, 64, 64)  # both kinds of residual block: with and without a shortcut convolution
CHANNELS = {"v1": 4, "sd3": 16, "inflated": 4}
VARIANTS = tuple(CHANNELS)


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Kernels ~ N(0, 1/fan_in), norm gains ~ 1 + N(0, 0.1), biases ~ N(0, 0.2), quant convs near the identity."""
    state = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        noise = torch.randn(tuple(shape), generator=generator)
        if "quant_conv.weight" in name:
            state[name] = torch.eye(shape[0])[:, :, None, None] + 0.3 * noise
        elif len(shape) > 1:
            state[name] = noise / math.sqrt(math.prod(shape[1:]))
        elif name.endswith("weight"):
            state[name] = 1 + 0.1 * noise
        else:
            state[name] = 0.2 * noise
    return state


def video_config(variant: str, widths: tuple[int, ...] = WIDTHS, blocks: int = 1) -> cvvae.Config:
    return cvvae.Config(variant, CHANNELS[variant], widths, blocks)


def canonical_shapes(config: cvvae.Config) -> dict[str, tuple[int, ...]]:
    """What the model definition holds, without allocating it."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in cvvae.VideoVAE(config).state_dict().items()}


def video_shapes(variant: str, widths: tuple[int, ...] = WIDTHS, blocks: int = 1) -> dict[str, tuple[int, ...]]:
    """Names and shapes as files of ``variant`` have them."""
    shapes = canonical_shapes(video_config(variant, widths, blocks))
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {name: tuple(tensor.shape) for name, tensor in keys.published(meta, variant).items()}


@lru_cache
def _video_state(variant: str) -> dict[str, Tensor]:
    return draw(video_shapes(variant))


def video_state(variant: str) -> dict[str, Tensor]:
    """A published-layout state dict; the tensors are shared between calls, the dict is not."""
    return dict(_video_state(variant))


def video_vae(variant: str = "v1", dtype: torch.dtype = torch.float32, tiling: cvvae.Tiling | None = None):
    """A small VideoVAE; cut only in time, every 9 frames, unless ``tiling`` says otherwise."""
    vae = cvvae.load(video_state(variant), dtype)
    vae.tiling = tiling or cvvae.Tiling(window_frames=9, tile_pixels=None)
    return vae


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def motion_state(place: str, channels: int = 64, length: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of a motion module at one place, by the names and in the shapes of AnimateDiff's files."""
    block = "transformer_blocks.0"
    shapes = {"norm.weight": [channels], "norm.bias": [channels], f"{block}.ff_norm.weight": [channels],
              f"{block}.ff_norm.bias": [channels], f"{block}.ff.net.0.proj.weight": [8 * channels, channels],
              f"{block}.ff.net.0.proj.bias": [8 * channels], f"{block}.ff.net.2.weight": [channels, 4 * channels],
              f"{block}.ff.net.2.bias": [channels]}
    for layer in ("proj_in", "proj_out"):
        shapes |= {f"{layer}.weight": [channels, channels], f"{layer}.bias": [channels]}
    for k in range(2):
        attention = f"{block}.attention_blocks.{k}"
        shapes |= {f"{attention}.{layer}.weight": [channels, channels] for layer in ("to_q", "to_k", "to_v", "to_out.0")}
        shapes |= {f"{attention}.to_out.0.bias": [channels], f"{attention}.pos_encoder.pe": [1, length, channels],
                   f"{block}.norms.{k}.weight": [channels], f"{block}.norms.{k}.bias": [channels]}
    generator = torch.Generator().manual_seed(seed)
    return {f"{place}.temporal_transformer.{name}": torch.randn(shape, generator=generator) / shape[-1] ** 0.5
            for name, shape in shapes.items()}


def video_clip(frames: int, height: int = 16, width: int = 16, batch: int = 1, seed: int = 0) -> Tensor:
    """A clip [B, 3, T, H, W] in [-1, 1]."""
    return noise(batch, 3, frames, height, width, seed=seed).mul(0.5).clamp(-1, 1)
