"""Load CV-VAE: a file of models/vae, or the built-in model, as a VAE for every node that takes one."""

import folder_paths
import torch
from comfy_api.v0_0_2 import io

from .common import CATEGORY, IMAGES, MODES, VIDEO
from .host import load_native

BUILT_IN = "tiny (built in)"
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class CVVAELoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAELoader",
            display_name="Load CV-VAE",
            category=CATEGORY,
            description="Loads a CV-VAE: a video VAE that packs four frames into one latent of the Stable Diffusion "
                        "kind. Works in every node that takes a VAE, CV-VAE's own and ComfyUI's.",
            search_aliases=["cvvae", "video vae", "load vae"],
            inputs=[
                io.Combo.Input("vae_name", options=[BUILT_IN, *folder_paths.get_filename_list("vae")], default=BUILT_IN,
                               tooltip="A CV-VAE in ComfyUI's folder models/vae. The built-in tiny model needs no "
                                       "download but only demonstrates. For real work use published weights: 4 "
                                       "channels for SD 1.5, SD 2.1 and SVD, 16 for SD 3."),
                io.Combo.Input("batch_is", options=list(MODES), default=VIDEO,
                               tooltip=f"What a batch means in ComfyUI's own VAE nodes. '{VIDEO}': the frames of one "
                                       f"clip, 17 frames make 5 latents. '{IMAGES}': each image makes a latent of its "
                                       "own; choose it for batches of pictures."),
                io.Combo.Input("dtype", options=list(DTYPES), default="auto",
                               tooltip="Precision of weights and computation. 'auto' is bf16 where the device has it, "
                                       "else fp32. Choose fp32 for the finest result at twice the memory; fp16 on "
                                       "devices that are slow in bf16."),
            ],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls, vae_name: str, batch_is: str, dtype: str) -> io.NodeOutput:
        source = "tiny" if vae_name == BUILT_IN else folder_paths.get_full_path_or_raise("vae", vae_name)
        return io.NodeOutput(load_native(source, MODES[batch_is], DTYPES[dtype]))
