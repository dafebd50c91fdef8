"""What lies between keyframes: image-mode latents decoded in video mode, against repeating and blending frames.

    python benchmarks/interpolation.py --clips FOLDER --models tiny runs/interpolate/model.safetensors

Every fourth frame of a clip is a keyframe; the frames between are held out and guessed.  Frames are taken further apart,
too (--strides), so that more moves from one keyframe to the next.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from cases import add_device_option, make_parser, parse_count, parse_frames
from growth import load_pyplot
from machine import Row, publish
from torch import Tensor

import cvvae
from cvvae.frames import TIME_FACTOR
from cvvae.metrics import psnr
from cvvae.training.data import load_clip
from cvvae.training.media import VIDEOS, media_paths

MEDIA = Path(__file__).parents[1] / "workflows" / "media"
PIXELS = ("repeated", "blended")  # of true keyframes, which no latent has to carry
BASE = "keyframes decoded, blended"
BEST = "image VAE on the held-out frames"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--clips", nargs="+", type=Path, default=[MEDIA], metavar="PATH", help="videos, or folders of them")
    parser.add_argument("--models", nargs="+", default=["tiny"], help="CV-VAEs that cvvae.load reads")
    parser.add_argument("--image-vae", default="tiny", help="the image VAE that encodes the keyframes")
    parser.add_argument("--frames", type=parse_frames, default=17, metavar="N", help="of each clip, 1 + 4n")
    parser.add_argument("--strides", nargs="+", type=parse_count, default=[1, 2, 4], metavar="N",
                        help="frames are taken this far apart")
    parser.add_argument("--size", type=parse_count, default=128, metavar="N", help="side they are resized and cropped to")
    add_device_option(parser)
    options = parser.parse_args(arguments)
    pyplot = load_pyplot()
    image_vae = cvvae.load_image_vae(options.image_vae, device=options.device)
    models = {name if name == "tiny" else Path(name).parent.name: cvvae.load(name, device=options.device)
              for name in options.models}
    measurements = []
    for stride in options.strides:
        for path in videos(options.clips):
            try:
                clip = load_clip(path, (options.frames - 1) * stride + 1, options.size)[:, :, ::stride]
            except ValueError as error:
                print(f"left out at stride {stride}: {error}")
                continue
            found = {way: held_out_psnr(guess, clip) for way, guess in guesses(clip, image_vae, models)}
            keyframes = clip[:, :, ::TIME_FACTOR]
            measurements.append({"clip": path.stem, "stride": stride, "psnr_db": found,
                                 "keyframes_psnr_db": psnr(keyframes[:, :, 1:], keyframes[:, :, :-1])})
            print(stride, path.stem, *(f"{way} {value:.2f}" for way, value in found.items()), sep="  ", flush=True)
    publish("interpolation", "Frames between keyframes", options, rows(measurements), measurements)
    draw(pyplot, measurements, list(models), options.out / "interpolation.png")


def videos(paths: Sequence[Path]) -> list[Path]:
    found = [item for path in paths for item in (media_paths(path) if path.is_dir() else [path])]
    return [path for path in found if path.suffix.lower() in VIDEOS]


@torch.no_grad()
def guesses(clip: Tensor, image_vae: cvvae.ImageVAE, models: dict[str, cvvae.VideoVAE]):
    """(what was done, the clip [1, 3, T, H, W] it gives), from frames 0, 4, 8, ... of ``clip`` alone, but the last."""
    keyframes = clip[:, :, ::TIME_FACTOR]
    yield PIXELS[0], repeated(keyframes)
    yield PIXELS[1], blended(keyframes)
    latents = image_vae.encode(keyframes[0].transpose(0, 1)).mode()
    yield BASE, blended(image_vae.decode(latents).transpose(0, 1)[None])
    for name, model in models.items():
        yield f"decoded in video mode, {name}", model.decode(latents.transpose(0, 1)[None])
    frames = clip[0].transpose(0, 1)
    yield BEST, image_vae.decode(image_vae.encode(frames).mode()).transpose(0, 1)[None]


def repeated(keyframes: Tensor) -> Tensor:
    """Each frame is the nearest keyframe, the one before where two are as near."""
    count = TIME_FACTOR * (keyframes.shape[2] - 1) + 1
    nearest = [(k + TIME_FACTOR // 2 - 1) // TIME_FACTOR for k in range(count)]
    return keyframes[:, :, nearest]


def blended(keyframes: Tensor) -> Tensor:
    """Linear between keyframes."""
    count = TIME_FACTOR * (keyframes.shape[2] - 1) + 1
    before = torch.arange(count) // TIME_FACTOR
    after = (before + 1).clamp(max=keyframes.shape[2] - 1)
    weight = (torch.arange(count) % TIME_FACTOR / TIME_FACTOR).to(keyframes).view(1, 1, -1, 1, 1)
    return keyframes[:, :, before].lerp(keyframes[:, :, after], weight)


def held_out_psnr(guess: Tensor, clip: Tensor) -> float:
    held_out = [k for k in range(clip.shape[2]) if k % TIME_FACTOR]
    return psnr(guess[:, :, held_out].clamp(-1, 1), clip[:, :, held_out])


def rows(measurements: list[dict]) -> list[Row]:
    found = []
    strides = sorted({m["stride"] for m in measurements})
    for way in measurements[0]["psnr_db"]:
        row = {"held-out frames": way}
        for stride in strides:
            of_stride = [m for m in measurements if m["stride"] == stride]
            row[f"stride {stride}, {len(of_stride)} clips"] = f"{mean(m['psnr_db'][way] for m in of_stride):.2f} dB"
        found.append(row)
    return found


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def draw(pyplot, measurements: list[dict], models: list[str], path: Path) -> None:
    """What decoding in video mode gains over blending the decoded keyframes, clip by clip, against how much moves."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name in models:
        gains = [m["psnr_db"][f"decoded in video mode, {name}"] - m["psnr_db"][BASE] for m in measurements]
        axes.scatter([m["keyframes_psnr_db"] for m in measurements], gains, s=18, alpha=0.7, label=name)
    axes.axhline(0, color="grey", linewidth=1)
    axes.set(xlabel="likeness of neighbouring keyframes, PSNR dB (left: much motion)",
             ylabel="gain over blending, PSNR dB", title="Image-mode latents decoded in video mode: held-out frames")
    axes.legend(title="decoder")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
