"""CV-VAE Decode: latents to frames, at the length and size that were encoded."""

from comfy_api.v0_0_2 import io
from torch import Tensor

from ..cvvae.frames import latent_side, latents_of
from .common import CATEGORY, IMAGES, MODES, VIDEO, make_tiling, require_cv_vae, tiling_inputs

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
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples, vae, mode: str, frames: int, **cut) -> io.NodeOutput:
        vae = require_cv_vae(vae, "For other VAEs use ComfyUI's own node VAE Decode.")
        latents = samples["samples"]
        origin = samples.get("cv_vae", {})
        mode = MODES.get(mode) or origin.get("mode") or vae.mode_of(latents)
        images = vae.decode_clip(latents, mode, make_tiling(**cut),
                                 frames or frames_encoded(origin, latents, mode), size_encoded(origin, latents))
        return io.NodeOutput(images.flatten(0, -4))


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
