"""What there is to train on: files, folders, CSV manifests and tar shards, as one list of :class:`Media`."""

import csv
import io
import math
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ..video import Frame, Source, VideoInfo, count_packets, probe, read_frames

VIDEOS = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Media:
    """A video or picture: a file, or ``size`` bytes at ``offset`` of the tar shard ``path``, there called ``member``."""

    name: str  # for reports: the stem, or the whole path where two have the same stem
    path: Path
    weight: float = 1.0
    member: str = ""
    offset: int = 0
    size: int = 0

    def __str__(self) -> str:
        return str(self.path / self.member) if self.member else str(self.path)

    @property
    def stem(self) -> str:
        """The file name without folder and suffix."""
        return PurePosixPath(self.member).stem if self.member else self.path.stem

    @property
    def is_video(self) -> bool:
        """By the suffix; everything else is a picture."""
        return str(self).lower().endswith(VIDEOS)

    @contextmanager
    def open(self) -> Iterator[Source]:
        """What :mod:`cvvae.video` reads: the path, or a file object over the member's bytes."""
        if not self.member:
            yield self.path
            return
        with _Member(self) as file:
            yield file

    def probe(self) -> VideoInfo:
        """As :func:`cvvae.video.probe`; counts the packets where the container does not say how many frames it holds."""
        with self.open() as source:
            info = probe(source)
        if info.frames:
            return info
        with self.open() as source:
            return replace(info, frames=count_packets(source))

    def frames(self, start: float = 0.0, step: int = 1) -> Iterator[Frame]:
        """As :func:`cvvae.video.read_frames`, decoded by one thread: many files are read at a time, and what is
        missing at the end of a file cut short is then an error, not silence."""
        with self.open() as source:
            yield from read_frames(source, start, step, threads=1)


class _Member(io.RawIOBase):
    """The bytes of one member, read where they lie in its shard."""

    def __init__(self, media: Media):
        self.name = str(media)
        self._shard = open(media.path, "rb")
        self._offset, self._size, self._at = media.offset, media.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        self._shard.seek(self._offset + self._at)
        count = self._shard.readinto(memoryview(buffer)[:count])
        self._at += count
        return count

    def close(self) -> None:
        self._shard.close()
        super().close()


def find_media(sources: list[str]) -> list[Media]:
    """All videos and pictures of ``sources``, in order.  Raises FileNotFoundError or ValueError naming the source."""
    found = [media for source in sources for media in _expand(Path(source))]
    stems = Counter(media.name for media in found)
    return [media if stems[media.name] == 1 else replace(media, name=str(media)) for media in found]


def media_paths(folder: Path) -> list[Path]:
    """Videos, pictures and tar shards in ``folder`` and below, sorted; hidden files and folders are left out."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in (*VIDEOS, *PICTURES, ".tar")
                  and not _hidden(path.relative_to(folder).parts) and path.is_file())


def _hidden(parts: tuple[str, ...]) -> bool:
    return any(part.startswith(".") for part in parts)


def _expand(source: Path) -> Iterator[Media]:
    if source.is_dir():
        for path in media_paths(source):
            yield from _expand(path)
    elif not source.is_file():
        raise FileNotFoundError(f"No such file or folder: {source}.")
    elif source.suffix.lower() == ".csv":
        yield from _manifest(source)
    elif source.suffix.lower() == ".tar":
        yield from _shard(source)
    elif source.suffix.lower() in VIDEOS + PICTURES:
        yield Media(source.stem, source)
    else:
        raise ValueError(f"{source} is neither a video nor a picture; expected one of "
                         f"{', '.join(VIDEOS + PICTURES)}, a .csv manifest or a .tar shard.")


def _manifest(path: Path) -> Iterator[Media]:
    """The rows of a CSV: ``path``, relative to the CSV's folder, and ``weight`` if there is such a column."""
    with open(path, newline="", encoding="utf-8-sig") as file:  # -sig: spreadsheets write a byte-order mark
        rows = csv.DictReader(file)
        if "path" not in (rows.fieldnames or ()):
            raise ValueError(f"{path}: expected a column 'path' in the first row, found {rows.fieldnames or 'nothing'}.")
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            media = path.parent / (row["path"] or "")
            if not media.is_file():
                raise ValueError(f"{where}: no such file: {row['path']!r} (paths count from the folder of the manifest).")
            if media.suffix.lower() not in VIDEOS + PICTURES:
                raise ValueError(f"{where}: {row['path']} is neither a video nor a picture; expected one of "
                                 f"{', '.join(VIDEOS + PICTURES)}.")
            yield Media(media.stem, media, _weight(row.get("weight") or "1", where))


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 <= weight < math.inf:
        raise ValueError(f"{where}: weight is {text!r}; expected a number, 0 (never drawn) or more.")
    return weight


def _shard(path: Path) -> Iterator[Media]:
    """The videos and pictures of a tar; other members (labels, captions) are passed over."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                inside = PurePosixPath(member.name)
                if member.isfile() and inside.suffix.lower() in VIDEOS + PICTURES and not _hidden(inside.parts):
                    yield Media(inside.stem, path, 1.0, member.name, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a whole uncompressed tar file: {error}.") from None
