"""Draws the README's picture: source frames, the image VAE frame by frame, the video VAE, and what the image VAE
makes of the video latents.

    python benchmarks/comparison_picture.py workflows/media/flower.mp4 docs/comparison.png
"""

import argparse
from itertools import islice

import av
import numpy as np
import torch

import cvvae
from cvvae.metrics import psnr
from cvvae.video import read_frames, to_clip, to_frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clip")
    parser.add_argument("picture")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--image-vae", default="tiny")
    parser.add_argument("--first", type=int, default=0, help="first frame shown; five follow, four apart")
    options = parser.parse_args()

    frames = [frame.pixels for frame in islice(read_frames(options.clip), options.first, options.first + 17)]
    clip = to_clip(frames)
    vae, image_vae = cvvae.load(options.model), cvvae.load_image_vae(options.image_vae)
    latents = vae.encode(clip).mode()
    video = vae.decode(latents, frames=17, size=clip.shape[-2:])
    stills = as_frames(clip)
    image = as_clip(image_vae.decode(image_vae.encode(stills).mode()))[..., :clip.shape[-2], :clip.shape[-1]]
    crossed = as_clip(image_vae.decode(as_frames(latents)))[..., :clip.shape[-2], :clip.shape[-1]]
    rows = {"source": clip[:, :, ::4], "image VAE, each frame": image[:, :, ::4], "CV-VAE": video[:, :, ::4],
            "image VAE's decoder on CV-VAE's latents": crossed}
    for name, row in rows.items():
        print(f"{name:42} {psnr(row, clip[:, :, ::4]):6.2f} dB on the frames shown")
    sheet = np.concatenate([np.concatenate(list(to_frames(row)), axis=1) for row in rows.values()])
    write_picture(sheet, options.picture)


def as_frames(clip: torch.Tensor) -> torch.Tensor:
    return clip[0].transpose(0, 1)


def as_clip(frames: torch.Tensor) -> torch.Tensor:
    return frames.transpose(0, 1)[None]


def write_picture(pixels: np.ndarray, path: str) -> None:
    with av.open(path, "w", format="image2", options={"update": "1"}) as file:
        stream = file.add_stream("png")
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], "rgb24"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        file.mux(stream.encode(None))


if __name__ == "__main__":
    main()
