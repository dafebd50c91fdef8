"""Time and peak memory of one training step, ours against the official one; and what fits in a GPU's memory.

    python benchmarks/train_step.py --reference ../CV-VAE
    python benchmarks/train_step.py --fit

Both sides train the 16-channel model through a frozen 2-D decoder ("decoder" regularizer) with learned variances, from the
same weights on the same clip, without LPIPS, whose weights would have to be downloaded.  A step is all that follows the
data: forward, backward, clipping, optimizers, and ours alone also keeps a moving average.  The official code trains encoder
and decoder on one batch and the discriminator on the next, so with the GAN its step is both of these on the same clip; ours
trains everything in one.  The two have different discriminators; the setting "official_discriminator" gives ours theirs.

Before anything is timed the first losses are compared, with the same noise and the same choice of frames on both sides.
See reference_training.py for how the official step is made to run.
"""

import argparse
import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from unittest.mock import patch

import fresh
import torch
from cases import (
    Case,
    Size,
    add_cases_option,
    add_device_option,
    add_reference_option,
    add_widths_option,
    make_parser,
    parse_count,
)
from machine import PeakMemory, Row, interleave, megabytes, publish, seconds_text, synchronize
from reference import BLOCKS, CHANNELS, drawn, weights
from reference_training import OfficialStep, discriminator
from torch import Tensor

import cvvae
from cvvae import checkpoint
from cvvae.frames import SPACE_FACTOR, latents_of
from cvvae.training import adversarial
from cvvae.training.config import Bucket, DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, check
from cvvae.training.data import Batch
from cvvae.training.trainer import Trainer

VARIANT = "sd3"  # of the only training configuration that was released
CLIP = Path(__file__).parents[1] / "workflows" / "media" / "flower.mp4"  # a trainer wants a source; nothing is read from it
PRECISIONS = ("fp32", "bf16")
GANS = ("hinge", "none")
SETTINGS = ("checkpointing", "channels_last", "one_pass", "adamw8bit", "official_discriminator")
PLAIN = "plain"

# Largest relative difference of losses and of the gradient's norm.  In float32 another order of sums makes about 1e-6, TF32
# a thousand times that; bfloat16 rounds to 4e-3.
TOLERANCES = {"fp32": 1e-3, "bf16": 2e-2}

# What --fit tries: the paper's buckets and the released configuration's, the hardest first.
FIT = (Bucket(17, 256, 256, 1), Bucket(17, 192, 192, 1), Bucket(9, 256, 256, 1), Bucket(1, 256, 256, 8))
BUDGETS = (8, 12, 16, 24)  # GiB
CONTEXT = 0.6 * 2**30  # bytes a process on CUDA takes beside its tensors
GAPS = 1.05  # what the allocator holds, against what is in use


@dataclass(frozen=True)
class Task:
    """A step on ``batch`` clips of ``size``; what both sides share."""

    size: Size
    precision: str
    gan: str
    batch: int = 1

    def clip(self, device: str) -> Tensor:
        """[B, 3, T, H, W]; the weights are float32 whatever the precision."""
        return Case("encode", VARIANT, *self.size, batch=self.batch).input(device)

    def describe(self) -> dict[str, str]:
        """JSON-ready, and the first cells of a row."""
        clip = str(self.size) if self.batch == 1 else f"{self.batch} x {self.size}"
        return {"clip": clip, "precision": self.precision, "GAN": "no" if self.gan == "none" else "yes"}

    def __str__(self) -> str:
        clip, precision, gan = self.describe().values()
        return f"{clip}, {precision}, {'with' if gan == 'yes' else 'without'} GAN"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add_reference_option(parser)
    add_cases_option(parser, "9x256x256", "17x256x256")
    add_widths_option(parser)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), dest="precisions",
                        help="bf16 is autocast with float32 weights, on both sides")
    parser.add_argument("--gan", nargs="+", choices=GANS, default=list(GANS), dest="gans", help="with and without the GAN")
    parser.add_argument("--settings", nargs="+", type=parse_setting, default=[PLAIN, "checkpointing"], metavar="SETTING",
                        help=f'of our trainer: "{PLAIN}", or some of {", ".join(SETTINGS)} joined by +')
    parser.add_argument("--keep-activations", action="store_true", dest="keep_activations",
                        help="also measure the official step without computing activations twice")
    parser.add_argument("--measure", nargs="+", choices=("time", "memory"), default=["time", "memory"],
                        help="memory is measured in a process of its own for each")
    parser.add_argument("--rounds", type=parse_count, default=5, help="timed steps of each, after one that is not timed")
    parser.add_argument("--fit", action="store_true",
                        help=f"instead: which settings fit in {', '.join(map(str, BUDGETS))} GB (needs CUDA)")
    add_device_option(parser)
    options = parser.parse_args(arguments)
    if any("official_discriminator" in setting for setting in options.settings) and options.reference is None:
        parser.error("official_discriminator needs --reference.")
    if options.fit:
        if options.device != "cuda":
            parser.error("--fit measures what the allocator of a GPU holds; there is no CUDA here.")
        measurements = fit(FIT, options)
        publish("train_step_fit", "What fits: our training step, moving average included", options,
                [fit_row(found) for found in measurements], measurements, best_fits(measurements))
        return
    tasks = [Task(*found) for found in product(options.cases, options.precisions, options.gans)]
    rows, measurements = [], []
    for task in tasks:
        found = measure(task, options)
        measurements += found
        rows += [row(one, found, "memory" in options.measure) for one in found]
        for one in rows[-len(found):]:
            print(*one.values(), sep="  ", flush=True)
    publish("train_step", "One training step", options, rows, measurements)


