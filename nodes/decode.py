"""CV-VAE Decode: latents to frames, at the length and size that were encoded."""

from fractions import Fraction

from comfy_api.v0_0_2 import io
from torch import Tensor

from ..cvvae.frames import latent_side, latents_of
from .common import CATEGORY, IMAGES, MODES, VIDEO, make_tiling, require_cv_vae, tiling_inputs
from .media import FPS, make_video

AUTO = "auto"


class CVVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAEDecode",
            display_name="CV-VAE Decode",
            category=CATEGORY,
            description="Decodes latents with a CV-VAE: t latents become 4t - 3 frames. Padding that CV-VAE Encode "
                        "added is cut off.",
            search_aliases=["cvvae", "latent to video", "vae decode video"],
            inputs=[
                io.Latent.Input("samples", tooltip="[t, C, h, w] with frames as batch, or clips [B, C, t, h, w]."),
                io.Vae.Input("vae", tooltip="A CV-VAE from Load CV-VAE."),
                io.Combo.Input("mode", options=[AUTO, *MODES], default=AUTO,
                               tooltip=f"'{VIDEO}': t latents become 4t - 3 frames. '{IMAGES}': t latents become t "
                                       f"pictures. '{AUTO}': as CV-VAE Encode made them; where that is unknown, "
                                       "latents with a time axis are clips, and batches are what Load CV-VAE says."),
                io.Int.Input("frames", default=0, min=0, max=65536,
                             tooltip="How many frames to keep, from the first. 0 keeps as many as were encoded, or all "
                                     "where that is unknown."),
                *tiling_inputs(),
                io.Float.Input("fps", default=0.0, min=0.0, max=240.0, step=0.01, optional=True,
                               tooltip="Frames per second of the output VIDEO. 0 keeps the speed of the video that was "
                                       f"encoded, or takes {FPS} where there was none."),
            ],
            outputs=[io.Image.Output(), io.Video.Output()],
        )

    @classmethod
    def execute(cls, samples, vae, mode: str, frames: int, fps: float = 0.0, **cut) -> io.NodeOutput:
        vae = require_cv_vae(vae, "For other VAEs use ComfyUI's own node VAE Decode.")
        latents = samples["samples"]
        origin = samples.get("cv_vae", {})
        mode = MODES.get(mode) or origin.get("mode") or vae.mode_of(latents)
        images = vae.decode_clip(latents, mode, make_tiling(**cut),
                                 frames or frames_encoded(origin, latents, mode), size_encoded(origin, latents))
        images = images.flatten(0, -4)
        speed = Fraction(fps).limit_denominator(1001) if fps else origin.get("fps", Fraction(FPS))
        return io.NodeOutput(images, make_video(images, speed, sound_of(origin, len(images), speed)))


# Latents may have been cut, joined or resized since they were encoded; then what was remembered no longer fits.


def frames_encoded(origin: dict, latents: Tensor, mode: str) -> int | None:
    frames = origin.get("frames")
    t = latents.shape[0] if latents.ndim == 4 else latents.shape[2]
    needed = latents_of(frames) if frames and mode == "video" else frames
    return frames if needed == t else None


def size_encoded(origin: dict, latents: Tensor) -> tuple[int, int] | None:
    size = origin.get("height", 0), origin.get("width", 0)
    fits = tuple(latent_side(side) for side in size) == tuple(latents.shape[-2:])
    return size if fits else None


def sound_of(origin: dict, frames: int, fps: Fraction) -> dict | None:
    """The sound of the video that was encoded, if the result has its frames at its speed."""
    unchanged = frames == origin.get("frames") and fps == origin.get("fps")
    return origin.get("sound") if unchanged else None
