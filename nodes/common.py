"""What the encode and decode nodes share: their widgets, and the check of what is wired into them."""

import dataclasses

from comfy_api.v0_0_2 import io

from ..cvvae.tiling import QUALITY, Tiling
from .host import NativeVAE

CATEGORY = "CV-VAE"
VIDEO, IMAGES = "video clip", "independent images"
MODES = {VIDEO: "video", IMAGES: "image"}
AS_SET, SMOOTH = "as set", "quality"


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


def require_cv_vae(vae, native_node: str) -> NativeVAE:
    if not isinstance(vae, NativeVAE):
        raise TypeError(f"This node works with CV-VAE models only, from the node Load CV-VAE; found "
                        f"{type(vae).__name__}. For other VAEs use ComfyUI's own node {native_node}.")
    return vae
