"""What adapting SVD takes of a GPU, counted without one: SVD's own UNet on tensors that have shapes and no numbers.

    COMFYUI/.venv/bin/python benchmarks/adapt_memory.py [--comfyui FOLDER] [--latents 25 --height 72 --width 128]

Runs a whole step of ``cvvae/adaptation`` (forward, backward, bf16 autocast) under FakeTensorMode and follows which storages
are alive.  Attention is PyTorch's, as ComfyUI uses on NVIDIA GPUs; it is counted with the memory of the flash kernel.  Not
counted: the CUDA context, libraries' workspaces, and what the allocator leaves between pieces (a gigabyte or two together).
"""

import argparse
import gc
import sys
import weakref
from pathlib import Path

import torch
from torch import autocast
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

sys.path.insert(0, str(Path(__file__).parents[1]))

from cvvae.adaptation.adapter import Adapter
from cvvae.adaptation.comfyui import find_comfyui
from cvvae.adaptation.config import NoiseConfig
from cvvae.adaptation.objective import Objective
from cvvae.adaptation.trainer import recompute_activations

GB = 1e9
ARMS = (("output", False), ("output+input", True), ("lora", False), ("lora", True))
SVD = dict(  # as ComfyUI's detection reads it off svd_xt.safetensors
    image_size=32, in_channels=8, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2, 2], channel_mult=[1, 2, 4, 4],
    transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0], transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    transformer_depth_middle=1, context_dim=1024, use_spatial_transformer=True, legacy=False, num_classes="sequential",
    adm_in_channels=768, use_linear_in_transformer=True, use_temporal_attention=True, use_temporal_resblock=True,
    extra_ff_mix_layer=True, use_spatial_context=True, merge_strategy="learned_with_images", merge_factor=0.0,
    video_kernel_size=[3, 1, 1], dtype=torch.float16)


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return made

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


def step(train: str, checkpointing: bool, options: argparse.Namespace) -> tuple[float, float, int]:
    """Bytes of the frozen weights, at the peak of a step in all, and how many parameters are trained."""
    from comfy import model_base, supported_models

    config = supported_models.SVD_img2vid(SVD)
    config.set_inference_dtype(torch.float16, None)
    with FakeTensorMode():
        unet_config = config.unet_config | {"device": "cpu"}
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
        from comfy.ops import disable_weight_init

        unet = UNetModel(**unet_config, operations=disable_weight_init)
        frozen = sum(parameter.numel() * parameter.element_size() for parameter in unet.parameters())
        adapter = Adapter(unet, train)
        sampling = model_base.model_sampling(config, model_base.ModelType.V_PREDICTION_EDM)
        objective = Objective(unet, adapter, sampling, NoiseConfig())
        if checkpointing:
            recompute_activations(unet)
        count = sum(parameter.numel() for parameter in adapter.parameters())
        latents = torch.empty(1, 4, options.latents, options.height, options.width)
        told = {"context": torch.empty(1, 1, 1024), "concat": torch.empty(1, 4, options.height, options.width),
                "y": torch.empty(1, 768)}
        sigma, noise = torch.ones(1), torch.empty_like(latents)
        gc.collect()
        with Alive() as alive:
            with autocast("cpu", torch.bfloat16):
                loss = objective.loss(latents, told, sigma, noise)
            loss.backward()
    states = 4 * 4 * count  # both moments of AdamW, the moving average, and the difference itself
    return frozen, frozen + states + alive.peak, count


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", default="")
    parser.add_argument("--latents", type=int, default=25)
    parser.add_argument("--height", type=int, default=72)
    parser.add_argument("--width", type=int, default=128)
    options = parser.parse_args(arguments)
    find_comfyui(options.comfyui)
    import comfy.ldm.modules.attention as attention

    attention.optimized_attention = attention.attention_pytorch
    print("| trained | activations computed again | parameters | weights | peak of a step |")
    print("|---|---|---|---|---|")
    for train, checkpointing in ARMS:
        frozen, peak, count = step(train, checkpointing, options)
        print(f"| {train} | {'yes' if checkpointing else 'no'} | {count:,} | {frozen / GB:.1f} GB | {peak / GB:.1f} GB |")


if __name__ == "__main__":
    main()
