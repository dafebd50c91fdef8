"""Pictures of a run, drawn with Pillow: clips side by side, contact sheets, and curves.

All are uint8 [H, W, 3].
"""

import csv
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..checkpoint import write_whole
from ..video import to_frames

Curve = tuple[list[float], list[float]]  # x and y

DARK, LIGHT, GREY = (24, 24, 27), (235, 235, 235), (150, 150, 155)
WHITE, INK, GRID, AXIS = (255, 255, 255), (40, 40, 45), (228, 228, 232), (130, 130, 138)
# Told apart by most people, colour-blind ones too (Okabe and Ito), its yellow darkened for a white ground.
COLOURS = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0), (110, 90, 40),
           (120, 120, 120)]
GAP = 4  # pixels between pictures
FONT, SMALL_FONT = 14, 10  # text height where there is room, and the least that can be read
SMALLEST, LARGEST = 64, 256  # pixels: sides of the pictures of a contact sheet
# Columns of losses.csv that are no losses, and of validation.csv what is drawn.
NOT_LOSSES = ("step", "gradient_norm", "discriminator_gradient_norm", "adaptive_weight", "learning_rate", "frames",
              "skipped")
VALIDATION = ("psnr", "image_vae_psnr", "compatibility_psnr", "stills_psnr")
LABELS = 64  # pixels left of an axis: the same in all panels, so that their steps are below each other
MOST_POINTS = 2000  # drawn of a curve; more would fall on the same pixels


def save_png(path: str | os.PathLike, pixels: np.ndarray) -> None:
    """Write ``pixels``; the file has its name only when whole."""
    write_whole(path, lambda partial: Image.fromarray(pixels).save(partial, format="PNG"))


# -- clips -------------------------------------------------------------------------------------------


def side_by_side(pictures: dict[str, Tensor]) -> Iterator[np.ndarray]:
    """Frames of clips [1, 3, T, H, W] next to each other, their names above; height and width are even, as H.264 needs.

    Raises ValueError where the clips differ in shape.
    """
    shapes = {tuple(clip.shape) for clip in pictures.values()}
    if len(shapes) != 1:
        raise ValueError(f"Clips side by side need one shape, found {', '.join(map(str, sorted(shapes)))}.")
    *_, frames, height, width = shapes.pop()
    column = max([width, *(math.ceil(_font(SMALL_FONT).getlength(name)) + GAP for name in pictures)])
    font = _fitting(pictures, column)
    strip = FONT + 8
    canvas = Image.new("RGB", (_even(len(pictures) * (column + GAP) - GAP), _even(strip + height)), DARK)
    draw = ImageDraw.Draw(canvas)
    for k, name in enumerate(pictures):
        draw.text((k * (column + GAP) + column / 2, strip / 2), name, LIGHT, font, anchor="mm")
    for t in range(frames):
        frame = np.array(canvas)
        for k, clip in enumerate(pictures.values()):
            left = k * (column + GAP) + (column - width) // 2
            frame[strip:strip + height, left:left + width] = to_frames(clip[:, :, t:t + 1])[0]
        yield frame


def contact_sheet(rows: list[tuple[str, dict[str, Tensor]]], columns: int = 6) -> np.ndarray:
    """The :func:`clip_sheet` of each named clip, below each other."""
    return stacked([clip_sheet(name, pictures, columns) for name, pictures in rows])


def stacked(sheets: list[np.ndarray]) -> np.ndarray:
    """Pictures below each other, aligned at the left."""
    width = max(sheet.shape[1] for sheet in sheets)
    return np.concatenate([_widened(sheet, width) for sheet in sheets])


