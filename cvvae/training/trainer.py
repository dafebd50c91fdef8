"""Training of a video VAE under the image VAE's eye, or of an image VAE; the loop itself is in ``base.py``."""

from pathlib import Path

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..config import Config
from ..frames import TIME_FACTOR
from ..inflate import inflate
from ..model import Downsample, ResnetBlock, SpatialAttention, TemporalAttention, Upsample
from ..vae import Autoencoder, ImageVAE
from ..video import VideoWriter
from . import TrainingError
from .base import BaseTrainer, learning_rate, make_optimizer, recomputed
from .config import ConfigError, TrainConfig
from .data import Batch, ClipData, SkipReport
from .distributed import share
from .evaluation import Evaluation, evaluate_clip, mean_scores
from .objective import Objective
from .pictures import loss_plot, save_png, side_by_side

__all__ = ["Trainer", "TrainingError", "choose_trained", "goodness", "learning_rate"]

SIDE_BY_SIDE_FPS = 8  # slow enough to compare four pictures


class Trainer(BaseTrainer):
    """Builds everything from a config; :meth:`run` trains, validates, saves and writes the result."""

    # What a checkpoint's tensors and draws depend on.
    fixed = ("model.kind", "model.train", "model.latent_channels", "model.widths", "model.blocks", "model.norm_groups",
             "loss.learn_logvar", "loss.regularizer", "loss.gan", "loss.gan_channels", "loss.gan_layers", "optim.optimizer",
             "run.seed")
    lighter = ("Set run.checkpointing to true; or lower that bucket's batch (and raise optim.accumulate, for the same "
               "step), then its frames, height or width; run.precision = 'bf16' halves activations.")

    def __init__(self, config: TrainConfig, resume: bool = False):
        super().__init__(config, resume)
        suffix = "" if self.group.leads else f"_rank{self.group.rank}"
        self.skip_report = SkipReport(self.out / f"skipped{suffix}.csv")

    def _build(self) -> None:
        config, run = self.config, self.config.run
        self.data = ClipData(config.data, run.seed)
        self.student, self.teacher = _models(config)
        self.trainee = self.student
        choose_trained(self.student, config.model.train)
        self.objective = Objective(self.student, self.teacher, config.loss, config.model.train).to(self.device)
        if run.channels_last:
            _channels_last(self.objective)
        if run.checkpointing:
            for model in (self.student, self.teacher):
                _recompute_activations(model)
        self.trained = [parameter for parameter in (*self.student.parameters(), *self.objective.logvars.parameters())
                        if parameter.requires_grad]
        self.adversary = self.objective.adversary
        if self.adversary is not None:
            self.discriminator_optimizer = make_optimizer(config.optim, self.adversary.parameters(),
                                                          config.optim.discriminator_rate)

    def preview(self) -> Tensor | None:
        """What the first held-out clip looks like now, [H, W, 3] uint8, source and reconstructions side by side.

        Of its last group of four the first frame: the one that an inflated model, which holds the last, has to learn.
        """
        clips = self.data.validation()[:1]
        if not clips:
            return None
        with self.ema.applied_to(self.student):
            pictures = evaluate_clip(self.student, self.teacher, clips[0][1].to(self.device)).pictures
        return torch.from_numpy(list(side_by_side(pictures))[-TIME_FACTOR:][0])

    # -- a step --------------------------------------------------------------------------------------

    def _take_step(self, batches: list[Batch]) -> dict[str, float]:
        for batch in batches:
            self.skip_report.add(batch.failures)
        return super()._take_step(batches)

    def _inputs(self, batch: Batch) -> tuple[Tensor]:
        clips = batch.clips.to(self.device)
        if self.config.run.channels_last:
            clips = clips.contiguous(memory_format=torch.channels_last_3d)
        return (clips,)

    def _size(self, batch: Batch) -> int:
        return len(batch.clips)

    def _shape(self, batch: Batch) -> str:
        return f"{len(batch.clips)} clips of {'x'.join(map(str, batch.clips.shape[2:]))}"

    def _facts(self, batch: Batch) -> dict[str, float]:
        return {"frames": batch.clips.shape[2]}

    def _kept(self, batch: Batch) -> dict[str, Tensor]:
        return {"clips": batch.clips}

    def _minimised(self, losses: dict[str, Tensor]) -> Tensor:
        return losses["total"] + losses.get("discriminator", 0.0)

    def _optimized(self) -> dict:
        optimized = super()._optimized()
        if self.adversary is not None and self.adversary.active(self.step):
            optimized["discriminator_gradient_norm"] = self.adversary.parameters(), self.discriminator_optimizer
        return optimized

    # -- validation ----------------------------------------------------------------------------------

    def _measure(self) -> dict[str, float]:
        """Score the held-out clips, and draw what the student does to them."""
        clips = self.data.validation()
        scores = {}
        for i, (name, clip) in share(clips, self.group):
            evaluation = evaluate_clip(self.student, self.teacher, clip.to(self.device), self._lpips())
            scores[i] = evaluation.scores
            if i < self.config.run.videos:
                self._draw(name, evaluation)
        scores = {i: found for part in self.group.gathered(scores) for i, found in part.items()}
        return mean_scores([scores[i] for i in sorted(scores)]) if scores else {}

    def _goodness(self, scores: dict[str, float]) -> float:
        return goodness(scores)

    def _after_validation(self) -> None:
        save_png(self.out / "losses.png", loss_plot(self.losses_log.path, self.validation_log.path))

    def _lpips(self) -> nn.Module | None:
        return self.objective.perceptual if self.config.loss.perceptual == "lpips" else None

    def _draw(self, name: str, evaluation: Evaluation) -> None:
        folder = self.out / "reconstructions"
        folder.mkdir(exist_ok=True)
        path = folder / f"step_{self.step:08d}_{name}"
        frames = side_by_side(evaluation.pictures)
        if evaluation.pictures["source"].shape[2] == 1:
            save_png(path.with_suffix(".png"), next(frames))
            return
        with VideoWriter(path.with_suffix(".mp4"), SIDE_BY_SIDE_FPS) as writer:
            for frame in frames:
                writer.write(frame)

    # -- files ---------------------------------------------------------------------------------------

    def _columns(self) -> list[str]:
        norms = ["gradient_norm"] + ["discriminator_gradient_norm"] * (self.adversary is not None)
        return [*self.objective.names, *norms, "learning_rate", "frames", "skipped"]

    def _state(self) -> dict:
        state = {"logvars": self.objective.logvars.state_dict()}
        if self.adversary is not None:
            state |= {"discriminator": self.adversary.state_dict(),
                      "discriminator_optimizer": self.discriminator_optimizer.state_dict()}
        return state

    def _load_state(self, state: dict) -> None:
        self.objective.logvars.load_state_dict(state["logvars"])
        if self.adversary is not None:
            self.adversary.load_state_dict(state["discriminator"])
            self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])

    def _write(self, path: Path, facts: dict) -> None:
        checkpoint.save(self.student, path, torch.float16, facts)

    def _without_paths(self, config: dict) -> dict:
        config["data"]["sources"] = [Path(source).name for source in config["data"]["sources"]]
        config["run"]["out"] = Path(config["run"]["out"]).name
        config["loss"]["lpips_weights"] = Path(config["loss"]["lpips_weights"]).name
        config["model"] |= {key: Path(config["model"][key]).name for key in ("teacher", "student")}
        return config


