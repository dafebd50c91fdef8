"""Inflate to CV-VAE: the video VAE that an image VAE is before any training."""

import torch
from comfy_api.v0_0_2 import io

from .. import cvvae
from .common import MODES, TRAINING_CATEGORY, VIDEO, image_vae_input, image_vae_of, teacher_input
from .host import load_native


class CVVAEInflate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAEInflate",
            display_name="Inflate to CV-VAE",
            category=TRAINING_CATEGORY,
            description="Makes a CV-VAE of an image VAE. Single frames come out as the image VAE makes them; motion is "
                        "blurred or held until Finetune CV-VAE has trained it. Computes in fp32.",
            search_aliases=["cvvae", "video vae from image vae"],
            inputs=[
                teacher_input("The image VAE to start from, a file in models/vae: choose the one of the diffusion model "
                              "whose latents you work with. The built-in one only demonstrates."),
                image_vae_input(),
            ],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls, teacher: str, image_vae=None) -> io.NodeOutput:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
            torch.manual_seed(0)  # the silent layers are drawn: the same ones each time
            inflated = cvvae.inflate(image_vae_of(teacher, image_vae))
        return io.NodeOutput(load_native(inflated.state_dict(), MODES[VIDEO], torch.float32))
