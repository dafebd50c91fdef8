"""SD's image VAE straight from a raw state dict: what load_image_vae and inflate are measured against.

Written from the layouts and with torch.nn.functional only; shares nothing with the library.  Quant convs
stay separate layers, arithmetic is float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from random_weights import draw
from torch import Tensor

WIDTHS = (32, 32, 64, 64)
BLOCKS = 2


@dataclass(frozen=True)
class Layout:
    """How one family of files names its tensors."""

    naming: str  # "ldm", "diffusers", or "old_diffusers", which has other words for attention
    latent_channels: int
    quant_convs: bool
    prefix: str = ""

    def level(self, side: str, level: int) -> str:
        """``level`` counts from full resolution; diffusers numbers the decoder's from the latent."""
        if self.naming == "ldm":
            return f"encoder.down.{level}" if side == "encoder" else f"decoder.up.{level}"
        return f"encoder.down_blocks.{level}" if side == "encoder" else f"decoder.up_blocks.{3 - level}"

    def block(self, side: str, level: int, index: int) -> str:
        return f"{self.level(side, level)}.{'block' if self.naming == 'ldm' else 'resnets'}.{index}"

    def resample(self, side: str, level: int) -> str:
        word = "downsample" if side == "encoder" else "upsample"
        return self.level(side, level) + (f".{word}.conv" if self.naming == "ldm" else f".{word}rs.0.conv")

    def middle(self, side: str, index: int) -> str:
        return f"{side}.mid.block_{index + 1}" if self.naming == "ldm" else f"{side}.mid_block.resnets.{index}"

    def attention(self, side: str) -> list[str]:
        """Norm, query, key, value and output projection."""
        if self.naming == "ldm":
            return [f"{side}.mid.attn_1.{part}" for part in ("norm", "q", "k", "v", "proj_out")]
        parts = {"diffusers": ("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
                 "old_diffusers": ("group_norm", "query", "key", "value", "proj_attn")}[self.naming]
        return [f"{side}.mid_block.attentions.0.{part}" for part in parts]

    def shortcut(self, block: str) -> str:
        return block + (".nin_shortcut" if self.naming == "ldm" else ".conv_shortcut")

    def norm_out(self, side: str) -> str:
        return f"{side}.norm_out" if self.naming == "ldm" else f"{side}.conv_norm_out"


LAYOUTS = {
    "sd": Layout("ldm", 4, True, "first_stage_model."),
    "sdxl": Layout("diffusers", 4, True),
    "old_diffusers": Layout("old_diffusers", 4, True),
    "sd3": Layout("ldm", 16, False, "first_stage_model."),
    "flux": Layout("ldm", 16, False),
    "flux_diffusers": Layout("diffusers", 16, False),
}


def image_state(layout: Layout, seed: int = 0) -> dict[str, Tensor]:
    """A random image VAE of ``layout``; no bias is zero."""
    return draw({layout.prefix + name: shape for name, shape in _shapes(layout)}, seed)


def _shapes(layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    z = layout.latent_channels
    yield from _encoder_shapes(layout)
    yield from _decoder_shapes(layout)
    if layout.quant_convs:
        yield from _conv("quant_conv", 2 * z, 2 * z, 1)
        yield from _conv("post_quant_conv", z, z, 1)


def _encoder_shapes(layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    channels = WIDTHS[0]
    yield from _conv("encoder.conv_in", 3, channels)
    for level, width in enumerate(WIDTHS):
        for index in range(BLOCKS):
            yield from _block(layout, layout.block("encoder", level, index), channels, width)
            channels = width
        if level < 3:
            yield from _conv(layout.resample("encoder", level), channels, channels)
    yield from _middle(layout, "encoder", channels)
    yield from _norm(layout.norm_out("encoder"), channels)
    yield from _conv("encoder.conv_out", channels, 2 * layout.latent_channels)


def _decoder_shapes(layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    channels = WIDTHS[-1]
    yield from _conv("decoder.conv_in", layout.latent_channels, channels)
    yield from _middle(layout, "decoder", channels)
    for level in (3, 2, 1, 0):
        for index in range(BLOCKS + 1):
            yield from _block(layout, layout.block("decoder", level, index), channels, WIDTHS[level])
            channels = WIDTHS[level]
        if level > 0:
            yield from _conv(layout.resample("decoder", level), channels, channels)
    yield from _norm(layout.norm_out("decoder"), channels)
    yield from _conv("decoder.conv_out", channels, 3)


def _conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs, kernel, kernel)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)


def _block(layout: Layout, name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _norm(f"{name}.norm1", inputs)
    yield from _conv(f"{name}.conv1", inputs, outputs)
    yield from _norm(f"{name}.norm2", outputs)
    yield from _conv(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        yield from _conv(layout.shortcut(name), inputs, outputs, 1)


def _middle(layout: Layout, side: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for index in range(2):
        yield from _block(layout, layout.middle(side, index), channels, channels)
    norm, *projections = layout.attention(side)
    yield from _norm(norm, channels)
    for name in projections:
        if layout.naming == "ldm":
            yield from _conv(name, channels, channels, 1)
        else:
            yield f"{name}.weight", (channels, channels)
            yield f"{name}.bias", (channels,)


class ImageOracle:
    """Encode [N, 3, H, W] (H, W multiples of 8) and decode [N, C, h, w], both to float32."""

    def __init__(self, state: dict[str, Tensor], layout: Layout):
        self.state = {name.removeprefix(layout.prefix): tensor.double() for name, tensor in state.items()}
        self.layout = layout

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance."""
        h = self._conv("encoder.conv_in", frames.double())
        for level in range(4):
            for index in range(BLOCKS):
                h = self._block(self.layout.block("encoder", level, index), h)
            if level < 3:
                # One row and one column of zeros, at the bottom and the right only.
                h = self._conv(self.layout.resample("encoder", level), F.pad(h, (0, 1, 0, 1)), stride=2, padding=0)
        h = self._norm(self.layout.norm_out("encoder"), self._middle("encoder", h))
        h = self._conv("encoder.conv_out", F.silu(h))
        if self.layout.quant_convs:
            h = self._conv("quant_conv", h, padding=0)
        mean, logvar = h.float().chunk(2, dim=1)
        return mean, logvar

    def decode(self, latents: Tensor) -> Tensor:
        h = latents.double()
        if self.layout.quant_convs:
            h = self._conv("post_quant_conv", h, padding=0)
        h = self._middle("decoder", self._conv("decoder.conv_in", h))
        for level in (3, 2, 1, 0):
            for index in range(BLOCKS + 1):
                h = self._block(self.layout.block("decoder", level, index), h)
            if level > 0:
                h = self._conv(self.layout.resample("decoder", level), F.interpolate(h, scale_factor=2, mode="nearest"))
        h = self._norm(self.layout.norm_out("decoder"), h)
        return self._conv("decoder.conv_out", F.silu(h)).float()

    def _conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], stride, padding)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6)

    def _block(self, name: str, x: Tensor) -> Tensor:
        h = self._conv(f"{name}.conv1", F.silu(self._norm(f"{name}.norm1", x)))
        h = self._conv(f"{name}.conv2", F.silu(self._norm(f"{name}.norm2", h)))
        shortcut = self.layout.shortcut(name)
        return h + (self._conv(shortcut, x, padding=0) if f"{shortcut}.weight" in self.state else x)

    def _middle(self, side: str, x: Tensor) -> Tensor:
        x = self._block(self.layout.middle(side, 0), x)
        return self._block(self.layout.middle(side, 1), x + self._attention(side, x))

    def _attention(self, side: str, x: Tensor) -> Tensor:
        norm, *projections = self.layout.attention(side)
        query, key, value, out = ((self.state[f"{name}.weight"].flatten(1), self.state[f"{name}.bias"])
                                  for name in projections)
        positions = self._norm(norm, x).flatten(2).transpose(1, 2)  # [N, h*w, C]
        q, k, v = (F.linear(positions, *projection) for projection in (query, key, value))
        weights = torch.softmax(q @ k.transpose(1, 2) / x.shape[1] ** 0.5, dim=-1)
        return F.linear(weights @ v, *out).transpose(1, 2).reshape(x.shape)
