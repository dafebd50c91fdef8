"""Latents seen without decoding: three colours as a linear function of the channels, fitted by least squares.

One picture of h x w for each latent.  Latent 0 is compared with frame 0, each other with the mean of the four frames it
stands for (:mod:`cvvae.frames`).  This shows what is where, its colours and its motion; not its edges.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import BUILT_IN, write_whole
from ..frames import SPACE_FACTOR, TIME_FACTOR, padded_frames, padded_size
from ..metrics import decibels
from .layout import LatentError, check

Pair = tuple[Tensor, Tensor]  # latents [B, C, t, h, w] and the clip [B, 3, T, H, W] in [-1, 1] they were encoded from


@dataclass(frozen=True)
class LinearPreview:
    """RGB in [-1, 1] = ``weight`` [3, C] times a latent + ``bias`` [3], float32.  about: how it was fitted, JSON-ready."""

    weight: Tensor
    bias: Tensor
    about: dict = field(default_factory=dict)

    @property
    def channels(self) -> int:
        return self.weight.shape[1]

    def pictures(self, latents: Tensor, scale: int = SPACE_FACTOR) -> Tensor:
        """[B, C, t, h, w] -> [B, 3, t, h * scale, w * scale] in [-1, 1], float32; bilinear, 8 is the size of the frames.

        Raises LatentError for another number of channels, and for values that are not finite.
        """
        rgb = self._linear(latents).clamp(-1, 1)
        if scale == 1:
            return rgb
        flat = F.interpolate(rgb.movedim(2, 1).flatten(0, 1), scale_factor=scale, mode="bilinear")
        return flat.unflatten(0, (rgb.shape[0], rgb.shape[2])).movedim(1, 2)

    def score(self, pairs: Iterable[Pair], mode: str = "video") -> dict[str, float]:
        """How well it shows ``pairs``, at the size of latents: "psnr" in dB; "baseline", the same of a picture in the mean
        colour of all pairs; and "r2", the share of the variance that it explains."""
        found, wanted = zip(*[(self._linear(latents).movedim(1, -1).flatten(0, -2), rows_of(clip, mode))
                              for latents, clip in pairs], strict=True)
        found, wanted = torch.cat(found).double().clamp(-1, 1), torch.cat(wanted).double()
        error = (found - wanted).square().mean().item() / 4
        variance = (wanted - wanted.mean(0)).square().mean().item() / 4
        r2 = 1 - error / variance if variance else math.nan
        return {"psnr": decibels(error), "baseline": decibels(variance), "r2": r2}

    def _linear(self, latents: Tensor) -> Tensor:
        x = checked(latents)
        if x.shape[1] != self.channels:
            raise LatentError(f"these latents have {x.shape[1]} channels, and this preview is of a model with "
                              f"{self.channels}. Choose the model that the latents belong to.")
        return torch.einsum("rc,bcthw->brthw", self.weight.to(x), x) + self.bias.to(x).view(3, 1, 1, 1)


def fit_preview(pairs: Sequence[Pair], mode: str = "video", about: dict | None = None) -> LinearPreview:
    """The map that shows ``pairs`` with the least mean squared error, every latent counting alike.

    mode: "video", or "image" where each latent was encoded from a frame of its own.  about: kept with the map.
    Raises LatentError where the latents are not of these clips, not of one model, or not finite.
    """
    if not pairs:
        raise LatentError("there is nothing to fit a preview to: expected latents with the clips they were encoded from.")
    channels = {latents.shape[1] for latents, _ in pairs}
    if len(channels) > 1:
        raise LatentError(f"these latents have {' and '.join(map(str, sorted(channels)))} channels: they belong to "
                          "different families of models. Fit a preview to each.")
    rows, targets = [], []
    for latents, clip in pairs:
        rows.append(checked(latents).movedim(1, -1).flatten(0, -2).double().cpu())
        targets.append(rows_of(clip, mode).double().cpu())
        if len(rows[-1]) != len(targets[-1]):
            raise LatentError(f"latents of shape {list(latents.shape)} are not of a clip of shape {list(clip.shape)} in "
                              f"{mode} mode. Encode that clip, and give its latents.")
    rows, targets = torch.cat(rows), torch.cat(targets)
    # Around the means, so that latents of one colour give that colour whatever their size.
    middle, colour = rows.mean(0), targets.mean(0)
    weight = torch.linalg.lstsq(rows - middle, targets - colour, driver="gelsd").solution.T
    return LinearPreview(weight.float(), (colour - weight @ middle).float(), about or {})


def pairs_of(encode: Callable[[Tensor], Tensor], clips: Iterable[Tensor]) -> list[Pair]:
    """What to fit a model's preview to: ``clips`` [B, 3, T, H, W] in [-1, 1] as they are, darker and lighter, encoded.

    A few clips hold few colours; with these variants a map of five shows other clips as well as one of sixty.
    """
    variants = [variant for clip in clips for variant in (clip, (clip - 1) / 2, (clip + 1) / 2)]
    return [(encode(variant), variant) for variant in variants]


def rows_of(clip: Tensor, mode: str = "video") -> Tensor:
    """The colours [B * t * h * w, 3] of the frames each latent stands for, padded as the encoder pads them."""
    if clip.ndim != 5 or clip.shape[1] != 3 or 0 in clip.shape:
        raise LatentError(f"Expected a clip [B, 3, T, H, W], found shape {list(clip.shape)}.")
    frames, height, width = clip.shape[2:]
    more = (padded_frames(frames) if mode == "video" else frames) - frames
    clip = F.pad(clip.float(), (0, padded_size(width) - width, 0, padded_size(height) - height, 0, more), mode="replicate")
    small = F.avg_pool3d(clip, (1, SPACE_FACTOR, SPACE_FACTOR))
    if mode == "video":
        later = small[:, :, 1:]
        means = F.avg_pool3d(later, (TIME_FACTOR, 1, 1)) if later.shape[2] else later
        small = torch.cat([small[:, :, :1], means], dim=2)
    return small.movedim(1, -1).flatten(0, -2)


def checked(latents: Tensor) -> Tensor:
    """``latents`` [B, C, t, h, w] in float32; raises LatentError where values are NaN or infinite."""
    x = check(latents).float()
    bad = ~x.isfinite()
    if bad.any():
        first = int(bad.any(4).any(3).any(1).any(0).nonzero()[0])
        raise LatentError(f"{int(bad.sum())} of {x.numel()} values are NaN or infinite, the first of them in latent "
                          f"{first}. They cannot be shown. Encode or sample in bf16 or fp32; CV-VAE Latent Statistics says "
                          "in which channels they are.")
    return x


# -- files -------------------------------------------------------------------------------------------


def save_preview(preview: LinearPreview, path: str | os.PathLike) -> None:
    """Write it as JSON; the file has its name only when whole."""
    rows = ",\n    ".join(json.dumps([round(value, 6) for value in row]) for row in preview.weight.tolist())
    bias = json.dumps([round(value, 6) for value in preview.bias.tolist()])
    about = json.dumps(preview.about, indent=2).replace("\n", "\n  ")
    text = f'{{\n  "weight": [\n    {rows}\n  ],\n  "bias": {bias},\n  "about": {about}\n}}\n'
    write_whole(path, lambda partial: Path(partial).write_text(text, encoding="utf-8"))


def load_preview(source: str | os.PathLike = "tiny") -> LinearPreview:
    """A map that :func:`save_preview` wrote; "tiny" is that of the built-in model.  Raises ValueError for other files."""
    path = {"tiny": BUILT_IN / "tiny_preview.json"}.get(str(source), Path(source))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        weight, bias = (torch.tensor(found[name], dtype=torch.float32) for name in ("weight", "bias"))
        fits = weight.ndim == 2 and len(weight) == 3 and bias.shape == (3,)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no preview of latents ({type(error).__name__}: {error}); expected the JSON file of "
                         "benchmarks/preview.py.") from None
    if not fits:
        raise ValueError(f"{path}: expected a weight [3, C] and a bias [3], found {list(weight.shape)} and "
                         f"{list(bias.shape)}. Make it again with benchmarks/preview.py.")
    return LinearPreview(weight, bias, found.get("about", {}))
