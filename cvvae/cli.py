"""The command line: reconstruct, encode, decode, info, inflate, train, evaluate."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from . import checkpoint
from .checkpoint import BUILT_IN, load, load_image_vae, save
from .frames import latent_side, latents_of
from .inflate import inflate
from .tiling import QUALITY, Tiling, make_plan
from .vae import VideoVAE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for bad input, 130 when stopped."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("Stopped; nothing half-written was left behind.", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _reconstruct(options) -> None:
    from .stream import reconstruct

    vae = _load_vae(options)
    with _tile_bar(options.input, vae, passes=2) as bar:
        report = reconstruct(vae, options.input, options.output, bar.step)
    latent = "x".join(map(str, report.latent_shape))
    print(f"{options.output}: {report.frames} frames of {report.width}x{report.height}")
    print(f"  PSNR           {report.psnr:.2f} dB")
    print(f"  SSIM           {report.ssim:.4f}")
    print(f"  latents        {latent}: one value for {report.ratio:.1f} pixel values")
    print(f"  time           {report.seconds:.1f} s, {report.frames / report.seconds:.1f} frames/s")
    print(f"  peak memory    {_peak_memory(vae.device)}")


def _encode(options) -> None:
    from .stream import encode_file, save_latents

    vae = _load_vae(options)
    with _tile_bar(options.input, vae) as bar:
        clip = encode_file(vae, options.input, bar.step)
    save_latents(clip, options.output)
    print(f"{options.output}: latents {list(clip.latents.shape)} of {len(clip.times)} frames")


def _decode(options) -> None:
    from .stream import decode_file, load_latents

    vae = _load_vae(options)
    clip = load_latents(options.input)
    if clip.latents.shape[1] != vae.config.latent_channels:
        raise ValueError(f"{options.input} has {clip.latents.shape[1]} latent channels, the model has "
                         f"{vae.config.latent_channels}; use the model it was encoded with.")
    with _Bar(None) as bar:
        decode_file(vae, clip, options.output, options.audio_from, bar.step)
    print(f"{options.output}: {len(clip.times)} frames of {clip.width}x{clip.height}")


def _info(options) -> None:
    path = {"tiny": BUILT_IN / "tiny.safetensors"}.get(options.model, Path(options.model))
    try:
        vae = load(path)
    except checkpoint.CheckpointError as error:
        try:
            vae = load_image_vae(path)
        except checkpoint.CheckpointError:
            raise error from None
    facts = checkpoint.read_metadata(path) if path.is_file() and path.suffix in checkpoint.SAFETENSORS else {}
    parameters = {part: sum(tensor.numel() for tensor in getattr(vae, part).parameters()) for part in ("encoder", "decoder")}
    description = {"model": str(path), "kind": "video VAE" if isinstance(vae, VideoVAE) else "image VAE",
                   "config": vae.config.describe(), "parameters": parameters}
    print(json.dumps(description | {name: value for name, value in facts.items() if name != "config"}, indent=2))


def _inflate(options) -> None:
    image_vae = load_image_vae(options.image_vae)
    save(inflate(image_vae), options.output, DTYPES[options.dtype],
         {"description": f"Video VAE inflated from {Path(options.image_vae).name}, not trained yet."})
    print(f"{options.output}: a video VAE that holds each latent for four frames until it is trained")


def _train(options) -> None:
    from .training.config import read_config
    from .training.trainer import Trainer

    trainer = Trainer(read_config(options.config, options.overrides), options.resume)
    trainer.stop_on_signals()
    total = trainer.config.optim.steps
    with tqdm(total=total, initial=trainer.step, unit="step", dynamic_ncols=True) as bar:
        def report(step: int, losses: dict[str, float]) -> None:
            bar.set_postfix(loss=f"{losses['total']:.4f}", **{k: f"{v:.2f}" for k, v in trainer.scores.items()})
            bar.update(step - bar.n)

        path = trainer.run(report)
    if trainer.step < total:
        print(f"Stopped at step {trainer.step} of {total}; go on with --resume.")
    print(f"{path}: " + ", ".join(f"{name} {value:.2f} dB" for name, value in trainer.scores.items()))


def _evaluate(options) -> None:
    from .training.data import load_clip
    from .training.trainer import evaluate_clip

    vae = _load_vae(options)
    teacher = load_image_vae(options.image_vae, device=vae.device) if options.image_vae else None
    rows = []
    for path in map(Path, options.clips):
        scores = evaluate_clip(vae, teacher, load_clip(path, options.frames, options.size).to(vae.device))
        rows.append(scores)
        print(f"{path.name:32}" + "".join(f"  {name} {value:6.2f} dB" for name, value in scores.items()), flush=True)
    print(f"{'mean':32}" + "".join(f"  {name} {sum(r[name] for r in rows) / len(rows):6.2f} dB" for name in rows[0]))


def _load_vae(options) -> VideoVAE:
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = load(options.model, DTYPES[options.dtype], device)
    memory = None if options.memory == "none" else int(options.memory) if options.memory.isdigit() else options.memory
    if options.quality:
        vae.tiling = replace(QUALITY, memory=memory)
    else:
        vae.tiling = Tiling(options.window or None, options.tile or None, options.overlap, memory=memory)
    return vae


class _Bar:
    """A progress bar counted in tiles."""

    def __init__(self, total: int | None):
        self.bar = tqdm(total=total, unit="tile", dynamic_ncols=True)

    def step(self) -> None:
        self.bar.update()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()


def _tile_bar(path: str, vae: VideoVAE, passes: int = 1) -> _Bar:
    """A bar as long as the container says the video is; an unknown length shows a count only."""
    from .video import probe, read_frames

    frames = probe(path).frames
    if not frames:
        return _Bar(None)
    height, width, _ = next(read_frames(path)).pixels.shape
    return _Bar(passes * len(make_plan(latents_of(frames), latent_side(height), latent_side(width), vae.tiling)))


def _peak_memory(device: torch.device) -> str:
    parts = []
    if device.type == "cuda":
        parts.append(f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} MB on the GPU")
    try:
        import resource  # not on Windows
    except ImportError:
        return ", ".join(parts) or "not measured on this system"
    unit = 1 if sys.platform == "darwin" else 1024
    parts.append(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:.0f} MB of the process")
    return ", ".join(parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cvvae",
                                     description="CV-VAE: 4x8x8 video latents in an image VAE's space.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str, model: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if model:
            sub.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: CUDA when there is one)")
            sub.add_argument("--dtype", default="fp32", choices=DTYPES, help="precision of the network (default: fp32)")
            tiling = Tiling()
            sub.add_argument("--window", type=int, default=tiling.window_frames, metavar="FRAMES",
                             help="frames per window, 1 + 4n; 0 does not cut (default: %(default)s)")
            sub.add_argument("--tile", type=int, default=tiling.tile_pixels, metavar="PIXELS",
                             help="side of a tile; smaller needs less memory; 0 does not cut (default: %(default)s)")
            sub.add_argument("--overlap", type=int, default=tiling.overlap_pixels, metavar="PIXELS",
                             help="what neighbouring tiles share (default: %(default)s)")
            sub.add_argument("--quality", action="store_true",
                             help="windows and tiles that share more, in place of --window, --tile and --overlap: fewer "
                                  "seams, up to four times the time")
            sub.add_argument("--memory", default=tiling.memory, metavar="SIZE",
                             help="what computing may take beside the weights: '2 GB', 'auto' or 'none'; less costs time "
                                  "and changes no number (default: %(default)s)")
        return sub

    def model_option(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--model", default="tiny", help="a CV-VAE file or folder (default: the built-in tiny)")

    sub = command("reconstruct", _reconstruct, "Encode and decode a video and say how good it is.")
    sub.add_argument("input"), sub.add_argument("output")
    model_option(sub)
    sub = command("encode", _encode, "Encode a video or picture into a .safetensors of latents.")
    sub.add_argument("input"), sub.add_argument("output")
    model_option(sub)
    sub = command("decode", _decode, "Decode such latents into a video.")
    sub.add_argument("input"), sub.add_argument("output")
    sub.add_argument("--audio-from", metavar="VIDEO", help="copy the sound of this file")
    model_option(sub)
    sub = command("info", _info, "Say what a model file is.", model=False)
    sub.add_argument("model")
    sub = command("inflate", _inflate, "Make an untrained video VAE of an image VAE.", model=False)
    sub.add_argument("image_vae", help="an SD-layout KL VAE (file or diffusers folder), or 'tiny'")
    sub.add_argument("output")
    sub.add_argument("--dtype", default="fp16", choices=DTYPES, help="of the stored weights (default: fp16)")
    sub = command("train", _train, "Train a video VAE under the image VAE's eye (or an image VAE).", model=False)
    sub.add_argument("config")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="for example optim.steps=200")
    sub.add_argument("--resume", action="store_true", help="go on from the checkpoint in run.out")
    sub = command("evaluate", _evaluate, "Score a model on clips.")
    sub.add_argument("model")
    sub.add_argument("clips", nargs="+")
    sub.add_argument("--image-vae", help="also score this image VAE frame by frame, and compatibility with it")
    sub.add_argument("--frames", type=int, default=17, help="frames from the start of each clip (default: %(default)s)")
    sub.add_argument("--size", type=int, default=128, help="side they are resized and cropped to (default: %(default)s)")
    return parser
