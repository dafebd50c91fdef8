"""Evaluate CV-VAE: scores of a clip that went through it, beside its image VAE, and the pictures behind them."""

from functools import partial

from comfy_api.v0_0_2 import io
from torch import Tensor

from .. import cvvae
from .common import TRAINING_CATEGORY, as_image, image_vae_input, image_vae_of, require_cv_vae, teacher_input
from .host import NativeVAE, all_memory, check_cancelled, training_device, weights_of
from .media import media_input, read_media

NONE = "none"


class CVVAEEvaluate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAEEvaluate",
            display_name="Evaluate CV-VAE",
            category=TRAINING_CATEGORY,
            description="Measures what a CV-VAE does to a clip, and how well its latents suit the image VAE whose latent "
                        "space it shares. Computes in fp32. Use a clip it was not trained on.",
            search_aliases=["cvvae", "psnr", "ssim", "vae quality"],
            inputs=[
                io.Vae.Input("vae", tooltip="The CV-VAE to measure."),
                media_input("images", "A video, or the frames of one clip in their order."),
                teacher_input("The image VAE to compare with: the one this CV-VAE was made of. 'none' measures the "
                              "reconstruction only.", NONE),
                io.Int.Input("frames", default=33, min=0, max=4096,
                             tooltip="How many frames are used, from the first; 0: all. Lower it to be done sooner."),
                io.String.Input("title", default="CV-VAE",
                                tooltip="Heads the report and the contact sheet. Change it to tell several apart."),
                image_vae_input(),
            ],
            outputs=[io.String.Output(display_name="report"), io.Image.Output(display_name="contact_sheet")],
        )

    @classmethod
    def execute(cls, vae, images, teacher: str, frames: int, title: str, image_vae=None) -> io.NodeOutput:
        from ..cvvae.training.pictures import clip_sheet  # here, so that ComfyUI starts without waiting for PyAV

        vae = require_cv_vae(vae, "Image VAEs are what it is compared with: connect them to image_vae.")
        images = read_media(images).images[:frames or None]
        with all_memory():
            compared = image_vae_of(teacher, image_vae) if image_vae is not None or teacher != NONE else None
            evaluation = measured(vae, compared, images)
        return io.NodeOutput(report(title, images, evaluation.scores), as_image(clip_sheet(title, evaluation.pictures)))


def measured(vae: NativeVAE, image_vae: cvvae.ImageVAE | None, images: Tensor):
    """The library's evaluation of the weights of ``vae``, in float32 whatever ComfyUI holds them in."""
    from ..cvvae.training.evaluation import evaluate_clip

    device, _ = training_device()
    model = cvvae.load(weights_of(vae), device=device)
    for name in ("encode", "decode"):
        setattr(model, name, partial(getattr(model, name), check=check_cancelled))
    clip = images[..., :3].movedim(-1, 0)[None].float().to(device) * 2 - 1
    return evaluate_clip(model, None if image_vae is None else image_vae.to(device), clip)


def report(title: str, images: Tensor, scores: dict[str, float]) -> str:
    """A list of the scores, that reads well as plain text and as Markdown."""
    from ..cvvae.training.evaluation import SCORES, cell

    frames, height, width = images.shape[:3]
    lines = [f"{title}, {frames} frames of {width} x {height}", ""]
    lines += [f"- {name}: {cell(scores, name)} ({SCORES[name].meaning})" for name in scores]
    return "\n".join(lines) + "\n"