def clip_sheet(title: str, pictures: dict[str, Tensor], columns: int = 6) -> np.ndarray:
    """Up to ``columns`` frames of a clip, evenly chosen from first to last, with a row for each of its pictures.

    Very small frames are enlarged and large ones reduced.
    """
    *_, frames, height, width = next(iter(pictures.values())).shape
    chosen = sorted({round(t) for t in np.linspace(0, frames - 1, min(columns, frames))})
    scale = min(max(1, math.ceil(SMALLEST / min(height, width))), LARGEST / max(height, width))
    cell = max(1, round(width * scale)), max(1, round(height * scale))
    font, small = _font(FONT), _font(FONT - 2)
    margin = math.ceil(max(font.getlength(name) for name in pictures)) + 20
    top = 2 * FONT + 22
    sheet_width = max(margin + len(chosen) * (cell[0] + GAP) + 6, math.ceil(font.getlength(title)) + 20)
    canvas = Image.new("RGB", (sheet_width, top + len(pictures) * (cell[1] + GAP) + 6), DARK)
    draw = ImageDraw.Draw(canvas)
    draw.text((10, 8), title, LIGHT, font)
    for i, t in enumerate(chosen):
        draw.text((margin + i * (cell[0] + GAP) + cell[0] / 2, top - 4), f"frame {t}", GREY, small, anchor="ms")
    for k, (name, clip) in enumerate(pictures.items()):
        y = top + k * (cell[1] + GAP)
        draw.text((margin - 10, y + cell[1] / 2), name, LIGHT, font, anchor="rm")
        for i, pixels in enumerate(to_frames(clip[:, :, chosen])):
            resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
            canvas.paste(Image.fromarray(pixels).resize(cell, resample), (margin + i * (cell[0] + GAP), y))
    return np.array(canvas)


def _widened(sheet: np.ndarray, width: int) -> np.ndarray:
    """``sheet`` with as much of its ground (the top right pixel) to its right as ``width`` asks."""
    ground = np.broadcast_to(sheet[:1, -1:], (sheet.shape[0], width - sheet.shape[1], 3))
    return np.concatenate([sheet, ground], axis=1)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _fitting(names, width: int) -> ImageFont.FreeTypeFont:
    """The largest font, between the two sizes, in which every name is at most ``width`` pixels long."""
    for size in range(FONT, SMALL_FONT, -1):
        if all(_font(size).getlength(name) <= width for name in names):
            return _font(size)
    return _font(SMALL_FONT)


def _even(pixels: int) -> int:
    return pixels + pixels % 2


# -- curves ------------------------------------------------------------------------------------------


def loss_plot(losses_csv: str | os.PathLike, validation_csv: str | os.PathLike | None = None) -> np.ndarray:
    """Panels of a run: losses, smoothed over a fortieth of the steps with the raw ones behind; below, PSNRs of validation.

    Losses that are not always positive (a GAN's, or with learned variances the total) have a panel of their own.
    """
    columns = _read_columns(losses_csv)
    raw = {name: curve for name, curve in columns.items() if name not in NOT_LOSSES and not name.startswith("logvar_")}
    positive = {name: curve for name, curve in raw.items() if all(y > 0 for y in curve[1] if math.isfinite(y))}
    signed = {name: curve for name, curve in raw.items() if name not in positive}
    panels = [_training_panel("Training losses", positive, log=True)]
    if signed:
        panels.append(_training_panel("Training losses, signed", signed, log=False))
    if validation_csv is not None and Path(validation_csv).exists():
        scores = _read_columns(validation_csv)
        if "unadapted" in scores:  # of a sampler's adaptation
            panels.append(plot({name: scores[name] for name in ("loss", "unadapted")}, "Held-out clips", "loss", log=True))
        else:
            panels.append(plot({name: scores[name] for name in VALIDATION if name in scores}, "Validation", "PSNR, dB"))
    return stacked(panels)


def plot(curves: dict[str, Curve], title: str = "", ylabel: str = "", log: bool = False, size: tuple[int, int] = (900, 520),
         behind: dict[str, Curve] | None = None) -> np.ndarray:
    """Curves by name over the steps, from 0 to the last.

    Points that are not finite, or on a logarithmic axis not positive, break a curve; a point by itself is a dot.
    behind: drawn faintly, in the colour of the curve of the same name.  size: width, height.
    """
    return _Plot(curves, behind or {}, title, ylabel, log, size).draw()


