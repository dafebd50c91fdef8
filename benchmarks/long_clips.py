"""Memory and time for each frame of long clips against short ones: as streams, and from video file to video file.

    python benchmarks/long_clips.py --frames 33 2000
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import fresh
import numpy as np
import torch
from cases import add_device_option, make_parser, parse_count, parse_side
from machine import PeakMemory, Row, megabytes, publish, seconds_text

import cvvae
from cvvae.stream import reconstruct
from cvvae.video import VideoWriter, to_clip

PART = 4  # frames that arrive together


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="tiny", help="a CV-VAE that cvvae.load reads")
    parser.add_argument("--frames", nargs="+", type=parse_count, default=[33, 2000], metavar="N",
                        help="lengths of the clips")
    parser.add_argument("--side", type=parse_side, default=256, metavar="PIXELS", help="of the square frames")
    add_device_option(parser)
    options = parser.parse_args(arguments)
    rows, measurements = [], []
    with TemporaryDirectory() as folder:
        for frames in options.frames:
            source = Path(folder) / f"{frames}.mp4"
            write_clip(source, frames, options.side)
            for way, function, what in (("stream", through_streams, options.side), ("file to file", through_files, source)):
                found = fresh.call(function, options.model, options.device, frames, what)
                measurements.append({"way": way, "frames": frames, **found})
                rows.append(row(measurements[-1]))
                print(*rows[-1].values(), sep="  ")
    publish("long_clips", f"Clips of {options.side}x{options.side}, encoded and decoded", options, rows, measurements)


def row(measurement: dict) -> Row:
    cells = {"way": measurement["way"], "frames": measurement["frames"]}
    if "seconds" not in measurement:
        return cells | {"peak": "ended by the system"}
    seconds = measurement["seconds"]
    cells |= {f"peak, {device}": megabytes(size) for device, size in measurement["peak_bytes"].items()}
    return cells | {"time": seconds_text([seconds]), "for each frame": f"{1000 * seconds / measurement['frames']:.0f} ms"}


def through_streams(model: str, device: str, frames: int, side: int) -> dict:
    """Encode and decode a clip drawn as it is asked for; nobody keeps what comes out."""
    vae = cvvae.load(model, device=device)

    def run(count: int) -> None:
        came = sum(part.shape[2] for part in vae.decode_stream(vae.encode_stream(drawn_parts(count, side))))
        if came < count:
            raise SystemExit(f"{came} frames came back of {count}.")

    run(5)  # sets up libraries and threads
    return measure(lambda: run(frames), device)


def through_files(model: str, device: str, frames: int, source: Path) -> dict:
    """Reconstruct the video ``source`` into a file beside it."""
    vae = cvvae.load(model, device=device)
    target = source.with_name("result.mp4")
    first = source.with_name("first.mp4")
    write_clip(first, 5, 64)
    reconstruct(vae, first, target)  # sets up libraries and threads

    def run() -> None:
        report = reconstruct(vae, source, target)
        if report.frames != frames:
            raise SystemExit(f"{report.frames} frames came back of {frames}.")

    return measure(run, device)


def measure(run: Callable[[], None], device: str) -> dict:
    """Seconds, and peaks of the process and, if used, of the GPU."""
    with ExitStack() as stack:
        watched = {name: stack.enter_context(PeakMemory(name)) for name in dict.fromkeys(("cpu", device))}
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_bytes": {name: memory.extra for name, memory in watched.items()}}


def drawn_frame(k: int, side: int) -> np.ndarray:
    """Frame ``k`` of a clip of drifting waves, uint8 [side, side, 3]."""
    y, x = np.mgrid[0:side, 0:side]
    waves = [np.sin((x + 2 * k) / 17), np.sin((y - k) / 23), np.sin((x + y + 3 * k) / 31)]
    return np.stack([127.5 + 100 * wave for wave in waves], axis=-1).astype(np.uint8)


def drawn_parts(frames: int, side: int) -> Iterator[torch.Tensor]:
    """The clip as parts [1, 3, n, side, side]."""
    for start in range(0, frames, PART):
        yield to_clip([drawn_frame(k, side) for k in range(start, min(start + PART, frames))])


def write_clip(path: Path, frames: int, side: int) -> None:
    with VideoWriter(path, Fraction(25)) as writer:
        for k in range(frames):
            writer.write(drawn_frame(k, side))


if __name__ == "__main__":
    main()