def parse_setting(text: str) -> str:
    """Raises ArgumentTypeError for a setting there is not."""
    unknown = set(text.split("+")) - set(SETTINGS) if text != PLAIN else ()
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: expected {PLAIN}, or some of "
                                         f"{', '.join(SETTINGS)} joined by +.")
    return text


# -- contenders --------------------------------------------------------------------------------------


class OurStep:
    """A Trainer built as for a run, and its step; ``setting`` as :func:`parse_setting` takes it."""

    def __init__(self, task: Task, setting: str, options: argparse.Namespace):
        theirs = "official_discriminator" in setting and task.gan != "none"
        swapped = patch.object(adversarial, "PatchDiscriminator", lambda *_: discriminator(options.reference))
        # A mapped file cannot be removed on Windows.
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder, swapped if theirs else nullcontext():
            self.trainer = Trainer(training_config(task, setting, options, Path(folder)))

    def __call__(self, clip: Tensor) -> dict[str, float]:
        """What the log says of a step on ``clip`` [B, 3, T, H, W]."""
        losses = self.trainer._train_step([Batch(clip)])
        if losses["skipped"]:
            norms = ", ".join(f"{name} {value:.3g}" for name, value in losses.items() if name.endswith("gradient_norm"))
            raise SystemExit(f"Our trainer skipped the step ({norms}), so there is nothing to compare.")
        return losses

    def seed(self) -> int:
        """From which the next step draws noise and frames of its first clip."""
        return self.trainer._seeds(0, 1)[0]

    def tensors(self) -> Iterator[Tensor]:
        """All that is kept from one step to the next."""
        trainer = self.trainer
        yield from trainer.objective.state_dict().values()
        yield from (parameter.grad for parameter in trainer.objective.parameters() if parameter.grad is not None)
        yield from trainer.ema.state.values()
        for optimizer in (trainer.optimizer, *([trainer.discriminator_optimizer] if trainer.adversary is not None else [])):
            yield from (value for moments in optimizer.state.values() for value in moments.values())


def training_config(task: Task, setting: str, options: argparse.Namespace, folder: Path) -> TrainConfig:
    """The released configuration in our settings (docs/training.md); the weights to start from are written to ``folder``."""
    student, teacher = models(options.widths)
    checkpoint.save(student, folder / "student.safetensors")
    checkpoint.save(teacher, folder / "teacher.safetensors")
    config = TrainConfig(
        model=ModelConfig(teacher=str(folder / "teacher.safetensors"), student=str(folder / "student.safetensors")),
        data=DataConfig(sources=[str(CLIP)], buckets=[Bucket(*task.size, task.batch)], workers=0),
        loss=LossConfig(learn_logvar=True, kl=CHANNELS[VARIANT] * latents_of(task.size.frames) / (3 * SPACE_FACTOR**2),
                        gan=task.gan),
        optim=OptimConfig(learning_rate=4e-5, discriminator_rate=2e-5, warmup=0, beta2=0.98),
        run=RunConfig(out=str(folder / "run"), device=options.device, precision=task.precision))
    chosen = setting.split("+")
    config.run.checkpointing = "checkpointing" in chosen
    config.run.channels_last = "channels_last" in chosen
    config.loss.gan_passes = 1 if "one_pass" in chosen else 2
    config.optim.optimizer = "adamw8bit" if "adamw8bit" in chosen else "adamw"
    check(config)
    return config


