"""What the regularizer and its mapping function do: tiny models that differ in nothing else, beside the paper's tables.

    python benchmarks/ablation.py --clips FOLDER --jobs 2

Every arm starts from the same inflated image VAE and sees the same crops in the same order, seed by seed; only
``loss.regularizer`` and ``loss.mapping`` differ.  Each run has a folder in --out: an interrupted one is resumed when the
command is given again, and a finished one is not run again.
"""

import argparse
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import fresh
import numpy as np
import torch
import torch.nn.functional as F
from cases import make_parser, parse_count, parse_frames, parse_side
from growth import load_pyplot
from machine import Row, describe, publish, seconds_text

from cvvae.checkpoint import write_whole
from cvvae.training.config import (
    Bucket,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    check,
)
from cvvae.training.media import VIDEOS, media_paths
from cvvae.training.trainer import Trainer
from cvvae.video import VideoWriter, probe, read_frames

MEDIA = Path(__file__).parents[1] / "workflows" / "media"
HELD_OUT = 8  # clips, where none are named
LAST = 17  # frames held out of a clip that is the only one


class Arm(NamedTuple):
    """What is varied, and the paper's PSNR and SSIM on WebVid for it; in table 6 the mapping is not named."""

    regularizer: str
    mapping: str
    paper: str = "-"


ARMS = {"none": Arm("none", "-"),
        "encoder": Arm("encoder", "random", "26.0 / .748"),
        "both": Arm("both", "random", "27.6 / .795"),
        "decoder": Arm("decoder", "random", "28.0 / .803 and 28.4 / .811"),
        "first": Arm("decoder", "first", "26.6 / .771"),
        "average": Arm("decoder", "average", "27.9 / .801"),
        "slice": Arm("decoder", "slice", "27.7 / .799")}

# What the paper leads one to expect: (score, the arm that has more of it, the arm that has less).
EXPECTED = [("psnr", "decoder", "both"), ("psnr", "both", "encoder"), ("psnr", "decoder", "encoder"),
            ("psnr", "decoder", "average"), ("psnr", "average", "slice"), ("psnr", "slice", "first"),
            ("compatibility_psnr", "decoder", "average"), ("compatibility_psnr", "decoder", "slice"),
            ("compatibility_psnr", "decoder", "first"), ("compatibility_psnr", "decoder", "none"),
            ("psnr", "none", "encoder")]

# Columns of the table: score, heading, decimals.
COLUMNS = [("psnr", "PSNR", 2), ("ssim", "SSIM", 4), ("compatibility_psnr", "compatible, PSNR", 2),
           ("stills_psnr", "stills, PSNR", 2),
           ("latent_mean_gap", "latent mean gap", 3), ("latent_std_gap", "latent std gap", 3)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.set_defaults(out=Path("runs/ablation"))
    parser.add_argument("--clips", type=Path, default=MEDIA, metavar="FOLDER",
                        help="videos to train on (default: the example clips, enough to see that the command runs)")
    parser.add_argument("--held-out", nargs="+", default=None, metavar="NAME", dest="held_out",
                        help=f"videos (no folder, no suffix) to score on; by default {HELD_OUT}, evenly chosen in the order "
                             "of their names, or of a single video its last frames")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="what is trained")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="one run of each arm for each")
    parser.add_argument("--steps", type=parse_count, default=300, metavar="N", help="of each run")
    parser.add_argument("--rate", type=float, default=1e-3, metavar="X", help="learning rate at its highest")
    parser.add_argument("--size", type=parse_side, default=48, metavar="PIXELS", help="side of the crops trained on")
    parser.add_argument("--frames", nargs="+", type=parse_frames, default=[9, 17], metavar="N",
                        help="lengths of the clips trained on, in turn by chance; batches hold 18 to 26 frames")
    parser.add_argument("--score-size", type=parse_side, default=96, metavar="PIXELS", dest="score_size",
                        help="side of the held-out clips, and the short side of what the videos are reduced to")
    parser.add_argument("--teacher", default="tiny", help="the image VAE, as cvvae.load_image_vae reads it")
    parser.add_argument("--jobs", type=parse_count, default=1, metavar="N",
                        help="runs at a time; at these sizes two with a core each are faster than one with two")
    options = parser.parse_args(arguments)
    pyplot = load_pyplot()
    held_out = prepare_clips(options)
    check_settings(options, held_out)
    measurements = list(finished(options, held_out))
    rows = [row(name, measurements) for name in options.arms]
    rows.append(untrained(measurements))
    publish("ablation", "Regularizer and mapping function", options, rows, measurements, notes(measurements))
    draw(pyplot, options.arms, measurements, options.out / "ablation.png")


# -- clips -------------------------------------------------------------------------------------------


def prepare_clips(options: argparse.Namespace) -> list[str]:
    """Small copies of the videos in ``out``/clips, made once, so that decoding costs little; returns the held-out names."""
    videos = [path for path in media_paths(options.clips) if path.suffix.lower() in VIDEOS]
    if not videos:
        raise SystemExit(f"There are no videos in {options.clips}.")
    folder = options.out / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    if len(videos) == 1:
        return [split(videos[0], folder, options.score_size)]
    for path in videos:
        copy = folder / f"{path.stem}.mp4"
        if not copy.exists():
            write_small(copy, path, (frame.pixels for frame in read_frames(path)), options.score_size)
    return choose_held_out([path.stem for path in videos], options.held_out)


