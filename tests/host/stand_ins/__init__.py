"""A pack for tests only: narrow twins of Stable Diffusion 1.5 and Stable Video Diffusion that ComfyUI's own loaders load.

Every part has the layers of the published model and 32 channels instead of 320 to 1280.  The classes join ComfyUI's list
of models, by which it knows a checkpoint; random checkpoints, with the published names of tensors, are written
when the pack is loaded.
"""

import json
import tempfile
from functools import partial
from pathlib import Path

import comfy.clip_model
import comfy.clip_vision
import comfy.ops
import comfy.sd1_clip
import folder_paths
import torch
from comfy import supported_models
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.supported_models_base import ClipTarget
from comfy.taesd.taesd import TAESD
from safetensors.torch import save_file

NODE_CLASS_MAPPINGS = {}  # as a pack without nodes must say

WIDTH = 32
TEXT = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 2}
VISION = TEXT | {"projection_dim": WIDTH}
FOLDER = Path(comfy.clip_vision.__file__).parent
UNET = {"image_size": 32, "out_channels": 4, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1, "use_spatial_transformer": True, "legacy": False}
IN_TIME = {"extra_ff_mix_layer": True, "use_spatial_context": True, "merge_strategy": "learned_with_images",
           "merge_factor": 0.0, "video_kernel_size": [3, 1, 1], "num_classes": "sequential"}


class NarrowText(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, **kwargs):
        config = json.loads((FOLDER / "sd1_clip_config.json").read_text()) | TEXT
        super().__init__(clip_model=partial(comfy.sd1_clip.SDClipModel, textmodel_json_config=config,
                                            return_projected_pooled=False), **kwargs)


class NarrowVision(comfy.clip_vision.ClipVisionModel):
    """What the loader makes of a vision encoder, by the number of its layers; 32 of them are SVD's."""

    def __init__(self, json_config: str):
        with tempfile.TemporaryDirectory() as folder:
            narrow = Path(folder) / "narrow.json"
            narrow.write_text(json.dumps(json.loads(Path(json_config).read_text()) | VISION))
            super().__init__(str(narrow))


class NarrowSD15(supported_models.SD15):
    unet_config = supported_models.SD15.unet_config | {"model_channels": WIDTH, "context_dim": WIDTH}

    def clip_target(self, state_dict={}):  # noqa: B006  as ComfyUI declares it
        return ClipTarget(comfy.sd1_clip.SD1Tokenizer, NarrowText)


class NarrowSVD(supported_models.SVD_img2vid):
    unet_config = supported_models.SVD_img2vid.unet_config | {"model_channels": WIDTH, "context_dim": WIDTH}
    unet_extra_config = supported_models.SVD_img2vid.unet_extra_config | {"num_head_channels": WIDTH}


def unet(model: type, **more) -> dict[str, torch.Tensor]:
    config = UNET | {"in_channels": 4} | model.unet_config | model.unet_extra_config | more
    return {f"model.diffusion_model.{name}": weight
            for name, weight in UNetModel(**config, operations=comfy.ops.disable_weight_init).state_dict().items()}


def text() -> dict[str, torch.Tensor]:
    """The keys that SD 1.5 has for its text encoder."""
    model = NarrowText(dtype=torch.float32)
    return NarrowSD15(UNET).process_clip_state_dict_for_saving(dict(model.state_dict()))


def vision() -> dict[str, torch.Tensor]:
    """The keys that SVD has for its image encoder, which are OpenCLIP's."""
    outer = {"embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding.weight": "conv1.weight",
             "embeddings.position_embedding.weight": "positional_embedding", "pre_layrnorm": "ln_pre",
             "post_layernorm": "ln_post"}
    inner = {"encoder.layers.": "transformer.resblocks.", "layer_norm": "ln_", "mlp.fc1": "mlp.c_fc",
             "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
    model = NarrowVision(str(FOLDER / "clip_vision_config_h.json")).model
    state, renamed = dict(model.state_dict()), {"proj": model.visual_projection.weight.T}
    for layer in range(len(model.vision_model.encoder.layers)):
        for end in ("weight", "bias"):
            parts = [state.pop(f"vision_model.encoder.layers.{layer}.self_attn.{part}_proj.{end}") for part in "qkv"]
            renamed[f"transformer.resblocks.{layer}.attn.in_proj_{end}"] = torch.cat(parts)
    for name, weight in state.items():
        if name.startswith("vision_model."):
            name = name.removeprefix("vision_model.")
            for old, new in (outer | inner).items():
                name = name.replace(old, new)
            renamed[name] = weight
    return {NarrowSVD.clip_vision_prefix + name: weight for name, weight in renamed.items()}


def write(name: str, state: dict[str, torch.Tensor]) -> None:
    """Random weights of these names and shapes, small enough that signals neither vanish nor grow."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, weight in state.items():
        values = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            weights[key] = values * weight[0].numel() ** -0.5
        elif weight.ndim == 1:
            weights[key] = 0.02 * values + (1 if key.endswith("weight") else 0)
        else:
            weights[key] = weight.detach()
    folder = Path(folder_paths.get_folder_paths("checkpoints")[0])
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.half().contiguous() for key, value in weights.items()}, folder / name)


supported_models.models[:0] = [NarrowSD15, NarrowSVD]
comfy.clip_vision.ClipVisionModel = NarrowVision
# An image VAE has no narrow form in ComfyUI; TAESD's is small as it is, and found in checkpoints, too.
own_vae = {f"first_stage_model.{name}": weight for name, weight in TAESD(latent_channels=4).state_dict().items()}
write("narrow_sd15.safetensors", unet(NarrowSD15) | text() | own_vae)
write("narrow_svd.safetensors", unet(NarrowSVD, **IN_TIME) | vision())