def models(widths: tuple[int, ...]) -> tuple[cvvae.VideoVAE, cvvae.ImageVAE]:
    """The student and its teacher, with the weights they always get here."""
    with torch.device("meta"):
        student = cvvae.VideoVAE(cvvae.Config(VARIANT, CHANNELS[VARIANT], widths, BLOCKS))
        teacher = cvvae.ImageVAE(cvvae.Config("image", CHANNELS[VARIANT], widths, BLOCKS))
    student.load_state_dict(weights(VARIANT, widths), assign=True)
    state = drawn(teacher)
    state["decoder.latent_shift"].zero_()  # the official 2-D decoder has none
    teacher.load_state_dict(state, assign=True)
    return student, teacher


def their_step(task: Task, options: argparse.Namespace, recompute: bool = True) -> OfficialStep:
    student, teacher = models(options.widths)
    return OfficialStep(options.reference, options.widths, student.state_dict(), teacher.decoder.state_dict(),
                        options.device, task.precision, task.gan != "none", recompute)


def contenders(task: Task, options: argparse.Namespace) -> dict[str, Callable[[], "OurStep | OfficialStep"]]:
    """How to build each of those compared, ours first."""
    settings = dict.fromkeys(_concerning(setting, task.gan) for setting in options.settings)
    found = {f"ours, {setting}": lambda setting=setting: OurStep(task, setting, options) for setting in settings}
    if options.reference is not None:
        found["reference"] = lambda: their_step(task, options)
        if options.keep_activations:
            found["reference, activations kept"] = lambda: their_step(task, options, recompute=False)
    return found


def _concerning(setting: str, gan: str) -> str:
    """``setting`` without what changes nothing where there is no GAN."""
    chosen = [name for name in setting.split("+") if gan != "none" or name not in ("one_pass", "official_discriminator")]
    return "+".join(chosen) or PLAIN


# -- time and memory ---------------------------------------------------------------------------------


def measure(task: Task, options: argparse.Namespace) -> list[dict]:
    """Of each contender: seconds of every round, how far its losses are from the official ones, and its peak."""
    try:
        seconds, differences = time_steps(task, options) if "time" in options.measure else ({}, {})
    except torch.OutOfMemoryError:
        raise SystemExit(f"{task}: out of memory. All that are timed in turn are held at once: leave some out (--settings, "
                         "--precision, --gan), or give --measure memory.") from None
    found = []
    for name in contenders(task, options):
        one = {"contender": name, **task.describe(), "seconds": seconds.get(name, []), "difference": differences.get(name)}
        if "memory" in options.measure:
            one |= measured_peak(name, task, options)
        found.append(one)
    return found


