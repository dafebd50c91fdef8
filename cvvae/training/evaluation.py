"""What a model does to clips: scores against the source and the image VAE, and the pictures behind them."""

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import metrics
from ..checkpoint import write_whole
from ..vae import Autoencoder, ImageVAE, VideoVAE

Distance = Callable[[Tensor, Tensor], Tensor]

EXACT = 100.0  # dB, the most a PSNR is given as: an exact result has an infinite one, and JSON has no infinity
DISTANCE_BATCH = 8  # frames compared at a time


class Score(NamedTuple):
    """How a score is shown."""

    meaning: str
    decimals: int = 2
    heading: str = ""  # of its column in tables of clips; only the main scores have one


SCORES = {
    "psnr": Score("dB, reconstruction against the source", heading="PSNR dB"),
    "ssim": Score("1 is equal", 4, "SSIM"),
    "lpips": Score("perceptual distance, 0 is equal", 4, "LPIPS"),
    "image_vae_psnr": Score("dB, the image VAE applied to every frame", heading="image VAE"),
    "image_vae_ssim": Score("1 is equal, the image VAE applied to every frame", 4),
    "compatibility_psnr": Score("dB, the image VAE's decoder on video latents, against every frame each latent stands for",
                                heading="compatible"),
    "stills_psnr": Score("dB, the video decoder on the image VAE's latents of single frames"),
    "psnr_frame_0": Score("dB, the first frame of the clip, which has a latent of its own"),
    "psnr_position_1": Score("dB, first of the four frames a latent stands for"),
    "psnr_position_2": Score("dB, second of the four"),
    "psnr_position_3": Score("dB, third of the four"),
    "psnr_position_4": Score("dB, last of the four"),
    "colour_shift": Score("of 255, how far the mean colour moves"),
    "seam_ratio": Score("jump of the error at window borders over the jump elsewhere, 1 shows nothing", heading="seams"),
    "latent_mean_gap": Score("distance of a channel's mean from the image VAE's, in its deviations; mean over channels", 4),
    "latent_std_gap": Score("relative difference of a channel's deviation from the image VAE's; mean over channels", 4),
}


@dataclass
class Evaluation:
    """Of one clip.

    scores: those of SCORES that could be computed, all finite.
    channels: "mean" and "std" of each latent channel, and beside a teacher "teacher_mean" and "teacher_std".
    pictures: clips [1, 3, T, H, W] on the CPU, by what made them, the source first.
    """

    scores: dict[str, float]
    channels: dict[str, list[float]]
    pictures: dict[str, Tensor] = field(repr=False)


@torch.no_grad()
def evaluate_clip(vae: Autoencoder, teacher: ImageVAE | None, clip: Tensor, lpips: Distance | None = None) -> Evaluation:
    """Score ``vae`` on a clip [1, 3, T, H, W] in [-1, 1]; a video VAE also against ``teacher``, if there is one.

    lpips: gives the mean distance of two batches [N, 3, H, W] in [-1, 1].
    Raises ValueError for a teacher of another latent space, and FloatingPointError where the result is not finite.
    """
    if isinstance(vae, ImageVAE):
        latents, found = _frame_by_frame(vae, clip)
        return _Scoring(clip, found, lpips).evaluation(latents, {"image VAE": found})
    if teacher is not None and teacher.config.latent_channels != vae.config.latent_channels:
        raise ValueError(f"The image VAE has {teacher.config.latent_channels} latent channels, the video VAE has "
                         f"{vae.config.latent_channels}; compare it with the one whose latent space it shares.")
    return _evaluate_video(vae, teacher, clip, lpips)


