"""Training of a sampler on CV-VAE latents; the loop itself is the one of ``cvvae/training/base.py``."""

import json
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoint import write_whole
from ..dataset import LatentDataset, weights_hash
from ..training.base import BaseTrainer, recomputed
from ..training.config import ConfigError
from ..training.distributed import share
from ..training.pictures import loss_plot, save_png
from .adapter import Adapter
from .comfyui import Sampler
from .conditions import Conditions
from .config import AdaptConfig
from .data import Batch, LatentClips
from .motion import USUAL, MotionModules
from .objective import Objective

LEVELS = 4  # noise levels at which each held-out clip is measured, spread over their distribution


class AdaptationTrainer(BaseTrainer):
    """Trains ``sampler`` on the latents of ``config.data``, whose conditions ``encode_conditions`` left in ``conditions``.

    The sampler's UNet is changed in place.  :meth:`run` returns the path of ``adapter.safetensors``, which ComfyUI loads as
    a LoRA; ``best.safetensors`` beside it is the same at the best validation.
    """

    fixed = ("model.train", "model.layers", "model.rank", "noise.distribution", "optim.optimizer", "run.seed")
    result = "adapter.safetensors"
    lighter = ("Set run.precision to 'bf16'; with model.train other than 'output' set run.checkpointing to true; or lower "
               "data.batch (and raise optim.accumulate, for the same step), then data.frames.")

    def __init__(self, config: AdaptConfig, sampler: Sampler, conditions: Path, resume: bool = False):
        self.sampler, self._conditions = sampler, conditions
        super().__init__(config, resume)

    def _build(self) -> None:
        config, unet = self.config, self.sampler.unet
        conditioned = Conditions(self._conditions)
        self.data = LatentClips(config.data, LatentDataset(config.data.latents), conditioned, unet.out_channels,
                                self.sampler.scale, config.run.seed, config.conditioning.dropout)
        motion = self.sampler.motion
        if motion is not None and self.data.longest > motion.length:
            raise ConfigError(f"The clips have up to {self.data.longest} latents, and the motion module has positions for "
                              f"{motion.length}. Set data.frames to {min(motion.length, USUAL)}.")
        if config.run.precision == "fp32":
            for frozen in filter(None, (unet, motion)):
                frozen.float()
        self.adapter = self.trainee = Adapter(unet, config.model.train, config.model.layers, config.model.rank)
        self.fingerprint = self.adapter.fingerprint() + ("" if motion is None else weights_hash(motion))
        self.objective = Objective(unet, self.adapter, self.sampler.sampling, config.noise, motion).to(self.device)
        if config.run.checkpointing:
            recompute_activations(unet, motion)
        self.trained = list(self.adapter.parameters())
        self.unadapted: float | None = None  # loss on the held-out clips before the first step

    # -- a step --------------------------------------------------------------------------------------

    def _inputs(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return batch.latents.to(self.device), {name: tensor.to(self.device) for name, tensor in batch.conditions.items()}

    def _size(self, batch: Batch) -> int:
        return len(batch.latents)

    def _shape(self, batch: Batch) -> str:
        return f"{len(batch.latents)} clips of {'x'.join(map(str, batch.latents.shape[2:]))} latents"

    def _kept(self, batch: Batch) -> dict:
        return {"latents": batch.latents, "conditions": batch.conditions}

    # -- validation ----------------------------------------------------------------------------------

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        """The loss on the held-out clips, always with the same noise at the same levels."""
        losses = {}
        for i, batch in share(self.data.validation(), self.group):
            latents, conditions = self._inputs(batch)
            for k in range(LEVELS):
                seed = Random(f"{self.config.run.seed}:{i}:{k}:validation").getrandbits(62)
                noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
                sigma = self.objective.levels(latents.new_tensor([(k + 0.5) / LEVELS]))
                with self._autocast():
                    losses[i, k] = self.objective.loss(latents, conditions, sigma, noise).item()
        losses = {at: loss for part in self.group.gathered(losses) for at, loss in part.items()}
        if not losses:
            return {}
        loss = sum(losses[at] for at in sorted(losses)) / len(losses)
        if self.unadapted is None:
            self.unadapted = loss
        return {"loss": loss, "unadapted": self.unadapted}

    def _goodness(self, scores: dict[str, float]) -> float:
        return -scores["loss"]

    def _after_validation(self) -> None:
        save_png(self.out / "losses.png", loss_plot(self.losses_log.path, self.validation_log.path))

    # -- files ---------------------------------------------------------------------------------------

    def _state(self) -> dict:
        return {"unadapted": self.unadapted, "fingerprint": self.fingerprint}

    def _load_state(self, state: dict) -> None:
        self.unadapted = state["unadapted"]
        if state["fingerprint"] != self.fingerprint:
            raise ConfigError(f"--resume: {self.out} began with another model: the weights it trains were others. Use that "
                              "one, or choose another run.out for a new run.")

    def _write(self, path: Path, facts: dict) -> None:
        metadata = {"cvvae": json.dumps(facts)}
        write_whole(path, lambda partial: save_file(self.adapter.tensors(), partial, metadata))

    def _without_paths(self, config: dict) -> dict:
        for section, name in (("model", "checkpoint"), ("model", "motion"), ("model", "vae"), ("model", "comfyui"),
                              ("data", "latents"), ("run", "out")):
            config[section][name] = Path(config[section][name]).name
        return config


def recompute_activations(unet: nn.Module, motion: MotionModules | None = None) -> None:
    """Keep the inputs of residual blocks and transformers only, and compute what is inside again in the backward pass."""
    layers = [layer for block in (*unet.input_blocks, unet.middle_block, *unet.output_blocks) for layer in block]
    if motion is not None:
        layers += motion.transformers
    for layer in layers:
        layer.forward = recomputed(layer.forward)
