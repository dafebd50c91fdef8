"""Where windows and tiles meet: what each way of cutting a clip costs, against the source and the uncut run.

    python benchmarks/seams.py --clips A.mp4 B.mp4                       # the built-in model
    python benchmarks/seams.py --clips A.mp4 B.mp4 --model vae3d.safetensors --size 512 --tile 256

Two sets of plans, each effect by itself: windows on untiled frames, tiles on one window.  A picture shows both:
quality frame by frame, and for the first clip where in the picture tiles differ from the uncut run.
"""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch
from cases import add_device_option, make_parser, parse_count
from growth import load_pyplot
from machine import Row, publish
from torch import Tensor

import cvvae
from cvvae import Tiling
from cvvae.metrics import WINDOW_STRIDE, decibels, psnr, ratio_at, seam_ratio, window_borders
from cvvae.training.data import load_clip

FLOWER = Path(__file__).parents[1] / "workflows" / "media" / "flower.mp4"
WINDOW = WINDOW_STRIDE + 1  # frames of the reference's windows: their borders are where every plan is judged
REFERENCE = "reference: 17, one shared"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--clips", nargs="+", type=Path, default=[FLOWER], metavar="FILE", help="videos")
    parser.add_argument("--model", default="tiny", help="a CV-VAE that cvvae.load reads")
    parser.add_argument("--frames", type=parse_count, default=33, metavar="N", help="frames taken of each clip")
    parser.add_argument("--size", type=parse_count, default=168, metavar="N", help="side they are resized and cropped to")
    parser.add_argument("--tile", type=parse_count, default=80, metavar="N", help="side of a tile, a multiple of 16")
    add_device_option(parser)
    options = parser.parse_args(arguments)
    pyplot = load_pyplot()
    vae = cvvae.load(options.model, device=options.device)
    clips = {path.stem: load_clip(path, options.frames, options.size) for path in options.clips}
    measurements, differences = [], {}
    for kind, plans, frames in (("windows", window_plans(), options.frames), ("tiles", tile_plans(options.tile), WINDOW)):
        for name, clip in clips.items():
            clip = clip[:, :, :frames]
            uncut = None
            for plan, tiling in plans.items():
                started = perf_counter()
                found = vae.decode(vae.encode(clip, tiling=tiling).mode(), clip.shape[2], clip.shape[-2:], tiling=tiling)
                seconds = perf_counter() - started
                uncut = found if uncut is None else uncut
                if kind == "tiles":
                    differences.setdefault(plan, (found - uncut).float().abs().mean((0, 1, 2)))
                measurements.append({"kind": kind, "plan": plan, "clip": name, "seconds": seconds}
                                    | judge(kind, found, clip, uncut, options.tile))
            print(kind, name, "done", flush=True)
    rows = [row(kind, plan, [m for m in measurements if (m["kind"], m["plan"]) == (kind, plan)])
            for kind, plans in (("windows", window_plans()), ("tiles", tile_plans(options.tile))) for plan in plans]
    publish("seams", "Seams between windows and between tiles", options, rows, measurements)
    draw(pyplot, measurements, differences, options.out / "seams.png")


def window_plans() -> dict[str, Tiling]:
    return {"uncut": Tiling(None, None),
            REFERENCE: Tiling(17, None),
            "17, 5 cross-faded": Tiling(17, None, overlap_frames=5),
            "17, 9 cross-faded": Tiling(17, None, overlap_frames=9),
            "25": Tiling(25, None),
            "17, statistics of the clip": Tiling(17, None, statistics="clip"),
            "17, 9 cross-faded, statistics of the clip": Tiling(17, None, overlap_frames=9, statistics="clip")}


