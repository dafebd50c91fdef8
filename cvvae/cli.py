"""The command line: see ``python -m cvvae --help``."""

import argparse
import json
import sys
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from . import __version__, checkpoint
from .checkpoint import BUILT_IN, load, load_image_vae, save
from .download import PUBLISHED, download
from .frames import latent_side, latents_of
from .inflate import inflate
from .tiling import QUALITY, Tiling, make_plan
from .training import TrainingError
from .vae import Autoencoder, VideoVAE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHEETS = 16  # clips shown on a contact sheet


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for bad input, 130 when stopped."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("Stopped; nothing half-written was left under its name.", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError, TrainingError) as error:
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


def _encode_dataset(options) -> None:
    from .dataset import Progress, Settings, encode_dataset
    from .training.distributed import torchrun_group

    group = torchrun_group()
    part, parts = options.part or (group.rank, group.world)
    if options.device == "auto" and torch.cuda.is_available():
        options.device = f"cuda:{group.local_rank % torch.cuda.device_count()}"
    vae = _load_vae(options)
    settings = Settings(options.frames, options.stride, *options.size, options.latent_dtype, options.files_per_shard)
    with tqdm(unit="clip", dynamic_ncols=True) as bar:
        def report(progress: Progress) -> None:
            bar.set_postfix_str(f"{progress.frames / progress.seconds:.1f} frames/s")
            bar.update()

        done = encode_dataset(vae, options.sources, options.to, settings, part, parts, report)
    print(f"{options.to}: {done.shards} shards, {done.clips} clips, {done.frames} frames by part {part} of {parts}")
    if done.frames:
        print(f"  {done.frames / done.seconds:.1f} frames/s; reading and resizing alone, beside it, "
              f"{done.frames / done.decoding:.1f} frames/s")
    if done.left_over:
        print(f"  {done.left_over} frames at the ends of videos were too few for a clip")
    for source, reason in done.skipped.items():
        print(f"  passed over: {source}: {reason}")


