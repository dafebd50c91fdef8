"""Save CV-VAE: into models/vae, where Load CV-VAE finds it."""

from itertools import count
from pathlib import Path

import torch
from comfy_api.v0_0_2 import io, ui

from .. import cvvae
from .common import CATEGORY, inside, require_cv_vae, writable_folder
from .host import show_text

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class CVVAESave(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAESave",
            display_name="Save CV-VAE",
            category=CATEGORY,
            description="Writes a CV-VAE into models/vae, for Load CV-VAE and for programs outside ComfyUI. Press R "
                        "afterwards: the loader then lists it. Existing files are kept.",
            search_aliases=["cvvae", "export vae"],
            is_output_node=True,
            inputs=[
                io.Vae.Input("vae", tooltip="A CV-VAE, for example from Finetune CV-VAE."),
                io.String.Input("name", default="my_cv_vae",
                                tooltip="Name of the file, without .safetensors; 'folder/name' makes a folder. Where there "
                                        "is a file of that name, the new one gets a number."),
                io.Combo.Input("dtype", options=list(DTYPES), default="fp16",
                               tooltip="Precision of the file. fp16 is half the size and exact enough to use; choose fp32 "
                                       "to train on from it, bf16 if fp16 warns of values that are not finite."),
                io.String.Input("description", default="", optional=True, advanced=True,
                                tooltip="Kept in the file: what it was trained on, for whom."),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, vae, name: str, dtype: str, description: str = "") -> io.NodeOutput:
        vae = require_cv_vae(vae, "For other VAEs use ComfyUI's own node VAESave.")
        path = unused(inside(writable_folder("vae"), name.strip().removesuffix(".safetensors"), "name"))
        path.parent.mkdir(parents=True, exist_ok=True)
        cvvae.save(vae.model, path, DTYPES[dtype], {"description": description})
        show_text(f"Saved as {path.name}", cls.hidden.unique_id if cls.hidden else None)
        return io.NodeOutput(ui=ui.PreviewText(f"Saved as {path}"))


def unused(path: Path) -> Path:
    """``path`` with .safetensors, or with _2, _3, ... before it where that exists."""
    names = (path.name if number == 1 else f"{path.name}_{number}" for number in count(1))
    return next(file for name in names if not (file := path.with_name(f"{name}.safetensors")).exists())
