"""Models of ComfyUI, taken as training needs them: the only file of the library that imports ComfyUI, and only when asked.

Inside ComfyUI its modules are there.  The command line calls :func:`find_comfyui` first, which puts it on sys.path.
"""

import copy
import hashlib
import math
import os
import sys
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from ..dataset import Sample, weights_hash
from ..frames import TIME_FACTOR
from ..training.config import ConfigError
from ..vae import VideoVAE
from .config import ConditioningConfig
from .motion import MIDDLE, MotionModules, training_sigmas


def find_comfyui(path: str = "") -> Path:
    """Make ComfyUI importable in this process; returns its folder.

    path: of ComfyUI; empty takes COMFYUI_PATH, else ~/ComfyUI.  Raises ConfigError where there is none.
    """
    folder = Path(path or os.environ.get("COMFYUI_PATH") or "~/ComfyUI").expanduser().resolve()
    if not (folder / "comfy" / "sd.py").exists():
        raise ConfigError(f"model.comfyui: there is no ComfyUI in {folder}, whose loader and model classes this command "
                          "uses. Name its folder there or in COMFYUI_PATH.")
    # In front, so that its nodes.py is never hidden by a folder nodes/ of whatever the command was started in.
    sys.path.insert(0, str(folder))
    try:
        import comfy.cli_args

        if not torch.cuda.is_available() and not torch.backends.mps.is_available():
            comfy.cli_args.args.cpu = True  # before the host looks for a GPU
        import comfy.sd  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"ComfyUI in {folder} cannot be imported by this Python ({error}). Run the command with ComfyUI's "
                          f"own Python, for example {folder}/.venv/bin/python -m cvvae adapt ...") from None
    return folder


def load(path: str) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and CLIP_VISION of a checkpoint, by ComfyUI's own loader; None for what it does not hold."""
    import comfy.sd

    if not Path(path).is_file():
        raise FileNotFoundError(f"model.checkpoint is {path}, and there is no such file.")
    try:
        model, clip, _, clip_vision = comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clipvision=True)
    except RuntimeError as error:
        raise ConfigError(f"{path} is no checkpoint that ComfyUI knows ({str(error).splitlines()[0]}). UNets without their "
                          "encoders do not do: name the whole checkpoint.") from None
    return model, clip, clip_vision


