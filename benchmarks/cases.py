"""What is computed in a benchmark, by which models, and the command-line options they share."""

import argparse
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from reference import CHANNELS, ENTRY, WIDTHS, Contender, config, ours, reference
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import cvvae
from cvvae.frames import SPACE_FACTOR, TIME_FACTOR, frames_of, latent_side, latents_of
from cvvae.tiling import make_plan, parse_memory

OPERATIONS = ("encode", "decode")
DTYPES = ("float32", "bfloat16", "float16")


class Size(NamedTuple):
    """Of a clip, written "17x256x256"."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


@dataclass(frozen=True)
class Case:
    """One operation on ``batch`` clips of ``frames`` x ``height`` x ``width``; to decode is to give such clips."""

    operation: str
    variant: str
    frames: int
    height: int
    width: int
    batch: int = 1

    @property
    def size(self) -> str:
        clip = str(Size(self.frames, self.height, self.width))
        return clip if self.batch == 1 else f"{self.batch} x {clip}"

    def describe(self) -> dict:
        return asdict(self)

    def input(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """A clip [B, 3, T, H, W] in [-1, 1], a smooth moving field and a little noise; or latents ~ N(0, 1)."""
        generator = torch.Generator().manual_seed(0)
        if self.operation == "decode":
            shape = (self.batch, CHANNELS[self.variant], latents_of(self.frames), latent_side(self.height),
                     latent_side(self.width))
            return torch.randn(shape, generator=generator).to(device, dtype)
        coarse = torch.randn(self.batch, 3, self.frames // 4 + 2, 5, 5, generator=generator)
        clip = F.interpolate(coarse, size=(self.frames, self.height, self.width), mode="trilinear", align_corners=True)
        noise = torch.randn(clip.shape, generator=generator)
        return clip.mul_(0.6).add_(noise, alpha=0.05).clamp_(-1, 1).to(device, dtype)

    def run(self, contender: Contender, x: Tensor) -> Tensor:
        return getattr(contender, self.operation)(x)

    def flop(self, widths: tuple[int, ...], tiling: cvvae.Tiling) -> int:
        """Floating-point operations of convolutions and products as the reference computes them; a multiply-add is two."""
        plan = make_plan(latents_of(self.frames), latent_side(self.height), latent_side(self.width), tiling)
        return self.batch * sum(_flop(self.operation, self.variant, widths, len(window), len(tile.rows), len(tile.cols))
                                for window in plan.windows for tile in plan.tiles)


@cache
def _flop(operation: str, variant: str, widths: tuple[int, ...], t: int, h: int, w: int) -> int:
    """Of one tile of one window, counted by running the definition on tensors without data."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae = cvvae.VideoVAE(config(variant, widths))
        if operation == "encode":
            vae.encoder(torch.empty(1, 3, frames_of(t), h * SPACE_FACTOR, w * SPACE_FACTOR))
        else:
            vae.decoder(torch.empty(1, CHANNELS[variant], t, h, w))
    return counter.get_total_flops()


# -- contenders --------------------------------------------------------------------------------------


def contenders(options: argparse.Namespace) -> list[str]:
    """Names of the models to compare, ours first."""
    return (["ours"] + ["compiled"] * options.compiled + ["plain"] * options.plain
            + ["reference"] * (options.reference is not None))


def build(name: str, variant: str, options: argparse.Namespace, memory: int | str | None = "auto") -> Contender:
    """The model ``name`` of :func:`contenders`."""
    dtype = getattr(torch, options.dtype)
    if name == "reference":
        return reference(options.reference, variant, options.widths, options.device, dtype)
    executor = "fast" if name == "ours" else name
    return ours(variant, options.widths, options.device, dtype, executor, memory)


# -- options -----------------------------------------------------------------------------------------


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows each default as it would be typed."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        if default is None or default is False or default is argparse.SUPPRESS:
            return action.help
        several = action.nargs is not None
        return f"{action.help} (default: {' '.join(map(str, default)) if several else default})"


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with ``--out``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), metavar="DIR",
                        help="folder for the table and all numbers")
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which models, of which shape, and where: what :func:`contenders` and :func:`build` read."""
    add_reference_option(parser)
    parser.add_argument("--compiled", action="store_true", help="also measure our engine with torch.compile")
    parser.add_argument("--plain", action="store_true", help="also measure our definition run layer by layer")
    parser.add_argument("--variant", nargs="+", choices=list(CHANNELS), default=list(CHANNELS), dest="variants",
                        help="families: v1 has 4 latent channels, sd3 has 16")
    add_widths_option(parser)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), help="what is measured")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and computation")
    add_device_option(parser)


def add_reference_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reference", type=_checkout, metavar="PATH",
                        help="a checkout of github.com/AILab-CVC/CV-VAE to compare with; without it only ours is measured")


def add_widths_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--widths", nargs=4, type=_width, default=WIDTHS, action=_Widths, metavar="N",
                        help="channels of the four levels, multiples of 32; the default is the published models'")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where to compute")


def add_cases_option(parser: argparse.ArgumentParser, *default: str) -> None:
    parser.add_argument("--cases", nargs="+", type=parse_size, default=[parse_size(text) for text in default],
                        metavar="TxHxW", help="clips: frames (1 + 4n) x height x width")


def cases(options: argparse.Namespace) -> list[Case]:
    return [Case(operation, variant, *size)
            for variant in options.variants for size in options.cases for operation in options.operations]


def parse_size(text: str) -> Size:
    """The size written as "17x256x256".  Raises ArgumentTypeError for one that is not encoded as it is."""
    parts = text.split("x")
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not FRAMESxHEIGHTxWIDTH, such as 17x256x256.")
    return Size(parse_frames(parts[0]), parse_side(parts[1]), parse_side(parts[2]))


def parse_frames(text: str) -> int:
    if parse_count(text) % TIME_FACTOR != 1:
        raise argparse.ArgumentTypeError(f"{text} frames are not 1 + 4n, and the official code takes nothing else.")
    return int(text)


def parse_side(text: str) -> int:
    if parse_count(text) % SPACE_FACTOR:
        raise argparse.ArgumentTypeError(f"{text} pixels are not a multiple of 8, and the official code takes nothing else.")
    return int(text)


def parse_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1.")
    return int(text)


def parse_budget(text: str) -> int | str | None:
    """A ``Tiling.memory``: "none", "auto" or a size."""
    try:
        return parse_memory(None if text == "none" else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _checkout(text: str) -> Path:
    if not (Path(text) / ENTRY).is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a checkout of github.com/AILab-CVC/CV-VAE: it has no {ENTRY}.")
    return Path(text)


def _width(text: str) -> int:
    if parse_count(text) % 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 32, the groups of the published models' norms.")
    return int(text)


class _Widths(argparse.Action):
    """Keeps the four widths as the tuple that a Config holds."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))
