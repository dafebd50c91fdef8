"""The training loop: one batch a step, everything that happens a function of (config, step).

Batches, crops, posterior noise and the regularizer's frame choice are drawn from generators seeded with
(seed, step), and the learning rate is computed from the step; so a checkpoint of weights, EMA, optimizer
and step is the whole state, and a resumed run on the CPU equals an uninterrupted one to the last bit.
"""

import csv
import dataclasses
import json
import math
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import checkpoint, metrics
from ..config import Config
from ..inflate import inflate
from ..vae import Autoencoder, ImageVAE
from .config import ConfigError, OptimConfig, TrainConfig
from .data import ClipData
from .objective import Objective

Report = Callable[[int, dict[str, float]], None]


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to ``final_ratio``, held there: past the end it does not rise again."""
    if step < optim.warmup:
        return optim.learning_rate * (step + 1) / optim.warmup
    progress = min(1.0, (step - optim.warmup) / max(1, optim.steps - optim.warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return optim.learning_rate * (optim.final_ratio + (1 - optim.final_ratio) * cosine)


class Trainer:
    """Builds everything from a config; :meth:`run` trains, validates, saves and writes the result.

    resume: go on from the checkpoint in ``run.out``.  Without it, a folder that holds one is refused, so
    that no run is overwritten by accident.
    """

    def __init__(self, config: TrainConfig, resume: bool = False):
        self.config = config
        self.device = _device(config.run.device)
        self.out = Path(config.run.out)
        self.data = ClipData(config.data, config.run.seed)
        torch.manual_seed(config.run.seed)  # the only global draw: initial weights
        student, teacher = _models(config)
        self.objective = Objective(student, teacher, config.loss).to(self.device)
        self.student, self.teacher = student, teacher
        self.ema = _Ema(student, config.optim.ema_decay)
        optim = config.optim
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=optim.learning_rate,
                                           betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay)
        self.step = 0
        self.scores: dict[str, float] = {}  # of the last validation, in dB
        self._stop = False
        self._checkpoint = self.out / "checkpoint.pt"
        if resume:
            self._load()
        elif self._checkpoint.exists():
            raise ConfigError(f"{self._checkpoint} exists: add --resume to go on with that run, or choose another run.out.")
        self.out.mkdir(parents=True, exist_ok=True)
        self.losses_log = _CsvLog(self.out / "losses.csv", self.step)
        self.validation_log = _CsvLog(self.out / "validation.csv", self.step)

    def run(self, report: Report | None = None) -> Path:
        """Train to the last step, or until :meth:`stop`; returns the path of ``model.safetensors``.

        report: called with (step, losses) after each step, and may raise to cancel: whatever ends the
        loop, the checkpoint is saved first.
        """
        run, optim = self.config.run, self.config.optim
        try:
            if self.step == 0:
                self._validate()
            while self.step < optim.steps and not self._stop:
                losses = self._train_step()
                self.losses_log.append(self.step, losses)
                if self.step % run.validate_every == 0 or self.step == optim.steps:
                    self._validate()
                # After the validation, and the report last: a checkpoint of this step has its scores,
                # and a run cancelled here lacks nothing.
                if self.step % run.save_every == 0:
                    self._save()
                if report is not None:
                    report(self.step, losses)
        finally:
            self._save()
        return self._export()

    def stop(self, *_) -> None:
        """Finish the step at hand, save and return; safe to call from a signal handler."""
        self._stop = True

    def stop_on_signals(self) -> None:
        """Make Ctrl-C and SIGTERM stop as :meth:`stop` does."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def _train_step(self) -> dict[str, float]:
        optim = self.config.optim
        clip = self.data.batch(self.step).to(self.device)
        generator = torch.Generator(self.device).manual_seed(self.config.run.seed * 1_000_003 + self.step)
        rate = learning_rate(optim, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self._autocast():
            losses = self.objective(clip, generator)
        self.optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), optim.clip_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"Step {self.step}: the gradient is not finite, so it was not applied. Lower "
                                     "optim.learning_rate, or set run.precision to fp32, and resume.")
        self.optimizer.step()
        self.step += 1
        self.ema.update(self.student, self.step)
        values = {name: loss.item() for name, loss in losses.items()}
        return values | {"gradient_norm": norm.item(), "learning_rate": rate, "frames": clip.shape[2]}

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bf16")

    @torch.no_grad()
    def _validate(self) -> None:
        """Mean scores of the EMA weights on the held-out clips."""
        clips = self.data.validation()
        if not clips:
            return
        with self.ema.applied_to(self.student):
            rows = [evaluate_clip(self.student, self.teacher, clip.to(self.device)) for _, clip in clips]
        self.scores = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        self.validation_log.append(self.step, self.scores)

    def _save(self) -> None:
        state = {"step": self.step, "model": self.student.state_dict(), "ema": self.ema.state,
                 "optimizer": self.optimizer.state_dict(), "torch_rng": torch.get_rng_state(), "scores": self.scores,
                 "config": json.dumps(dataclasses.asdict(self.config))}
        checkpoint.write_whole(self._checkpoint, lambda partial: torch.save(state, partial))

    def _load(self) -> None:
        if not self._checkpoint.exists():
            raise FileNotFoundError(f"--resume: there is no {self._checkpoint}.")
        state = torch.load(self._checkpoint, map_location=self.device, weights_only=True)
        self.student.load_state_dict(state["model"])
        self.ema.load(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"].cpu())
        self.step, self.scores = state["step"], state["scores"]

    def _export(self) -> Path:
        path = self.out / "model.safetensors"
        facts = {"description": self.config.run.name, "steps": self.step, "validation": self.scores,
                 "training": dataclasses.asdict(self.config), "torch": torch.__version__}
        # Where things lie on the trainer's disk is nobody's business.
        facts["training"]["data"]["sources"] = [Path(source).name for source in self.config.data.sources]
        facts["training"]["run"]["out"] = self.out.name
        facts["training"]["model"] |= {key: Path(facts["training"]["model"][key]).name for key in ("teacher", "student")}
        with self.ema.applied_to(self.student):
            checkpoint.save(self.student, path, torch.float16, facts)
        return path


def evaluate_clip(vae: Autoencoder, teacher: ImageVAE | None, clip: Tensor) -> dict[str, float]:
    """Scores in dB of one clip [1, 3, T, H, W]: psnr, and beside a teacher image_vae_psnr and compatibility_psnr."""
    if isinstance(vae, ImageVAE):
        return {"psnr": metrics.image_vae_psnr(vae, clip)}
    scores = {"psnr": metrics.psnr(vae.reconstruct(clip), clip)}
    if teacher is not None:
        scores["image_vae_psnr"] = metrics.image_vae_psnr(teacher, clip)
        scores["compatibility_psnr"] = metrics.compatibility_psnr(vae, teacher, clip)
    return scores


class _Ema:
    """Exponential moving average of a model's weights, in float32, warming up over the first steps."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        self.state = {name: tensor.clone() for name, tensor in state.items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in model.named_parameters():
            self.state[name].lerp_(tensor, 1 - decay)

    @contextmanager
    def applied_to(self, model: nn.Module):
        """``model`` with the averaged weights inside a with block, and its own again after."""
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.state)
        try:
            yield
        finally:
            model.load_state_dict(own)


class _CsvLog:
    """Rows by step; on resume, rows of steps that will be taken again are dropped."""

    def __init__(self, path: Path, step: int):
        self.path = path
        self.columns: list[str] | None = None
        if not path.exists():
            return
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        kept = [row for row in rows if int(row["step"]) <= step] if step else []
        path.unlink()
        for row in kept:
            self.append(int(row.pop("step")), row)

    def append(self, step: int, values: dict) -> None:
        row = {"step": step} | values
        if self.columns is None:
            self.columns = list(row)
            with open(self.path, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(self.columns)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, extrasaction="ignore").writerow(row)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"run.device is {name!r}, which this machine does not have ({reason}).") from None


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