def unload() -> None:
    """Let go of what ComfyUI keeps on the device."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


class Sampler:
    """A diffusion model of ComfyUI as a trainer needs it: a UNet of its own, in ordinary tensors, and how it is used.

    model: a MODEL of ComfyUI (its ModelPatcher), with patches of weights (LoRAs) and of the noise schedule counted in.  It
    is left as it is.
    motion: AnimateDiff's modules, which the UNet is to have in it; their noise schedule takes the place of the model's.

    Raises ConfigError for models that are no UNet of Stable Diffusion's latent space.
    """

    def __init__(self, model: Any, motion: MotionModules | None = None):
        from comfy import model_base, supported_models
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

        base = model.model
        if type(base) not in (model_base.BaseModel, model_base.SVD_img2vid) or type(base.diffusion_model) is not UNetModel:
            raise ConfigError(f"This model is a {type(base).__name__}; adapting is for SD 1.x, SD 2.x and SVD "
                              "image-to-video.")
        self.shows_first_frame = type(base) is model_base.SVD_img2vid
        shown = base.diffusion_model.in_channels - base.diffusion_model.out_channels
        if shown and not self.shows_first_frame:
            raise ConfigError(f"This model reads {shown} channels beside its latents, as those for inpainting do, and "
                              "adapting has nothing to show it there. Adapt the plain model.")
        if model.injections:
            names = ", ".join(model.injections)
            raise ConfigError(f"This MODEL has modules put into it while it samples ({names}), as those of AnimateDiff are, "
                              "and in training they would be missing. Connect the MODEL from before that node, and name the "
                              "motion module itself.")
        if motion is not None and not isinstance(base.model_config, supported_models.SD15):
            raise ConfigError("AnimateDiff's motion modules are for SD 1.5, and this model is another one. Adapt it without "
                              "them.")
        self.base, self.motion = base, motion
        with torch.inference_mode(False):
            self.unet = _fresh_unet(base, _weights(model))
            self.sampling = _ordinary(model.get_model_object("model_sampling"))
        if motion is not None:
            put_into(self.unet, motion.to(next(self.unet.parameters()).dtype))
            self.sampling.set_sigmas(training_sigmas())
        self.scale = base.latent_format.process_in


def _fresh_unet(base: Any, weights: dict[str, Tensor]) -> nn.Module:
    import comfy.ops

    config = base.model_config.unet_config | {"dtype": None, "device": "meta"}
    unet = type(base.diffusion_model)(**config, operations=comfy.ops.disable_weight_init)
    unet.load_state_dict(weights, assign=True)
    return unet.eval()


def _weights(model: Any) -> dict[str, Tensor]:
    """Of the UNet, patches counted in, as copies made outside of inference mode: what is made inside cannot be trained."""
    import comfy.lora

    prefix = "diffusion_model."
    weights = {}
    for key, ((weight, convert), *patches) in model.get_key_patches(prefix).items():
        own = convert(weight.detach().to("cpu", copy=True), inplace=True)
        if patches:
            own = comfy.lora.calculate_weight(patches, own.float(), key).to(own.dtype)
        weights[key.removeprefix(prefix)] = own
    return weights


def put_into(unet: nn.Module, motion: MotionModules) -> None:
    """Have ``motion`` run where AnimateDiff does.  As hooks, so that the UNet's parameters keep their names."""
    layers = places_of(unet)
    if missing := layers.keys() - motion.places.keys() - {MIDDLE} or motion.places.keys() - layers.keys():
        raise ConfigError(f"This motion module is for another UNet: only one of them has {sorted(missing)[0]}. Take one "
                          "for SD 1.5.")
    frames = 1

    def note(unet: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
        nonlocal frames
        frames = named["num_video_frames"]

    unet.register_forward_pre_hook(note, with_kwargs=True)
    for place, transformer in motion.places.items():
        layers[place].register_forward_hook(lambda layer, inputs, x, transformer=transformer: transformer(x, frames))


def places_of(unet: nn.Module) -> dict[str, nn.Module]:
    """AnimateDiff's names of its modules -> the layer of a UNet of SD 1.5 that each comes behind.

    One comes behind each residual block with its attention, before what changes the size; in the middle before the last
    residual block.
    """
    from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample

    layers = {MIDDLE: unet.middle_block[-2]}
    sides = (("down_blocks", unet.input_blocks[1:], Downsample), ("up_blocks", unet.output_blocks, Upsample))
    for name, blocks, resize in sides:
        level = number = 0
        for block in blocks:
            kept = [layer for layer in block if not isinstance(layer, resize)]
            if kept:
                layers[f"{name}.{level}.motion_modules.{number}"] = kept[-1]
                number += 1
            if len(kept) < len(block):
                level, number = level + 1, 0
    return layers


def _ordinary(module: nn.Module) -> nn.Module:
    """A copy whose buffers may take part in training."""
    module = copy.deepcopy(module)
    for name, buffer in module.named_buffers():
        module.register_buffer(name, buffer.detach().cpu().clone())
    return module


# -- what a sampler is told --------------------------------------------------------------------------


class TextConditioner:
    """Captions for an SD model.  clip: a CLIP of ComfyUI.  prompt: for clips without a caption."""

    def __init__(self, clip: Any, prompt: str, facts: dict[str, Any]):
        self.clip, self.prompt = clip, prompt
        self.facts = facts | {"kind": "text", "prompt": prompt}
        self._known: dict[str, Tensor] = {}

    def empty(self) -> dict[str, Tensor]:
        return self._of("")

    def __call__(self, sample: Sample, latents: Tensor) -> dict[str, Tensor]:
        return self._of(sample.caption or self.prompt)

    def _of(self, text: str) -> dict[str, Tensor]:
        if text not in self._known:
            self._known[text] = self.clip.encode_from_tokens(self.clip.tokenize(text))[0].cpu()
        return {"context": self._known[text]}


class FixedConditioner:
    """The same conditioning for every clip: context and empty [L, C]."""

    def __init__(self, context: Tensor, empty: Tensor, facts: dict[str, Any]):
        self._context, self._empty = context, empty
        self.facts = facts | {"kind": "fixed"} | {name: hashlib.sha256(tensor.cpu().float().numpy().tobytes()).hexdigest()
                                                  for name, tensor in (("context", context), ("empty", empty))}

    def empty(self) -> dict[str, Tensor]:
        return {"context": self._empty}

    def __call__(self, sample: Sample, latents: Tensor) -> dict[str, Tensor]:
        return {"context": self._context}


class FirstFrameConditioner:
    """What SVD is told: the first frame, as an embedding and as latents with a little noise, and three numbers.

    The first frame is decoded from the clip's first latent, which stands for it alone.  Noise goes onto the picture, in
    [-1, 1], before it is encoded, as in SVD's training (arXiv 2311.15127); its level is one of the numbers.

    clip_vision: SVD's CLIP_VISION of ComfyUI.  vae: the CV-VAE of the latents.
    """

    def __init__(self, sampler: Sampler, clip_vision: Any, vae: VideoVAE, config: ConditioningConfig, facts: dict[str, Any]):
        self.base, self.clip_vision, self.vae, self.config = sampler.base, clip_vision, vae, config
        self.facts = facts | {"kind": "first frame", "vae": weights_hash(vae), "settings": [
            config.fps, config.motion_bucket, config.augmentations, config.augmentation_mean, config.augmentation_std]}

    def empty(self) -> dict[str, Tensor]:
        """A picture embedding of zeros, as ComfyUI's negative conditioning of SVD has it."""
        width = self.base.model_config.unet_config["context_dim"]
        return {"context": torch.zeros(1, width)}

    def __call__(self, sample: Sample, latents: Tensor) -> dict[str, Tensor]:
        config = self.config
        first = latents[None, :, :1].to(self.vae.device, self.vae.dtype)
        frame = self.vae.decode(first, frames=1, size=(sample.height, sample.width))  # [1, 3, 1, H, W]
        frame = frame.float().clamp(-1, 1)  # a picture, as a user has one
        picture = (frame[:, :, 0].movedim(1, -1) + 1) / 2
        context = self.clip_vision.encode_image(picture.cpu())["image_embeds"].float().cpu()  # [1, D]
        rng = Random(sample.key)
        levels = [math.exp(rng.gauss(config.augmentation_mean, config.augmentation_std))
                  for _ in range(config.augmentations)]
        shown = [latents[:, 0]] if not levels else [self._noised(frame, level, rng) for level in levels]
        fps = config.fps or float(Fraction(sample.fps)) / TIME_FACTOR
        numbers = [self.base.encode_adm(fps=max(1, round(fps)), motion_bucket_id=config.motion_bucket,
                                        augmentation_level=level)[0] for level in levels or [0.0]]
        return {"context": context, "concat": torch.stack(shown), "y": torch.stack(numbers)}

    def _noised(self, frame: Tensor, level: float, rng: Random) -> Tensor:
        """The latent [C, h, w] of ``frame`` with noise on it."""
        noise = torch.randn(frame.shape, generator=torch.Generator().manual_seed(rng.getrandbits(62)))
        noised = frame + level * noise.to(frame.device)
        return self.vae.encode(noised.to(self.vae.dtype)).mode()[0, :, 0].float().cpu()
