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
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import write_whole
from .training.media import Media, find_media
from .vae import VideoVAE
from .video import VideoError, to_clip

AHEAD = 2  # parts of clips decoded before they are asked for
PART = 16  # frames read at a time where a whole video is one clip
CAPTION = ".txt"  # beside a video, with its name


class DatasetError(ValueError):
    """A folder of latents that does not fit what is asked of it."""


@dataclass(frozen=True)
class Settings:
    """How videos become clips, and clips files.  ``frames`` 0 encodes each video as one clip, however long."""

    frames: int = 0  # 1 + 4n; what is left at a video's end is counted, not encoded
    stride: int = 1  # frames are taken this far apart
    height: int = 0  # resized to cover height x width, then cropped in the middle; 0 keeps the size
    width: int = 0
    dtype: str = "float16"  # of the stored latents
    files_per_shard: int = 16

    def __post_init__(self):
        if self.frames < 0 or self.frames and self.frames % 4 != 1:
            raise DatasetError(f"frames is {self.frames}; expected 1 + 4n, or 0 for whole videos.")
        if self.stride < 1 or self.files_per_shard < 1:
            raise DatasetError(f"stride is {self.stride}, files_per_shard {self.files_per_shard}; expected 1 or more.")
        if bool(self.height) != bool(self.width) or self.height % 8 or self.width % 8 or min(self.height, self.width) < 0:
            raise DatasetError(f"The size is {self.height} x {self.width}; expected multiples of 8, or 0 x 0 to keep sizes.")
        if self.dtype not in ("float16", "bfloat16", "float32"):
            raise DatasetError(f"dtype is {self.dtype!r}; expected float16, bfloat16 or float32.")


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


@dataclass
class Progress:
    """What a process did.  ``decoding``: seconds that the reading thread worked, beside the model."""

    shards: int = 0
    clips: int = 0
    frames: int = 0
    left_over: int = 0  # frames at ends of videos, fewer than Settings.frames
    seconds: float = 0.0
    decoding: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)  # source -> reason


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


def _write_shard(vae, group, k, folder, settings, progress, started, report, check) -> None:
    tensors: dict[str, Tensor] = {}
    samples: list[Sample] = []
    failures: dict[str, str] = {}
    with closing(_ahead(_read(group, settings, progress), progress)) as events:
        for event in events:
            if isinstance(event, _Failure):
                failures[event.source] = event.reason
                continue
            frames = 0

            def parts(events=events) -> Iterator[Tensor]:
                nonlocal frames
                for event in events:
                    if isinstance(event, _Failure):
                        raise _Broken(event)
                    if event is _END:
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


# -- reading, in a thread of its own -----------------------------------------------------------------


@dataclass(frozen=True)
class _Begin:
    """A clip begins: the ``piece``-th of the file that has ``number`` in its shard.  Parts of frames and _END follow."""

    number: int
    media: Media
    piece: int
    start: int
    fps: Fraction
    height: int
    width: int
    caption: str


@dataclass(frozen=True)
class _Failure:
    """A file that cannot be read any further; the clip that has begun is given up."""

    source: str
    reason: str


class _Broken(Exception):
    def __init__(self, failure: _Failure):
        super().__init__(failure.reason)
        self.failure = failure


_END = object()


def _read(group: list[Media], settings: Settings, progress: Progress) -> Iterator:
    """What :func:`_write_shard` takes in: for each clip _Begin, parts uint8 [n, H, W, 3] and _END."""
    for number, media in enumerate(group):
        try:
            yield from _read_file(media, number, settings, progress)
        except (VideoError, OSError) as error:
            yield _Failure(str(media), str(error))


def _read_file(media: Media, number: int, settings: Settings, progress: Progress) -> Iterator:
    fps = media.probe().fps / settings.stride if media.is_video else Fraction(1)
    caption = _caption(media)
    whole = settings.frames == 0 or not media.is_video
    held: list[np.ndarray] = []
    piece = read = 0
    shape = None
    for frame in media.frames(step=settings.stride):
        place = f"{media}, frame {read * settings.stride}"
        shape = shape or frame.pixels.shape
        if frame.damaged:
            raise VideoError(f"{place}: the file is damaged there.")
        if frame.pixels.shape != shape:
            raise VideoError(f"{place}: the picture size changes there.")
        held.append(_resized(frame.pixels, settings))
        if read == 0 and whole or not whole and len(held) == settings.frames:
            start = (read + 1 - len(held)) * settings.stride
            yield _Begin(number, media, piece, start, fps, *held[0].shape[:2], caption)
        read += 1
        if len(held) == (PART if whole else settings.frames):
            yield np.stack(held)
            held = []
            if not whole:
                yield _END
                piece += 1
    if not read:
        raise VideoError(f"{media} holds no frame that can be decoded.")
    if whole:
        if held:
            yield np.stack(held)
        yield _END
        return
    progress.left_over += len(held)
    if not piece:
        raise VideoError(f"{media} has {len(held)} frames at stride {settings.stride}; a clip takes {settings.frames}.")


def _resized(pixels: np.ndarray, settings: Settings) -> np.ndarray:
    """uint8 [H, W, 3] -> the middle of it, scaled to cover the settings' size."""
    height, width = settings.height, settings.width
    if not height or pixels.shape[:2] == (height, width):
        return pixels
    scale = max(height / pixels.shape[0], width / pixels.shape[1])
    sides = max(height, round(pixels.shape[0] * scale)), max(width, round(pixels.shape[1] * scale))
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    image = F.interpolate(image, sides, mode="bilinear", antialias=True)[0]
    top, left = (sides[0] - height) // 2, (sides[1] - width) // 2
    return image[:, top:top + height, left:left + width].permute(1, 2, 0).numpy()


def _caption(media: Media) -> str:
    """The text beside a file, in a ``.txt`` with its name; empty without one."""
    path = media.path.with_suffix(CAPTION)
    return path.read_text(encoding="utf-8").strip() if not media.member and path.is_file() else ""


def _ahead(events: Iterator, progress: Progress) -> Iterator:
    """``events``, read ahead by a thread; closing the iterator ends it."""
    ready: queue.Queue = queue.Queue(AHEAD)
    closed = threading.Event()

    def put(item) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            while True:
                began = time.monotonic()
                event = next(events, _DONE)
                progress.decoding += time.monotonic() - began
                if not put(event) or event is _DONE:
                    return
        except BaseException as error:  # handed to the thread that can tell the user
            put(error)

    thread = threading.Thread(target=read, name="frames", daemon=True)
    thread.start()
    try:
        while (event := ready.get()) is not _DONE:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        closed.set()
        thread.join()


_DONE = object()


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
