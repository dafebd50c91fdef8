"""Finetune CV-VAE: the library's trainer as a node, with progress, previews, Cancel and resume."""

from comfy_api.v0_0_2 import io

from .common import TRAINING_CATEGORY, image_vae_input, teacher_input
from .media import media_input, read_media
from .presets import DEMONSTRATION, PRESETS


class CVVAEFinetune(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAEFinetune",
            display_name="Finetune CV-VAE",
            category=TRAINING_CATEGORY,
            description="Trains a CV-VAE on your clips so that an image VAE's models understand its latents. Cancel keeps "
                        "what was trained; the next run goes on from there. Everything is kept in ComfyUI's output folder, "
                        "in cv-vae, in a folder with the run's name.",
            search_aliases=["cvvae", "train vae", "video vae training"],
            is_output_node=True,
            inputs=[
                io.String.Input("folder", default="examples",
                                tooltip="Videos and pictures to train on: a folder in ComfyUI's input folder, or a whole "
                                        "path. 'examples' are the few clips of this pack; leave it empty to train on "
                                        "'images' alone. Of four videos or more, one in four is held out to measure on, "
                                        "two at most."),
                io.Combo.Input("preset", options=list(PRESETS), default=DEMONSTRATION,
                               tooltip="Clip sizes, batches and losses, by the memory of your graphics card. Larger ones "
                                       "give better results and take longer. The demonstration suits the built-in image "
                                       "VAE only."),
                io.Int.Input("steps", default=1000, min=1, max=10_000_000,
                             tooltip="Where the run ends, counted from its beginning: raise it to go on with a finished "
                                     "run. The paper took 200,000; a few thousand show whether your data works."),
                io.Float.Input("learning_rate", default=1e-4, min=1e-7, max=1e-1, step=1e-6, round=False,
                               tooltip="How far each step goes. Leave it at 0.0001 for image VAEs of the usual size; lower "
                                       "it if the losses jump, or if you go on from a trained CV-VAE."),
                teacher_input("The image VAE whose latents the CV-VAE has to keep to, a file in models/vae: that of the "
                              "diffusion model you work with. The built-in one only demonstrates."),
                io.String.Input("run", default="finetune",
                                tooltip="Name of the run, and of its folder. Give a new one for other data, another image "
                                        "VAE or a fresh start."),
                io.Boolean.Input("resume", default=True,
                                 tooltip="Go on with the run of this name, if there is one. Switch it off to be told "
                                         "instead that the name is taken."),
                # Fixed, because a run goes on only with the seed it began with.
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1, control_after_generate=False, advanced=True,
                             tooltip="Which clips are drawn when. Change it, together with the name, to see how much of a "
                                     "result is chance."),
                media_input("images", "A video, or the frames of one clip in their order, to train on beside the folder. If "
                                      "it is long enough, its last frames are held out to measure on.", optional=True),
                image_vae_input(),
                io.Vae.Input("cv_vae", optional=True,
                             tooltip="A CV-VAE to go on from, in the latent space of the image VAE; load it in fp32. "
                                     "Without one, the image VAE is inflated."),
            ],
            outputs=[io.Vae.Output(), io.LossMap.Output(display_name="loss_map"), io.String.Output(display_name="run"),
                     io.Image.Output(display_name="loss_plot")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, folder: str, preset: str, steps: int, learning_rate: float, teacher: str, run: str, resume: bool,
                seed: int, images=None, image_vae=None, cv_vae=None) -> io.NodeOutput:
        from .training import finetune  # here, so that ComfyUI starts without waiting for the trainer and PyAV

        node_id = cls.hidden.unique_id if cls.hidden else None
        images = None if images is None else read_media(images).images
        return io.NodeOutput(*finetune(folder, PRESETS[preset], steps, learning_rate, teacher, run, resume, seed, images,
                                       image_vae, cv_vae, node_id))
