"""What Finetune CV-VAE does: node inputs to a run of the library's trainer.  Imported when a finetune begins."""

import csv
import logging
import math
import time
from collections.abc import Callable
from fractions import Fraction
from itertools import islice
from pathlib import Path

import comfy.utils
import folder_paths
import torch
from PIL import Image
from torch import Tensor

from .. import cvvae
from ..cvvae.training import TrainingError
from ..cvvae.training.base import BaseTrainer
from ..cvvae.training.config import (
    Bucket,
    ConfigError,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    check,
)
from ..cvvae.training.evaluation import cell
from ..cvvae.training.media import Media, find_media
from ..cvvae.training.pictures import loss_plot
from ..cvvae.training.runfolder import Checkpoints
from ..cvvae.training.trainer import Trainer
from ..cvvae.video import VideoError, VideoWriter
from .common import MODES, VIDEO, as_image, image_vae_of, inside, require_cv_vae, runs_folder
from .example import FOLDER as EXAMPLES
from .host import NativeVAE, all_memory, check_cancelled, load_native, show_text, training_device
from .presets import Preset

log = logging.getLogger(__name__)

HELD_OUT = 2  # videos of a folder, at most
ENOUGH = 4  # videos, of which one can be spared
PREVIEW_EVERY = 10.0  # seconds
PREVIEW_SHARE = 0.05  # of the time may go into previews
PREVIEW_SIDE = 512  # pixels
TEXT_EVERY = 0.5  # seconds
CLIP_FPS = Fraction(24)  # frames from a socket have no times of their own


def finetune(folder: str, preset: Preset, steps: int, learning_rate: float, teacher: str, run: str, resume: bool, seed: int,
             images: Tensor | None, image_vae, cv_vae, node_id: str | None) -> tuple[NativeVAE, dict, str, Tensor]:
    """Train; returns the VAE, its losses as a LOSS_MAP, the run's name and the plot."""
    out = inside(runs_folder(), run, "run")
    # Nodes run in inference mode: what is trained must not come from there.  The trainer seeds torch, and the host draws
    # from it too.
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        begun = has_begun(out, run, resume)
        data = sources_of(folder, images, preset, out)
        taught_by = image_vae_of(teacher, image_vae)
        if begun:
            require_same_teacher(taught_by, out / "teacher.safetensors", run)
        else:
            keep_models(taught_by, cv_vae, out)
        config = make_config(out, data, preset, steps, learning_rate, seed)
        with all_memory():
            run_trainer(lambda: Trainer(config, begun), Progress, begun, node_id,
                        "choose a smaller preset, or a lower learning rate",
                        "run.out is 'run', run.seed 'seed', model.student 'cv_vae'; other settings come from 'preset'")
    losses = read_losses(out / "losses.csv")
    plot = as_image(loss_plot(out / "losses.csv", out / "validation.csv"))
    vae = load_native(out / "model.safetensors", MODES[VIDEO], torch.float32)
    return vae, {"loss": losses}, out.relative_to(runs_folder().resolve()).as_posix(), plot


def has_begun(out: Path, run: str, resume: bool) -> bool:
    """Whether the run in ``out`` has a checkpoint to go on from; raises ConfigError where it must not be gone on with."""
    begun = bool(Checkpoints(out / "checkpoints", 1).files())
    if begun and not resume:
        raise ConfigError(f"There is a run {run!r} already, in {out}. Switch resume on to go on with it, or choose "
                          "another name.")
    return begun


def run_trainer(make_trainer: Callable[[], BaseTrainer], progress: "type[Progress]", resume: bool, node_id: str | None,
                remedy: str, settings: str) -> None:
    """In a function of its own, so that the trainer is gone when it returns.

    remedy: what to choose in the node when a step fails; settings: what the config's settings are called there.
    """
    try:
        trainer = make_trainer()
        config = trainer.config
        if resume:
            log.info("CV-VAE: going on with %s at step %d.", config.run.out, trainer.step)
        show = progress(trainer, config.optim.steps, node_id)
        trainer.run(show)
    except TrainingError as error:
        raise TrainingError(f"{error}\nIn this node: {remedy}, and run it again under the same name to go on.") from error
    except ConfigError as error:
        raise ConfigError(f"{error}\nIn this node {settings}.") from error
    show.finish()


