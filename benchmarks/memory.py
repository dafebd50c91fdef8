"""Peak memory of one encode and one decode beside weights and input, each in a process of its own; what our model
makes of a memory budget; and what the nodes tell ComfyUI that it will take.

    python benchmarks/memory.py --reference ../CV-VAE
    python benchmarks/memory.py --cases 17x512x512 --memory none 4GB 2GB 1GB
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import fresh
import torch
from cases import Case, add_cases_option, add_model_options, cases, contenders, make_parser, parse_budget, parse_count
from machine import Row, megabytes, publish, seconds_text
from reference import config, distance

import cvvae
from cvvae import engine
from cvvae.frames import latent_side, latents_of, pictures_of


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add_cases_option(parser, "1x512x512", "17x256x256")
    parser.add_argument("--memory", nargs="+", type=parse_budget, default=["auto"], dest="budgets", metavar="BUDGET",
                        help='our model\'s Tiling.memory: "none" for no limit, "auto", or a size such as 800MB')
    parser.add_argument("--rounds", type=parse_count, default=1, help="calls of each; the largest peak counts")
    add_model_options(parser)
    options = parser.parse_args(arguments)
    rows, measurements = [], []
    with TemporaryDirectory() as folder:
        for case in cases(options):
            expected = None
            # The reference comes first: the others are compared with it.
            for name in reversed(contenders(options)):
                for budget in [None] if name == "reference" else options.budgets:
                    kept = Path(folder) / "result.pt"
                    found = fresh.call(fresh.measure, name, case, options, budget, options.rounds, kept)
                    measurements.append({"contender": name, "budget": budget, **case.describe(), **found,
                                         "estimated_bytes": estimate(name, case, options, budget)})
                    if found:
                        result = torch.load(kept)
                        measurements[-1]["difference"] = None if expected is None else distance(result, expected)
                        expected = result if expected is None else expected
                    rows.append(row(case.size, measurements[-1]))
                    print(*rows[-1].values(), sep="  ")
    publish("memory", "Peak memory beside weights and input, the result included", options, rows, measurements)


def estimate(name: str, case: Case, options: argparse.Namespace, budget: int | str | None) -> int | None:
    """Bytes that ComfyUI is told, result included; None for the others' models."""
    if name == "reference":
        return None
    size = latents_of(case.frames), latent_side(case.height), latent_side(case.width)
    dtype, encodes = getattr(torch, options.dtype), case.operation == "encode"
    made = 0 if encodes else 3 * case.batch * case.frames * case.height * case.width * dtype.itemsize
    with torch.device("meta"):
        vae = cvvae.VideoVAE(config(case.variant, options.widths))
    folded = partial(engine.folded_bytes, vae.encoder if encodes else vae.decoder, dtype)
    return made + engine.working_memory(vae.config, encodes, size, pictures_of("video", case.batch, size[0]), dtype,
                                        torch.device(options.device), cvvae.Tiling(memory=budget), folded)


def row(size: str, measurement: dict) -> Row:
    budget = measurement["budget"]
    cells = {"model": measurement["variant"], "operation": measurement["operation"], "clip": size,
             "by": measurement["contender"],
             "budget": "" if measurement["contender"] == "reference" else
                       megabytes(budget) if isinstance(budget, int) else budget or "none"}
    if measurement["estimated_bytes"] is not None:
        cells["estimated"] = megabytes(measurement["estimated_bytes"])
    if "seconds" not in measurement:
        return cells | {"peak": "ended by the system"}
    difference = measurement["difference"]
    return cells | {"peak": megabytes(measurement["peak_bytes"]), "of it the result": megabytes(measurement["result_bytes"]),
                    "time": seconds_text(measurement["seconds"]),
                    "difference": "" if difference is None else f"{difference:.1e} sd"}


if __name__ == "__main__":
    main()
