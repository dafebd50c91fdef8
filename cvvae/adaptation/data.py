"""Batches of latents and what the sampler is told of them, drawn from (seed, step, number of the clip in the step)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from ..dataset import LatentDataset
from ..frames import latent_side, latents_of
from ..training.config import ConfigError
from .conditions import Conditions
from .config import DataConfig


@dataclass
class Batch:
    """latents [B, C, t, h, w], scaled; conditions: tensors with B in front."""

    latents: Tensor
    conditions: dict[str, Tensor]


class LatentClips:
    """Clips of latents to train on, those of one shape together; the held-out ones are kept apart.

    ``longest`` is the most latents a clip of them has.

    channels: of the model's latents.  scale: what the model does to them (``latent_format.process_in``).
    """

    def __init__(self, config: DataConfig, data: LatentDataset, conditions: Conditions, channels: int,
                 scale: Callable[[Tensor], Tensor], seed: int, dropout: float):
        self.config, self.data, self.conditions = config, data, conditions
        self.scale, self.seed, self.dropout = scale, seed, dropout
        if data.plan["channels"] != channels:
            raise ConfigError(f"data.latents has latents of {data.plan['channels']} channels, the sampler's have {channels}:"
                              " encode the clips with the CV-VAE of its family (4 channels: SD 1.x, SD 2.x, SVD).")
        stems = {Path(sample.source).stem for sample in data.samples}
        if unknown := [name for name in config.validation if name not in stems]:
            raise ConfigError(f"data.validation: {unknown[0]!r} is none of the {len(stems)} videos of {config.latents}, "
                              f"such as {sorted(stems)[0]!r}.")
        held_out, self.shapes, short = [], {}, 0
        for i, sample in enumerate(data.samples):
            shape = self._shape(i)
            if shape[0] < config.frames:
                short += 1
            elif Path(sample.source).stem in config.validation:
                held_out.append(i)
            else:
                self.shapes.setdefault(shape, []).append(i)
        self.held_out = held_out
        if not self.shapes:
            raise ConfigError(f"There is no clip to train on in {config.latents}: of {len(data)} clips {short} are shorter "
                              f"than data.frames = {config.frames} latents and {len(held_out)} are held out.")
        self.longest = max(shape[0] for shape in (*self.shapes, *map(self._shape, held_out)))

    def batch(self, step: int, part: int) -> Batch:
        """The ``part``-th of a step; all parts have clips of one shape."""
        rng = Random(f"{self.seed}:{step}:shape")
        clips = rng.choices(list(self.shapes.values()), [len(clips) for clips in self.shapes.values()])[0]
        return collate([self._clip(clips, Random(f"{self.seed}:{step}:{part * self.config.batch + k}:clip"))
                        for k in range(self.config.batch)])

    def validation(self) -> list[Batch]:
        """The held-out clips, each by itself."""
        return [collate([self._item(i, None)]) for i in self.held_out]

    def _clip(self, clips: list[int], rng: Random) -> tuple[Tensor, dict[str, Tensor]]:
        return self._item(rng.choice(clips), rng)

    def _item(self, i: int, rng: Random | None) -> tuple[Tensor, dict[str, Tensor]]:
        # From the start: only a clip's first latent stands for a single frame.
        latents = self.data[i][:, :self.config.frames or None]
        return self.scale(latents), self.conditions.of(self.data.samples[i], rng, self.dropout)

    def _shape(self, i: int) -> tuple[int, int, int]:
        sample = self.data.samples[i]
        t = latents_of(sample.frames)
        return (min(t, self.config.frames or t), latent_side(sample.height), latent_side(sample.width))


def collate(items: list[tuple[Tensor, dict[str, Tensor]]]) -> Batch:
    latents, conditions = zip(*items, strict=True)
    length = math.lcm(*(len(of["context"]) for of in conditions))
    for of in conditions:  # as ComfyUI batches texts of unequal length: to attention a text repeated is the same text
        of["context"] = of["context"].repeat(length // len(of["context"]), 1)
    return Batch(torch.stack(latents), {name: torch.stack([of[name] for of in conditions]) for name in conditions[0]})
