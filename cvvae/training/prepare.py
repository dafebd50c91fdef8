"""Look through a folder once and write the manifest that training draws from.

What spoils training is given weight 0, so that it is never drawn: files that cannot be decoded whole, clips in which
nothing moves, and all but the largest of near-duplicates.  Clips with cuts keep weight 1, because decoders meet cuts
too; they are flagged, and the column ``cut_times`` says where to split them.  Edit the weights as you like.

The thresholds were set on 56 clips of many kinds (films, phones, screens; 256 px, up to 121 frames): of 400 pairs of
them joined end to end every joint was found, as was the one real cut, and nothing else was taken for a cut.
"""

import csv
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from ..checkpoint import write_whole
from ..video import VideoError, probe, read_frames
from .media import PICTURES, VIDEOS, media_paths

SMALL = 64  # side of the pictures that are compared, whatever the shape of the video

STATIC = 0.1  # mean change from frame to frame, of 255; still scenes filmed by hand have 0.2 and more

# A cut: the picture changes by this much (of 255), by this much more than in the frames around, and its colours too.
# The last two tell cuts from fast motion, which changes as much, but keeps on doing so and keeps its colours.
CUT_CHANGE = 15.0
CUT_RATIO = 2.25
CUT_COLOURS = 0.1  # share of the pixels that fall into other bins of the colour histogram
CUT_NEIGHBOURS = 8  # frames on either side

# Share of the bits of two fingerprints that may differ.  Copies made smaller and compressed harder differ in up to 0.09,
# two stretches of one still scene in 0.14, unrelated clips in 0.34 and more.
DUPLICATE = 0.1
FINGERPRINT_AT = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the length, so that a copy with another frame rate has the same


@dataclass
class Row:
    """One line of the manifest; ``path`` counts from the manifest's folder."""

    path: str
    weight: int = 1
    kind: str = "video"  # or "picture"
    width: int = 0
    height: int = 0
    frames: int = 0
    fps: float = 0.0
    seconds: float = 0.0
    motion: float = 0.0  # mean change of brightness from frame to frame of the shrunk picture, 0 .. 255, cuts left out
    cuts: int = 0
    cut_times: str = ""  # seconds at which a new scene begins, joined by ";"
    duplicate_of: str = ""
    flags: str = ""  # of unreadable, static, duplicate, cuts, joined by ";"
    error: str = ""

    def flag(self, name: str, drop: bool) -> None:
        """Add a flag; drop: never draw the file."""
        self.flags = ";".join(filter(None, (self.flags, name)))
        if drop:
            self.weight = 0


def find_files(folder: str | os.PathLike) -> list[Path]:
    """The videos and pictures of ``folder`` and below.  Raises FileNotFoundError or ValueError where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"No such folder: {folder}.")
    files = [path for path in media_paths(folder) if path.suffix.lower() != ".tar"]
    if not files:
        raise ValueError(f"{folder} holds no file that ends in {', '.join(VIDEOS + PICTURES)}.")
    return files


def prepare(files: Iterable[Path], target: str | os.PathLike) -> list[Row]:
    """Look through ``files`` and write the manifest ``target`` (.csv), whole or not at all.  Returns its rows."""
    target = Path(target)
    if target.suffix.lower() != ".csv":
        raise ValueError(f"{target}: a manifest is a .csv file.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: the folder {target.parent} does not exist.")
    scanned = [_scan(path, _relative(path, target.parent)) for path in files]
    rows = [row for row, _ in scanned]
    _mark_duplicates([(row, bits) for row, bits in scanned if bits is not None])
    write_whole(target, lambda partial: _write(rows, partial))
    return rows


def summary(rows: list[Row]) -> str:
    """What was found, for people."""
    kinds = Counter(row.kind for row in rows)
    flags = Counter(flag for row in rows for flag in row.flags.split(";") if flag)
    dropped = sum(row.weight == 0 for row in rows)
    text = f"{kinds['video']} videos and {kinds['picture']} pictures, {dropped} of them with weight 0 (never drawn)"
    for flag in ("unreadable", "static", "duplicate", "cuts"):
        if flags[flag]:
            text += f"\n  {flag + (' (weight 1)' if flag == 'cuts' else ''):20}{flags[flag]}"
    return text


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive of Windows
        return path.resolve().as_posix()


def _write(rows: list[Row], path: str) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _scan(path: Path, name: str) -> tuple[Row, np.ndarray | None]:
    """A file's row and its fingerprint (bool [315] of a video, [63] of a picture), None where it cannot be decoded."""
    row = Row(name, kind="video" if path.suffix.lower() in VIDEOS else "picture")
    try:
        return row, _measure(path, row)
    except (VideoError, OSError) as error:
        row.flag("unreadable", drop=True)
        row.error = str(error)
        return row, None