class _Plot:
    FINE = 2  # drawn this much larger and reduced, for smooth edges

    def __init__(self, curves: dict[str, Curve], behind: dict[str, Curve], title: str, ylabel: str, log: bool,
                 size: tuple[int, int]):
        self.title, self.ylabel, self.log = title, ylabel, log
        self.colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(curves)}
        self.curves = {name: self._points(curve) for name, curve in curves.items()}
        self.behind = {name: self._points(curve) for name, curve in behind.items()}
        points = np.concatenate([np.zeros((0, 2)), *self.curves.values(), *self.behind.values()])
        points = points[np.isfinite(points).all(1)]
        self.empty = len(points) == 0
        self.x_range = 0.0, max([1.0, *points[:, 0]])
        self.y_range = _range(points[:, 1], 0.05)
        self.width, self.height = (side * self.FINE for side in size)
        self.font, self.title_font = _font(12 * self.FINE), _font(15 * self.FINE)
        self.image = Image.new("RGB", (self.width, self.height), WHITE)
        self.pen = ImageDraw.Draw(self.image)

    def _points(self, curve: Curve) -> np.ndarray:
        """[n, 2], y as its logarithm where the axis is; NaN where there is nothing to draw."""
        points = np.array(curve, dtype=np.float64).reshape(2, -1).T
        if self.log:
            positive = points[:, 1] > 0
            points[:, 1] = np.log10(points[:, 1], out=np.full(len(points), np.nan), where=positive)
        points[~np.isfinite(points).all(1)] = np.nan
        return points

    def draw(self) -> np.ndarray:
        fine, pen = self.FINE, self.pen
        legend_bottom = self._head()
        y_ticks = _log_ticks(*self.y_range) if self.log else _ticks(*self.y_range, 6)
        self.box = (LABELS * fine, legend_bottom + 10 * fine, self.width - 24 * fine, self.height - 44 * fine)
        left, top, right, bottom = self.box
        for value, text in y_ticks:
            _, y = self._place(self.x_range[0], value)
            pen.line([(left, y), (right, y)], GRID, fine)
            pen.text((left - 8 * fine, y), text, INK, self.font, anchor="rm")
        for value, text in _ticks(*self.x_range, 8, finest=1):
            x, _ = self._place(value, self.y_range[0])
            pen.line([(x, top), (x, bottom)], GRID, fine)
            pen.text((x, bottom + 8 * fine), text, INK, self.font, anchor="mt")
        pen.text(((left + right) / 2, self.height - 8 * fine), "step", INK, self.font, anchor="ms")
        for name, points in self.behind.items():
            self._curve(points, _faint(self.colours.get(name, INK)), fine)
        for name, points in self.curves.items():
            self._curve(points, self.colours[name], 2 * fine)
        pen.line([(left, top), (left, bottom), (right, bottom)], AXIS, fine)
        if self.empty:
            pen.text(((left + right) / 2, (top + bottom) / 2), "nothing to show yet", AXIS, self.title_font, anchor="mm")
        return np.array(self.image.reduce(fine))

    def _head(self) -> float:
        """Title, what the y axis is, and the legend, in as many lines as it takes; returns where it ends."""
        fine, pen = self.FINE, self.pen
        x, y, line = 16 * fine, 12 * fine, 20 * fine
        pen.text((x, y), self.title, INK, self.title_font)
        if self.ylabel:
            beside = self.title_font.getlength(self.title) + 12 * fine if self.title else 0
            pen.text((x + beside, y + 2 * fine), self.ylabel, AXIS, self.font)
        if self.title or self.ylabel:
            y += 28 * fine
        for name, colour in self.colours.items():
            length = 26 * fine + self.font.getlength(name)
            if x + length > self.width - 16 * fine and x > 16 * fine:
                x, y = 16 * fine, y + line
            pen.line([(x, y + 8 * fine), (x + 18 * fine, y + 8 * fine)], colour, 3 * fine)
            pen.text((x + 24 * fine, y + 8 * fine), name, INK, self.font, anchor="lm")
            x += length + 18 * fine
        return y + (line if self.colours else 0)

    def _place(self, x, y):
        """Where values lie in the picture."""
        left, top, right, bottom = self.box
        return (left + (x - self.x_range[0]) / (self.x_range[1] - self.x_range[0]) * (right - left),
                bottom - (y - self.y_range[0]) / (self.y_range[1] - self.y_range[0]) * (bottom - top))

    def _curve(self, points: np.ndarray, colour: tuple[int, int, int], width: int) -> None:
        breaks = np.flatnonzero(np.isnan(points[:, 0]))
        for part in np.split(points, breaks):
            part = part[~np.isnan(part[:, 0])]
            if len(part) == 0:
                continue
            places = list(zip(*self._place(part[:, 0], part[:, 1]), strict=True))
            if len(places) > 1:
                self.pen.line(places, colour, width, joint="curve")
            else:
                (x, y), radius = places[0], 2 * width
                self.pen.ellipse([x - radius, y - radius, x + radius, y + radius], colour)