def tile_plans(tile: int) -> dict[str, Tiling]:
    overlap = tile // 4 // 8 * 8
    return {"uncut": Tiling(17, None),
            "reference: overlap a quarter": Tiling(17, tile, overlap),
            "even": Tiling(17, tile, overlap, even=True),
            "overlap a half": Tiling(17, tile, tile // 16 * 8),
            "statistics of the window": Tiling(17, tile, overlap, statistics="window"),
            "even, statistics of the window": Tiling(17, tile, overlap, even=True, statistics="window")}


def judge(kind: str, found: Tensor, source: Tensor, uncut: Tensor, tile: int) -> dict:
    """Scores of a reconstruction [1, 3, T, H, W]."""
    error = (found - source).float()
    borders = window_borders(error.shape[2] - 1)
    by_position = error.clamp(-2, 2).square().mean((0, 1, 3, 4)) / 4
    columns = error.mean((0, 1, 2, 3))
    step = tile - tile // 4 // 8 * 8
    return {"psnr": psnr(found, source), "psnr_uncut": psnr(found, uncut),
            "psnr_by_frame": [decibels(value) for value in by_position.tolist()],
            "seam": seam_ratio(found, source) if kind == "windows" else ratio_at(columns.diff().abs(), tile_borders(
                len(columns), tile, step)),
            "first_of_window": decibels(by_position[borders].mean().item()) if borders else None,
            "by_group_of_four": [decibels(by_position[1 + k::4].mean().item()) for k in range(4)],
            "colour_shift": colour_shift(error, WINDOW_STRIDE) * 127.5 if kind == "windows" else colour_shift(
                error.movedim(-1, 2), step) * 127.5}


def tile_borders(width: int, tile: int, step: int) -> list[int]:
    """Columns next to where a tile begins or ends."""
    ends = [start + tile for start in range(0, width, step)]
    return sorted({x - 1 for x in (*range(step, width, step), *ends) if 0 < x < width - 1})


def colour_shift(error: Tensor, step: int) -> float:
    """Largest difference of mean colour error [1, 3, n, ...] between neighbouring pieces of ``step``."""
    means = torch.stack([part.mean((0, 2, 3, 4)) for part in error.split(step, dim=2) if part.shape[2] == step])
    return means.diff(dim=0).abs().max().item() if len(means) > 1 else 0.0


def row(kind: str, plan: str, found: list[dict]) -> Row:
    def mean(key: str) -> float:
        return sum(m[key] for m in found) / len(found)

    first = found[0]["first_of_window"]
    return {"cut": kind, "plan": plan, "PSNR": f"{mean('psnr'):.2f} dB",
            "PSNR with the uncut run": "-" if plan == "uncut" else f"{mean('psnr_uncut'):.1f} dB",
            "seam ratio": f"{mean('seam'):.2f}",
            "frame behind a border": "-" if first is None else f"{mean('first_of_window'):.2f} dB",
            "in the group of four": " ".join(f"{sum(m['by_group_of_four'][k] for m in found) / len(found):.1f}"
                                             for k in range(4)),
            "colour shift": f"{mean('colour_shift'):.2f} / 255", "time": f"{mean('seconds'):.1f} s"}


def draw(pyplot, measurements: list[dict], differences: dict[str, Tensor], path: Path) -> None:
    """Mean PSNR of each frame, for each way of cutting windows; below, |difference| of tiles from the uncut run."""
    figure = pyplot.figure(figsize=(13, 8), layout="constrained")
    grid = figure.add_gridspec(2, len(differences) - 1, height_ratios=[1.3, 1])
    axes = figure.add_subplot(grid[0, :])
    for plan in window_plans():
        curves = torch.tensor([m["psnr_by_frame"] for m in measurements if (m["kind"], m["plan"]) == ("windows", plan)])
        axes.plot(curves.mean(0), label=plan, linewidth=2 if plan in ("uncut", REFERENCE) else 1)
    for border in window_borders(curves.shape[1] - 1):
        axes.axvline(border + 0.5, color="0.7", linewidth=0.8)
    axes.set(xlabel="frame (lines: borders of the reference's windows)", ylabel="PSNR with the source, dB")
    axes.legend(fontsize=8)
    brightest = max(difference.max().item() for difference in differences.values())
    for column, (plan, difference) in enumerate(list(differences.items())[1:]):
        axes = figure.add_subplot(grid[1, column])
        axes.imshow(difference, vmin=0, vmax=brightest, cmap="magma")
        axes.set_title(plan, fontsize=8)
        axes.axis("off")
    figure.supxlabel(f"tiles against the uncut run, mean |difference|, brightest {brightest * 127.5:.1f} / 255", fontsize=9)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
