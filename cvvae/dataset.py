"""Latents of whole video sets, in shards that any number of processes and machines fill without talking to each other.

    plan.json                  what is encoded and how: every process reads the same one
    shard-000000.safetensors   latents of the first files, their facts in its metadata
    manifest.csv               one row for each clip, written by whoever finds that no shard is missing

The shard contract: files are in the order of the plan, ``files_per_shard`` to a shard, and shard k belongs to the part
that has number k modulo ``parts``.  A shard is a function of the plan and the weights alone and gets its name when it is
whole.  So a process that starts, whenever and wherever, computes those of its shards that have no file yet: after
``kill -9`` nothing is lost but the shard at hand, nothing is encoded twice, and the number of parts may change in between.
"""

import csv
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import write_whole
from .dataset_clips import END, DatasetError, Failure, Progress, Settings, ahead, read_clips
from .training.media import Media, find_media
from .vae import VideoVAE
from .video import to_clip

__all__ = ["DatasetError", "LatentDataset", "Progress", "Sample", "Settings", "encode_dataset", "weights_hash"]


@dataclass(frozen=True)
class Sample:
    """One clip: where it comes from, and which shard holds its latents under ``key``."""

    key: str
    shard: str
    source: str
    start: int  # first frame in the source
    frames: int  # encoded, before padding to 1 + 4n
    stride: int
    fps: str  # of the clip as it was encoded, a fraction
    height: int
    width: int
    caption: str = ""


def encode_dataset(vae: VideoVAE, sources: Sequence[str], folder: str | os.PathLike, settings: Settings,
                   part: int = 0, parts: int = 1, report: Callable[[Progress], None] | None = None,
                   check: Callable[[], None] = lambda: None) -> Progress:
    """Encode the videos and pictures of ``sources`` into shards of latents (posterior mode) in ``folder``.

    sources: files, folders, CSV manifests with weights (0 leaves a file out) and tar shards of videos.

    part, parts: this process's share, 0 <= part < parts.  report: called after every clip; check: between tiles, may raise
    to cancel.  A file that cannot be decoded is passed over, and its shard and the manifest say why.

    Raises DatasetError where ``folder`` holds latents of other files, settings or weights; FileNotFoundError or ValueError
    for sources that are not there; OSError where the disk is full.
    """
    if not 0 <= part < parts:
        raise DatasetError(f"part is {part} of {parts}; expected 0 to {parts - 1}.")
    folder = Path(folder)
    media = [item for item in find_media(list(sources)) if item.weight > 0]
    if not media:
        raise DatasetError(f"No videos or pictures in {', '.join(sources)}.")
    plan = _plan(vae, media, settings)
    folder.mkdir(parents=True, exist_ok=True)
    _agree(plan, folder / "plan.json")
    groups = [media[i:i + settings.files_per_shard] for i in range(0, len(media), settings.files_per_shard)]
    mine = [k for k in range(part, len(groups), parts) if not (folder / _name(k)).exists()]
    progress, started = Progress(), time.monotonic()
    for k in mine:
        for stale in folder.glob(f".{_name(k)}.partial*"):  # of a process that was killed
            stale.unlink(missing_ok=True)
        _write_shard(vae, groups[k], k, folder, settings, progress, started, report, check)
    if all((folder / _name(k)).exists() for k in range(len(groups))):
        _write_manifest(folder)
    progress.seconds = time.monotonic() - started
    return progress


class _Broken(Exception):
    """A file broke off in the middle of a clip."""

    def __init__(self, failure: Failure):
        super().__init__(failure.reason)
        self.failure = failure


def _write_shard(vae, group, k, folder, settings, progress, started, report, check) -> None:
    tensors: dict[str, Tensor] = {}
    samples: list[Sample] = []
    failures: dict[str, str] = {}
    with closing(ahead(read_clips(group, settings, progress), progress)) as events:
        for event in events:
            if isinstance(event, Failure):
                failures[event.source] = event.reason
                continue
            frames = 0

            def parts(events=events) -> Iterator[Tensor]:
                nonlocal frames
                for event in events:
                    if isinstance(event, Failure):
                        raise _Broken(event)
                    if event is END:
                        return
                    frames += len(event)
                    yield to_clip(event)

            try:
                latents = torch.cat([part.cpu() for part in vae.encode_stream(parts(), check=check)], dim=2)[0]
            except _Broken as broken:
                failures[broken.failure.source] = broken.failure.reason
                continue
            key = f"{k * settings.files_per_shard + event.number:08d}-{event.piece:04d}"
            tensors[key] = latents.to(getattr(torch, settings.dtype)).contiguous()
            samples.append(Sample(key, _name(k), str(event.media), event.start, frames, settings.stride, str(event.fps),
                                  event.height, event.width, event.caption))
            progress.clips += 1
            progress.frames += frames
            progress.seconds = time.monotonic() - started
            if report is not None:
                report(progress)
    # One entry: safetensors writes several in no fixed order, and the same shard should be the same bytes.
    facts = {"cvvae": json.dumps({"samples": [asdict(sample) for sample in samples], "skipped": failures})}
    write_whole(folder / _name(k), lambda partial: save_file(tensors, partial, facts))
    progress.shards += 1
    progress.skipped |= failures