def _measure(path: Path, row: Row) -> np.ndarray:
    """Fill in ``row`` and return the fingerprint, holding numbers about every frame but never the frames."""
    info = probe(path)
    row.height, row.width = next((frame.pixels.shape[:2] for frame in read_frames(path)), (0, 0))
    prints, changes, motions, colours, times = [], [], [], [], []
    before = None
    for frame in read_frames(path, size=(SMALL, SMALL)):
        if frame.damaged:
            raise VideoError(f"{path} is damaged at frame {row.frames}.")
        row.frames += 1
        now = frame.pixels.astype(np.float32)
        grey, histogram = now.mean(-1), _histogram(frame.pixels)
        prints.append(np.packbits(_fingerprint(grey)))
        times.append(float(frame.time) if frame.time is not None else (row.frames - 1) / float(info.fps))
        if before is not None:
            changes.append(np.abs(now - before[0]).mean())
            motions.append(np.abs(grey - before[1]).mean())
            colours.append(np.abs(histogram - before[2]).sum() / 2)
        before = now, grey, histogram
    if row.frames == 0:
        raise VideoError(f"{path} holds no frame that can be decoded.")
    if row.kind == "picture":
        return np.unpackbits(prints[0], count=63).astype(bool)
    if row.frames < 0.9 * info.frames - 1:  # what the container says may be rounded from the duration
        raise VideoError(f"{path} ends early: {row.frames} of {info.frames} frames could be decoded.")
    row.fps = round(float(info.fps), 3)
    row.seconds = round(times[-1] - times[0] + 1 / float(info.fps), 3)
    cuts = _cuts(np.array(changes), np.array(colours))
    row.cuts = len(cuts)
    row.cut_times = ";".join(f"{times[k + 1]:.3f}" for k in cuts)
    within_scenes = np.delete(np.array(motions), cuts)
    row.motion = round(float(within_scenes.mean()), 3) if within_scenes.size else 0.0
    if row.cuts:
        row.flag("cuts", drop=False)
    if row.motion < STATIC:
        row.flag("static", drop=True)
    chosen = [round((row.frames - 1) * share) for share in FINGERPRINT_AT]
    return np.concatenate([np.unpackbits(prints[k], count=63) for k in chosen]).astype(bool)


def _histogram(pixels: np.ndarray) -> np.ndarray:
    """Shares [48] of the pixels in 16 bins of each colour; they add up to 1."""
    counts = np.concatenate([np.bincount(pixels[..., c].ravel() >> 4, minlength=16) for c in range(3)])
    return counts / pixels.size


_COSINES = np.cos(np.pi / 32 * np.outer(np.arange(8), np.arange(32) + 0.5)).astype(np.float32)


def _fingerprint(grey: np.ndarray) -> np.ndarray:
    """A perceptual hash, bool [63]: which of the lowest 8 x 8 frequencies but the mean are above their median."""
    half = grey.reshape(32, 2, 32, 2).mean((1, 3))
    frequencies = (_COSINES @ half @ _COSINES.T).ravel()[1:]
    return frequencies > np.median(frequencies)


def _cuts(changes: np.ndarray, colours: np.ndarray) -> list[int]:
    """The k for which a new scene begins with frame k + 1."""
    found = []
    for k in np.flatnonzero((changes > CUT_CHANGE) & (colours > CUT_COLOURS)):
        around = np.concatenate([changes[max(0, k - CUT_NEIGHBOURS):k], changes[k + 1:k + 1 + CUT_NEIGHBOURS]])
        usual = np.median(around) if around.size else 0.0
        if changes[k] > CUT_RATIO * (usual + 1):
            found.append(int(k))
    return found


def _mark_duplicates(scanned: list[tuple[Row, np.ndarray]]) -> None:
    """Of files that look alike keep the one with most pixels, then the first; the others name it."""
    for kind in ("video", "picture"):
        alike = sorted((pair for pair in scanned if pair[0].kind == kind),
                       key=lambda pair: -pair[0].width * pair[0].height)
        if not alike:
            continue
        # +-1, so that a product counts equal bits less different ones.
        prints = np.stack([bits for _, bits in alike]).astype(np.float32) * 2 - 1
        kept = np.zeros(len(alike), dtype=bool)
        for k, (row, _) in enumerate(alike):
            differing = np.where(kept[:k], (1 - prints[:k] @ prints[k] / prints.shape[1]) / 2, 1.0)
            nearest = int(differing.argmin()) if k else 0
            if k and differing[nearest] <= DUPLICATE:
                row.duplicate_of = alike[nearest][0].path
                row.flag("duplicate", drop=True)
            else:
                kept[k] = True
