"""Adapt Sampler to CV-VAE: the library's adaptation as a node, with progress, Cancel and resume."""

import folder_paths
from comfy_api.v0_0_2 import io

from .common import TRAINING_CATEGORY

OUTPUT, BOTH, LORA = "output layer", "output and input layers", "LoRA on temporal layers"
TRAIN = {OUTPUT: "output", BOTH: "output+input", LORA: "lora"}
NO_MOTION = "none"
MOTION_FOLDER = "animatediff_models"  # as packs for AnimateDiff name it to ComfyUI


class CVVAEAdapt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAEAdapt",
            display_name="Adapt Sampler to CV-VAE",
            category=TRAINING_CATEGORY,
            description="Trains a diffusion model (SVD, SD 1.x, SD 2.x, AnimateDiff) to make CV-VAE's latents, which stand "
                        "for four frames each. The result is a LoRA file for ComfyUI's own loader. Cancel keeps what was "
                        "trained; the next run goes on from there. Everything is kept in ComfyUI's output folder, in "
                        "cv-vae, in a folder with the run's name.",
            search_aliases=["cvvae", "train lora", "svd training", "finetune svd"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model to adapt. LoRAs on it count as part of it."),
                io.String.Input("folder", default="",
                                tooltip="What to train on: a folder that encode-dataset wrote, or a folder of videos, which "
                                        "are then encoded with 'vae'. In ComfyUI's input folder, or a whole path. Of four "
                                        "videos or more, one in four is held out to measure on, two at most."),
                io.Combo.Input("train", options=list(TRAIN), default=OUTPUT,
                               tooltip=f"'{OUTPUT}' is what the paper trains of SVD: few weights, little memory, little can "
                                       f"go wrong. Try '{LORA}' (SVD only) if motion stays jerky; it needs most memory."),
                io.Int.Input("steps", default=5000, min=1, max=10_000_000,
                             tooltip="Where the run ends, counted from its beginning: raise it to go on with a finished "
                                     "run. The paper took 5,000."),
                io.Float.Input("learning_rate", default=1e-5, min=1e-7, max=1e-1, step=1e-6, round=False,
                               tooltip="How far each step goes. 0.00001 is the paper's; try 0.0001 with a LoRA or with few "
                                       "steps, and lower it if the loss jumps."),
                io.String.Input("run", default="adapt",
                                tooltip="Name of the run, of its folder, and of the file in models/loras/cv-vae. Give a new "
                                        "one for other data, another model or a fresh start."),
                io.Boolean.Input("resume", default=True,
                                 tooltip="Go on with the run of this name, if there is one. Switch it off to be told "
                                         "instead that the name is taken."),
                io.Int.Input("latents", default=25, min=0, max=4096,
                             tooltip="Of each clip, from its start: 25 (97 frames) for SVD XT, 14 (53 frames) for SVD, 16 "
                                     "(61 frames) for AnimateDiff. 0 takes clips as long as they are."),
                io.Int.Input("width", default=1024, min=0, max=4096, step=8,
                             tooltip="Videos are resized and cut to it before they are encoded; 0 leaves them as they are. "
                                     "Has no part where the folder holds latents already."),
                io.Int.Input("height", default=576, min=0, max=4096, step=8, tooltip="As width."),
                io.Int.Input("rank", default=16, min=1, max=256, advanced=True,
                             tooltip=f"Of '{LORA}'. Raise it if the held-out loss stops falling early."),
                # Fixed, because a run goes on only with the seed it began with.
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1, control_after_generate=False, advanced=True,
                             tooltip="Which clips and noises are drawn when."),
                io.Vae.Input("vae", optional=True,
                             tooltip="The CV-VAE whose latents are to be made. Needed for SVD and for folders of videos; "
                                     "load it in fp32."),
                io.ClipVision.Input("clip_vision", optional=True,
                                    tooltip="SVD's image encoder, from Image Only Checkpoint Loader. Needed for SVD."),
                io.Conditioning.Input("positive", optional=True,
                                      tooltip="SD 1.x and 2.x: the text that all clips are shown with. Needed for them."),
                io.Conditioning.Input("negative", optional=True,
                                      tooltip="SD 1.x and 2.x: an empty text, shown in place of 'positive' one time in ten, "
                                              "so that CFG keeps working. Without it, 'positive' is always shown."),
                io.Combo.Input("motion_module", options=[NO_MOTION, *motion_modules()], default=NO_MOTION, optional=True,
                               tooltip="SD 1.5 for AnimateDiff: the motion module (v2 or v3) that it will sample with, from "
                                       "models/animatediff_models, listed where AnimateDiff-Evolved is installed. It stays "
                                       "as it is. Connect the MODEL from before AnimateDiff's loader, and set 'latents' to "
                                       "16."),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="lora_name"),
                     io.LossMap.Output(display_name="loss_map"), io.Image.Output(display_name="loss_plot")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, folder: str, train: str, steps: int, learning_rate: float, run: str, resume: bool, latents: int,
                width: int, height: int, rank: int, seed: int, vae=None, clip_vision=None, positive=None,
                negative=None, motion_module: str = NO_MOTION) -> io.NodeOutput:
        from .adaptation import Told, adapt  # here, so that ComfyUI starts without waiting for the trainer and PyAV

        node_id = cls.hidden.unique_id if cls.hidden else None
        told = Told(vae, clip_vision, positive, negative)
        motion = "" if motion_module == NO_MOTION else folder_paths.get_full_path_or_raise(MOTION_FOLDER, motion_module)
        return io.NodeOutput(*adapt(model, motion, folder, TRAIN[train], steps, learning_rate, run, resume, latents,
                                    (height, width), rank, seed, told, node_id))


def motion_modules() -> list[str]:
    """Files of motion modules; none where no pack has told ComfyUI of a folder of them."""
    known = MOTION_FOLDER in folder_paths.folder_names_and_paths
    return folder_paths.get_filename_list(MOTION_FOLDER) if known else []
