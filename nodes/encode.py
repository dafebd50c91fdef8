"""CV-VAE Encode: any number of frames of any size, padded, never cropped."""

from comfy_api.v0_0_2 import io

from .common import CATEGORY, IMAGES, MODES, VIDEO, make_tiling, require_cv_vae, tiling_inputs
from .media import media_input, read_media

FRAMES_AS_BATCH, CLIP = "frames as batch", "clip with time axis"
AS_LOADED = "as loaded"


class CVVAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAEEncode",
            display_name="CV-VAE Encode",
            category=CATEGORY,
            description="Encodes frames with a CV-VAE: 1 + 4n frames become 1 + n latents. Other lengths are padded "
                        "with the last frame and other sizes with their edge; CV-VAE Decode cuts that off again.",
            search_aliases=["cvvae", "video to latent", "vae encode video"],
            inputs=[
                media_input("pixels", "A video, the frames of one clip in their order, or pictures. Of a video CV-VAE "
                                      "Decode gets the speed and the sound as well."),
                io.Vae.Input("vae", tooltip="A CV-VAE from Load CV-VAE."),
                io.Combo.Input("mode", options=[AS_LOADED, *MODES], default=AS_LOADED,
                               tooltip=f"'{VIDEO}': four frames share a latent. '{IMAGES}': each frame has a latent "
                                       f"of its own; for pictures. '{AS_LOADED}': what Load CV-VAE says."),
                io.Combo.Input("layout", options=[FRAMES_AS_BATCH, CLIP], default=FRAMES_AS_BATCH,
                               tooltip="Keep frames as batch for SD 1.5, AnimateDiff and SVD: their samplers take no "
                                       "other form. Change it for nodes that want time as an axis of its own."),
                *tiling_inputs(),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, pixels, vae, mode: str, layout: str, **cut) -> io.NodeOutput:
        vae = require_cv_vae(vae, "For other VAEs use ComfyUI's own node VAE Encode.")
        mode = MODES.get(mode, vae.batch_is)
        media = read_media(pixels)
        latents = vae.encode_clip(media.images, mode, make_tiling(**cut))
        if layout == CLIP:
            latents = latents.movedim(0, 1)[None]
        frames, height, width = media.images.shape[:3]
        # For CV-VAE Decode; samplers and most latent nodes pass it on.
        origin = {"mode": mode, "frames": frames, "height": height, "width": width}
        origin |= {key: value for key, value in (("fps", media.fps), ("sound", media.sound)) if value is not None}
        return io.NodeOutput({"samples": latents, "cv_vae": origin})
