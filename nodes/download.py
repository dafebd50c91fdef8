"""Download CV-VAE: one published file from Hugging Face into models/vae."""

import os
import time
from pathlib import Path

import folder_paths
from comfy_api.v0_0_2 import io, ui

from ..cvvae.download import PUBLISHED, download
from .common import CATEGORY, writable_folder
from .host import Progress, check_cancelled, show_text

WHAT_FOR = "; ".join(f"{name} for {entry.made_for} ({entry.latent_channels} channels, {entry.size})"
                     for name, entry in PUBLISHED.items())


class CVVAEDownload(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAEDownload",
            display_name="Download CV-VAE",
            category=CATEGORY,
            description="Fetches published weights from Hugging Face (AILab-CVC/CV-VAE) into models/vae when it runs. "
                        "Cancel keeps what has arrived, and the next run goes on from there; a file that is there is not "
                        "fetched again. Connect vae_name to Load CV-VAE, or press R afterwards: the loader then lists it.",
            search_aliases=["cvvae", "download vae", "huggingface", "weights"],
            is_output_node=True,
            inputs=[
                io.Combo.Input("weights", options=list(PUBLISHED),
                               tooltip="Which of the published files. Choose the one that fits the diffusion model you work "
                                       f"with: {WHAT_FOR}."),
            ],
            outputs=[io.Combo.Output("vae_name", display_name="vae_name",
                                     tooltip="The file's name, for the input vae_name of Load CV-VAE.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, weights: str) -> str:
        """Runs again when the file has gone or changed."""
        path = folder_paths.get_full_path("vae", PUBLISHED[weights].file)
        return f"{os.stat(path).st_mtime_ns}" if path else "not there"

    @classmethod
    def execute(cls, weights: str) -> io.NodeOutput:
        there = folder_paths.get_full_path("vae", PUBLISHED[weights].file)  # in any of the folders of VAEs
        report = Report(cls.hidden.unique_id if cls.hidden else None)
        show_text("Asking Hugging Face", report.node_id)
        path = download(weights, Path(there).parent if there else writable_folder("vae"), report, check_cancelled)
        show_text(f"{path.name} is there", report.node_id)
        return io.NodeOutput(path.name, ui=ui.PreviewText(f"{path.name} is in {path.parent}"))


class Report:
    """The host's progress bar, and on the node megabytes, speed and the time that is left."""

    def __init__(self, node_id: str | None):
        self.node_id = node_id
        self.bar = Progress()
        self.started, self.from_byte, self.shown = 0.0, 0, 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self.started:
            self.started, self.from_byte = now, done
        self.bar(done, total)
        if now - self.shown < 0.5 and done < total:
            return
        self.shown = now
        text = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB"
        if done > self.from_byte and now > self.started:
            speed = (done - self.from_byte) / (now - self.started)
            text += f", {speed / 1e6:.1f} MB/s, {(total - done) / speed:.0f} s left"
        show_text(text, self.node_id)
