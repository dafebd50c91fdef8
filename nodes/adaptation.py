"""What Adapt Sampler to CV-VAE does: node inputs to a run of the library's adaptation.  Imported when one begins."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import cvvae
from ..cvvae.adaptation.comfyui import FirstFrameConditioner, FixedConditioner, Sampler
from ..cvvae.adaptation.conditions import Conditioner, encode_conditions
from ..cvvae.adaptation.config import (
    AdaptConfig,
    ConditioningConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    check,
)
from ..cvvae.adaptation.motion import load_motion
from ..cvvae.adaptation.trainer import AdaptationTrainer
from ..cvvae.checkpoint import write_whole
from ..cvvae.dataset import LatentDataset, Settings, encode_dataset
from ..cvvae.frames import frames_of
from ..cvvae.training.config import ConfigError
from ..cvvae.training.pictures import loss_plot
from .common import as_image, inside, require_cv_vae, runs_folder, writable_folder
from .host import all_memory, check_cancelled, show_text, training_device, weights_of, with_lora
from .training import ENOUGH, HELD_OUT, Progress, find_folder, has_begun, read_losses, run_trainer

log = logging.getLogger(__name__)


@dataclass
class Told:
    """The sockets from which comes what the sampler is told of each clip; None where nothing is connected."""

    vae: Any
    clip_vision: Any
    positive: Any
    negative: Any


def adapt(model, motion: str, folder: str, train: str, steps: int, learning_rate: float, run: str, resume: bool,
          latents: int, size: tuple[int, int], rank: int, seed: int, told: Told,
          node_id: str | None) -> tuple[Any, str, dict, Tensor]:
    """Train; returns the adapted MODEL, its file's name among the LoRAs, its losses as a LOSS_MAP, and the plot.

    motion: path of a motion module, or empty.
    """
    out = inside(runs_folder(), run, "run")
    loras = writable_folder("loras")  # known before hours of training
    # Nodes run in inference mode: what is trained must not come from there.  The trainer seeds torch, and the host draws
    # from it too.
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        begun = has_begun(out, run, resume)
        sampler = Sampler(model, load_motion(motion) if motion else None)
        device, _ = training_device()
        with all_memory():
            vae = None
            if told.vae is not None:
                native = require_cv_vae(told.vae, "Connect the CV-VAE whose latents are to be made.")
                vae = cvvae.load(weights_of(native), device=device)
                vae.tiling = native.model.tiling
            clips = latents_folder(folder, vae, latents, size, out, node_id)
            data = LatentDataset(clips)
            settings = ConditioningConfig(dropout=0.1 if sampler.shows_first_frame or told.negative is not None else 0.0)
            encode_conditions(data, conditioner(sampler, vae, told, settings), out / "conditioning",
                              report=lambda done, total: tell(f"clip {done}/{total} encoded to show", node_id))
            del vae
        config = make_config(out, data, motion, latents, train, rank, steps, learning_rate, seed, settings)
        with all_memory():
            run_trainer(lambda: AdaptationTrainer(config, sampler, out / "conditioning", begun), AdaptationProgress, begun,
                        node_id, "choose fewer latents, a smaller width and height, or the output layer",
                        "run.out is 'run', run.seed 'seed', model.train 'train', model.motion 'motion_module', data.frames "
                        "'latents'")
    name = keep(out / "adapter.safetensors", loras, run)
    plot = as_image(loss_plot(out / "losses.csv", out / "validation.csv"))
    return with_lora(model, out / "adapter.safetensors"), name, {"loss": read_losses(out / "losses.csv")}, plot


def latents_folder(folder: str, vae, latents: int, size: tuple[int, int], out: Path, node_id: str | None) -> Path:
    """The folder of latents that ``folder`` is, or that its videos become."""
    if not folder.strip():
        raise ConfigError("folder is empty; name a folder of latents that encode-dataset wrote, or of videos.")
    path = find_folder(folder)
    if (path / "plan.json").exists():
        return path
    if vae is None:
        raise ConfigError(f"{path} is no folder of latents, so its videos have to be encoded: connect a CV-VAE to 'vae'.")
    settings = Settings(frames_of(latents) if latents else 0, 1, *(size if all(size) else (0, 0)), "float16", 4)

    def report(progress) -> None:
        tell(f"{progress.clips} clips encoded, {progress.frames / progress.seconds:.1f} frames/s", node_id)

    encode_dataset(vae, [str(path)], out / "latents", settings, report=report, check=check_cancelled)
    return out / "latents"


def conditioner(sampler: Sampler, vae, told: Told, settings: ConditioningConfig) -> Conditioner:
    if sampler.shows_first_frame:
        if vae is None or told.clip_vision is None:
            raise ConfigError("SVD is shown the first frame of each clip: connect its image encoder to 'clip_vision' (from "
                              "Image Only Checkpoint Loader) and the CV-VAE to 'vae'.")
        return FirstFrameConditioner(sampler, told.clip_vision, vae, settings, {})
    if told.positive is None:
        raise ConfigError("Connect a text to 'positive': this model is shown one with every clip.")
    shown = told.positive[0][0][0]
    return FixedConditioner(shown, told.negative[0][0][0] if told.negative is not None else shown, {})


def make_config(out: Path, data: LatentDataset, motion: str, latents: int, train: str, rank: int, steps: int,
                learning_rate: float, seed: int, conditioning: ConditioningConfig) -> AdaptConfig:
    device, precision = training_device()
    every = min(500, max(1, steps // 4))
    videos = list(dict.fromkeys(Path(sample.source).stem for sample in data.samples))
    held_out = videos[:min(HELD_OUT, len(videos) // ENOUGH)]
    if not held_out:
        log.info("CV-VAE: no clip is held out, so nothing is measured: that takes %d videos.", ENOUGH)
    config = AdaptConfig(
        ModelConfig(motion=motion, train=train, rank=rank), DataConfig(str(data.folder), held_out, latents), conditioning,
        optim=OptimConfig(steps=steps, learning_rate=learning_rate, warmup=min(100, steps // 10)),
        run=RunConfig(out=str(out), seed=seed, device=device, precision=precision, checkpointing=train != "output",
                      save_every=every, validate_every=every, name=f"Adapted to CV-VAE in ComfyUI as {out.name}"))
    check(config)
    return config


class AdaptationProgress(Progress):
    def preview(self) -> None:
        """Latents in the making say nothing; what was adapted shows in what it samples."""

    def scores(self) -> str:
        scores = self.trainer.scores
        return f", held-out loss {scores['loss']:.4f} (unadapted {scores['unadapted']:.4f})" if scores else ""

    def warn(self) -> None:
        pass


def tell(text: str, node_id: str | None) -> None:
    check_cancelled()
    show_text(text, node_id)


def keep(path: Path, loras: Path, run: str) -> str:
    """Copy the result to ``loras``; returns its name there."""
    copy = inside(loras / "cv-vae", f"{run.strip()}.safetensors", "run")
    copy.parent.mkdir(parents=True, exist_ok=True)
    write_whole(copy, lambda partial: shutil.copyfile(path, partial))
    return copy.relative_to(loras.resolve()).as_posix()
