"""What is trained of a sampler: differences to some of its weights, which become a file that ComfyUI loads as a LoRA."""

import hashlib
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..training.config import ConfigError

PREFIX = "diffusion_model."  # ComfyUI's name of the UNet in its models
OUTPUT, INPUT = "out.2.", "input_blocks.0.0."  # its last and first convolution
TEMPORAL = ("*.time_stack.*",)


class Difference(nn.Module):
    """weight -> weight + delta."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta

    def tensors(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        layer, _, kind = name.rpartition(".")
        if kind == "bias":
            return {f"{layer}.diff_b": self.delta}
        return {f"{layer if kind == 'weight' else name}.diff": self.delta}


class LowRank(nn.Module):
    """weight [rows, ...] -> weight + up [rows, rank] x down [rank, ...]; begins as no difference."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        columns = weight[0].numel()
        rank = min(rank, len(weight), columns)
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank))
        self.down = nn.Parameter(torch.empty(rank, columns))  # drawn on the CPU, so alike on every device
        nn.init.kaiming_uniform_(self.down, a=5 ** 0.5)
        self.down.data = self.down.data.to(weight)

    def forward(self, weight: Tensor) -> Tensor:
        # As ComfyUI computes it, to the last bit.
        return weight + torch.mm(self.up, self.down).reshape(weight.shape)

    def tensors(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        layer = name.removesuffix(".weight")
        rank = len(self.down)
        return {f"{layer}.lora_up.weight": self.up.reshape(len(weight), rank, *[1] * (weight.ndim - 2)),
                f"{layer}.lora_down.weight": self.down.reshape(rank, *weight.shape[1:])}


class Adapter(nn.Module):
    """The differences that are trained, put into ``unet``; its own weights are frozen.

    The differences themselves are the parameters.  So what the file holds is what was trained, with no rounding between:
    ComfyUI adds it to float32 weights at strength 1 and has the trained model, to the last bit.

    train, layers, rank: as in ``config.ModelConfig``.  Raises ConfigError where they name nothing.
    """

    def __init__(self, unet: nn.Module, train: str = "output", layers: Sequence[str] = (), rank: int = 16):
        super().__init__()
        unet.requires_grad_(False)
        self.parts = nn.ModuleDict()
        self._weights: dict[str, Tensor] = {}
        for name in chosen(unet, train, layers):
            path, _, attribute = name.rpartition(".")
            module = unet.get_submodule(path)
            weight = getattr(module, attribute)
            weight.data = weight.data.float()  # differences would drown in 16 bit
            part = LowRank(weight.data, rank) if train == "lora" else Difference(weight.data)
            parametrize.register_parametrization(module, attribute, part)
            self.parts[name.replace(".", "/")] = part
            self._weights[name] = weight

    def tensors(self) -> dict[str, Tensor]:
        """By the keys of ComfyUI's LoRA loader: ``.diff``, ``.diff_b``, ``.lora_up.weight``, ``.lora_down.weight``."""
        found = {}
        for name, part in self.parts.items():
            name = name.replace("/", ".")
            found |= part.tensors(PREFIX + name, self._weights[name])
        return {key: tensor.detach().cpu().contiguous() for key, tensor in found.items()}

    def fingerprint(self) -> str:
        """SHA-256 of the weights that the differences are to: a run goes on with the model it began with."""
        digest = hashlib.sha256()
        for name, weight in self._weights.items():
            digest.update(name.encode())
            digest.update(weight.detach().cpu().numpy().tobytes())
        return digest.hexdigest()


def chosen(unet: nn.Module, train: str, layers: Sequence[str]) -> list[str]:
    """Names of the parameters that are trained."""
    names = [name for name, _ in unet.named_parameters()]
    if train in ("output", "output+input"):
        wanted = (OUTPUT, INPUT) if train == "output+input" else (OUTPUT,)
        return [name for name in names if name.startswith(wanted)]
    patterns = layers or TEMPORAL
    found = []
    for pattern in patterns:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches and not layers:
            raise ConfigError("This model has no temporal layers of its own (AnimateDiff's motion modules are not trained), "
                              "which model.train = 'lora' is for unless model.layers names others. Name some, or set "
                              "model.train to 'output'.")
        if not matches:
            raise ConfigError(f"model.layers: {pattern!r} matches none of the {len(names)} parameters of this model; they "
                              f"look like {names[0]!r} and {names[-1]!r}.")
        found += matches
    if train == "lora":
        found = [name for name in found if name.endswith(".weight") and unet.get_parameter(name).ndim > 1]
        if not found:
            raise ConfigError(f"model.layers names no weight of a layer ({', '.join(patterns)}); LoRA is for matrices and "
                              "convolutions.")
    return list(dict.fromkeys(found))
