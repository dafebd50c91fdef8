"""The networks: one definition for image VAEs, the z=4 and z=16 CV-VAE families, and inflated models.

Names follow latent-diffusion's autoencoder (``encoder.down.0.block.1.conv1``).  Shapes in docstrings:
B clips, C channels, T frames, H x W pixels; t, h, w the same for latents.

What differs between families is written once in :data:`cvvae.config.CONVENTIONS`; the modules read it.
``ops`` is where the layers come from: ``torch.nn``, or ComfyUI's ``comfy.ops`` inside the host.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import LEVELS, Config


def pad_clip(x: Tensor, time: tuple[int, int], space: tuple[int, int], time_mode: str, space_mode: str) -> Tensor:
    """Pad [B, C, T, H, W] by ``time`` = (front, back) frames and ``space`` = (top/left, bottom/right) pixels."""
    modes = {"zeros": "constant", "replicate": "replicate"}
    if time_mode == space_mode:
        return F.pad(x, (*space, *space, *time), mode=modes[time_mode])
    x = F.pad(x, (*space, *space, 0, 0), mode=modes[space_mode])
    return F.pad(x, (0, 0, 0, 0, *time), mode=modes[time_mode])


def silu(x: Tensor) -> Tensor:
    """SiLU of a norm's fresh output, in place where no gradient needs that output."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class Padding:
    """Where a 3-tap kernel looks beyond the clip: causal layers look at past frames only.

    The reference repeats the first frame before every causal layer and before and after every
    up-sampler; only the z=4 decoder's other layers see black frames (AILab-CVC/CV-VAE vae_models.py).
    """

    def __init__(self, config: Config, causal: bool):
        conventions = config.conventions
        self.time = (2, 0) if causal else (1, 1)
        self.time_mode = "replicate" if causal else conventions.decoder_time_padding
        self.space_mode = conventions.space_padding

    def __call__(self, x: Tensor) -> Tensor:
        return pad_clip(x, self.time, (1, 1), self.time_mode, self.space_mode)


def convolve(conv: nn.Module, x: Tensor, padding: Padding | None = None) -> Tensor:
    """Apply ``conv`` to [B, C, T, H, W]: a 2-D kernel frame by frame, a 3-D one after ``padding``."""
    if isinstance(conv, nn.Conv2d):
        out = conv(rearrange(x, "b c t h w -> (b t) c h w"))
        return rearrange(out, "(b t) c h w -> b c t h w", b=x.shape[0])
    return conv(x if padding is None else padding(x))


def make_conv(config: Config, ops, in_channels: int, out_channels: int) -> nn.Module:
    """A 3x3x3 convolution padded from outside, or a 3x3 one that pads itself where there is no time."""
    if config.conventions.temporal:
        return ops.Conv3d(in_channels, out_channels, 3)
    return ops.Conv2d(in_channels, out_channels, 3, padding=1)


def make_norm(config: Config, ops, channels: int) -> nn.Module:
    """Group norm; its statistics span the whole window (T, H, W), which couples the frames of a window."""
    return ops.GroupNorm(config.norm_groups, channels, eps=config.conventions.norm_eps)