def goodness(scores: dict[str, float]) -> float:
    """By which the best validation is chosen, in dB: reconstruction, and where it was measured compatibility, as much."""
    return sum(found := [scores[name] for name in ("psnr", "compatibility_psnr") if name in scores]) / len(found)


def choose_trained(student: Autoencoder, train: str) -> None:
    """Freeze what ``ModelConfig.train`` leaves out."""
    if train in ("encoder", "decoder"):
        student.requires_grad_(False)
        getattr(student, train).requires_grad_(True)
    elif train == "temporal":
        student.requires_grad_(False)
        for module in student.modules():
            if isinstance(module, nn.Conv3d) and module.kernel_size[0] > 1:
                module.requires_grad_(True)
            if isinstance(module, TemporalAttention):
                for name, parameter in module.named_parameters():
                    parameter.requires_grad_("_t" in name)


def _models(config: TrainConfig) -> tuple[Autoencoder, ImageVAE | None]:
    """The student to train, and its frozen teacher."""
    model = config.model
    if model.kind == "image":
        config = Config("image", model.latent_channels, tuple(model.widths), model.blocks, model.norm_groups)
        return ImageVAE(config), None
    teacher = checkpoint.load_image_vae(model.teacher)
    student = checkpoint.load(model.student) if model.student else inflate(teacher)
    if student.config.latent_channels != teacher.config.latent_channels:
        raise ConfigError(f"model.student has {student.config.latent_channels} latent channels, model.teacher has "
                          f"{teacher.config.latent_channels}; they must be the same latent space.")
    return student, teacher


def _channels_last(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.ndim in (4, 5):
            form = torch.channels_last if parameter.ndim == 4 else torch.channels_last_3d
            parameter.data = parameter.data.contiguous(memory_format=form)


def _recompute_activations(model: nn.Module | None) -> None:
    """Keep the inputs of blocks only, and compute what is inside again in the backward pass."""
    if model is None:
        return
    for module in model.modules():
        if isinstance(module, (ResnetBlock, SpatialAttention, Downsample, Upsample)):
            module.forward = recomputed(module.forward)
