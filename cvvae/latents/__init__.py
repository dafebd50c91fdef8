"""Tools for latents that know time: pure functions of tensors [B, C, t, h, w].

Any channel count, batch and floating-point type; computed in float32, given back in the type that came in, and
never written into.  Lengths and places are counted in latents; :mod:`cvvae.frames` turns frames into them.
"""

from .interpolation import CURVES, EASINGS, crossfade, interpolate, resample, spread
from .layout import LatentError, to_batch, to_clips
from .preview import LinearPreview, fit_preview, load_preview, save_preview
from .statistics import Distribution, Statistics, expected_distribution, normalize, plot, statistics
from .time import insert, join, one_frame_latent, reencode, replace, reverse, seamless, there_and_back, trim

__all__ = ["CURVES", "EASINGS", "Distribution", "LatentError", "LinearPreview", "Statistics", "crossfade",
           "expected_distribution", "fit_preview", "insert", "interpolate", "join", "load_preview", "normalize",
           "one_frame_latent", "plot", "reencode", "replace", "resample", "reverse", "save_preview", "seamless", "spread",
           "statistics", "there_and_back", "to_batch", "to_clips", "trim"]
