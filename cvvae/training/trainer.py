"""The training loop: one step after another, everything that happens a function of (config, step).

Batches, crops, posterior noise and the regularizer's frame choice are drawn from generators seeded with (seed, step,
number of the clip in the step), and rates and weights are computed from the step.  So a checkpoint of weights, EMA,
optimizers and step is the whole state: a resumed run on the CPU equals an uninterrupted one to the last bit, and
several processes with small batches take the steps of one with a large batch.
"""

import dataclasses
import json
import math
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute

from .. import checkpoint
from ..config import Config
from ..frames import TIME_FACTOR
from ..inflate import inflate
from ..model import Downsample, ResnetBlock, SpatialAttention, TemporalAttention, Upsample
from ..vae import Autoencoder, ImageVAE
from ..video import VideoWriter
from . import TrainingError
from .config import ConfigError, OptimConfig, TrainConfig
from .data import Batch, ClipData, SkipReport, loader
from .distributed import join_group, share
from .evaluation import Evaluation, evaluate_clip, mean_scores
from .objective import Objective
from .pictures import loss_plot, save_png, side_by_side
from .runfolder import Checkpoints, CsvLog, check_resumable, provenance, without_paths

Report = Callable[[int, dict[str, float]], None]
SIDE_BY_SIDE_FPS = 8  # slow enough to compare four pictures


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to ``final_ratio``, held there: past the end it does not rise again."""
    if step < optim.warmup:
        return optim.learning_rate * (step + 1) / optim.warmup
    progress = min(1.0, (step - optim.warmup) / max(1, optim.steps - optim.warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return optim.learning_rate * (optim.final_ratio + (1 - optim.final_ratio) * cosine)


class Trainer:
    """Builds everything from a config; :meth:`run` trains, validates, saves and writes the result.

    resume: go on from the newest checkpoint in ``run.out``.  Without it, a folder that holds one is refused, so
    that no run is overwritten by accident.

    Under torchrun each process builds one, and they train together.
    """

    def __init__(self, config: TrainConfig, resume: bool = False):
        self.config = config
        run, optim = config.run, config.optim
        self.group = join_group(_device(run.device).type)
        self.device = _device(run.device)
        self.out = Path(run.out)
        self.checkpoints = Checkpoints(self.out / "checkpoints", run.keep)
        if not resume and self.checkpoints.files():
            raise ConfigError(f"{self.out} holds a run already: add --resume to go on with it, or choose another run.out.")
        self.data = ClipData(config.data, run.seed)
        torch.manual_seed(run.seed)  # the only global draws: initial weights
        self.student, self.teacher = _models(config)
        choose_trained(self.student, config.model.train)
        self.objective = Objective(self.student, self.teacher, config.loss, config.model.train).to(self.device)
        if run.channels_last:
            _channels_last(self.objective)
        if run.checkpointing:
            for model in (self.student, self.teacher):
                _recompute_activations(model)
        self.ema = _Ema(self.student, optim.ema_decay)
        self.trained = [parameter for parameter in (*self.student.parameters(), *self.objective.logvars.parameters())
                        if parameter.requires_grad]
        self.optimizer = _optimizer(optim, self.trained, optim.learning_rate)
        self.adversary = self.objective.adversary
        if self.adversary is not None:
            self.discriminator_optimizer = _optimizer(optim, self.adversary.parameters(), optim.discriminator_rate)
        self.step = 0
        self.scores: dict[str, float] = {}  # of the last validation
        self.best = -math.inf
        self.skipped = self.skipped_in_a_row = 0  # steps whose gradient was not applied
        self.board = None
        self._stop = False
        self._whole_step = True  # false while an optimizer is at work: weights half stepped are not worth saving
        if resume:
            self._load()
        self.parallel = self.objective
        if self.group.world > 1:
            self.parallel = DistributedDataParallel(self.objective, broadcast_buffers=False)
        self.out.mkdir(parents=True, exist_ok=True)
        suffix = "" if self.group.leads else f"_rank{self.group.rank}"
        self.skip_report = SkipReport(self.out / f"skipped{suffix}.csv")
        if self.group.leads:
            self._open_logs()

    def run(self, report: Report | None = None) -> Path:
        """Train to the last step, or until :meth:`stop`; returns the path of ``model.safetensors``.

        report: called with (step, losses) after each step, and may raise to cancel: whatever ends the
        loop, the checkpoint is saved first.

        Raises TrainingError where no step can be taken any more (out of memory, gradients that are not finite), DataError
        where no clip can be read, and OSError where the disk is full.
        """
        run, optim = self.config.run, self.config.optim
        parts = [self.group.rank + self.group.world * k for k in range(optim.accumulate)]
        batches = loader(self.data, self.step, optim.steps, parts, self.config.data.workers)
        try:
            if self.step == 0:
                self._validate()
            while self.step < optim.steps and not self.group.any(self._stop, self.device):
                losses = self._take_step(next(batches)[1])
                if self.group.leads:
                    self.losses_log.append(self.step, losses)
                    self._board("train", losses)
                if self.step % run.validate_every == 0 or self.step == optim.steps:
                    self._validate()
                # After the validation, and the report last: a checkpoint of this step has its scores,
                # and a run cancelled here lacks nothing.
                if self.step % run.save_every == 0:
                    self._save()
                if report is not None:
                    report(self.step, losses)
        finally:
            batches.close()
            if self._whole_step:
                self._save()
            if self.board is not None:
                self.board.close()
        return self._export(self.out / "model.safetensors")

    def stop(self, *_) -> None:
        """Finish the step at hand, save and return; safe to call from a signal handler.  A second call does not wait."""
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True

    def stop_on_signals(self) -> None:
        """Make Ctrl-C and SIGTERM stop as :meth:`stop` does."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

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
        """One optimizer step over ``batches``; returns what the log says of it."""
        for batch in batches:
            self.skip_report.add(batch.failures)
        try:
            return self._train_step([batch.clips for batch in batches])
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            shape = "x".join(map(str, batches[0].clips.shape[2:]))
            raise TrainingError(
                f"Step {self.step}: out of memory with {len(batches[0].clips)} clips of {shape}. Set run.checkpointing to "
                "true; or lower that bucket's batch (and raise optim.accumulate, for the same step), then its frames, "
                "height or width; run.precision = 'bf16' halves activations. What was trained so far is saved; go on "
                f"with --resume. ({str(error).splitlines()[0]})") from error

    def _train_step(self, clips: list[Tensor]) -> dict[str, float]:
        optim = self.config.optim
        rate = learning_rate(optim, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.objective.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for k, clip in enumerate(clips):
            last = k == len(clips) - 1
            clip = clip.to(self.device)
            if self.config.run.channels_last:
                clip = clip.contiguous(memory_format=torch.channels_last_3d)
            with nullcontext() if last or self.group.world == 1 else self.parallel.no_sync():
                with self._autocast():
                    losses = self.parallel(clip, self._seeds(k, len(clip)), self.step)
                minimised = losses["total"] + losses.get("discriminator", 0.0)
                (minimised / len(clips)).backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.detach().float()
        values = dict(zip(sums, self.group.mean(torch.stack(list(sums.values())) / len(clips)).tolist(), strict=True))
        values |= {"learning_rate": rate, "frames": clips[0].shape[2]} | self._apply_gradients(clips)
        return values | {"skipped": self.skipped}

    def _apply_gradients(self, clips: list[Tensor]) -> dict[str, float]:
        """Let the optimizers step, unless a gradient is not finite or far too large; returns the gradients' norms."""
        optim = self.config.optim
        norms = {"gradient_norm": nn.utils.clip_grad_norm_(self.trained, optim.clip_norm).item()}
        judged = self.adversary is not None and self.adversary.active(self.step)
        if judged:
            norm = nn.utils.clip_grad_norm_(self.adversary.parameters(), optim.clip_norm)
            norms["discriminator_gradient_norm"] = norm.item()
        if not all(norm < optim.skip_norm for norm in norms.values()):  # NaN is not smaller either
            self._skip(clips, norms)
            return norms
        self._whole_step = False
        self.optimizer.step()
        if judged:
            self.discriminator_optimizer.step()
        self.step += 1
        self.ema.update(self.student, self.step)
        self.skipped_in_a_row = 0
        self._whole_step = True
        return norms

    def _skip(self, clips: list[Tensor], norms: dict[str, float]) -> None:
        optim = self.config.optim
        self.step += 1
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row < optim.stop_after_skips:
            return
        path = self.out / f"bad_batch_rank{self.group.rank}.pt"
        checkpoint.write_whole(path, lambda partial: torch.save({"step": self.step - 1, "clips": clips}, partial))
        raise TrainingError(
            f"Step {self.step - 1}: the gradient is not finite or above optim.skip_norm = {optim.skip_norm:g} "
            f"({', '.join(f'{name} {norm:.3g}' for name, norm in norms.items())}), the {self.skipped_in_a_row}th time in a "
            f"row; none was applied. Lower optim.learning_rate, or set run.precision to fp32, and resume. The batch is "
            f"kept in {path}.")

    def _seeds(self, k: int, clips: int) -> list[int]:
        """Of each clip of the ``k``-th pass, by its number among all clips of the step."""
        part = self.group.rank + self.group.world * k
        return [random.Random(f"{self.config.run.seed}:{self.step}:{part * clips + i}:noise").getrandbits(62)
                for i in range(clips)]

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bf16")

    # -- validation ----------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Score the EMA weights on the held-out clips, and draw what they do."""
        clips = self.data.validation()
        if not clips:
            return
        scores = {}
        with self.ema.applied_to(self.student):
            for i, (name, clip) in share(clips, self.group):
                evaluation = evaluate_clip(self.student, self.teacher, clip.to(self.device), self._lpips())
                scores[i] = evaluation.scores
                if i < self.config.run.videos:
                    self._draw(name, evaluation)
        scores = {i: found for part in self.group.gathered(scores) for i, found in part.items()}
        self.scores = mean_scores([scores[i] for i in sorted(scores)])
        quality = goodness(self.scores)
        better, self.best = quality > self.best, max(quality, self.best)
        if not self.group.leads:
            return
        self.validation_log.append(self.step, self.scores)
        self._board("validation", self.scores)
        save_png(self.out / "losses.png", loss_plot(self.losses_log.path, self.validation_log.path))
        if better:
            self._export(self.out / "best.safetensors")

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

    def _open_logs(self) -> None:
        norms = ["gradient_norm"] + ["discriminator_gradient_norm"] * (self.adversary is not None)
        columns = [*self.objective.names, *norms, "learning_rate", "frames", "skipped"]
        self.losses_log = CsvLog(self.out / "losses.csv", columns, self.step)
        self.validation_log = CsvLog(self.out / "validation.csv", None, self.step)
        self.provenance = provenance(self.config)
        checkpoint.write_whole(self.out / "config.json",
                               lambda partial: Path(partial).write_text(json.dumps(self.provenance, indent=2)))
        if self.config.run.tensorboard:
            self.board = _tensorboard(self.out / "tensorboard", self.step)

    def _board(self, group: str, values: dict[str, float]) -> None:
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{group}/{name}", value, self.step)

    def _save(self) -> None:
        if not self.group.leads:
            return
        state = {"step": self.step, "model": self.student.state_dict(), "logvars": self.objective.logvars.state_dict(),
                 "ema": self.ema.state, "optimizer": self.optimizer.state_dict(), "torch_rng": torch.get_rng_state(),
                 "scores": self.scores, "best": self.best, "skipped": self.skipped,
                 "skipped_in_a_row": self.skipped_in_a_row, "config": json.dumps(dataclasses.asdict(self.config))}
        if self.adversary is not None:
            state |= {"discriminator": self.adversary.state_dict(),
                      "discriminator_optimizer": self.discriminator_optimizer.state_dict()}
        self.checkpoints.save(self.step, state)

    def _load(self) -> None:
        state = self.checkpoints.load(self.device)
        check_resumable(json.loads(state["config"]), self.config)
        self.student.load_state_dict(state["model"])
        self.objective.logvars.load_state_dict(state["logvars"])
        self.ema.load(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.adversary is not None:
            self.adversary.load_state_dict(state["discriminator"])
            self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
        torch.set_rng_state(state["torch_rng"].cpu())
        self.step, self.scores, self.best = state["step"], state["scores"], state["best"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]

    def _export(self, path: Path) -> Path:
        if not self.group.leads:
            return path
        facts = {"description": self.config.run.name, "steps": self.step, "validation": self.scores,
                 "training": without_paths(self.provenance["config"]), "versions": self.provenance["versions"],
                 "git": self.provenance["git"]}
        with self.ema.applied_to(self.student):
            checkpoint.save(self.student, path, torch.float16, facts)
        return path


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
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """``model`` with the averaged weights inside a with block, and its own again after."""
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.state)
        try:
            yield
        finally:
            model.load_state_dict(own)


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


def _optimizer(optim: OptimConfig, parameters, rate: float) -> torch.optim.Optimizer:
    settings = {"lr": rate, "betas": (optim.beta1, optim.beta2), "weight_decay": optim.weight_decay}
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(f"optim.optimizer is 'adamw8bit', but bitsandbytes cannot be imported ({error}): "
                          "pip install bitsandbytes, or set it to 'adamw'.") from None
    return AdamW8bit(parameters, **settings)


def _tensorboard(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("run.tensorboard is true, but the package is not installed: pip install tensorboard, or set it to "
                          "false; losses.csv and validation.csv are written anyway.") from None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


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
            module.forward = _recomputed(module.forward)


def _recomputed(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        return recompute(forward, x, use_reentrant=False) if torch.is_grad_enabled() else forward(x)

    return run


def _is_out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator has no class of its own for it.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
