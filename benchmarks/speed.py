"""Time of one encode and one decode: ours, also compiled or run plainly, and the official code, in turn on the same weights.

    python benchmarks/speed.py --reference ../CV-VAE
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from functools import partial
from time import perf_counter

import torch
from cases import Case, add_cases_option, add_model_options, build, cases, contenders, make_parser, parse_count
from machine import Row, interleave, matrix_rate, publish, seconds_text, synchronize
from reference import Contender, distance
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import cvvae

# In float32 another order of sums makes about 1e-5; TF32 convolutions on a GPU, a hundred times that.
LARGEST_DIFFERENCE = 0.02


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add_cases_option(parser, "1x512x512", "17x256x256")
    parser.add_argument("--rounds", type=parse_count, default=5, help="timed calls of each, after one that is not timed")
    add_model_options(parser)
    options = parser.parse_args(arguments)
    measurements = []
    for variant in options.variants:
        models = {name: build(name, variant, options) for name in contenders(options)}
        for case in cases(options):
            if case.variant == variant:
                measurements.append(measure(case, models, options))
                print(f"{variant} {case.operation} {case.size}: "
                      + ", ".join(f"{name} {seconds_text(taken)}" for name, taken in measurements[-1]["seconds"].items()))
    publish("speed", "Time of one call", options, [row(measurement) for measurement in measurements], measurements)


def measure(case: Case, models: dict[str, Contender], options: argparse.Namespace) -> dict:
    """Seconds of every round of each model, and how far each is from the last one named, in standard deviations."""
    x = case.input(options.device, getattr(torch, options.dtype))
    differences = {}

    def compare(results: dict[str, Tensor]) -> None:
        *others, expected = results
        for name in others:
            differences[name] = distance(results[name], results[expected])
            if options.dtype == "float32" and differences[name] > LARGEST_DIFFERENCE:
                raise SystemExit(f"{case.variant} {case.operation} {case.size}: {name} and {expected} differ by "
                                 f"{differences[name]:.2g} standard deviations; they do not compute the same thing.")

    first = {}

    def run(name: str) -> Tensor:
        started = perf_counter()
        result = case.run(models[name], x)
        synchronize(options.device)
        first.setdefault(name, perf_counter() - started)
        return result

    seconds = interleave({name: partial(run, name) for name in models}, options.rounds, options.device, compare)
    done = {}
    if options.device == "cuda":
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.bmm: _flop_of_products}) as counter:
            case.run(models["ours"], x)
        # Beside the rate at which large matrices are multiplied it says how well the machine is used.
        done = {"flop_done": counter.get_total_flops(), "matrix_rate": matrix_rate(options.device, x.dtype)}
    return {**case.describe(), **done, "seconds": seconds, "first_seconds": first, "differences": differences,
            "flop": case.flop(options.widths, cvvae.Tiling())}


def _flop_of_products(a: torch.Size, b: torch.Size, *_, **__) -> int:
    """Of [N, I, J] by [N, J, K]; torch's own count fails where the result's dtype is told."""
    return 2 * math.prod(a) * b[2]


def row(measurement: dict) -> Row:
    """Medians, what ours gains over each other one, and the speed at which the reference's operations are done."""
    seconds, flop = measurement["seconds"], measurement["flop"]
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    size = Case(**{key: measurement[key] for key in Case.__dataclass_fields__}).size
    cells = {"model": measurement["variant"], "operation": measurement["operation"], "clip": size,
             "TFLOP": f"{flop / 1e12:.3g}"}
    cells |= {name: seconds_text(taken) for name, taken in seconds.items()}
    cells |= {f"{name} / ours": f"{median / medians['ours']:.2f}" for name, median in medians.items() if name != "ours"}
    if "compiled" in seconds:
        cells["compiled, first call"] = seconds_text([measurement["first_seconds"]["compiled"]])
    cells |= {f"{name}, GFLOP/s": f"{flop / median / 1e9:.0f}" for name, median in medians.items()}
    if "flop_done" in measurement:
        done, rate = measurement["flop_done"], measurement["flop_done"] / medians["ours"]
        cells |= {"ours, TFLOP done": f"{done / 1e12:.3g}", "ours, TFLOP/s done": f"{rate / 1e12:.0f}",
                  "of the matrix rate": f"{rate / measurement['matrix_rate']:.0%}"}
    cells |= {f"{name}, difference": f"{value:.1e} sd" for name, value in measurement["differences"].items()}
    return cells


if __name__ == "__main__":
    main()
