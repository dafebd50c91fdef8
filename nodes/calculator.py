"""CV-VAE Frames and Latents: how many latents for how many seconds, and which frame rate means what."""

from comfy_api.v0_0_2 import io

from ..cvvae.frames import TIME_FACTOR, frames_of, latents_of
from .common import IMAGES, VIDEO
from .host import show_text
from .latent_dict import LATENT_CATEGORY, count

SECONDS, FRAMES, LATENTS = "seconds", "frames", "latents"


class CVVAEFrameCalculator(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAEFrameCalculator",
            display_name="CV-VAE Frames and Latents",
            category=LATENT_CATEGORY,
            description="How many latents a sampler must make for a video of so many seconds or frames, and which frame "
                        "rate it should be told: a latent stands for four frames, so latents at 6 fps play at 24.",
            search_aliases=["cvvae", "frame calculator", "seconds to frames", "fps", "video length", "latent count"],
            inputs=[
                io.Combo.Input("start_from", options=[SECONDS, FRAMES, LATENTS], default=SECONDS,
                               tooltip=f"What 'amount' counts. '{LATENTS}' for models of a fixed length: 14 and 25 for SVD, "
                                       "16 for AnimateDiff."),
                io.Float.Input("amount", default=2.0, min=0.0, max=1e6, step=0.1,
                               tooltip="Rounded up to whole latents: the video is never shorter than you ask for."),
                io.Float.Input("fps", default=24.0, min=0.1, max=1000.0, step=0.1,
                               tooltip="Frame rate of the finished video. Lower it for slow motion of the same latents."),
                io.Combo.Input("batch_is", options=[VIDEO, IMAGES], default=VIDEO,
                               tooltip=f"'{VIDEO}': latents become four times as many frames, less three. '{IMAGES}': each "
                                       "latent becomes one frame."),
            ],
            outputs=[
                io.Int.Output(display_name="latents", tooltip="For the sampler: batch_size, or video_frames of SVD."),
                io.Int.Output(display_name="frames", tooltip="That come out of decoding."),
                io.Float.Output(display_name="fps", tooltip="For CV-VAE Decode or Create Video."),
                io.Int.Output(display_name="sampler_fps",
                              tooltip="Of the latents, rounded: what SVD's conditioning should be told."),
                io.Float.Output(display_name="seconds"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, start_from: str, amount: float, fps: float, batch_is: str) -> io.NodeOutput:
        video = batch_is == VIDEO
        if start_from == LATENTS:
            latents = max(1, round(amount))
        else:
            # Rounded, not up: 0.7 s at 10 fps is 7 frames, though the product is a little more.
            frames = max(1, round(amount * fps if start_from == SECONDS else amount))
            latents = latents_of(frames) if video else frames
        frames = frames_of(latents) if video else latents
        sampler_fps = fps / TIME_FACTOR if video else fps
        seconds = frames / fps
        show_text(f"{count(frames, 'frame')} from {count(latents, 'latent')}: {seconds:.2f} s at {fps:g} fps\n"
                  f"the sampler works at {sampler_fps:g} fps", cls.hidden.unique_id if cls.hidden else None)
        return io.NodeOutput(latents, frames, fps, max(1, round(sampler_fps)), seconds)
