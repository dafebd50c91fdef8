"""Clips drawn in code and written with PyAV, so that tests need no files."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def frames(count: int, height: int = 64, width: int = 64, seed: int = 0) -> list[np.ndarray]:
    """uint8 [H, W, 3]: a bright disc drifting over a smooth gradient."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    background = np.stack([x * 160 / width, y * 160 / height, np.full_like(x, 60)], -1)
    centre, motion = rng.uniform(16, 48, 2), rng.uniform(-1.5, 1.5, 2)
    drawn = []
    for k in range(count):
        cy, cx = centre + k * motion
        disc = np.clip(8 - np.hypot(y - cy, x - cx), 0, 1)[..., None]
        drawn.append((background * (1 - disc) + 255 * disc).astype(np.uint8))
    return drawn


def write_video(path: Path, count: int, height: int = 64, width: int = 64, fps: Fraction = Fraction(25),
                sound: bool = False, seed: int = 0, times: list[Fraction] | None = None) -> Path:
    """A near-lossless H.264 file, with a tone beside it if asked."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps)
        video.height, video.width = height, width
        video.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        video.options = {"crf": "4"}
        if times:
            video.codec_context.time_base = Fraction(1, 90000)
        audio = container.add_stream("aac", rate=44100, layout="mono") if sound else None
        for k, pixels in enumerate(frames(count, height, width, seed)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times:
                frame.time_base, frame.pts = Fraction(1, 90000), round(times[k] * 90000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio:
            for start in range(0, int(44100 * count / fps), 1024):
                tone = np.sin((start + np.arange(1024)) * 0.06).astype(np.float32)[None] * 0.3
                frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 44100, start
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


def small_image_vae(seed: int = 0, latent_channels: int = 4):
    """A random image VAE of a few thousand weights."""
    import torch

    from cvvae import Config, ImageVAE

    torch.manual_seed(seed)
    return ImageVAE(Config("image", latent_channels, (8, 8, 8, 8), 1, norm_groups=4))
