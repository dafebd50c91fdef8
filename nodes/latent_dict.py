"""ComfyUI's LATENT read and written in one place: the samples in either layout, and what travels beside them.

Beside ``samples`` a LATENT may carry ``noise_mask`` (where to denoise), ``batch_index`` (which noise each item of the
batch gets), ``cv_vae`` (what CV-VAE Encode remembered) and keys of others, which are passed on.  A mask goes where its
latents go, and fades where they do.  With frames as batch each latent has an index: it goes along when latents only
change places, and is dropped when they are mixed, because then no noise is theirs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..cvvae.frames import frames_of, latents_of
from ..cvvae.latents import LatentError, to_batch, to_clips
from ..cvvae.latents.interpolation import LERP
from .common import CATEGORY, require_cv_vae
from .host import show_text

LATENT_CATEGORY = f"{CATEGORY}/latent"
BOTH_LAYOUTS = "Takes frames as batch [t, C, h, w] and clips [B, C, t, h, w], and gives back what it took."

Operation = Callable[[list[Tensor], str], Tensor]  # clips [B, C, t, h, w] and a curve to one clip


@dataclass(frozen=True)
class Latents:
    """What a LATENT holds."""

    source: dict
    clips: Tensor  # [B, C, t, h, w]; frames as batch are one clip
    as_batch: bool  # the layout it came in
    mode: str  # "video" or "image"
    frames: int  # that the latents stand for, without padding; in image mode as many as latents

    @property
    def length(self) -> int:
        return self.clips.shape[2]

    def mask(self) -> Tensor | None:
        """[B or 1, C or 1, t or 1, H, W], as the host would spread it over the samples."""
        mask = self.source.get("noise_mask")
        if mask is None:
            return None
        if self.as_batch:
            mask = mask.reshape(1, 1, -1, *mask.shape[-2:])
            if mask.shape[2] not in (1, self.length):  # the host repeats a batch of masks, or takes the first of them
                mask = mask[:, :, torch.arange(self.length) % mask.shape[2]]
            return mask
        if mask.ndim < 5:
            mask = mask.reshape(1, 1, -1, *mask.shape[-2:])
        if mask.shape[2] not in (1, self.length):
            mask = F.interpolate(mask, (self.length, *mask.shape[-2:]), mode="trilinear")
        return mask

    def index(self) -> Tensor | None:
        """The noise of each latent [1, 1, t, 1, 1], where it has one of its own."""
        index = self.source.get("batch_index")
        if index is None or not self.as_batch or len(index) != self.length:
            return None
        return torch.tensor(index, dtype=torch.float64).view(1, 1, -1, 1, 1)

    def pixels(self, decode: Callable[[Tensor], Tensor]) -> Tensor:
        """The frames it stands for [B, 3, T, H, W]."""
        return decode(self.clips)[:, :, :self.frames]

    @property
    def padding(self) -> int:
        """Frames at the end that its latents decode to but that it does not stand for."""
        return natural_frames(self.mode, self.length) - self.frames


def read(latent: dict, mode: str | None = None) -> Latents:
    """``latent`` as clips; raises LatentError where it holds something else.  mode: instead of what it remembers."""
    samples, origin = latent["samples"], latent.get("cv_vae", {})
    if getattr(samples, "is_nested", False):
        raise LatentError("These latents hold sound beside the video; CV-VAE's tools work on video alone. Separate them.")
    if samples.ndim not in (4, 5):
        raise LatentError(f"Expected latents [t, C, h, w] or [B, C, t, h, w], found shape {list(samples.shape)}.")
    clips = to_clips(samples) if samples.ndim == 4 else samples
    mode = mode or origin.get("mode", "video")
    frames, natural = origin.get("frames"), natural_frames(mode, clips.shape[2])
    # Latents may have been cut or joined by other nodes since the number was remembered.
    fits = mode == "video" == origin.get("mode") and frames and latents_of(frames) == clips.shape[2]
    return Latents(latent, clips, samples.ndim == 4, mode, frames if fits else natural)


def read_all(inputs: dict[str, dict], mode: str | None = None) -> list[Latents]:
    """The latents of an input that grows, in the order of its sockets."""
    numbered = sorted((int(name.lstrip("abcdefghijklmnopqrstuvwxyz")), latent) for name, latent in inputs.items()
                      if latent is not None)
    return [read(latent, mode) for _, latent in numbered]


def changed(operation: Operation, sources: Sequence[Latents], curve: str | None = None, clips: Tensor | None = None,
            frames: int | None = None, padding: int = 0, mode: str | None = None) -> dict:
    """A LATENT like the first of ``sources``, with what ``operation`` makes of them all.

    curve: how it mixes latents; None if it only moves them.
    clips: instead of what the operation makes of the samples; masks may then be longer, and lose what is too much.
    frames: that the result stands for; by default as many as its latents, without ``padding`` ones at the end.
    Raises LatentError where the layouts do not meet.
    """
    first = sources[0]
    if clips is None:
        clips = operation([source.clips for source in sources], curve or LERP)
    if first.as_batch and clips.shape[0] > 1:
        raise LatentError(f"The first latents are frames as batch, which is one clip, and others hold {clips.shape[0]} "
                          "clips. Turn the first into a clip with CV-VAE Latent Layout.")
    length, mode = clips.shape[2], mode or first.mode
    latent = {**first.source, "samples": _layout(clips, first.as_batch)}
    if "cv_vae" in latent:  # its sound belongs to frames that are now elsewhere
        latent["cv_vae"] = {key: value for key, value in latent["cv_vae"].items() if key != "sound"}
    if (masks := _masks(sources)) is not None:
        constant = len(masks) == 1 and masks[0].shape[2] == 1
        mask = masks[0] if constant else operation(_all_latents(masks, sources), LERP)[:, :, :length]
        latent["noise_mask"] = _layout(mask, first.as_batch)
    if first.as_batch:
        latent.pop("batch_index", None)
        if curve is None and (indices := _indices(sources)):
            latent["batch_index"] = operation(indices, LERP).flatten()[:length].long().tolist()
    remember(latent, mode, frames or natural_frames(mode, length) - padding, length)
    return latent


def remember(latent: dict, mode: str, frames: int, length: int) -> None:
    """Write into ``latent`` what CV-VAE Decode is to know, where it would not guess it."""
    if "cv_vae" in latent or mode == "image" or frames != natural_frames(mode, length):
        latent["cv_vae"] = {**latent.get("cv_vae", {}), "mode": mode, "frames": frames}


def natural_frames(mode: str, length: int) -> int:
    return frames_of(length) if mode == "video" else length


def one_mode(sources: Sequence[Latents]) -> str:
    """The mode of all ``sources``; single pictures go with clips."""
    modes = {source.mode for source in sources if source.length > 1} or {source.mode for source in sources}
    if len(modes) > 1:
        raise LatentError("Some of these latents are a video clip and some are independent images, so they have no common "
                          "time. Encode them in one mode, or choose one with CV-VAE Latent Layout.")
    return modes.pop()


def _layout(clips: Tensor, as_batch: bool) -> Tensor:
    return (to_batch(clips) if as_batch else clips).contiguous()


def _masks(sources: Sequence[Latents]) -> list[Tensor] | None:
    """Of all sources, at the size of the first there is; None if there is none.  Without a mask all is denoised."""
    masks = [source.mask() for source in sources]
    like = next((mask for mask in masks if mask is not None), None)
    if like is None:
        return None
    channels, size = like.shape[1], like.shape[-2:]
    found = []
    for mask in masks:
        if mask is None:
            mask = like.new_ones(1, channels, 1, *size)
        if mask.shape[1] != channels:
            mask = mask[:, :1].expand(-1, channels, -1, -1, -1)
        if mask.shape[-2:] != size:
            mask = F.interpolate(mask, (mask.shape[2], *size), mode="trilinear")
        found.append(mask)
    return found


def _indices(sources: Sequence[Latents]) -> list[Tensor]:
    """Of all sources, counted from 0 where there are none, as the host does; [] if no source has any."""
    indices = [source.index() for source in sources]
    if all(index is None for index in indices):
        return []
    return [torch.arange(source.length, dtype=torch.float64).view(1, 1, -1, 1, 1) if index is None else index
            for index, source in zip(indices, sources, strict=True)]


def _all_latents(masks: Sequence[Tensor], sources: Sequence[Latents]) -> list[Tensor]:
    return [mask.expand(-1, -1, source.length, -1, -1) for mask, source in zip(masks, sources, strict=True)]


# -- what the nodes share ----------------------------------------------------------------------------


def coders(vae) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """``decode`` and ``encode`` of a CV-VAE, between latents [B, C, t, h, w] and frames [B, 3, T, H, W] in [0, 1]."""
    vae = require_cv_vae(vae, "Connect one to 'vae', or nothing.")
    return (lambda latents: vae.decode_clip(latents, "video", vae.model.tiling).movedim(-1, 1),
            lambda frames: vae.encode_clip(frames.movedim(1, -1), "video", vae.model.tiling))


def vae_input(tooltip: str) -> io.Input:
    return io.Vae.Input("vae", optional=True, tooltip=f"{tooltip} A CV-VAE from Load CV-VAE; independent images need none.")


def outputs() -> list[io.Output]:
    return [io.Latent.Output(), io.Int.Output(display_name="frames", tooltip="How many frames the latents stand for.")]


def answer(node: type[io.ComfyNode], latent: dict, text: str = "") -> io.NodeOutput:
    """``latent`` and its frames, told on the node in frames and in latents."""
    result = read(latent)
    text = f"{count(result.frames, 'frame')} in {count(result.length, 'latent')}{text}"
    show_text(text, node.hidden.unique_id if node.hidden else None)
    return io.NodeOutput(latent, result.frames)


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
