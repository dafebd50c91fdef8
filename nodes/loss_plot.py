"""CV-VAE Loss Plot: the curves of a finetune, while it runs in another program or after it."""

from pathlib import Path

from comfy_api.v0_0_2 import io

from .common import TRAINING_CATEGORY, as_image, inside, runs_folder


class CVVAELossPlot(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAELossPlot",
            display_name="CV-VAE Loss Plot",
            category=TRAINING_CATEGORY,
            description="Draws the losses of a finetune, and its scores on held-out clips where it has some.",
            search_aliases=["cvvae", "training chart", "plot loss"],
            inputs=[
                io.String.Input("run", default="finetune",
                                tooltip="Name of the run in ComfyUI's output folder cv-vae, as in Finetune CV-VAE, or the "
                                        "whole path of a folder that `python -m cvvae train` writes."),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, run: str | None = None):
        """Draw again when the run has got on."""
        log = losses_of(run) if run else None
        return log.stat().st_mtime_ns if log and log.exists() else None

    @classmethod
    def execute(cls, run: str) -> io.NodeOutput:
        from ..cvvae.training.pictures import loss_plot  # here, so that ComfyUI starts without waiting for PyAV

        log = losses_of(run)
        if not log.exists():
            raise FileNotFoundError(f"run is {run!r}, but there is no {log}. Give the name of a finetune that has begun.")
        return io.NodeOutput(as_image(loss_plot(log, log.with_name("validation.csv"))))


def losses_of(run: str) -> Path:
    folder = Path(run.strip())
    return (folder if folder.is_absolute() else inside(runs_folder(), run, "run")) / "losses.csv"
