"""Tensor names and shapes of the published layouts, and the one this library uses.

Inside, everything has latent-diffusion's names ("canonical").  Files come in two namings:

* latent-diffusion: ``encoder.down.0.block.1.conv1.weight`` (SD checkpoints, FLUX, vae3d, vae3d_v1-1);
* diffusers: ``encoder.down_blocks.0.resnets.1.conv1.weight`` (diffusers folders, vae3d_sd3).
"""

import re

from torch import Tensor

from .config import LEVELS

State = dict[str, Tensor]

_TO_CANONICAL = [
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", lambda m: f".up.{LEVELS - 1 - int(m[1])}.block."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f".up.{LEVELS - 1 - int(m[1])}.upsample."),
    (r"\.mid_block\.resnets\.(\d+)\.", lambda m: f".mid.block_{int(m[1]) + 1}."),
    (r"\.mid_block\.attentions\.0\.", r".mid.attn_1."),
    (r"\.attn_1\.group_norm\.", r".attn_1.norm."),
    (r"\.attn_1\.(?:to_q|query)\.", r".attn_1.q."),
    (r"\.attn_1\.(?:to_k|key)\.", r".attn_1.k."),
    (r"\.attn_1\.(?:to_v|value)\.", r".attn_1.v."),
    (r"\.attn_1\.(?:to_out\.0|proj_attn)\.", r".attn_1.proj_out."),
    (r"\.conv_shortcut\.", r".nin_shortcut."),
    (r"\.conv_norm_out\.", r".norm_out."),
]

_TO_DIFFUSERS = [
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", lambda m: f".up_blocks.{LEVELS - 1 - int(m[1])}.resnets."),
    (r"\.up\.(\d+)\.upsample\.", lambda m: f".up_blocks.{LEVELS - 1 - int(m[1])}.upsamplers.0."),
    (r"\.mid\.block_(\d+)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
    (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.(q|k|v)\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"\.norm_out\.", r".conv_norm_out."),
]

_ATTENTION = re.compile(r"\.attn_1\.(q|k|v|proj_out)\.weight$")


def _rename(name: str, rules: list) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def is_diffusers(state: State) -> bool:
    return any(".down_blocks." in name or ".up_blocks." in name for name in state)


def canonical(state: State) -> State:
    """``state`` under canonical names, attention projections as 1x1 convolutions [C, C, 1, 1]."""
    renamed = {}
    for name, tensor in state.items():
        name = _rename(name, _TO_CANONICAL)
        if _ATTENTION.search(name) and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        renamed[name] = tensor
    return renamed


def published(state: State, variant: str) -> State:
    """The inverse: canonical ``state`` as files of ``variant`` name and shape it (only vae3d_sd3 differs)."""
    if variant != "sd3":
        return dict(state)
    renamed = {}
    for name, tensor in state.items():
        if _ATTENTION.search(name):
            tensor = tensor[:, :, 0, 0]
        elif name.endswith("nin_shortcut.weight"):
            tensor = tensor[:, :, 0]
        renamed[_rename(name, _TO_DIFFUSERS)] = tensor
    return renamed