def mean_scores(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """Each score's mean over the clips that have it."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _evaluate_video(vae: VideoVAE, teacher: ImageVAE | None, clip: Tensor, lpips: Distance | None) -> Evaluation:
    frames, size = clip.shape[2], clip.shape[-2:]
    latents = vae.encode(clip).mode()
    found = vae.decode(latents, frames, size)
    scoring = _Scoring(clip, found, lpips)
    latents = latents[0].transpose(0, 1)  # [t, C, h, w]
    pictures = {"video VAE": found}
    if teacher is not None:
        image_latents, images = _frame_by_frame(teacher, clip)
        decoded = _as_clip(metrics.held(teacher.decode(latents), frames), size)
        stills = vae.decode(image_latents.transpose(0, 1)[None], size=size, mode="image")
        pictures = {"image VAE": images, "video VAE": found, "image decoder": decoded}
        scoring.add({"image_vae_psnr": metrics.psnr(images, clip), "image_vae_ssim": _ssim(images, clip),
                     "compatibility_psnr": metrics.psnr(decoded, clip), "stills_psnr": metrics.psnr(stills, clip)})
    scoring.add({f"psnr_{place}": value for place, value in metrics.position_psnr(metrics.frame_mse(found, clip)).items()})
    scoring.add({"colour_shift": metrics.colour_shift(found, clip), "seam_ratio": metrics.seam_ratio(found, clip)})
    # Each latent counted as often as it stands for frames: the teacher has one for every frame.
    latents = metrics.held(latents, frames)
    return scoring.evaluation(latents, pictures, image_latents if teacher is not None else None)


class _Scoring:
    """Collects what is known of one reconstruction."""

    def __init__(self, clip: Tensor, found: Tensor, lpips: Distance | None):
        if not found.isfinite().all():
            raise FloatingPointError("The reconstruction holds values that are not finite: the model is damaged, or its "
                                     "precision too low.")
        self.clip = clip
        self.scores: dict[str, float] = {}
        self.add({"psnr": metrics.psnr(found, clip), "ssim": _ssim(found, clip)})
        if lpips is not None:
            self.add({"lpips": _distance(lpips, found, clip)})

    def add(self, scores: dict[str, float]) -> None:
        """An exact PSNR gets a number; what else is not finite is left out."""
        scores = {name: min(value, EXACT) if "psnr" in name else value for name, value in scores.items()}
        self.scores |= {name: value for name, value in scores.items() if math.isfinite(value)}

    def evaluation(self, latents: Tensor, pictures: dict[str, Tensor], expected: Tensor | None = None) -> Evaluation:
        """latents, expected: [N, C, h, w], of the model and of its teacher."""
        mean, deviation = metrics.channel_statistics(latents)
        channels = {"mean": mean.tolist(), "std": deviation.tolist()}
        if expected is not None:
            teacher_mean, teacher_deviation = metrics.channel_statistics(expected)
            channels |= {"teacher_mean": teacher_mean.tolist(), "teacher_std": teacher_deviation.tolist()}
            if teacher_deviation.min() > 0:
                self.add({"latent_mean_gap": ((mean - teacher_mean) / teacher_deviation).abs().mean().item(),
                          "latent_std_gap": (deviation / teacher_deviation - 1).abs().mean().item()})
        pictures = {name: picture.float().cpu() for name, picture in ({"source": self.clip} | pictures).items()}
        return Evaluation(self.scores, channels, pictures)


def _frame_by_frame(image_vae: ImageVAE, clip: Tensor) -> tuple[Tensor, Tensor]:
    """Latents [T, C, h, w] of every frame by itself, and the clip they decode to."""
    latents = image_vae.encode(clip[0].transpose(0, 1)).mode()
    return latents, _as_clip(image_vae.decode(latents), clip.shape[-2:])


def _as_clip(images: Tensor, size: tuple[int, int]) -> Tensor:
    """[T, 3, H, W], trimmed to ``size`` -> [1, 3, T, H, W]."""
    return images[..., :size[0], :size[1]].transpose(0, 1)[None]


def _ssim(a: Tensor, b: Tensor) -> float:
    """NaN for frames smaller than its window."""
    return metrics.ssim(a, b) if min(a.shape[-2:]) >= metrics.SSIM_WINDOW else math.nan


def _distance(lpips: Distance, a: Tensor, b: Tensor) -> float:
    """Mean distance of the frames of two clips, a few at a time."""
    parts = [[part.float().clamp(-1, 1) for part in clip[0].transpose(0, 1).split(DISTANCE_BATCH)] for clip in (a, b)]
    return sum(lpips(x, y).item() * len(x) for x, y in zip(*parts, strict=True)) / a.shape[2]


# -- reports -----------------------------------------------------------------------------------------


def main_scores(scores: dict[str, float]) -> list[str]:
    """Those of ``scores`` that tables of clips show, in their order."""
    return [name for name, score in SCORES.items() if score.heading and name in scores]


def cell(scores: dict[str, float], name: str) -> str:
    """A score as tables show it; "-" where it could not be computed."""
    return f"{scores[name]:.{SCORES[name].decimals}f}" if name in scores else "-"


def write_report(folder: str | os.PathLike, about: dict, evaluations: dict[str, Evaluation]) -> None:
    """Write ``evaluation.json`` (everything) and ``evaluation.md`` (tables) into ``folder``.

    about: JSON-ready facts, "model" among them.  evaluations: by name of the clip.
    """
    folder = Path(folder)
    means = mean_scores(evaluation.scores for evaluation in evaluations.values())
    clips = [{"clip": name, "scores": evaluation.scores, "channels": evaluation.channels}
             for name, evaluation in evaluations.items()]
    _write(folder / "evaluation.json", json.dumps(about | {"mean": means, "clips": clips}, indent=2, allow_nan=False) + "\n")
    _write(folder / "evaluation.md", _markdown(about, means, {clip["clip"]: clip["scores"] for clip in clips}))


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda partial: Path(partial).write_text(text, encoding="utf-8"))


def _markdown(about: dict, means: dict[str, float], rows: dict[str, dict[str, float]]) -> str:
    columns = main_scores(means)
    facts = [f"{name} {value}" for name, value in about.items() if isinstance(value, (str, int)) and name != "model"]
    lines = [f"# Evaluation of {about['model']}", "", ", ".join(facts), "",
             f"| clip | {' | '.join(SCORES[name].heading for name in columns)} |", "|---|" + "---:|" * len(columns)]
    for name, scores in (rows | {"**mean**": means}).items():
        escaped = name.replace("|", "\\|")
        lines.append(f"| {escaped} | {' | '.join(cell(scores, column) for column in columns)} |")
    lines += ["", "| score | mean | |", "|---|---:|---|"]
    lines += [f"| {name} | {cell(means, name)} | {SCORES[name].meaning} |" for name in means]
    return "\n".join(lines) + "\n"