def _training_panel(title: str, raw: dict[str, Curve], log: bool) -> np.ndarray:
    smooth = {name: (_thinned(xs), _thinned(_running_mean(ys))) for name, (xs, ys) in raw.items()}
    raw = {name: (_thinned(xs), _thinned(ys)) for name, (xs, ys) in raw.items()}
    return plot(smooth, title, "logarithmic" if log else "", log, behind=raw)


def _read_columns(path: str | os.PathLike) -> dict[str, Curve]:
    """Of a log by step: each column's steps and values, empty cells left out, and columns with nothing else."""
    columns: dict[str, Curve] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if text:
                    xs, ys = columns.setdefault(name, ([], []))
                    xs.append(float(row["step"]))
                    ys.append(float(text))
    return columns


def _running_mean(values: list[float]) -> list[float]:
    """Mean of the fortieth of all values around each; what is not finite is not counted."""
    reach = len(values) // 80
    values = np.array(values, dtype=np.float64)
    counted = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(counted, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(counted)])
    first = np.maximum(np.arange(len(values)) - reach, 0)
    last = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    with np.errstate(invalid="ignore"):
        return ((sums[last] - sums[first]) / (counts[last] - counts[first])).tolist()


def _thinned(values: list[float]) -> list[float]:
    return values[::max(1, len(values) // MOST_POINTS)]


def _faint(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    return tuple(round(255 - 0.3 * (255 - part)) for part in colour)


def _range(values: np.ndarray, room: float) -> tuple[float, float]:
    """From the least to the largest value, with a share of ``room`` around; never empty."""
    if len(values) == 0:
        return 0.0, 1.0
    low, high = values.min().item(), values.max().item()
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        reach = 0.5 * abs(low) or 0.5
        return low - reach, high + reach
    return low - room * (high - low), high + room * (high - low)


def _ticks(low: float, high: float, about: int, finest: float = 0.0) -> list[tuple[float, str]]:
    """Round numbers between low and high: 1, 2 or 5 times a power of ten apart, at least ``finest``, ``about`` so many."""
    rough = max((high - low) / about, finest)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= 0.999 * rough)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(n * step, _number(n * step, step)) for n in numbers]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Of logarithms: powers of ten, with 2 and 5 times them where these are few, and plain steps within an octave or so."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    stride = 1 + len(powers) // 9
    for times in ((1, 2, 5), (1,)):
        values = [(p + math.log10(m), m * 10.0 ** p) for p in powers if p % stride == 0 for m in times]
        inside = [(place, f"{value:g}") for place, value in values if low <= place <= high]
        if len(inside) <= 9:
            break
    if len(inside) > 2:
        return inside
    return [(math.log10(value), text) for value, text in _ticks(10.0 ** low, 10.0 ** high, 5) if value > 0]


def _number(value: float, step: float) -> str:
    if step >= 1e4:
        return f"{value / 1000:,.0f}k"
    if step < 1e-4:
        return f"{value:.4g}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
