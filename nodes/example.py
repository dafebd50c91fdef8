"""CV-VAE Example Media: the clip and the picture that come with the pack, so that its workflows run as they are."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from comfy_api.v0_0_2 import io

from .common import CATEGORY
from .media import make_video

FOLDER = Path(__file__).parent.parent / "workflows" / "media"
FILES = {"flower clip (33 frames)": "flower.mp4", "cat photo": "cat.jpg", "goats clip (33 frames)": "goats.mp4",
         "frog clip (33 frames)": "frog.mp4", "bee clip (33 frames)": "bee.mp4"}


class CVVAEExample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAEExample",
            display_name="CV-VAE Example Media",
            category=CATEGORY,
            description="Short clips and a picture to try CV-VAE with. Replace this node by Load Video with Get Video "
                        "Components, or by Load Image, to use your own.",
            search_aliases=["cvvae", "sample video", "demo clip", "test image"],
            inputs=[io.Combo.Input("media", options=list(FILES),
                                   tooltip="Which clip or picture to load. Change it to see other motion: the flower "
                                           "opens slowly, the bee moves fast.")],
            outputs=[io.Image.Output(display_name="images"), io.Float.Output(display_name="fps"),
                     io.Video.Output(display_name="video")],
        )

    @classmethod
    def execute(cls, media: str) -> io.NodeOutput:
        from ..cvvae.video import probe, read_frames  # here, so that ComfyUI starts without waiting for PyAV

        path = FOLDER / FILES[media]
        frames = np.stack([frame.pixels for frame in read_frames(path)])
        fps = probe(path).fps if len(frames) > 1 else Fraction(1)
        images = torch.from_numpy(frames).float() / 255
        return io.NodeOutput(images, float(fps), make_video(images, fps))