class ResnetBlock(nn.Module):
    """norm, SiLU, 3-D conv; norm, SiLU, 2-D conv ("2D+3D" in the paper, half_3d in the reference)."""

    def __init__(self, config: Config, ops, in_channels: int, out_channels: int, padding: Padding):
        super().__init__()
        self.padding = padding
        self.norm1 = make_norm(config, ops, in_channels)
        self.conv1 = make_conv(config, ops, in_channels, out_channels)
        self.norm2 = make_norm(config, ops, out_channels)
        self.conv2 = ops.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            pointwise = ops.Conv3d if config.conventions.temporal else ops.Conv2d
            self.nin_shortcut = pointwise(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = convolve(self.conv1, silu(self.norm1(x)), self.padding)
        h = convolve(self.conv2, silu(self.norm2(h)))
        if hasattr(self, "nin_shortcut"):
            x = convolve(self.nin_shortcut, x)
        return x + h


class SpatialAttention(nn.Module):
    """Single-head self-attention over the h*w positions of each frame, normalised frame by frame."""

    def __init__(self, config: Config, ops, channels: int):
        super().__init__()
        self.norm = make_norm(config, ops, channels)
        self.q = ops.Conv2d(channels, channels, 1)
        self.k = ops.Conv2d(channels, channels, 1)
        self.v = ops.Conv2d(channels, channels, 1)
        self.proj_out = ops.Conv2d(channels, channels, 1)

    def attend(self, frames: Tensor) -> Tensor:
        """[N, C, h, w] -> the same shape, without the residual."""
        h = self.norm(frames)
        q, k, v = (rearrange(layer(h), "n c h w -> n 1 (h w) c") for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj_out(rearrange(out, "n 1 (h w) c -> n c h w", h=frames.shape[-2]))

    def along_time(self, spatial: Tensor) -> Tensor:
        """What the frames gave, [B, C, T, h, w], on its way to the residual sum."""
        return spatial

    def forward(self, x: Tensor) -> Tensor:
        spatial = self.attend(rearrange(x, "b c t h w -> (b t) c h w"))
        return x + self.along_time(rearrange(spatial, "(b t) c h w -> b c t h w", b=x.shape[0]))


class TemporalAttention(SpatialAttention):
    """Spatial attention, then self-attention along the frames of each position (decoder, z=4 family).

    "chained" (published): the temporal step replaces what the spatial step gave, so it cannot be silent.
    "gated" (inflated): the temporal step is added to it, scaled per channel by ``gamma_t``, which starts
    at zero: the inflated decoder then gives the image decoder's numbers exactly.
    """

    def __init__(self, config: Config, ops, channels: int):
        super().__init__(config, ops, channels)
        self.q_t = ops.Linear(channels, channels)
        self.k_t = ops.Linear(channels, channels)
        self.v_t = ops.Linear(channels, channels)
        self.proj_out_t = ops.Linear(channels, channels)
        self.norm_t = ops.LayerNorm(channels)
        self.gated = config.conventions.temporal_attention == "gated"
        if self.gated:
            self.gamma_t = nn.Parameter(torch.zeros(channels))

    def attend_time(self, positions: Tensor) -> Tensor:
        """[(B h w), T, C] -> the same shape."""
        h = self.norm_t(positions)
        out = F.scaled_dot_product_attention(self.q_t(h)[:, None], self.k_t(h)[:, None], self.v_t(h)[:, None])
        return self.proj_out_t(out[:, 0])

    def along_time(self, spatial: Tensor) -> Tensor:
        b, _, _, h, w = spatial.shape
        positions = rearrange(spatial, "b c t h w -> (b h w) t c")
        temporal = self.joined(positions, self.attend_time(positions))
        return rearrange(temporal, "(b h w) t c -> b c t h w", b=b, h=h, w=w)

    def joined(self, positions: Tensor, temporal: Tensor) -> Tensor:
        """What the temporal step gave, [..., C], and where it is gated what it started from."""
        return positions + temporal * self.gamma_t.to(temporal) if self.gated else temporal


class Downsample(nn.Module):
    """Halve H and W, and T where ``time``: T becomes ceil(T / 2).  Always causal."""

    def __init__(self, config: Config, ops, channels: int, time: bool):
        super().__init__()
        self.temporal = config.conventions.temporal
        self.space_mode = config.conventions.space_padding
        # Zero borders are padded on one side as in SD's VAE, replicated ones on both (vae_blocks3d_sd3.py).
        self.space = (0, 1) if self.space_mode == "zeros" else (1, 1)
        if self.temporal:
            self.conv = ops.Conv3d(channels, channels, 3, stride=(2 if time else 1, 2, 2))
        else:
            self.conv = ops.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        past = (2, 0) if self.temporal else (0, 0)
        return convolve(self.conv, pad_clip(x, past, self.space, "replicate", self.space_mode))


class Upsample(nn.Module):
    """Double H and W (nearest, then conv), and T where ``time``: T becomes 2T - 1.

    A temporal up-sampler makes 2C channels and unfolds them into two frames for each one; the first
    frame of the result is dropped, so that one frame stays one frame.
    """

    def __init__(self, config: Config, ops, channels: int, time: bool):
        super().__init__()
        self.temporal = config.conventions.temporal
        self.space_mode = config.conventions.space_padding
        self.time = time and self.temporal
        self.conv = make_conv(config, ops, channels, channels * (2 if self.time else 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        x = x[..., :, None, :, None].expand(b, c, t, h, 2, w, 2).reshape(b, c, t, 2 * h, 2 * w)
        if self.temporal:
            x = pad_clip(x, (1, 1), (1, 1), "replicate", self.space_mode)
        x = convolve(self.conv, x)
        return rearrange(x, "b (n c) t h w -> b c (t n) h w", n=2)[:, :, 1:] if self.time else x


class Encoder(nn.Module):
    """[B, 3, T, H, W] in [-1, 1] -> moments [B, 2C, t, h, w]: mean and log-variance on the channel axis."""

    def __init__(self, config: Config, ops=nn):
        super().__init__()
        self.padding = Padding(config, causal=True)
        widths = config.widths
        self.conv_in = make_conv(config, ops, 3, widths[0])
        self.down = nn.ModuleList()
        channels = widths[0]
        for i in range(LEVELS):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(config.blocks):
                level.block.append(ResnetBlock(config, ops, channels, widths[i], self.padding))
                channels = widths[i]
            if i < LEVELS - 1:
                level.downsample = Downsample(config, ops, channels, time=i % 2 == 0)
            self.down.append(level)
        self.mid = nn.Module()
        self.mid.block_1 = ResnetBlock(config, ops, channels, channels, self.padding)
        self.mid.attn_1 = SpatialAttention(config, ops, channels)
        self.mid.block_2 = ResnetBlock(config, ops, channels, channels, self.padding)
        self.norm_out = make_norm(config, ops, channels)
        self.conv_out = make_conv(config, ops, channels, 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = convolve(self.conv_in, x, self.padding)
        for level in self.down:
            for block in level.block:
                h = block(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return convolve(self.conv_out, silu(self.norm_out(h)), self.padding)


class Decoder(nn.Module):
    """Latents [B, C, t, h, w] -> [B, 3, 4t - 3, 8h, 8w] (T = t where frames never meet).

    ``latent_shift`` [C] is what is left of SD's ``post_quant_conv`` after folding it into ``conv_in``:
    the latent that the 1x1 convolution sends to zero.  Subtracting it first keeps the zero border of
    ``conv_in`` exact, which folding the bias would not.
    """

    def __init__(self, config: Config, ops=nn):
        super().__init__()
        self.padding = Padding(config, causal=False)
        widths = config.widths
        channels = widths[-1]
        attention = SpatialAttention if config.conventions.temporal_attention == "none" else TemporalAttention
        if config.conventions.latent_shift:
            self.latent_shift = nn.Parameter(torch.zeros(config.latent_channels))
        self.conv_in = make_conv(config, ops, config.latent_channels, channels)
        self.mid = nn.Module()
        self.mid.block_1 = ResnetBlock(config, ops, channels, channels, self.padding)
        self.mid.attn_1 = attention(config, ops, channels)
        self.mid.block_2 = ResnetBlock(config, ops, channels, channels, self.padding)
        levels = []
        for i in reversed(range(LEVELS)):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(config.blocks + 1):
                level.block.append(ResnetBlock(config, ops, channels, widths[i], self.padding))
                channels = widths[i]
            if i > 0:
                level.upsample = Upsample(config, ops, channels, time=i % 2 == 1)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)  # level 0 is the full resolution, as in the encoder
        self.norm_out = make_norm(config, ops, channels)
        self.conv_out = make_conv(config, ops, channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        if hasattr(self, "latent_shift"):
            z = z - self.latent_shift.to(z)[:, None, None, None]
        h = convolve(self.conv_in, z, self.padding)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for level in reversed(self.up):
            for block in level.block:
                h = block(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return convolve(self.conv_out, silu(self.norm_out(h)), self.padding)
