"""For scale: time and peak memory of other public video decoders that turn a latent into 4x8x8 pixels, as ComfyUI runs
them, beside this model, in turn.

    python benchmarks/others.py --comfyui ../ComfyUI

Weights are random: only time and memory mean something.  TAEHV is a distilled decoder that trades quality for speed.
Run it with ComfyUI's Python.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

# ComfyUI's Python does not have this package; behind its own folders, because nodes/ would hide ComfyUI's nodes.py.
sys.path.append(str(Path(__file__).parents[1]))

import torch
from cases import DTYPES, Case, add_device_option, add_widths_option, make_parser, parse_count, parse_size
from machine import PeakMemory, Row, interleave, megabytes, publish, seconds_text
from reference import CHANNELS, drawn, ours
from torch import Tensor, nn

LATENT_CHANNELS = 16  # of every other model here
NEWEST = "comfy/ldm/cogvideo/vae.py"  # of ComfyUI's decoders

Decode = Callable[[Tensor], Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--comfyui", type=_host, required=True, metavar="PATH", help="a checkout of ComfyUI")
    parser.add_argument("--cases", nargs="+", type=parse_size, metavar="TxHxW", help="clips to decode",
                        default=[parse_size("17x576x1024"), parse_size("1x1024x1024")])
    parser.add_argument("--rounds", type=parse_count, default=5, help="timed calls of each, after one that is not timed")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and computation")
    add_widths_option(parser)
    add_device_option(parser)
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    decoders = {f"CV-VAE {variant}": (channels, ours(variant, options.widths, options.device, dtype).decode)
                for variant, channels in CHANNELS.items()}
    decoders |= {name: (LATENT_CHANNELS, decode) for name, decode in others(options.comfyui, options.device, dtype).items()}
    rows, measurements = [], []
    for size in options.cases:
        found = measure(decoders, Case("decode", "sd3", *size), options)
        measurements += found
        rows += [row(str(size), measurement) for measurement in found]
    publish("others", "Decoding, beside other public 4x8x8 decoders", options, rows, measurements)


def others(host: Path, device: str, dtype: torch.dtype) -> dict[str, Decode]:
    """Decoders of the checkout at ``host``, of [1, 16, t, h, w]; in the sizes of the published weights."""
    sys.path.insert(0, str(host))
    if device == "cpu":
        from comfy.cli_args import args  # its command line, which nobody gave: without this it looks for a GPU

        args.cpu = True
    import comfy.ldm.cogvideo.vae
    import comfy.ldm.wan.vae
    import comfy.taesd.taehv

    wan = comfy.ldm.wan.vae.WanVAE(dim=96, z_dim=LATENT_CHANNELS, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
                                   temperal_downsample=[False, True, True], image_channels=3, conv_out_channels=3)
    cogvideox = comfy.ldm.cogvideo.vae.AutoencoderKLCogVideoX(latent_channels=LATENT_CHANNELS)
    taehv = comfy.taesd.taehv.TAEHV(latent_channels=LATENT_CHANNELS)
    models = {"Wan 2.1": wan, "CogVideoX": cogvideox, "TAEHV": taehv}
    for model in models.values():
        model.load_state_dict(drawn(model), assign=True)  # ComfyUI's layers come without values
        model.to(device, dtype).requires_grad_(False).eval()
    return {name: partial(decode, model) for name, model in models.items()}


@torch.no_grad()
def decode(model: nn.Module, latents: Tensor) -> Tensor:
    return model.decode(latents)


def measure(decoders: dict[str, tuple[int, Decode]], case: Case, options: argparse.Namespace) -> list[dict]:
    latents = case.input(options.device, getattr(torch, options.dtype))
    calls = {name: partial(decoder, latents[:, :channels]) for name, (channels, decoder) in decoders.items()}
    peaks = {}
    for name, call in calls.items():
        with PeakMemory(options.device) as taken:
            made = call()
        # Some make more frames than 4t - 3.
        if made.shape[-2:] != (case.height, case.width) or made[..., 0, 0].numel() < 3 * case.frames:
            raise SystemExit(f"{name} made {list(made.shape)}, not {case.size}.")
        del made
        peaks[name] = taken.extra
    seconds = interleave(calls, options.rounds, options.device)
    return [{"decoder": name, **case.describe(), "seconds": seconds[name], "peak_bytes": peaks[name]} for name in calls]


def row(size: str, measurement: dict) -> Row:
    return {"decoder": measurement["decoder"], "clip": size, "time": seconds_text(measurement["seconds"]),
            "peak memory": megabytes(measurement["peak_bytes"])}


def _host(text: str) -> Path:
    if not (Path(text) / NEWEST).is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a ComfyUI that knows all of these decoders: it has no {NEWEST}.")
    return Path(text)


if __name__ == "__main__":
    main()
