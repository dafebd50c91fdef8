"""What adapting SVD or AnimateDiff takes of a GPU, counted without one: their UNets on tensors with shapes and no numbers.

    COMFYUI/.venv/bin/python benchmarks/adapt_memory.py [--comfyui FOLDER] [--latents 25 --height 72 --width 128]
    COMFYUI/.venv/bin/python benchmarks/adapt_memory.py --animatediff --latents 16 --height 64 --width 64

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
from cvvae.adaptation.comfyui import find_comfyui, places_of, put_into
from cvvae.adaptation.config import NoiseConfig
from cvvae.adaptation.motion import MotionModules, TemporalTransformer
from cvvae.adaptation.objective import Objective
from cvvae.adaptation.trainer import recompute_activations

GB = 1e9
ARMS = (("output", False), ("output+input", True), ("lora", False), ("lora", True))
# As ComfyUI's detection reads them off the published checkpoints.
COMMON = dict(
    image_size=32, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2, 2], channel_mult=[1, 2, 4, 4],
    transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0], transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    transformer_depth_middle=1, use_spatial_transformer=True, legacy=False, dtype=torch.float16)
SVD = COMMON | dict(
    in_channels=8, context_dim=1024, num_classes="sequential", adm_in_channels=768, use_linear_in_transformer=True,
    use_temporal_attention=True, use_temporal_resblock=True, extra_ff_mix_layer=True, use_spatial_context=True,
    merge_strategy="learned_with_images", merge_factor=0.0, video_kernel_size=[3, 1, 1])
SD15 = COMMON | dict(in_channels=4, context_dim=768, num_heads=8, use_linear_in_transformer=False, adm_in_channels=None,
                     use_temporal_attention=False, use_temporal_resblock=False)


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

    kind, config, predicts = ((supported_models.SD15, SD15, "EPS") if options.animatediff else
                              (supported_models.SVD_img2vid, SVD, "V_PREDICTION_EDM"))
    config = kind(config)
    config.set_inference_dtype(torch.float16, None)
    with FakeTensorMode():
        unet_config = config.unet_config | {"device": "cpu"}
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
        from comfy.ops import disable_weight_init

        unet = UNetModel(**unet_config, operations=disable_weight_init)
        motion = None
        if options.animatediff:
            torch.set_default_dtype(torch.float16)
            motion = MotionModules({place: TemporalTransformer(layer_width(layer), 32)
                                    for place, layer in places_of(unet).items()}, 32)
            torch.set_default_dtype(torch.float32)
            put_into(unet, motion)
        frozen = sum(parameter.numel() * parameter.element_size() for module in filter(None, (unet, motion))
                     for parameter in module.parameters())
        adapter = Adapter(unet, train)
        sampling = model_base.model_sampling(config, model_base.ModelType[predicts])
        objective = Objective(unet, adapter, sampling, NoiseConfig(), motion)
        if checkpointing:
            recompute_activations(unet, motion)
        count = sum(parameter.numel() for parameter in adapter.parameters())
        latents = torch.empty(1, 4, options.latents, options.height, options.width)
        told = {"context": torch.empty(1, 77, 768)} if options.animatediff else {
            "context": torch.empty(1, 1, 1024), "concat": torch.empty(1, 4, options.height, options.width),
            "y": torch.empty(1, 768)}
        sigma, noise = torch.ones(1), torch.empty_like(latents)
        gc.collect()
        with Alive() as alive:
            with autocast("cpu", torch.bfloat16):
                loss = objective.loss(latents, told, sigma, noise)
            loss.backward()
    states = 4 * 4 * count  # both moments of AdamW, the moving average, and the difference itself
    return frozen, frozen + states + alive.peak, count


def layer_width(layer: torch.nn.Module) -> int:
    """Channels that a residual block or a transformer gives."""
    return getattr(layer, "out_channels", None) or layer.in_channels


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", default="")
    parser.add_argument("--animatediff", action="store_true", help="SD 1.5 with motion modules in place of SVD")
    parser.add_argument("--latents", type=int, default=25)
    parser.add_argument("--height", type=int, default=72)
    parser.add_argument("--width", type=int, default=128)
    options = parser.parse_args(arguments)
    find_comfyui(options.comfyui)
    import comfy.ldm.modules.attention as attention

    attention.optimized_attention = attention.attention_pytorch
    print("| trained | activations computed again | parameters | weights | peak of a step |")
    print("|---|---|---|---|---|")
    for train, checkpointing in ARMS[:2] if options.animatediff else ARMS:
        frozen, peak, count = step(train, checkpointing, options)
        print(f"| {train} | {'yes' if checkpointing else 'no'} | {count:,} | {frozen / GB:.1f} GB | {peak / GB:.1f} GB |")


if __name__ == "__main__":
    main()
