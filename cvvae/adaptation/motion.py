"""AnimateDiff's motion modules (arXiv 2307.04725): temporal transformers that make SD 1.5 sample clips, read from its files.

After animatediff/models/motion_module.py of the official code, whose parameter names the files have.  They are frozen here:
what is trained is the UNet around them.  ``comfyui.py`` puts them into it.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoint
from ..keys import State
from ..training.config import ConfigError

HEADS, GROUPS = 8, 32
USUAL = 16  # latents of a clip in training
NAME = re.compile(r"(?:module\.)?((?:(?:down|up)_blocks\.\d+|mid_block)\.motion_modules\.\d+)\.temporal_transformer\.(.+)")
MIDDLE = "mid_block.motion_modules.0"
# Betas of the noise that the modules were trained with are linear between these; SD 1.5's are squares of what is linear.
FIRST_BETA, LAST_BETA, STEPS = 0.00085, 0.012, 1000


class PositionalEncoding(nn.Module):
    def __init__(self, channels: int, length: int):
        super().__init__()
        self.register_buffer("pe", torch.zeros(1, length, channels))  # comes from the file

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pe[:, :x.shape[1]]


class Attention(nn.Module):
    """Of each position to itself in other frames, [N, t, C]."""

    def __init__(self, channels: int, length: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.pos_encoder = PositionalEncoding(channels, length)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_encoder(x)
        q, k, v = (layer(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GatedGELU(nn.Module):
    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.ModuleList([GatedGELU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class Block(nn.Module):
    def __init__(self, channels: int, length: int):
        super().__init__()
        self.attention_blocks = nn.ModuleList([Attention(channels, length) for _ in range(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for _ in self.attention_blocks])
        self.ff, self.ff_norm = FeedForward(channels), nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        for attention, norm in zip(self.attention_blocks, self.norms, strict=True):
            x = x + attention(norm(x))
        return x + self.ff(self.ff_norm(x))


class TemporalTransformer(nn.Module):
    """``forward(x, frames)`` of x [B t, C, h, w], ``frames`` being t; nothing passes between positions of a frame."""

    def __init__(self, channels: int, length: int):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)  # each frame by itself
        self.proj_in, self.proj_out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([Block(channels, length)])

    def forward(self, x: Tensor, frames: int) -> Tensor:
        height, width = x.shape[2:]
        h = self.norm(x).unflatten(0, (-1, frames)).permute(0, 3, 4, 1, 2)  # [B, h, w, t, C]
        h = self.proj_in(h.flatten(0, 2))
        for block in self.transformer_blocks:
            h = block(h)
        h = self.proj_out(h).unflatten(0, (-1, height, width)).permute(0, 3, 4, 1, 2)
        return x + h.flatten(0, 1)


class MotionModules(nn.Module):
    """All of a file.  places: ``down_blocks.0.motion_modules.0`` and so on, as AnimateDiff names them -> a module.

    length: the most latents of a clip that its positions are for.
    """

    def __init__(self, places: dict[str, TemporalTransformer], length: int):
        super().__init__()
        self.length = length
        self.names = list(places)
        self.transformers = nn.ModuleList(places.values())
        self.requires_grad_(False).eval()

    @property
    def places(self) -> dict[str, TemporalTransformer]:
        return dict(zip(self.names, self.transformers, strict=True))


def load_motion(path: str | Path) -> MotionModules:
    """Read a motion module for SD 1.5, such as ``v3_sd15_mm.ckpt`` or ``mm_sd_v15_v2.ckpt``; nothing in it is executed.

    Raises ConfigError for other files: modules of v1, for whose clips SD 1.5 itself normalises otherwise; AnimateLCM, which
    has no positions; PIA, which reads a picture too.  CheckpointError or FileNotFoundError as ``cvvae.load``.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"The motion module is {path}, and there is no such file.")
    states: dict[str, State] = {}
    tensors = checkpoint.read_tensors(path)
    for name, tensor in tensors.items():
        if found := NAME.fullmatch(name):
            states.setdefault(found[1], {})[found[2]] = tensor
    if not states:
        raise ConfigError(f"{path} is no motion module of AnimateDiff: none of its tensors is named like "
                          "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight. Take, for example, "
                          "v3_sd15_mm.ckpt.")
    if "conv_in.weight" in tensors and tensors["conv_in.weight"].shape[1] != 4:
        raise ConfigError(f"{path} brings a first convolution of its own, as PIA does, which reads a picture beside the "
                          "latents, and adapting has none to show it. Take one of AnimateDiff v2 or v3.")
    positions = {tensor.shape[1] for state in states.values() for name, tensor in state.items()
                 if name.endswith("pos_encoder.pe")}
    if len(positions) != 1:
        raise ConfigError(f"{path} is no motion module that can be used here: it has no positions of frames, as those of "
                          "AnimateLCM. Take one of AnimateDiff v2 or v3.")
    length = positions.pop()
    if MIDDLE not in states and length < 32:
        raise ConfigError(f"{path} is a motion module of AnimateDiff v1 ({length} positions, none in the middle), for which "
                          "SD 1.5 itself has to normalise across frames. Take one of v2 or v3.")
    return MotionModules({place: _built(state, length, path, place) for place, state in states.items()}, length)


def _built(state: State, length: int, path: Path, place: str) -> TemporalTransformer:
    try:
        with torch.device("meta"):
            transformer = TemporalTransformer(len(state["norm.weight"]), length)
        transformer.load_state_dict(state, assign=True)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{path}: {place} is not as AnimateDiff's modules are ({str(error).splitlines()[-1].strip()}). "
                          "Take one of AnimateDiff v2 or v3 for SD 1.5.") from None
    return transformer


def training_sigmas() -> Tensor:
    """Noise levels [1000] of AnimateDiff's training, as ComfyUI counts them: of noise added to latents as they are."""
    kept = (1 - torch.linspace(FIRST_BETA, LAST_BETA, STEPS, dtype=torch.float64)).cumprod(0)
    return ((1 - kept) / kept).sqrt().float()