def choose_held_out(names: list[str], wanted: list[str] | None) -> list[str]:
    """``wanted``, or up to HELD_OUT of ``names``, evenly spread, none that is a part of a whole (NAME_0, NAME_1, ...)."""
    missing = set(wanted or ()) - set(names)
    if missing:
        raise SystemExit(f"--held-out names {', '.join(sorted(missing))}, found nowhere in --clips.")
    if wanted:
        return sorted(wanted)
    shoots = [re.sub(r"_\d+$", "", name) for name in names]
    alone = sorted(name for name, shoot in zip(names, shoots, strict=True) if shoots.count(shoot) == 1)
    count = min(HELD_OUT, max(1, len(names) // 4))
    return sorted({alone[k * len(alone) // count] for k in range(count)}) if alone else sorted(names)[-1:]


def split(path: Path, folder: Path, side: int) -> str:
    """The only video there is: its last frames are held out, the others trained on."""
    name, copy = f"{path.stem}_end", folder / f"{path.stem}.mp4"
    frames = [frame.pixels for frame in read_frames(path)]
    if len(frames) < 2 * LAST - 1:  # the halves may share a frame
        raise SystemExit(f"{path} is the only video, and has {len(frames)} frames; {2 * LAST - 1} are needed.")
    if not copy.exists():
        write_small(folder / f"{name}.mp4", path, frames[-LAST:], side)
        write_small(copy, path, frames[:1 - LAST], side)
    return name


def write_small(copy: Path, source: Path, frames: Iterable[np.ndarray], side: int) -> None:
    """``frames`` with their short side reduced to ``side``, as H.264."""
    with VideoWriter(copy, probe(source).fps) as writer:
        for pixels in frames:
            height, width = pixels.shape[:2]
            scale = side / min(height, width)
            shape = [max(side, 2 * round(length * scale / 2)) for length in (height, width)]
            planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
            small = F.interpolate(planes, shape, mode="bilinear", antialias=True)[0]
            writer.write(small.permute(1, 2, 0).numpy())


# -- runs --------------------------------------------------------------------------------------------


def settings(options: argparse.Namespace, held_out: list[str]) -> dict:
    """All that every run of a table must share."""
    return {"steps": options.steps, "rate": options.rate, "size": options.size, "frames": options.frames,
            "score_size": options.score_size, "teacher": Path(options.teacher).name, "held_out": held_out,
            "clips": sorted(path.name for path in (options.out / "clips").glob("*.mp4"))}


def check_settings(options: argparse.Namespace, held_out: list[str]) -> None:
    """Note the settings in ``out``; exits with a message where runs with other settings lie there."""
    path, now = options.out / "settings.json", settings(options, held_out)
    if path.exists():
        before = json.loads(path.read_text())
        changed = [f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in now if before.get(key) != now[key]]
        if changed:
            raise SystemExit(f"{options.out} holds runs with other settings: {'; '.join(changed)}. Choose another --out.")
    write_whole(path, lambda partial: Path(partial).write_text(json.dumps(now, indent=1)))


def run_config(arm: Arm, seed: int, options: argparse.Namespace, held_out: list[str], folder: Path) -> TrainConfig:
    """Buckets of equal work; the built-in recipe (configs/tiny.toml) otherwise, shortened."""
    longest = max(options.frames)
    buckets = [Bucket(frames, options.size, options.size, batch=max(1, round(longest / frames)))
               for frames in options.frames]
    config = TrainConfig(
        model=ModelConfig(teacher=options.teacher),
        data=DataConfig(sources=[str((options.out / "clips").resolve())], validation=held_out, buckets=buckets, max_stride=3,
                        workers=0, validation_frames=LAST, validation_size=options.score_size),
        loss=LossConfig(kl=1e-5, regularizer=arm.regularizer, mapping="random" if arm.mapping == "-" else arm.mapping),
        optim=OptimConfig(steps=options.steps, learning_rate=options.rate, warmup=min(20, options.steps // 2),
                          final_ratio=0.02, weight_decay=0.0, ema_decay=0.99),
        run=RunConfig(out=str(folder), seed=seed, device="cpu", save_every=50, keep=1,
                      validate_every=options.steps, videos=0))
    check(config)
    return config


def finished(options: argparse.Namespace, held_out: list[str]) -> Iterator[dict]:
    """The result of every run, in order; those not finished are trained first, ``jobs`` at a time."""
    folder = options.out / "runs"
    tasks = [(name, seed, folder / f"{name}_seed{seed}") for seed in options.seeds for name in options.arms]
    threads = max(1, describe()["cores"] // options.jobs)

    def result(task: tuple[str, int, Path]) -> dict:
        name, seed, place = task
        path = place / "result.json"
        if not path.exists():
            config = run_config(ARMS[name], seed, options, held_out, place)
            taken = train(config, threads) if options.jobs == 1 else fresh.call(train, config, threads)
            if not taken:
                raise SystemExit(f"{place.name} was ended by the system; the same command goes on from its last checkpoint.")
            found = {"arm": name, "seed": seed} | taken
            write_whole(path, lambda partial: Path(partial).write_text(json.dumps(found, indent=1)))
        found = json.loads(path.read_text())
        print(f"{place.name}: " + ", ".join(f"{heading} {found['scores'][score]:.{decimals}f}" for score, heading, decimals
                                            in COLUMNS if score in found["scores"])
              + f"  ({seconds_text([found['seconds']])})", flush=True)
        return found

    if options.jobs == 1:
        yield from map(result, tasks)
        return
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(result, task) for task in tasks]
        try:
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def train(config: TrainConfig, threads: int) -> dict:
    """Train one model, going on where an interrupted run left off: scores before and after, and the seconds it took now."""
    torch.set_num_threads(threads)
    started = perf_counter()
    trainer = Trainer(config, resume=bool(list(Path(config.run.out, "checkpoints").glob("step_*.pt"))))
    resumed_at = trainer.step
    trainer.run()
    log = (trainer.out / "validation.csv").read_text().splitlines()
    before = dict(zip(log[0].split(","), map(float, log[1].split(",")), strict=True))
    before.pop("step")
    return {"scores": trainer.scores, "untrained": before, "skipped": trainer.skipped, "resumed_at": resumed_at,
            "seconds": perf_counter() - started}


# -- what comes of it --------------------------------------------------------------------------------


def over_seeds(measurements: list[dict], arm: str, score: str) -> dict[int, float]:
    """The score of each run of ``arm``."""
    return {found["seed"]: found["scores"][score] for found in measurements
            if found["arm"] == arm and score in found["scores"]}


def mean_text(values: list[float], decimals: int) -> str:
    """Mean and, of several, standard deviation: "26.10 ± 0.04"."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{decimals}f}{spread}"


def differences(measurements: list[dict], score: str, more: str, less: str) -> list[float]:
    """Of the arms ``more`` and ``less``, seed by seed: both saw the same crops and the same noise."""
    a, b = over_seeds(measurements, more, score), over_seeds(measurements, less, score)
    return [a[seed] - b[seed] for seed in a if seed in b]


def row(name: str, measurements: list[dict]) -> Row:
    arm = ARMS[name]
    cells = {"regularizer": arm.regularizer, "mapping": arm.mapping}
    cells |= {heading: mean_text(list(over_seeds(measurements, name, score).values()), decimals)
              for score, heading, decimals in COLUMNS}
    return cells | {"paper, WebVid PSNR / SSIM": arm.paper}


def untrained(measurements: list[dict]) -> Row:
    """Where all began: the inflated image VAE, which holds every latent for four frames."""
    scores = measurements[0]["untrained"]
    cells = {"regularizer": "before training", "mapping": "-"}
    return cells | {heading: mean_text([scores[score]] if score in scores else [], decimals)
                    for score, heading, decimals in COLUMNS}


def notes(measurements: list[dict]) -> str:
    """How each of the paper's orderings came out, and what the image VAE does by itself."""
    scores = measurements[0]["scores"]
    seeds = len({found["seed"] for found in measurements})
    lines = [f"Mean ± standard deviation over {seeds} seeds, EMA weights, held-out clips. \"compatible\": the image VAE's "
             "decoder on video latents, against every frame a latent stands for. The image VAE applied to every frame: "
             f"{scores['image_vae_psnr']:.2f} dB.", "",
             "What the paper leads one to expect, as differences seed by seed:", ""]
    for score, more, less in EXPECTED:
        found = differences(measurements, score, more, less)
        if found:
            agreeing = sum(difference > 0 for difference in found)
            lines.append(f"- {dict((c[0], c[1]) for c in COLUMNS)[score]}: {more} - {less} = {mean_text(found, 2)} dB, "
                         f"above 0 in {agreeing} of {len(found)} seeds")
    return "\n".join(lines)


def draw(pyplot, names: list[str], measurements: list[dict], path: Path) -> None:
    """A dot for each run and a line at each arm's mean: reconstruction and compatibility."""
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    shown = {"psnr": "reconstruction, PSNR dB", "compatibility_psnr": "image decoder on video latents, PSNR dB"}
    for panel, (score, title) in zip(panels, shown.items(), strict=True):
        for place, name in enumerate(names):
            values = list(over_seeds(measurements, name, score).values())
            panel.plot(values, [place] * len(values), "o", color=f"C{place}", alpha=0.6)
            panel.plot([statistics.fmean(values)], [place], "|", color=f"C{place}", markersize=22, markeredgewidth=2)
        start = measurements[0]["untrained"][score]
        panel.axvline(start, color="0.6", linestyle=":", label="before training")
        panel.set(title=title, yticks=range(len(names)), yticklabels=[
            f"{ARMS[name].regularizer}, {ARMS[name].mapping}" if ARMS[name].mapping != "-" else "no regularizer"
            for name in names])
        panel.grid(axis="x", alpha=0.3)
        panel.legend()
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