# -- what is trained on ------------------------------------------------------------------------------


def sources_of(folder: str, images: Tensor | None, preset: Preset, out: Path) -> DataConfig:
    """Files to train on, and which of them are held out; frames of a socket become files in ``out``."""
    sources, held_out = [], []
    if folder.strip():
        sources.append(str(find_folder(folder)))
        held_out += choose_held_out(find_media(sources), preset.validation_frames)
    if images is not None:
        spare = preset.validation_frames if len(images) >= preset.longest + preset.validation_frames else 0
        sources.append(write_clip(out / "images.mkv", images[:len(images) - spare]))
        if spare:
            sources.append(write_clip(out / "images_held_out.mkv", images[-spare:]))
            held_out.append("images_held_out")
    if not sources:
        raise ConfigError("There is nothing to train on: name a folder, or connect a clip to images.")
    if not held_out:
        log.info("CV-VAE: no clip is held out, so there are no previews and no scores: that takes a folder of %d videos, or "
                 "a clip of %d frames.", ENOUGH, preset.longest + preset.validation_frames)
    return DataConfig(sources=sources, validation=held_out)


def find_folder(folder: str) -> Path:
    path = Path(folder.strip().strip('"'))  # as a file manager copies paths
    if str(path) == "examples":
        return EXAMPLES
    path = Path(folder_paths.get_input_directory()) / path
    if not path.exists():
        raise ConfigError(f"folder is {folder!r}, but there is no {path}. Give a folder in ComfyUI's input folder, a whole "
                          "path, or 'examples'.")
    return path


