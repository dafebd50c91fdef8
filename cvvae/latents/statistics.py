"""What latents look like in numbers, per channel, and latents made to look like others."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .layout import LatentError, check


@dataclass(frozen=True)
class Distribution:
    """What a family of models expects of its latents: each channel about N(mean, std^2)."""

    family: str
    mean: float
    std: float


# The models compute with (latents - shift) * factor, which their authors chose to have a standard deviation of 1.
EXPECTED = {
    4: Distribution("SD 1.x, SD 2.x, SVD", 0.0, 1 / 0.18215),  # stable-diffusion v1 config, scale_factor
    16: Distribution("SD 3", 0.0609, 1 / 1.5305),  # stable-diffusion-3 vae/config.json, shift_factor and scaling_factor
}
WHITE, INK, GRID, BAND = (255, 255, 255), (40, 40, 45), (215, 215, 220), (240, 240, 243)
COLOURS = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167)]  # as in training.pictures, which needs PyAV
SCALED, FLAT = 0.3, 1e-6  # shares of the expected deviation: less than this is a mistake, and less than that nothing


def expected_distribution(channels: int) -> Distribution:
    """Of latents with so many channels; raises LatentError where no family is known."""
    if channels not in EXPECTED:
        raise LatentError(f"no family of models is known whose latents have {channels} channels; expected "
                          f"{' or '.join(map(str, EXPECTED))}. Give a reference instead.")
    return EXPECTED[channels]


@dataclass(frozen=True)
class Statistics:
    """Of the finite values of each channel, all [C] in float64; NaN where there are none.  bad: how many are not finite."""

    mean: Tensor
    std: Tensor
    min: Tensor
    max: Tensor
    bad: Tensor
    count: int  # values of a channel

    def distance(self, expected: Distribution) -> Tensor:
        """Kullback-Leibler divergence of N(mean, std^2) from the expected distribution, [C] in nats: 0 where equal."""
        ratio = (self.std / expected.std) ** 2
        return 0.5 * (ratio + ((self.mean - expected.mean) / expected.std) ** 2 - 1 - torch.log(ratio))

    def remarks(self, expected: Distribution | None) -> list[str]:
        """What is wrong with them for certain, as sentences."""
        found = []
        if (bad := int(self.bad.sum())) > 0:
            found.append(f"{bad} of {self.count * len(self.bad)} values are NaN or infinite: they decode to black. Encode "
                         "or sample in bf16 or fp32.")
        if expected is None:
            return found
        share = self.std.square().mean().sqrt().item() / expected.std
        if share < FLAT:
            found.append("Every channel is flat: empty latents, or one colour.")
        elif share < SCALED:
            found.append(f"The deviation is {share:.2f} of that expected by {expected.family}: latents that were multiplied "
                         "by a model's factor, or very flat pictures.")
        elif share > 1 / SCALED:
            found.append(f"The deviation is {share:.1f} times that expected by {expected.family}: latents of another "
                         "family, or divided by a model's factor twice.")
        return found


def statistics(latents: Tensor) -> Statistics:
    """Per channel over clips, time and space, of [B, C, t, h, w]."""
    values = check(latents).movedim(1, 0).flatten(1).double()
    finite = values.isfinite()
    nothing = torch.where(finite.any(1), 0.0, torch.nan)
    n = finite.sum(1)
    mean = torch.where(finite, values, 0.0).sum(1) / n
    std = (torch.where(finite, values - mean[:, None], 0.0).square().sum(1) / n).sqrt()
    least, most = (torch.where(finite, values, end).aminmax(dim=1) for end in (torch.inf, -torch.inf))
    return Statistics(mean, std, least.min + nothing, most.max + nothing, (~finite).sum(1), values.shape[1])


def normalize(latents: Tensor, reference: Tensor | Distribution, per_frame: bool = False, strength: float = 1.0) -> Tensor:
    """``latents`` with the mean and deviation of ``reference`` in every channel of every clip (AdaIN).

    reference: latents of any length and size, or a distribution.
    per_frame: statistics of each latent instead of the clip's.  This takes fades and flashes out, or with a reference of
        the same length puts its in.
    strength: 0 changes nothing, 1 goes all the way.
    A flat channel has no contrast to adjust: it only takes the mean.
    """
    x = check(latents).float()
    mean, std = _moments(x, per_frame)
    if isinstance(reference, Distribution):
        new_mean, new_std = reference.mean, reference.std
    else:
        _check_reference(latents, check(reference), per_frame)
        new_mean, new_std = _moments(reference.to(x), per_frame)
    gain = torch.where(std > FLAT * mean.abs().clamp(min=1.0), new_std / std, 1.0)
    return torch.lerp(x, (x - mean) * gain + new_mean, strength).to(latents.dtype)


def _moments(x: Tensor, per_frame: bool) -> tuple[Tensor, Tensor]:
    std, mean = torch.std_mean(x, dim=(3, 4) if per_frame else (2, 3, 4), correction=0, keepdim=True)
    return mean, std


def _check_reference(latents: Tensor, reference: Tensor, per_frame: bool) -> None:
    for dimension, name in ((1, "channels"), (0, "clips"), (2, "latents")):
        here, there = latents.shape[dimension], reference.shape[dimension]
        if here == there or (dimension == 0 and there == 1) or (dimension == 2 and (not per_frame or there == 1)):
            continue
        todo = {1: "Take a reference of the same family of models.", 0: "Take one clip as the reference, or as many.",
                2: "Compare whole clips, trim the longer one, or take a reference of one latent."}[dimension]
        raise LatentError(f"the reference has {there} {name} and the latents have {here}. {todo}")


# -- pictures ----------------------------------------------------------------------------------------


def plot(found: Statistics, expected: Distribution | None = None, title: str = "") -> np.ndarray:
    """uint8 [H, W, 3]: a bar of mean +- deviation for each channel, a line from its least to its largest value.

    The grey band is mean +- deviation of the expected distribution; the ruled lines count its deviations, or without it
    the channels' own.
    """
    base = expected or Distribution("", 0.0, max(FLAT, found.std.nan_to_num().square().mean().sqrt().item()))
    in_units = {name: ((getattr(found, name) - base.mean) / base.std).tolist() for name in ("mean", "min", "max")}
    deviations = (found.std / base.std).tolist()
    reach = [abs(value) for values in in_units.values() for value in values if np.isfinite(value)]
    most = max(2, int(np.ceil(max(reach, default=0))))
    rule = next(r for r in (1, 2, 5, 10, 20, 50, most) if most <= 8 * r or r == most)
    channels, font = len(deviations), ImageFont.load_default(13)
    left, top, height, pitch = 64, 40, 320, max(24, min(72, 560 // channels))
    width = left + channels * pitch + 24
    image = Image.new("RGB", (max(width, 30 + round(font.getlength(title))), top + height + 44), WHITE)
    pen = ImageDraw.Draw(image)

    def y(value: float) -> float:
        return top + height * (0.5 - 0.5 * value / most)

    pen.text((14, 12), title, INK, font)
    if expected:
        pen.rectangle([left, y(1), width - 24, y(-1)], BAND)
    for level in range(-(most // rule) * rule, most + 1, rule):
        pen.line([left, y(level), width - 24, y(level)], GRID)
        pen.text((left - 8, y(level)), f"{base.mean + level * base.std:.3g}", INK, font, anchor="rm")
    for c, deviation in enumerate(deviations):
        x, colour = left + (c + 0.5) * pitch, COLOURS[c % len(COLOURS)]
        pen.text((x, top + height + 8), str(c), INK, font, anchor="mt")
        if np.isfinite(deviation):
            mean = in_units["mean"][c]
            pen.line([x, y(in_units["max"][c]), x, y(in_units["min"][c])], colour, 2)
            pen.rectangle([x - pitch / 4, y(mean + deviation), x + pitch / 4, y(mean - deviation)], None, colour, 2)
            pen.line([x - pitch / 4, y(mean), x + pitch / 4, y(mean)], colour, 3)
    pen.text(((left + width - 24) / 2, top + height + 40), "channel", INK, font, anchor="ms")
    return np.array(image)
