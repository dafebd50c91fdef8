"""What several nodes share: their widgets, and the reading of what is wired into them."""

import dataclasses
import os
from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy_api.v0_0_2 import io
from torch import Tensor

from .. import cvvae
from ..cvvae.tiling import QUALITY, Tiling
from .host import NativeVAE, weights_of

CATEGORY = "CV-VAE"
TRAINING_CATEGORY = f"{CATEGORY}/training"
VIDEO, IMAGES = "video clip", "independent images"
MODES = {VIDEO: "video", IMAGES: "image"}
AS_SET, SMOOTH = "as set", "quality"
BUILT_IN_IMAGE_VAE = "tiny image VAE (built in)"


def tiling_inputs() -> list[io.Input]:
    """The widgets of the chunk plan, hidden under "advanced": their defaults are how the weights were made."""
    return [
        io.Int.Input("window", default=17, min=5, max=4097, step=4, advanced=True,
                     tooltip="Frames computed together (1 + 4n). Leave it at 17: the published weights were trained "
                             "with it. Lower it only if memory runs out with the smallest tile."),
        io.Int.Input("tile", default=576, min=64, max=4096, step=32, advanced=True,
                     tooltip="Side of a tile in pixels. Lower it when memory runs out; raise it when you see seams or "
                             "colour shifts between tiles and have memory to spare."),
        io.Int.Input("overlap", default=128, min=0, max=2048, step=8, advanced=True,
                     tooltip="Pixels that neighbouring tiles share and blend. Raise it when you see seams; at most "
                             "half a tile."),
        io.Float.Input("memory", default=0.0, min=0.0, max=1024.0, step=0.25, optional=True, advanced=True,
                       tooltip="Gigabytes that computing may take beside the weights; 0 takes what is free. Lower it to "
                               "leave room for other models. Less memory costs time and changes nothing in the result, "
                               "as long as the log does not speak of smaller tiles."),
        io.Combo.Input("pieces", options=[AS_SET, SMOOTH], default=AS_SET, optional=True, advanced=True,
                       tooltip=f"'{AS_SET}': windows and tiles as window, tile and overlap say, by default as the weights "
                               f"were made. '{SMOOTH}': windows and tiles that share more than that and cross-fade; "
                               "choose it when you see a jump every 16 frames or borders in large pictures. Takes 1.3 "
                               "times as long, with large pictures up to four times."),
    ]


def make_tiling(window: int, tile: int, overlap: int, memory: float = 0.0, pieces: str = AS_SET) -> Tiling:
    bytes_or_auto = int(memory * 10 ** 9) if memory else "auto"
    if pieces == SMOOTH:
        return dataclasses.replace(QUALITY, memory=bytes_or_auto)
    return Tiling(window_frames=window, tile_pixels=tile, overlap_pixels=overlap, memory=bytes_or_auto)


def require_cv_vae(vae, otherwise: str) -> NativeVAE:
    """``vae``, if it is a CV-VAE; else raises TypeError.  otherwise: what to do with another one, as a sentence."""
    if not isinstance(vae, NativeVAE):
        raise TypeError("This node works with CV-VAE models only, such as those of Load CV-VAE; found "
                        f"{type(vae).__name__}. {otherwise}")
    return vae


# -- the image VAE behind a CV-VAE ---------------------------------------------------------------------


def teacher_input(tooltip: str, *first: str) -> io.Input:
    """Choice of an image VAE; ``first`` options come before the files."""
    options = [*first, BUILT_IN_IMAGE_VAE, *folder_paths.get_filename_list("vae")]
    return io.Combo.Input("teacher", options=options, default=BUILT_IN_IMAGE_VAE, tooltip=tooltip)


def image_vae_input() -> io.Input:
    return io.Vae.Input("image_vae", optional=True,
                        tooltip="Takes the place of 'teacher': an image VAE of ComfyUI, such as that of Load Checkpoint. "
                                "ComfyUI may hold it in bf16; choose its file in 'teacher' for all of its precision.")


def image_vae_of(teacher: str, image_vae) -> cvvae.ImageVAE:
    """What is wired into ``image_vae``, else what ``teacher`` names; on the CPU, in float32."""
    with torch.inference_mode(False):
        if image_vae is not None:
            try:
                return cvvae.load_image_vae(weights_of(image_vae))
            except cvvae.CheckpointError as error:
                raise cvvae.CheckpointError(f"What is connected to image_vae does not fit. {error}") from None
        return cvvae.load_image_vae("tiny" if teacher == BUILT_IN_IMAGE_VAE
                                    else folder_paths.get_full_path_or_raise("vae", teacher))


# -- folders and pictures ----------------------------------------------------------------------------


def inside(folder: str | os.PathLike, name: str, what: str) -> Path:
    """The path of ``name`` in ``folder``; raises ValueError where it leads out of it."""
    folder = Path(folder).resolve()
    path = (folder / name.strip()).resolve()
    if folder not in path.parents:
        raise ValueError(f"{what} is {name!r}; expected a name, which becomes one in {folder}.")
    return path


def writable_folder(kind: str) -> Path:
    """The first of ComfyUI's folders of models of ``kind`` that may be written to."""
    folders = folder_paths.get_folder_paths(kind)
    for folder in map(Path, folders):
        if os.access(folder if folder.exists() else folder.parent, os.W_OK):
            return folder
    raise PermissionError(f"None of ComfyUI's folders models/{kind} may be written to: {', '.join(folders)}.")


def runs_folder() -> Path:
    """Where the finetunes lie, a folder each."""
    return Path(folder_paths.get_output_directory()) / "cv-vae"


def as_image(pixels: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> ComfyUI's [1, H, W, 3] in [0, 1]."""
    return torch.from_numpy(pixels)[None].float() / 255
