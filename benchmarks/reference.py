"""The models that are compared: ours, and the official ones from a checkout of github.com/AILab-CVC/CV-VAE.

Both get the same weights, drawn from a seed, so no weight file is needed.  Nothing of the official code is
here; it is imported from where it lies.
"""

import importlib
import math
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cvvae
from cvvae import keys

CHANNELS = {"v1": 4, "sd3": 16}
WIDTHS = (128, 256, 512, 512)  # of the published models
BLOCKS = 2
ENTRY = "models/modeling_vae.py"
WORKING = "diffusers==0.30.3, with huggingface_hub<0.26, is known to work"


@dataclass(frozen=True)
class Contender:
    """A model as the benchmarks use it.

    encode: clip [B, 3, T, H, W] -> mean [B, C, t, h, w].
    decode: latents [B, C, t, h, w] -> clip [B, 3, 4t - 3, 8h, 8w].
    """

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def ours(variant: str, widths: tuple[int, ...] = WIDTHS, device: str = "cpu", dtype: torch.dtype = torch.float32,
         executor: str = "fast", memory: int | str | None = "auto") -> Contender:
    """Our model; ``executor`` and ``memory`` as ``VideoVAE.executor`` and ``Tiling.memory`` take them."""
    with torch.device("meta"):
        vae = cvvae.VideoVAE(config(variant, widths))
    vae.load_state_dict(weights(variant, widths), assign=True)
    vae.to(device, dtype).requires_grad_(False)
    vae.executor = executor
    vae.tiling = cvvae.Tiling(memory=memory)
    return Contender(lambda clip: vae.encode(clip).mode(), vae.decode)


def reference(path: str | Path, variant: str, widths: tuple[int, ...] = WIDTHS, device: str = "cpu",
              dtype: torch.dtype = torch.float32) -> Contender:
    """The official model from the checkout at ``path``, as its own scripts use it.

    Exits with a message where the checkout, or what it needs, is missing.
    """
    module = official(path)
    if variant == "v1" and any(width % widths[0] for width in widths):
        raise SystemExit(f"The official v1 model takes multiples of its first width only, not {widths}.")
    with torch.device("meta"):
        if variant == "v1":
            model = module.CVVAEModel(z_channels=4, ch=widths[0], ch_mult=[width // widths[0] for width in widths],
                                      num_res_blocks=BLOCKS)
        else:
            model = module.CVVAESD3Model(out_channels=16, block_out_channels=list(widths), layers_per_block=BLOCKS)
    model.load_state_dict(keys.published(weights(variant, widths), variant), assign=True)
    model.to(device, dtype).requires_grad_(False).eval()
    return Contender(lambda clip: model.encode(clip).latent_dist.mode(), lambda latents: model.decode(latents).sample)


def config(variant: str, widths: tuple[int, ...]) -> cvvae.Config:
    return cvvae.Config(variant, CHANNELS[variant], widths, BLOCKS)


@cache
def weights(variant: str, widths: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """Of our model, as :func:`drawn` draws them."""
    with torch.device("meta"):
        model = cvvae.VideoVAE(config(variant, widths))
    return drawn(model, seed)


def drawn(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Kernels ~ N(0, 1/fan_in), norm gains ~ 1 + N(0, 0.1), biases ~ N(0, 0.05), under the names ``model`` has for them."""
    state = {}
    for name, tensor in model.state_dict().items():
        shape = tensor.shape
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode())))
        if len(shape) > 1:
            state[name] = noise.div_(math.sqrt(math.prod(shape[1:])))
        elif name.endswith("weight"):
            state[name] = 1 + 0.1 * noise
        else:
            state[name] = 0.05 * noise
    return state


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in standard deviations of ``expected``; infinite where ``found`` is not finite."""
    if found.shape != expected.shape:
        raise SystemExit(f"The results have different shapes, {list(found.shape)} and {list(expected.shape)}: "
                         "nothing can be compared.")
    found, expected = found.double(), expected.double()
    largest = ((found - expected).abs().max() / expected.std()).item()
    return largest if math.isfinite(largest) else math.inf


@cache
def official(path: str | Path) -> ModuleType:
    """The official ``models.modeling_vae``.  Exits with a message where it cannot be imported."""
    folder = Path(path).resolve()
    if not (folder / ENTRY).is_file():
        raise SystemExit(f"{path} is not a checkout of github.com/AILab-CVC/CV-VAE: there is no {ENTRY} in it.")
    try:
        # Before xformers is stood in for: diffusers looks for the real one when it is imported.
        import diffusers.models.attention_processor
        import diffusers.models.modeling_utils  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"The official code needs diffusers, which cannot be imported ({error}); {WORKING}.") from None
    try:
        with _importable(folder):
            return importlib.import_module("models.modeling_vae")
    except ImportError as error:
        raise SystemExit(f"The official code cannot be imported ({error}); {WORKING}.") from None


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """``folder`` on the path, and xformers, a package for CUDA only, stood in for by torch's own attention."""
    stand_in, stand_in_ops = ModuleType("xformers"), ModuleType("xformers.ops")
    stand_in.ops = stand_in_ops
    stand_in_ops.memory_efficient_attention = _attention
    sys.path.insert(0, str(folder))
    try:
        with replaced({"xformers": stand_in, "xformers.ops": stand_in_ops}):
            yield
    finally:
        sys.path.remove(str(folder))


@contextmanager
def replaced(stand_ins: dict[str, ModuleType | None]) -> Iterator[None]:
    """What imports inside find under these names, installed or not; None is found missing."""
    real = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in real.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: None = None, op: None = None) -> Tensor:
    """xformers.ops.memory_efficient_attention as the official code calls it: [B, N, C] each, one head."""
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
