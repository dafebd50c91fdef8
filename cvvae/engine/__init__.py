"""The fast engine: another executor of the definition in :mod:`cvvae.model`, for inference.

Read :mod:`.executor` first: the walk through the layers; :mod:`.activation` and :mod:`.store`: how their
outputs are kept; :mod:`.kernels`, :mod:`.products` and :mod:`.winograd`: convolutions; :mod:`.passes` and, for
CUDA, :mod:`.fused`: the rest; :mod:`.arena`: where the CPU's tensors lie; :mod:`.memory`: sizes.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..frames import frames_of
from ..model import Decoder, Downsample, Encoder, ResnetBlock, SpatialAttention, TemporalAttention, Upsample
from .activation import Statistics
from .arena import scratch
from .executor import Executor, Folded, Weights, own_weights
from .memory import Footprint, Together, budget, fitting, folded_bytes, footprint, together, working_memory
from .passes import passes_for

__all__ = ["Folded", "Footprint", "Statistics", "Together", "Weights", "budget", "fitting", "folded_bytes", "footprint",
           "knows", "own_weights", "run", "together", "working_memory"]


LAYERS = (nn.GroupNorm, nn.LayerNorm, nn.Conv2d, nn.Conv3d, nn.Linear)
CONTAINERS = (Encoder, Decoder, ResnetBlock, SpatialAttention, TemporalAttention, Downsample, Upsample, nn.ModuleList,
              nn.Module)


def knows(network: nn.Module) -> bool:
    """Whether ``network`` is the definition's and nobody watches its layers.

    A network or layer put in its place, or one with hooks, is there to be called: the engine leaves it alone.
    """
    return type(network) in (Encoder, Decoder) and all(
        (isinstance(module, LAYERS) or type(module) in CONTAINERS)
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
        for module in network.modules())


def run(network: Encoder | Decoder, x: Tensor, stills: bool, memory: int | None, check: Callable[[], None],
        weights: Weights, statistics: Statistics | None = None, compiled: bool = False,
        folded: Folded | None = None) -> Tensor:
    """What ``network(x)`` gives for [1, C, T, H, W]; ``stills`` are T independent images.

    memory: bytes to compute in, beside weights, ``x`` and the result; None for no limit.
    check: called after every strip; may raise to cancel.
    statistics: what group norms share with other calls.
    compiled: see :mod:`.passes`.
    folded: of ``stills``, kernels that other calls with the same weights, dtype and device left here, and will use.
    """
    encodes = isinstance(network, Encoder)
    frames, height, width = x.shape[2:]
    if encodes:
        channels = widest = network.conv_in.out_channels
    else:
        channels, widest = network.norm_out.num_channels, network.up[0].block[0].norm1.num_channels
        frames, height, width = frames if stills else frames_of(frames), 8 * height, 8 * width
    tile = Footprint(encodes, frames, height, width, channels, widest, network.mid.block_1.norm1.num_channels,
                     x.element_size(), x.device.type)
    # Triton launches kernels on the current device, wherever their tensors are.
    with scratch(), torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
        executor = Executor(*tile.plan(memory), stills, check, weights, statistics, passes_for(x, compiled), folded)
        return executor.encode(network, x) if encodes else executor.decode(network, x)