def choose_held_out(media: list[Media], frames: int) -> list[str]:
    """One in four videos: the first ones, of what is long enough to measure on."""
    videos = {item.stem: item for item in media if item.is_video}
    long_enough = (stem for stem, video in videos.items() if _length(video) >= frames)
    return list(islice(long_enough, min(HELD_OUT, len(videos) // ENOUGH)))


def _length(media: Media) -> int:
    """In frames; 0 for what cannot be read."""
    try:
        return media.probe().frames
    except (VideoError, OSError):
        return 0


def write_clip(path: Path, images: Tensor) -> str:
    """Write [T, H, W, 3] in [0, 1] without loss; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, CLIP_FPS, lossless=True) as writer:
        for frame in images:
            writer.write(frame[..., :3].mul(255).round().clamp(0, 255).byte().cpu().numpy())
    return str(path)


# -- what is trained, and how ------------------------------------------------------------------------


def keep_models(image_vae: cvvae.ImageVAE, cv_vae, out: Path) -> None:
    """Store what the run begins with in its folder; it then goes on without ComfyUI, too."""
    out.mkdir(parents=True, exist_ok=True)
    start = out / "start.safetensors"
    start.unlink(missing_ok=True)  # of an attempt that took no step
    if cv_vae is not None:
        cvvae.save(require_cv_vae(cv_vae, "Connect image VAEs to image_vae.").model, start, torch.float32)
    cvvae.save(image_vae, out / "teacher.safetensors")


def require_same_teacher(image_vae: cvvae.ImageVAE, path: Path, run: str) -> None:
    """Raise ConfigError where the run began with another image VAE, which is kept in ``path``."""
    kept, given = cvvae.load_image_vae(path).state_dict(), image_vae.state_dict()
    same = kept.keys() == given.keys() and all(torch.equal(kept[name], given[name]) for name in kept)
    if not same:
        raise ConfigError(f"The run {run!r} began with another image VAE, kept in {path}. Connect that one, or choose "
                          "another name for a new run.")


def make_config(out: Path, data: DataConfig, preset: Preset, steps: int, learning_rate: float, seed: int) -> TrainConfig:
    device, precision = training_device()
    start = out / "start.safetensors"
    every = min(500, max(1, steps // 4))
    data.buckets = [Bucket(*bucket) for bucket in preset.buckets]
    data.validation_frames, data.validation_size = preset.validation_frames, preset.validation_size
    data.max_stride = preset.max_stride
    config = TrainConfig(
        ModelConfig(teacher=str(out / "teacher.safetensors"), student=str(start) if start.exists() else ""),
        data,
        LossConfig(perceptual=preset.perceptual, gan=preset.gan, gan_start=preset.gan_start),
        OptimConfig(steps=steps, learning_rate=learning_rate, warmup=min(100, steps // 10), accumulate=preset.accumulate),
        RunConfig(out=str(out), seed=seed, device=device, precision=precision, checkpointing=preset.checkpointing,
                  channels_last=device.startswith("cuda"), save_every=every, validate_every=every,
                  name=f"CV-VAE, finetuned in ComfyUI as {out.name}"))
    check(config)
    return config


# -- what is shown -----------------------------------------------------------------------------------


class Progress:
    """Called after each step: moves the host's bar, writes the time left, shows what a held-out clip looks like now."""

    def __init__(self, trainer: Trainer, steps: int, node_id: str | None):
        self.trainer, self.steps, self.node_id = trainer, steps, node_id
        self.bar = comfy.utils.ProgressBar(steps)
        self.first, self.started = trainer.step, time.monotonic()
        self.text_at = self.preview_at = -math.inf  # when the next one is due

    def __call__(self, step: int, losses: dict[str, float]) -> None:
        check_cancelled()  # asked here because the host's bar skips most updates
        now = time.monotonic()
        if now >= self.text_at or step == self.steps:
            show_text(in_words(step, self.steps, (step - self.first) / (now - self.started), losses["total"]), self.node_id)
            self.text_at = now + TEXT_EVERY
        self.bar.update_absolute(step, self.steps, self.preview() if now >= self.preview_at else None)

    def preview(self) -> tuple[str, Image.Image, int] | None:
        """As the host's bar takes it; the next one when it is due and has cost little."""
        began = time.monotonic()
        pixels = self.trainer.preview()
        now = time.monotonic()
        self.preview_at = now + max(PREVIEW_EVERY, (now - began) / PREVIEW_SHARE)
        if pixels is None:
            return None
        return "JPEG", Image.fromarray(pixels.numpy()), PREVIEW_SIDE

    def finish(self) -> None:
        """Leave the scores and the last preview on the node, and what went wrong in the log."""
        trainer = self.trainer
        self.bar.update_absolute(self.steps, self.steps, self.preview())
        done = f"step {trainer.step}/{self.steps}{self.scores()}"
        show_text(done, self.node_id)
        log.info("CV-VAE: %s; everything is in %s.", done, trainer.out)
        self.warn()

    def scores(self) -> str:
        scores = self.trainer.scores
        return (f", held-out clips {cell(scores, 'psnr')} dB (image VAE {cell(scores, 'image_vae_psnr')} dB)" if scores
                else "")

    def warn(self) -> None:
        skipped = self.trainer.skip_report
        if skipped.count:
            log.warning("CV-VAE: %d files could not be used; %s says why.", skipped.count, skipped.path)


def in_words(step: int, steps: int, rate: float, loss: float) -> str:
    """"step 12/100, 3.2 steps/s, 00:27 left, loss 0.0312"."""
    speed = f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step"
    seconds = round((steps - step) / rate)
    hours, minutes = divmod(seconds // 60, 60)
    left = f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes:02}:{seconds % 60:02}"
    return f"step {step}/{steps}, {speed}, {left} left, loss {loss:.4f}"


def read_losses(path: Path) -> list[float]:
    """The total loss of every step, finite and never all the same: the host's own plot divides by their spread."""
    with open(path, newline="", encoding="utf-8") as file:
        losses = [float(row["total"]) for row in csv.DictReader(file) if row["total"]]
    losses = [loss for loss in losses if math.isfinite(loss)] or [0.0]
    return losses if len(set(losses)) > 1 else [*losses, losses[-1] + 1e-6]
