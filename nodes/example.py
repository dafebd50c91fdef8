"""CV-VAE Example Media: the clip and the picture that come with the pack, so that its workflows run as they are."""

from pathlib import Path

import numpy as np
import torch
from comfy_api.v0_0_2 import io

from .common import CATEGORY

FOLDER = Path(__file__).parent.parent / "workflows" / "media"
FILES = {"flower clip (33 frames)": "flower.mp4", "cat photo": "cat.jpg"}


class CVVAEExample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAEExample",
            display_name="CV-VAE Example Media",
            category=CATEGORY,
            description="A short clip and a picture to try CV-VAE with. Replace this node by Load Video with Get Video "
                        "Components, or by Load Image, to use your own.",
            inputs=[io.Combo.Input("media", options=list(FILES), tooltip="Which file of workflows/media to load.")],
            outputs=[io.Image.Output(display_name="images"), io.Float.Output(display_name="fps")],
        )

    @classmethod
    def execute(cls, media: str) -> io.NodeOutput:
        frames, fps = read_frames(FOLDER / FILES[media])
        return io.NodeOutput(torch.from_numpy(np.stack(frames)).float() / 255, fps)


def read_frames(path: Path) -> tuple[list[np.ndarray], float]:
    """RGB frames [H, W, 3] of a clip or picture, and frames per second (a picture has 1)."""
    import av  # here, so that ComfyUI starts without waiting for it

    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
        return frames, float(stream.average_rate) if len(frames) > 1 else 1.0