def time_steps(task: Task, options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds by contender, and of ours the largest relative difference of a loss to the official one."""
    gc.collect()  # the last task's models point at themselves, and go only now
    steps = {name: build() for name, build in contenders(task, options).items()}
    clip = task.clip(options.device)
    seed = next(iter(steps.values())).seed()
    differences, called = {}, set()

    def run(name: str) -> dict[str, float]:
        alike = isinstance(steps[name], OfficialStep) and name not in called
        called.add(name)
        with same_draws(seed, options.device) if alike else nullcontext():
            return steps[name](clip)

    def compare(results: dict[str, dict[str, float]]) -> None:
        for name in results:
            if "reference" in results and name != "reference":
                differences[name] = difference(results[name], results["reference"], task, name)

    seconds = interleave({name: lambda name=name: run(name) for name in steps}, options.rounds, options.device, compare)
    return seconds, differences


def difference(found: dict[str, float], expected: dict[str, float], task: Task, name: str) -> float:
    """The largest relative one of the losses both have.  Exits with a message where it is too large."""
    compared = ["reconstruction", "decoder_regularizer", "kl"]
    if task.gan == "none" or name.startswith("reference"):
        compared += ["total", "gradient_norm"]
    elif "official_discriminator" in name:
        compared += ["generator", "adaptive_weight"] + ["gradient_norm"] * ("one_pass" not in name)
    apart = {loss: abs(found[loss] - expected[loss]) / abs(expected[loss]) for loss in compared}
    apart = {loss: value if math.isfinite(value) else math.inf for loss, value in apart.items()}
    worst = max(apart, key=apart.get)
    if apart[worst] > TOLERANCES[task.precision]:
        raise SystemExit(f"{task}: {worst} is {found[worst]:.6g} by {name} and {expected[worst]:.6g} by the official code; "
                         "they do not compute the same thing.")
    return apart[worst]


@contextmanager
def same_draws(seed: int, device: str) -> Iterator[None]:
    """Inside, the official code draws what our objective draws for a clip of this seed: noise, then frames of groups."""
    generator = torch.Generator(device).manual_seed(seed)
    randn, randint = torch.randn, torch.randint

    def noise(shape: torch.Size) -> Tensor:
        return randn(shape[1:], generator=generator, device=device)[None]

    def frames(low: int, high: int, size: tuple[int]) -> Tensor:
        return randint(high - low, size, generator=generator, device=device).cpu() + low

    with patch.object(torch, "randn", noise), patch.object(torch, "randint", frames):
        yield


def measured_peak(name: str, task: Task, options: argparse.Namespace) -> dict:
    """:func:`peak` in a process of its own; {} where there was not enough memory."""
    try:
        return fresh.call(peak, name, task, options)
    except torch.OutOfMemoryError:
        return {}


def peak(name: str, task: Task, options: argparse.Namespace) -> dict:
    """Bytes of all tensors at the highest point of a step that is not the first, and of those kept between steps.

    On the CPU, what is kept is counted and what the step takes beside it is the process's growth.
    """
    step = contenders(task, options)[name]()
    clip = task.clip(options.device)
    step(clip)
    with PeakMemory(options.device) as taken:
        started = perf_counter()
        step(clip)
        synchronize(options.device)
        seconds = perf_counter() - started
    if taken.device.type == "cuda":
        kept = taken.start
    else:
        kept = sum({tensor.data_ptr(): tensor.nbytes for tensor in step.tensors()}.values())
    return {"kept_bytes": kept, "peak_bytes": kept + taken.extra, "second_step_seconds": seconds}


def row(measurement: dict, beside: list[dict], memory: bool) -> Row:
    """Medians, and how many times the official speed they are; ``beside`` holds the official step's measurement.

    memory: whether it was measured.
    """
    cells = {name: measurement[name] for name in ("clip", "precision", "GAN")} | {"by": measurement["contender"]}
    expected = next((one["seconds"] for one in beside if one["contender"] == "reference"), [])
    if measurement["seconds"]:
        median = statistics.median(measurement["seconds"])
        cells |= {"step": seconds_text(measurement["seconds"]), "steps/s": f"{1 / median:.3g}"}
        if expected:
            cells["of the official speed"] = f"{statistics.median(expected) / median:.2f}"
    if measurement["difference"] is not None:
        cells["difference"] = f"{measurement['difference']:.1e}"
    if "peak_bytes" in measurement:
        cells |= {"peak": megabytes(measurement["peak_bytes"]),
                  "of it kept between steps": megabytes(measurement["kept_bytes"])}
    elif memory:
        cells["peak"] = "more than there is here"
    return cells


# -- what fits ---------------------------------------------------------------------------------------


def fit(buckets: Sequence[Bucket], options: argparse.Namespace) -> list[dict]:
    """The peak of every setting, in order of quality: larger clips before smaller ones, with the GAN before without,
    float32 before bfloat16; then what changes time and memory only."""
    optimizers = ["adamw", "adamw8bit"] if options.device == "cuda" and find_spec("bitsandbytes") else ["adamw"]
    found = []
    for bucket, gan, precision, optimizer, checkpointing in product(buckets, options.gans, options.precisions, optimizers,
                                                                    (False, True)):
        task = Task(Size(bucket.frames, bucket.height, bucket.width), precision, gan, bucket.batch)
        chosen = ["adamw8bit"] * (optimizer == "adamw8bit") + ["checkpointing"] * checkpointing
        setting = "+".join(chosen) or PLAIN
        only = argparse.Namespace(**vars(options) | {"settings": [setting]})
        one = {**task.describe(), "setting": setting} | measured_peak(f"ours, {setting}", task, only)
        found.append(one)
        print(*fit_row(one).values(), sep="  ", flush=True)
    return found


def fits(measurement: dict, budget: int) -> bool:
    """In a GPU of ``budget`` GiB that does nothing else."""
    return "peak_bytes" in measurement and measurement["peak_bytes"] * GAPS + CONTEXT <= budget * 2**30


def fit_row(measurement: dict) -> Row:
    cells = {name: measurement[name] for name in ("clip", "precision", "GAN", "setting")}
    if "peak_bytes" in measurement:
        cells |= {"peak": megabytes(measurement["peak_bytes"]), "step": seconds_text([measurement["second_step_seconds"]])}
    else:
        cells |= {"peak": "more than there is here", "step": ""}
    return cells | {f"{budget} GB": "yes" if fits(measurement, budget) else "no" for budget in BUDGETS}


def best_fits(measurements: list[dict]) -> str:
    """Of each budget, the first setting that fits."""
    lines = [f"Fits: the allocator's peak, {GAPS - 1:.0%} for its gaps and {CONTEXT / 2**30:.1f} GiB for CUDA's own. "
             "The best for each:", ""]
    for budget in BUDGETS:
        best = next((one for one in measurements if fits(one, budget)), None)
        lines.append(f"- {budget} GB: " + (", ".join(f"{key} {best[key]}" for key in ("clip", "precision", "GAN", "setting"))
                                           if best else "none of these"))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