def _part(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not PART/PARTS, for example 0/4 (the first of four)")
    return int(part), int(parts)


def _size(text: str) -> tuple[int, int]:
    width, times, height = text.partition("x")
    if not (times and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, for example 1024x576")
    return int(height), int(width)


def _info(options) -> None:
    path = {"tiny": BUILT_IN / "tiny.safetensors"}.get(options.model, Path(options.model))
    vae = _load_either(path)
    facts = checkpoint.read_metadata(path) if path.is_file() and path.suffix in checkpoint.SAFETENSORS else {}
    parameters = {part: sum(tensor.numel() for tensor in getattr(vae, part).parameters()) for part in ("encoder", "decoder")}
    description = {"model": str(path), "kind": _kind(vae),
                   "config": vae.config.describe(), "parameters": parameters}
    print(json.dumps(description | {name: value for name, value in facts.items() if name != "config"}, indent=2))


def _inflate(options) -> None:
    image_vae = load_image_vae(options.image_vae)
    save(inflate(image_vae), options.output, DTYPES[options.dtype],
         {"description": f"Video VAE inflated from {Path(options.image_vae).name}, not trained yet."})
    print(f"{options.output}: a video VAE that holds each latent for four frames until it is trained")


def _download(options) -> None:
    with tqdm(unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        def show(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.update(0)

        try:
            path = download(options.name, options.to, show)
        except KeyboardInterrupt:
            bar.write("What has arrived is kept: the same command goes on from there.", file=sys.stderr)
            raise
    print(f"{path}: {PUBLISHED[options.name].made_for}")


def _prepare(options) -> None:
    from .training.prepare import find_files, prepare, summary

    with tqdm(find_files(options.folder), unit="file", dynamic_ncols=True) as files:
        rows = prepare(files, options.output)
    print(f"{options.output}: {summary(rows)}")


def _train(options) -> None:
    from .training.config import read_config
    from .training.trainer import Trainer

    trainer = Trainer(read_config(options.config, options.overrides), options.resume)
    path = _follow(trainer)
    if trainer.group.leads and trainer.skip_report.count:
        print(f"{trainer.skip_report.count} files could not be used; {trainer.skip_report.path} says why.")
    _finish(trainer, path)


def _adapt(options) -> None:
    from .adaptation.command import make_trainer
    from .adaptation.config import read_config

    with tqdm(unit="clip", desc="conditions", dynamic_ncols=True) as bar:
        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        trainer = make_trainer(read_config(options.config, options.overrides), options.resume, report)
    _finish(trainer, _follow(trainer))
    if trainer.group.leads:
        print("Put it into ComfyUI's models/loras and load it with LoraLoaderModelOnly, strength 1.")


def _follow(trainer) -> Path:
    """Train with a progress bar; returns the path of the result."""
    trainer.stop_on_signals()
    total = trainer.config.optim.steps
    with tqdm(total=total, initial=trainer.step, unit="step", dynamic_ncols=True, disable=not trainer.group.leads) as bar:
        def report(step: int, losses: dict[str, float]) -> None:
            bar.set_postfix(loss=f"{losses['total']:.4f}", **_shown(trainer.scores))
            bar.update(step - bar.n)

        path = trainer.run(report)
    trainer.group.close()
    if trainer.group.leads and trainer.step < total:
        print(f"Stopped at step {trainer.step} of {total}; go on with --resume.")
    return path


def _finish(trainer, path: Path) -> None:
    if trainer.group.leads:
        print(f"{path}: " + ", ".join(f"{name} {value}" for name, value in _shown(trainer.scores).items()))


def _shown(scores: dict[str, float]) -> dict[str, str]:
    """The few that fit beside a progress bar."""
    names = {"psnr": "PSNR", "compatibility_psnr": "compatibility"}
    shown = {title: f"{scores[name]:.2f} dB" for name, title in names.items() if name in scores}
    return shown | {f"held_out_{name}": f"{scores[name]:.4f}" for name in ("loss", "unadapted") if name in scores}


def _download_lpips(options) -> None:
    from .training.perceptual import download_backbone

    print(f"{download_backbone(options.net)}: there for loss.perceptual = 'lpips'")


def _evaluate(options) -> None:
    from .training.evaluation import SCORES, cell, evaluate_clip, main_scores, mean_scores, write_report
    from .training.pictures import clip_sheet, save_png, stacked

    device = _device(options)
    vae = _load_either(options.model, DTYPES[options.dtype], device)
    if isinstance(vae, VideoVAE):
        vae.tiling = _tiling(options)
    elif options.image_vae:
        raise ValueError(f"{options.model} is an image VAE: it is scored by itself. Leave --image-vae out.")
    teacher = load_image_vae(options.image_vae, device=device) if options.image_vae else None
    lpips = _lpips(options, device) if options.lpips_weights else None
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    paths = list(dict.fromkeys(map(Path, options.clips)))
    alone = len({path.name for path in paths}) == len(paths)  # else their folders tell them apart
    found, sheets, columns = {}, [], []
    for path in paths:
        evaluation = evaluate_clip(vae, teacher, _read_clip(path, options.frames, options.size).to(device), lpips)
        name = path.name if alone else str(path)
        if not found:
            columns = main_scores(evaluation.scores)
            print(_line("clip", [SCORES[column].heading for column in columns]))
        print(_line(name, [cell(evaluation.scores, column) for column in columns]), flush=True)
        if options.out and len(sheets) < SHEETS:
            sheets.append(clip_sheet(name, evaluation.pictures))
        found[name] = replace(evaluation, pictures={})  # those of every clip would be too many to keep
    means = mean_scores(evaluation.scores for evaluation in found.values())
    print(_line("mean", [cell(means, column) for column in columns]))
    if not options.out:
        return
    about = {"model": options.model, "kind": _kind(vae), "image_vae": options.image_vae, "frames": options.frames,
             "size": options.size, "dtype": options.dtype, "device": str(device), "config": vae.config.describe(),
             "tiling": asdict(vae.tiling) if isinstance(vae, VideoVAE) else None,
             "versions": {"cvvae": __version__, "torch": torch.__version__}}
    write_report(options.out, about, found)
    save_png(options.out / "contact_sheet.png", stacked(sheets))
    print(f"{options.out}: evaluation.json, evaluation.md, contact_sheet.png")


def _line(name: str, cells: list[str]) -> str:
    """A row of a table at most 80 characters wide; a long name loses its middle."""
    room = min(25, 80 - 11 * len(cells))
    if len(name) > room:
        kept = (room - 2) // 2
        name = f"{name[:kept]}..{name[-kept:]}"
    return f"{name:{room}}" + "".join(f"{text:>11}" for text in cells)


def _read_clip(path: Path, frames: int, size: int) -> Tensor:
    from .training.data import load_clip
    from .video import VideoError, read_frames

    try:
        return load_clip(path, frames, size)
    except VideoError:
        there = sum(1 for _ in islice(read_frames(path), frames))  # raises again where the file cannot be read
        if there in (0, frames):
            raise
        raise ValueError(f"{path} has {there} frames, fewer than the {frames} read of each clip; leave it out or add "
                         f"--frames {there}.") from None


def _lpips(options, device: torch.device) -> torch.nn.Module:
    from .training.config import LossConfig
    from .training.perceptual import make_perceptual

    return make_perceptual(LossConfig(perceptual="lpips", lpips_net=options.lpips_net,
                                      lpips_weights=options.lpips_weights)).to(device)


def _load_either(source, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Autoencoder:
    """A video VAE or, where it is one, an image VAE."""
    try:
        return load(source, dtype, device)
    except checkpoint.CheckpointError as error:
        try:
            return load_image_vae(source, dtype, device)
        except checkpoint.CheckpointError:
            raise error from None


def _kind(vae: Autoencoder) -> str:
    return "video VAE" if isinstance(vae, VideoVAE) else "image VAE"


def _load_vae(options) -> VideoVAE:
    vae = load(options.model, DTYPES[options.dtype], _device(options))
    vae.tiling = _tiling(options)
    return vae


def _device(options) -> torch.device:
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(options.device)


def _tiling(options) -> Tiling:
    memory = None if options.memory == "none" else int(options.memory) if options.memory.isdigit() else options.memory
    if options.quality:
        return replace(QUALITY, memory=memory)
    return Tiling(options.window or None, options.tile or None, options.overlap, memory=memory)


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


def _at_least(least: int):
    """A type of arguments: whole numbers from ``least`` on."""
    def number(text: str) -> int:
        if not (text.isdecimal() and int(text) >= least):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)
    return number


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
    sub = command("encode-dataset", _encode_dataset, "Encode a set of videos into shards of latents, to train samplers on. "
                  "Run it as often, and in as many processes, as you like: each makes what is missing of its part.")
    sub.add_argument("sources", nargs="+", help="videos, pictures, folders, .csv manifests, .tar shards")
    sub.add_argument("--to", required=True, metavar="FOLDER", help="where shards, plan.json and manifest.csv go")
    sub.add_argument("--frames", type=_at_least(0), default=0, metavar="N",
                     help="cut videos into clips of N frames, 1 + 4n (97 gives SVD's 25 latents); 0: whole videos (default)")
    sub.add_argument("--stride", type=_at_least(1), default=1, metavar="N", help="take every N-th frame (default: 1)")
    sub.add_argument("--size", type=_size, default=(0, 0), metavar="WIDTHxHEIGHT",
                     help="resize to cover it and cut out the middle; multiples of 8 (default: as they are)")
    sub.add_argument("--latent-dtype", default="float16", choices=("float16", "bfloat16", "float32"),
                     help="of the stored latents (default: %(default)s)")
    sub.add_argument("--files-per-shard", type=_at_least(1), default=16, metavar="N", help="(default: %(default)s)")
    sub.add_argument("--part", type=_part, metavar="PART/PARTS",
                     help="this process's share, from 0/PARTS on (default: torchrun's rank, else all of it)")
    model_option(sub)
    sub = command("info", _info, "Say what a model file is.", model=False)
    sub.add_argument("model")
    sub = command("inflate", _inflate, "Make an untrained video VAE of an image VAE.", model=False)
    sub.add_argument("image_vae", help="an SD-layout KL VAE (file or diffusers folder), or 'tiny'")
    sub.add_argument("output")
    sub.add_argument("--dtype", default="fp16", choices=DTYPES, help="of the stored weights (default: fp16)")
    files = "; ".join(f"{name}: {entry.made_for} ({entry.size})" for name, entry in PUBLISHED.items())
    sub = command("download", _download, "Fetch published weights from Hugging Face.", model=False)
    sub.description += (f" There are: {files}. A download that was stopped goes on where it was; a whole file is not "
                        "fetched again. Set HF_ENDPOINT to use a mirror.")
    sub.add_argument("name", choices=PUBLISHED, metavar="NAME", help=", ".join(PUBLISHED))
    sub.add_argument("--to", type=Path, default=Path(), metavar="FOLDER",
                     help="for ComfyUI its models/vae (default: the current folder)")
    sub = command("prepare", _prepare, "Look through a folder of videos and pictures and write the manifest to train on.",
                  model=False)
    sub.description += (" Its columns say size, length, motion and cuts of each file. Weight 0 (never drawn) goes to what "
                        "cannot be decoded, to clips in which nothing moves, and to all but the largest of "
                        "near-duplicates; clips with cuts are flagged and keep weight 1. Edit the weights as you like.")
    sub.add_argument("folder", help="looked through with the folders in it")
    sub.add_argument("output", help="the manifest, a .csv to name in data.sources; paths in it count from its folder")
    sub = command("train", _train, "Train a video VAE under the image VAE's eye (or an image VAE).", model=False)
    sub.add_argument("config")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="for example optim.steps=200")
    sub.add_argument("--resume", action="store_true", help="go on from the checkpoint in run.out")
    sub = command("adapt", _adapt, "Train a sampler of ComfyUI to make the latents of a folder that encode-dataset wrote.",
                  model=False)
    sub.add_argument("config")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="for example optim.steps=200")
    sub.add_argument("--resume", action="store_true", help="go on from the checkpoint in run.out")
    sub = command("download-lpips", _download_lpips, "Fetch LPIPS's weights from PyTorch's server.", model=False)
    sub.add_argument("--net", default="vgg", choices=("vgg", "alex"), help="the backbone (default: %(default)s)")
    sub = command("evaluate", _evaluate, "Score a model on clips.")
    sub.add_argument("model", help="a video VAE or an image VAE: a file or folder, or 'tiny'")
    sub.add_argument("clips", nargs="+", help="videos, or pictures with --frames 1")
    sub.add_argument("--image-vae", metavar="PATH",
                     help="the image VAE whose latent space it shares (or 'tiny'): scored too, and compatibility with it")
    sub.add_argument("--frames", type=_at_least(1), default=17, metavar="N",
                     help="frames from the start of each clip; above 17, seams are scored too (default: %(default)s)")
    sub.add_argument("--size", type=_at_least(8), default=128, metavar="PIXELS",
                     help="side they are resized and cropped to (default: %(default)s)")
    sub.add_argument("--lpips-weights", metavar="PATH", help="score LPIPS too, with this file of its backbone's weights")
    sub.add_argument("--lpips-net", default="vgg", choices=("vgg", "alex"), help="that backbone (default: %(default)s)")
    sub.add_argument("--out", type=Path, metavar="FOLDER",
                     help="write evaluation.json, evaluation.md and contact_sheet.png there")
    return parser
