"""What half precision costs: bfloat16 and float16 against float32 on real clips, on every device there is.

    python benchmarks/precision.py
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from cases import DTYPES, make_parser, parse_count
from machine import Row, publish
from reference import distance
from torch import Tensor

import cvvae
from cvvae.metrics import psnr
from cvvae.video import read_frames, to_clip

FLOWER = Path(__file__).parents[1] / "workflows" / "media" / "flower.mp4"
FULL, *HALVES = DTYPES


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--clips", nargs="+", type=Path, metavar="FILE", help="videos (default: the example clip)")
    parser.add_argument("--frames", type=parse_count, default=17, metavar="N", help="frames taken of each")
    parser.add_argument("--model", default="tiny", help="a CV-VAE that cvvae.load reads")
    parser.add_argument("--dtypes", nargs="+", choices=HALVES, default=HALVES, help="what is compared with float32")
    parser.add_argument("--devices", nargs="+", choices=("cpu", "cuda"), help="where (default: all there are)",
                        default=None)
    options = parser.parse_args(arguments)
    clips = options.clips or [FLOWER]
    devices = options.devices or ["cpu"] + ["cuda"] * torch.cuda.is_available()
    measurements = []
    for path in clips:
        clip = to_clip([frame.pixels for frame in islice(read_frames(path), options.frames)])
        for device in devices:
            full = cvvae.load(options.model, getattr(torch, FULL), device)
            latents = full.encode(clip).mode()
            decoded = decode(full, latents, clip)
            for dtype in options.dtypes:
                half = cvvae.load(options.model, getattr(torch, dtype), device)
                measurements.append({"clip": path.stem, "device": device, "dtype": dtype}
                                    | compare(half, clip, latents, decoded))
                print(*row(measurements[-1]).values(), sep="  ")
    publish("precision", "Half precision against float32", options, [row(found) for found in measurements], measurements)


def compare(half: cvvae.VideoVAE, clip: Tensor, latents: Tensor, decoded: Tensor) -> dict:
    """``half`` against what float32 made of ``clip``: its ``latents``, and the clip ``decoded`` from them."""
    own_latents = half.encode(clip).mode()
    own_decoded = decode(half, latents, clip)
    round_trip = decode(half, own_latents, clip)
    return {"latents_max_error_sd": distance(own_latents, latents),
            "decoded_psnr_db": psnr(own_decoded, decoded),
            "decoded_max_error": (own_decoded.float() - decoded).abs().max().item(),  # pixels span -1 .. 1
            "round_trip_psnr_db": psnr(round_trip, decoded),
            "source_psnr_db": {FULL: psnr(decoded, clip), "half": psnr(round_trip, clip)},
            "finite": all(bool(x.isfinite().all()) for x in (own_latents, own_decoded, round_trip))}


def decode(vae: cvvae.VideoVAE, latents: Tensor, clip: Tensor) -> Tensor:
    return vae.decode(latents, frames=clip.shape[2], size=clip.shape[-2:])


def row(found: dict) -> Row:
    source = found["source_psnr_db"]
    return {"clip": found["clip"], "device": found["device"], "dtype": found["dtype"],
            "latents, max error": f"{found['latents_max_error_sd']:.2g} sd",
            "decoded, PSNR": f"{found['decoded_psnr_db']:.1f} dB",
            "decoded, max error": f"{found['decoded_max_error'] * 127.5:.1f} / 255",
            "round trip, PSNR": f"{found['round_trip_psnr_db']:.1f} dB",
            "PSNR with the source, float32 and half": f"{source[FULL]:.2f}, {source['half']:.2f} dB",
            "finite": "yes" if found["finite"] else "NO"}


if __name__ == "__main__":
    main()
