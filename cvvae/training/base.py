"""The loop that every training run shares: one step after another, everything a function of (config, step).

Batches and noise are drawn from generators seeded with (seed, step, number of the clip in the step), and rates are computed
from the step.  So a checkpoint of weights, EMA, optimizers and step is the whole state: a resumed run on the CPU equals an
uninterrupted one to the last bit, and several processes with small batches take the steps of one with a large batch.
"""

import dataclasses
import json
import math
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, autocast, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute

from .. import checkpoint
from . import TrainingError
from .config import CommonOptimConfig, ConfigError
from .data import loader
from .distributed import join_group
from .runfolder import Checkpoints, CsvLog, check_resumable, provenance

Report = Callable[[int, dict[str, float]], None]


def learning_rate(optim: CommonOptimConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to ``final_ratio``, held there: past the end it does not rise again."""
    if step < optim.warmup:
        return optim.learning_rate * (step + 1) / optim.warmup
    progress = min(1.0, (step - optim.warmup) / max(1, optim.steps - optim.warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return optim.learning_rate * (optim.final_ratio + (1 - optim.final_ratio) * cosine)


class BaseTrainer:
    """Steps, checkpoints, logs and validation of a run; a subclass says what is trained, on what, and what is written.

    A subclass's :meth:`_build` sets

        data        with ``batch(step, part)``: the batch that this part of the step gets
        objective   a module whose ``forward(*inputs, seeds, step)`` returns losses, "total" among them, and whose ``names``
                    lists all that it may return
        trainee     the module whose weights are kept in checkpoints, averaged (EMA) and exported
        trained     the parameters that the optimizer moves

    resume: go on from the newest checkpoint in ``run.out``.  Without it, a folder that holds one is refused, so
    that no run is overwritten by accident.

    Under torchrun each process builds one, and they train together.
    """

    fixed: tuple[str, ...] = ()  # settings that make it another run
    result = "model.safetensors"
    lighter = ""  # what to change when memory runs out, as a sentence

    def __init__(self, config: Any, resume: bool = False):
        self.config = config
        run, optim = config.run, config.optim
        self.group = join_group(pick_device(run.device).type)
        self.device = pick_device(run.device)
        self.out = Path(run.out)
        self.checkpoints = Checkpoints(self.out / "checkpoints", run.keep)
        if not resume and self.checkpoints.files():
            raise ConfigError(f"{self.out} holds a run already: add --resume to go on with it, or choose another run.out.")
        torch.manual_seed(run.seed)  # the only global draws: initial weights
        self._build()
        self.ema = Ema(self.trainee, optim.ema_decay)
        self.optimizer = make_optimizer(optim, self.trained, optim.learning_rate)
        self.step = 0
        self.scores: dict[str, float] = {}  # of the last validation
        self.best = -math.inf
        self.skipped = self.skipped_in_a_row = 0  # steps whose gradient was not applied
        self.board = None
        self._stop = False
        self._whole_step = True  # false while an optimizer is at work: weights half stepped are not worth saving
        if resume:
            self._load(self.checkpoints.load(self.device))
        self.parallel = self.objective
        if self.group.world > 1:
            self.parallel = DistributedDataParallel(self.objective, broadcast_buffers=False)
        self.out.mkdir(parents=True, exist_ok=True)
        if self.group.leads:
            self._open_logs()

    # -- what a subclass says ------------------------------------------------------------------------

    def _build(self) -> None:
        raise NotImplementedError

    def _inputs(self, batch: Any) -> tuple:
        """What the objective takes of a batch, on the device."""
        raise NotImplementedError

    def _size(self, batch: Any) -> int:
        """Clips in a batch."""
        raise NotImplementedError

    def _shape(self, batch: Any) -> str:
        """Of a batch, for people."""
        raise NotImplementedError

    def _facts(self, batch: Any) -> dict[str, float]:
        """What the log says of a batch beside its losses."""
        return {}

    def _kept(self, batch: Any) -> dict[str, Any]:
        """Of a batch that stopped a run, what is worth a look."""
        raise NotImplementedError

    def _minimised(self, losses: dict[str, Tensor]) -> Tensor:
        return losses["total"]

    def _optimized(self) -> dict[str, tuple[list[nn.Parameter], torch.optim.Optimizer]]:
        """Name of its gradient's norm in the log -> what the optimizer moves in this step, and the optimizer."""
        return {"gradient_norm": (self.trained, self.optimizer)}

    def _columns(self) -> list[str]:
        """Of the log of losses, but for the step."""
        return [*self.objective.names, "gradient_norm", "learning_rate", "skipped"]

    def _measure(self) -> dict[str, float]:
        """Scores of the EMA weights, which the trainee has now; the same in every process.  Empty: nothing is held out."""
        raise NotImplementedError

    def _goodness(self, scores: dict[str, float]) -> float:
        """By which the best validation is chosen: larger is better."""
        raise NotImplementedError

    def _after_validation(self) -> None:
        """Draw curves and the like; called where the files are written."""

    def _state(self) -> dict[str, Any]:
        """Of the subclass, for the checkpoint."""
        return {}

    def _load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`_state` gave."""

    def _write(self, path: Path, facts: dict[str, Any]) -> None:
        """Write the trainee, which has the EMA weights now.  facts: of the run."""
        raise NotImplementedError

    def _without_paths(self, config: dict) -> dict:
        """Where things lie on the trainer's disk is nobody's business: a config with file names only, to publish."""
        raise NotImplementedError

    # -- the run -------------------------------------------------------------------------------------

    def run(self, report: Report | None = None) -> Path:
        """Train to the last step, or until :meth:`stop`; returns the path of the result.

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
        return self._export(self.out / self.result)

    def stop(self, *_) -> None:
        """Finish the step at hand, save and return; safe to call from a signal handler.  A second call does not wait."""
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True

    def stop_on_signals(self) -> None:
        """Make Ctrl-C and SIGTERM stop as :meth:`stop` does."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    # -- a step --------------------------------------------------------------------------------------

    def _take_step(self, batches: list) -> dict[str, float]:
        """One optimizer step over ``batches``; returns what the log says of it."""
        try:
            return self._train_step(batches)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"Step {self.step}: out of memory with {self._shape(batches[0])}. {self.lighter} What was trained so far is "
                f"saved; go on with --resume. ({str(error).splitlines()[0]})") from error

    def _train_step(self, batches: list) -> dict[str, float]:
        rate = learning_rate(self.config.optim, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.objective.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for k, batch in enumerate(batches):
            last = k == len(batches) - 1
            inputs = self._inputs(batch)
            with nullcontext() if last or self.group.world == 1 else self.parallel.no_sync():
                with self._autocast():
                    losses = self.parallel(*inputs, self._seeds(k, self._size(batch)), self.step)
                (self._minimised(losses) / len(batches)).backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.detach().float()
        values = dict(zip(sums, self.group.mean(torch.stack(list(sums.values())) / len(batches)).tolist(), strict=True))
        values |= {"learning_rate": rate} | self._facts(batches[0]) | self._apply_gradients(batches)
        return values | {"skipped": self.skipped}

    def _apply_gradients(self, batches: list) -> dict[str, float]:
        """Let the optimizers step, unless a gradient is not finite or far too large; returns the gradients' norms."""
        optim = self.config.optim
        optimized = self._optimized()
        norms = {name: nn.utils.clip_grad_norm_(parameters, optim.clip_norm).item()
                 for name, (parameters, _) in optimized.items()}
        if not all(norm < optim.skip_norm for norm in norms.values()):  # NaN is not smaller either
            self._skip(batches, norms)
            return norms
        self._whole_step = False
        for _, optimizer in optimized.values():
            optimizer.step()
        self.step += 1
        self.ema.update(self.trainee, self.step)
        self.skipped_in_a_row = 0
        self._whole_step = True
        return norms

    def _skip(self, batches: list, norms: dict[str, float]) -> None:
        optim = self.config.optim
        self.step += 1
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row < optim.stop_after_skips:
            return
        path = self.out / f"bad_batch_rank{self.group.rank}.pt"
        kept = [self._kept(batch) for batch in batches]
        kept = {"step": self.step - 1} | {name: [batch[name] for batch in kept] for name in kept[0]}
        checkpoint.write_whole(path, lambda partial: torch.save(kept, partial))
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
        return autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bf16")

    # -- validation ----------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Score the EMA weights on what is held out."""
        with self.ema.applied_to(self.trainee):
            scores = self._measure()
        if not scores:
            return
        self.scores = scores
        quality = self._goodness(scores)
        better, self.best = quality > self.best, max(quality, self.best)
        if not self.group.leads:
            return
        self.validation_log.append(self.step, scores)
        self._board("validation", scores)
        self._after_validation()
        if better:
            self._export(self.out / "best.safetensors")

    # -- files ---------------------------------------------------------------------------------------

    def _open_logs(self) -> None:
        self.losses_log = CsvLog(self.out / "losses.csv", self._columns(), self.step)
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
        self.checkpoints.save(self.step, {
            "step": self.step, "model": self.trainee.state_dict(), "ema": self.ema.state,
            "optimizer": self.optimizer.state_dict(), "torch_rng": torch.get_rng_state(), "scores": self.scores,
            "best": self.best, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row,
            "config": json.dumps(dataclasses.asdict(self.config))} | self._state())

    def _load(self, state: dict[str, Any]) -> None:
        check_resumable(json.loads(state["config"]), self.config, self.fixed)
        self.trainee.load_state_dict(state["model"])
        self.ema.load(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"].cpu())
        self.step, self.scores, self.best = state["step"], state["scores"], state["best"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self._load_state(state)

    def _export(self, path: Path) -> Path:
        if not self.group.leads:
            return path
        facts = {"description": self.config.run.name, "steps": self.step, "validation": self.scores,
                 "training": self._without_paths(json.loads(json.dumps(self.provenance["config"]))),
                 "versions": self.provenance["versions"], "git": self.provenance["git"]}
        with self.ema.applied_to(self.trainee):
            self._write(path, facts)
        return path


class Ema:
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


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"run.device is {name!r}, which this machine does not have ({reason}).") from None


def make_optimizer(optim: CommonOptimConfig, parameters, rate: float) -> torch.optim.Optimizer:
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


def recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``forward`` that keeps its inputs only, and computes what is inside again in the backward pass."""
    def run(*inputs, **named) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        return recompute(forward, *inputs, use_reentrant=False, **named)

    return run


def is_out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator has no class of its own for it.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