# -- plan and manifest -------------------------------------------------------------------------------


def _name(shard: int) -> str:
    return f"shard-{shard:06d}.safetensors"


def _plan(vae: VideoVAE, media: list[Media], settings: Settings) -> dict:
    """Everything that the shards' content depends on."""
    files = [{"source": str(item), "bytes": item.size or item.path.stat().st_size} for item in media]
    tiling = None if vae.tiling is None else {name: value for name, value in asdict(vae.tiling).items() if name != "memory"}
    return {"settings": asdict(settings), "tiling": tiling, "precision": str(vae.dtype).removeprefix("torch."),
            "weights": weights_hash(vae), "channels": vae.config.latent_channels, "files": files}


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 of a model's tensors, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _agree(plan: dict, path: Path) -> None:
    """Write ``plan``, or raise DatasetError where another one is there."""
    if not path.exists():
        write_whole(path, lambda partial: Path(partial).write_text(json.dumps(plan, indent=1)))
    there = _load_plan(path)
    differing = [name for name in plan if plan[name] != there.get(name)]
    if not differing:
        return
    if differing == ["files"]:
        given, begun = ({file["source"]: file["bytes"] for file in files} for files in (plan["files"], there["files"]))
        odd = sorted(given.items() ^ begun.items())[0][0] if given != begun else "the order"
        raise DatasetError(f"{path.parent} was begun with other files ({len(begun)}, now {len(given)}; {odd} differs). Name "
                           "the same sources, or another folder for the new set.")
    raise DatasetError(f"{path.parent} was begun with other {', '.join(differing)}: "
                       + "; ".join(f"{name} {_short(there.get(name))}, now {_short(plan[name])}" for name in differing
                                   if name != "files") + ". Use the same, or another folder.")


def _short(value) -> str:
    return value[:12] if isinstance(value, str) else json.dumps(value)


def _load_plan(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read ({error}): it is not a folder written by encode-dataset.") from None


def _shards(folder: Path) -> list[str]:
    plan = _load_plan(folder / "plan.json")
    return [_name(k) for k in range(-(-len(plan["files"]) // plan["settings"]["files_per_shard"]))]


def _write_manifest(folder: Path) -> None:
    samples, skipped = [], []
    for shard in _shards(folder):
        found, failures = _facts(folder / shard)
        samples += found
        skipped += failures.items()

    def write(name: str, header: Sequence[str], rows) -> None:
        def to(partial: str) -> None:
            with open(partial, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(header)
                writer.writerows(rows)
        write_whole(folder / name, to)

    write("manifest.csv", list(Sample.__dataclass_fields__), (asdict(sample).values() for sample in samples))
    if skipped:
        write("skipped.csv", ("source", "reason"), skipped)


def _facts(path: Path) -> tuple[list[Sample], dict[str, str]]:
    """The samples of a shard, and the files it passed over."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["cvvae"])
        return [Sample(**sample) for sample in facts["samples"]], facts["skipped"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{path} is not a whole shard of latents ({error}). Delete it and run encode-dataset "
                           "again.") from None


class LatentDataset(torch.utils.data.Dataset):
    """The clips of a finished folder: ``len(data)``, ``data[i]`` -> latents [C, t, h, w] float32, ``data.samples[i]``.

    Shards are mapped into memory: only what is asked for is read.  Raises DatasetError for a folder that is no such
    folder, or whose shards are not all there.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.plan = _load_plan(self.folder / "plan.json")
        names = _shards(self.folder)
        missing = [name for name in names if not (self.folder / name).exists()]
        if missing:
            raise DatasetError(f"{len(missing)} of {len(names)} shards are missing in {folder} ({missing[0]} first): run "
                               "encode-dataset again with the same settings; it makes only those.")
        self.samples = [sample for name in names for sample in _facts(self.folder / name)[0]]
        if not self.samples:
            raise DatasetError(f"{folder} holds no clip: every file was passed over; skipped.csv says why.")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        sample = self.samples[index]
        with safe_open(self.folder / sample.shard, framework="pt") as file:
            return file.get_tensor(sample.key).float()
