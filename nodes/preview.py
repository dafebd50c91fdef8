"""CV-VAE Preview Latents: what latents show, without decoding them."""

from weakref import WeakKeyDictionary

from comfy_api.v0_0_2 import io, ui

from ..cvvae.frames import SPACE_FACTOR
from ..cvvae.latents.preview import LinearPreview, fit_preview, load_preview, pairs_of
from ..cvvae.latents.statistics import EXPECTED
from ..cvvae.metrics import held
from .example import FILES, CVVAEExample
from .host import latent_colours
from .latent_dict import LATENT_CATEGORY, coders, read
from .loader import BUILT_IN

COLOURS = {f"{channels} channels ({expected.family})": channels for channels, expected in EXPECTED.items()}
LATENTS, FRAMES = "one picture per latent", "one picture per frame"
FRAMES_TO_FIT = 9  # of each example clip: more of them show the same colours again

fitted: WeakKeyDictionary = WeakKeyDictionary()  # the map of each model it was asked for


class CVVAEPreviewLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAEPreviewLatents",
            display_name="CV-VAE Preview Latents",
            category=LATENT_CATEGORY,
            description="Shows latents at once, without decoding: colours and motion, no edges. To look at what goes into a "
                        "long decode or comes out of a latent node. Takes frames as batch [t, C, h, w] and clips "
                        "[B, C, t, h, w].",
            search_aliases=["cvvae", "latent preview", "latent to rgb", "latent2rgb", "quick preview", "show latents"],
            is_output_node=True,
            inputs=[
                io.Latent.Input("samples", tooltip="Latents of the model chosen below."),
                io.Combo.Input("model", options=[BUILT_IN, *COLOURS], default=BUILT_IN,
                               tooltip="The model that the latents belong to: with another one the colours are wrong. By "
                                       "channels are ComfyUI's own colours for SD 1.5 and SD 3, in whose latent spaces the "
                                       "published weights work."),
                io.Combo.Input("show", options=[LATENTS, FRAMES], default=LATENTS,
                               tooltip=f"Choose '{FRAMES}' to play it beside the decoded clip: each picture is held for the "
                                       "frames its latent stands for."),
                io.Int.Input("scale", default=SPACE_FACTOR, min=1, max=SPACE_FACTOR,
                             tooltip="Pixels per latent. 8 is the size of the decoded frames; lower it for very many or "
                                     "very large ones."),
                io.Vae.Input("vae", optional=True,
                             tooltip="Takes the place of 'model': connect a CV-VAE that you trained. Its colours are fitted "
                                     "to the example clips, once for each time it is loaded."),
            ],
            outputs=[io.Image.Output(display_name="images")],
        )

    @classmethod
    def execute(cls, samples, model: str, show: str, scale: int, vae=None) -> io.NodeOutput:
        source = read(samples)
        preview = preview_of(model) if vae is None else fitted_to(vae)
        pictures = (preview.pictures(source.clips, scale).movedim(1, -1) + 1) / 2  # [B, t, H, W, 3]
        if show == FRAMES and source.mode == "video":
            pictures = held(pictures.transpose(0, 1), source.frames).transpose(0, 1)
        images = pictures.flatten(0, 1).cpu()
        return io.NodeOutput(images, ui=ui.PreviewImage(images, cls=cls))


def preview_of(model: str) -> LinearPreview:
    return load_preview("tiny") if model == BUILT_IN else latent_colours(COLOURS[model])


def fitted_to(vae) -> LinearPreview:
    """The map of a connected CV-VAE."""
    _, encode = coders(vae)
    if vae.model not in fitted:
        clips = [CVVAEExample.execute(media).args[0][:FRAMES_TO_FIT].movedim(-1, 0)[None] * 2 - 1 for media in FILES]
        fitted[vae.model] = fit_preview(pairs_of(lambda clip: encode((clip + 1) / 2), clips))
    return fitted[vae.model]
