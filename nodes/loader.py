"""Load CV-VAE: a file of models/vae, or the built-in model, as a VAE for every node that takes one."""

import os
import re
from functools import lru_cache

import folder_paths
import torch
from comfy_api.v0_0_2 import io

from ..cvvae.checkpoint import SAFETENSORS, CheckpointError, refusal
from ..cvvae.download import PUBLISHED
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
                io.Combo.Input("vae_name", options=[BUILT_IN, *listed()], default=BUILT_IN,
                               tooltip="A CV-VAE in ComfyUI's folder models/vae. Files that are none stand last, with what "
                                       "they are in brackets. The built-in tiny model needs no download but only "
                                       "demonstrates. For real work use published weights, which Download CV-VAE fetches: "
                                       "4 channels for SD 1.5, SD 2.1 and SVD, 16 for SD 3."),
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
    def validate_inputs(cls, vae_name: str | None = None) -> bool | str:
        """Before anything runs; None stands for a name that another node will give."""
        if vae_name in (None, BUILT_IN):
            return True
        name = file_of(vae_name)
        path = folder_paths.get_full_path("vae", name)
        problem = refused(path) if path else missing(name)
        return str(problem) if problem else True

    @classmethod
    def execute(cls, vae_name: str, batch_is: str, dtype: str) -> io.NodeOutput:
        if vae_name == BUILT_IN:
            source = "tiny"
        elif not (source := folder_paths.get_full_path("vae", file_of(vae_name))):
            raise FileNotFoundError(missing(file_of(vae_name)))
        return io.NodeOutput(load_native(source, MODES[batch_is], DTYPES[dtype]))


# -- what there is -----------------------------------------------------------------------------------


def listed() -> list[str]:
    """The files of models/vae: CV-VAEs, then those whose header says nothing, then others, marked with what they are.

    A marked name is never one that loads, so a workflow that was saved with a file's plain name keeps its meaning.
    """
    groups: tuple[list[str], list[str], list[str]] = [], [], []
    for name in folder_paths.get_filename_list("vae"):
        path = folder_paths.get_full_path("vae", name)
        if path is None:  # gone since the list was made
            continue
        if not name.endswith(SAFETENSORS):
            groups[1].append(name)
        elif problem := refused(path):
            groups[2].append(f"{name} ({problem.kind})")
        else:
            groups[0].append(name)
    return [name for group in groups for name in group]


def file_of(value: str) -> str:
    """The file behind an entry of the list, marked or not."""
    return re.sub(r"(\.\w+) \([^()]+\)$", r"\1", value)


def refused(path: str) -> CheckpointError | None:
    """Why the file at ``path`` is no CV-VAE, if that can be told without opening more than its header."""
    if not path.endswith(SAFETENSORS):
        return None
    try:
        facts = os.stat(path)
        return _refused(path, facts.st_mtime_ns, facts.st_size)
    except OSError as error:
        return CheckpointError(f"{path} cannot be read ({error.strerror or error}). Look at its permissions and its disk.",
                               "cannot be read")


@lru_cache(maxsize=4096)
def _refused(path: str, changed: int, size: int) -> CheckpointError | None:
    return refusal(path)


def missing(file: str) -> str:
    """What to do about a file that is not there."""
    folders = " or ".join(folder_paths.get_folder_paths("vae"))
    for name, published in PUBLISHED.items():
        if published.file == file:
            return (f"{file} is not in {folders}. Add the node Download CV-VAE, choose {name} and run it; or save "
                    f"{published.url} there as {file}. Then press R.")
    return (f"{file} is not in {folders}. Put it there and press R, or choose another file; Download CV-VAE fetches "
            "published weights.")
