"""Fits the quick preview of a model's latents to the example media, and says how well it shows what it was not fitted to.

    python benchmarks/preview.py                                  # writes that of the built-in model again
    python benchmarks/preview.py --model my.safetensors --out my_preview.json --held-out A.mp4 B.mp4
"""

import argparse
import hashlib
from itertools import islice
from pathlib import Path

import cvvae
from cvvae.checkpoint import BUILT_IN
from cvvae.latents.preview import LinearPreview, Pair, fit_preview, pairs_of, save_preview
from cvvae.video import read_frames, to_clip

MEDIA = Path(__file__).parents[1] / "workflows" / "media"
FRAMES = 9  # of each: more of them show the same colours again


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUILT_IN / "tiny.safetensors", help="a CV-VAE file")
    parser.add_argument("--out", type=Path, default=BUILT_IN / "tiny_preview.json")
    parser.add_argument("--held-out", nargs="+", type=Path, default=[], metavar="FILE", help="more clips to score it on")
    options = parser.parse_args(arguments)
    vae = cvvae.load(options.model)
    preview, others = fit(vae, options.model), [pairs_of_file(vae, path)[0] for path in options.held_out]
    save_preview(preview, options.out)
    print(f"{options.out}: {line(preview.about['fit'])}")
    print(f"  each file by the map of the others: {line(preview.about['left_out'])}")
    for path, pair in zip(options.held_out, others, strict=True):
        print(f"  {path.name:30} {line(preview.score([pair]))}")
    if others:
        print(f"  {'all of these':30} {line(preview.score(others))}")


def fit(vae: cvvae.VideoVAE, model: Path) -> LinearPreview:
    """The map of ``vae``, which is the file ``model``."""
    files = sorted(path for path in MEDIA.iterdir() if path.suffix != ".md")
    pairs = {path.name: pairs_of_file(vae, path) for path in files}
    preview = fit_preview(sum(pairs.values(), []))
    scores = [left_out(pairs, name) for name in pairs]
    preview.about.update(
        model=model.name, sha256=hashlib.sha256(model.read_bytes()).hexdigest(),
        fitted_to=f"the first {FRAMES} frames of these files of workflows/media, as they are, darker and lighter",
        files=list(pairs), fit=rounded(preview.score([found[0] for found in pairs.values()])),
        left_out=rounded({name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}),
        scores="psnr in dB and r2 at the size of latents, of the files as they are; baseline: psnr of their mean colour; "
               "left_out: mean over the files, each shown by the map of the others")
    return preview


def pairs_of_file(vae: cvvae.VideoVAE, path: Path) -> list[Pair]:
    clip = to_clip([frame.pixels for frame in islice(read_frames(path), FRAMES)])
    return pairs_of(lambda variant: vae.encode(variant).mode(), [clip])


def left_out(pairs: dict[str, list[Pair]], name: str) -> dict[str, float]:
    others = fit_preview([pair for other, found in pairs.items() if other != name for pair in found])
    return others.score([pairs[name][0]])


def rounded(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in scores.items()}


def line(scores: dict[str, float]) -> str:
    return f"{scores['psnr']:.2f} dB, R2 {scores['r2']:.3f}; mean colour {scores['baseline']:.2f} dB"


if __name__ == "__main__":
    main()
