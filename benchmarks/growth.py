"""How time and peak memory grow with frames, picture side and batch: one process for each point, a plot for the curves.

    python benchmarks/growth.py --reference ../CV-VAE
"""

import statistics
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import fresh
from cases import Case, Size, add_model_options, contenders, make_parser, parse_count, parse_frames, parse_side, parse_size
from machine import Row, megabytes, publish, seconds_text

AXES = {"frames": "frames", "side": "side of the picture, pixels", "batch": "clips in a batch"}
LINES = {"encode": "--", "decode": "-"}
MARKERS = {"ours": "o", "compiled": "D", "plain": "s", "reference": "^"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--base", type=parse_size, default=Size(5, 128, 128), metavar="TxHxW",
                        help="the clip that each axis starts from")
    parser.add_argument("--frames", nargs="*", type=parse_frames, default=[1, 5, 9, 17, 33, 65], metavar="N",
                        help="lengths, 1 + 4n each")
    parser.add_argument("--sides", nargs="*", type=parse_side, default=[64, 128, 256, 384, 512, 768], metavar="PIXELS",
                        help="sides of square pictures, multiples of 8")
    parser.add_argument("--batches", nargs="*", type=parse_count, default=[1, 2, 4, 8], metavar="N", help="clips in a batch")
    parser.add_argument("--rounds", type=parse_count, default=2, help="calls at each point: median time, largest peak")
    add_model_options(parser)
    parser.set_defaults(variants=["v1"])
    options = parser.parse_args(arguments)
    pyplot = load_pyplot()
    rows, measurements, known = [], [], {}
    for axis, value, case in points(options):
        for name in contenders(options):
            if (name, case) not in known:  # the base lies on every axis
                known[name, case] = fresh.call(fresh.measure, name, case, options, rounds=options.rounds)
            measurements.append({"axis": axis, "value": value, "contender": name, **case.describe(), **known[name, case]})
            rows.append(row(measurements[-1], case))
            print(*rows[-1].values(), sep="  ")
    publish("growth", "How time and peak memory grow", options, rows, measurements)
    for variant in options.variants:
        path = options.out / f"growth_{variant}.png"
        plot(pyplot, [found for found in measurements if found["variant"] == variant and "seconds" in found], path)
        print(f"Written: {path}")


def points(options: Namespace) -> Iterator[tuple[str, int, Case]]:
    """(axis, value on it, case) of every point of every curve."""
    for variant in options.variants:
        for operation in options.operations:
            base = Case(operation, variant, *options.base)
            for frames in options.frames:
                yield "frames", frames, replace(base, frames=frames)
            for side in options.sides:
                yield "side", side, replace(base, height=side, width=side)
            for batch in options.batches:
                yield "batch", batch, replace(base, batch=batch)


def row(measurement: dict, case: Case) -> Row:
    cells = {"model": case.variant, "operation": case.operation, "clip": case.size, "by": measurement["contender"]}
    if "seconds" not in measurement:
        return cells | {"time": "ended by the system"}
    return cells | {"time": seconds_text(measurement["seconds"]), "peak": megabytes(measurement["peak_bytes"])}


def plot(pyplot, measurements: list[dict], path: Path) -> None:
    """For each axis a panel of seconds and one of peak memory; a line for each operation and contender."""
    axes = [axis for axis in AXES if any(found["axis"] == axis for found in measurements)]
    figure, panels = pyplot.subplots(len(axes), 2, figsize=(11, 3.8 * len(axes)), squeeze=False, layout="constrained")
    for (seconds, memory), axis in zip(panels, axes, strict=True):
        curves: dict[tuple[str, str], list[dict]] = {}
        for found in measurements:
            if found["axis"] == axis:
                curves.setdefault((found["operation"], found["contender"]), []).append(found)
        for (operation, name), curve in curves.items():
            values = [found["value"] for found in curve]
            # A colour for each model, a kind of line for each operation.
            style = {"linestyle": LINES[operation], "marker": MARKERS[name], "color": f"C{list(MARKERS).index(name)}",
                     "label": f"{operation}, {name}"}
            seconds.plot(values, [statistics.median(found["seconds"]) for found in curve], **style)
            memory.plot(values, [found["peak_bytes"] / 1e9 for found in curve], **style)
        for panel, quantity in ((seconds, "seconds"), (memory, "peak memory, GB")):
            panel.set(xlabel=AXES[axis], xticks=values, ylabel=quantity, ylim=(0, None))
            panel.grid(alpha=0.3)
            panel.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def load_pyplot():
    """matplotlib's plotting, which only this benchmark needs.  Exits with a message where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("The plot needs matplotlib, which is not installed: pip install matplotlib") from None
    matplotlib.use("agg")  # draws without a screen
    from matplotlib import pyplot

    return pyplot


if __name__ == "__main__":
    main()
