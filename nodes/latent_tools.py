"""Nodes for what latents are rather than when: layout, statistics, and empty ones."""

import comfy.model_management
import torch
from comfy_api.v0_0_2 import io, ui

from ..cvvae.frames import SPACE_FACTOR, latent_side, latents_of
from ..cvvae.latents import LatentError, expected_distribution, normalize, plot, statistics, to_batch, to_clips
from ..cvvae.latents.statistics import EXPECTED, Statistics
from .common import as_image
from .encode import CLIP, FRAMES_AS_BATCH
from .latent_dict import BOTH_LAYOUTS, LATENT_CATEGORY, answer, count, outputs, read, remember

INDEPENDENT = "independent images"
WHOLE_CLIP, EACH_LATENT = "whole clip", "each latent"
CHANNELS = {f"{channels} ({expected.family})": channels for channels, expected in EXPECTED.items()}


class CVVAELatentLayout(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAELatentLayout",
            display_name="CV-VAE Latent Layout",
            category=LATENT_CATEGORY,
            description="Turns latents from frames as batch into clips with a time axis, into independent images, and back. "
                        "Masks and what CV-VAE Encode remembered go along; batch indices, which count something else then, "
                        "do not.",
            search_aliases=["cvvae", "latent to batch", "latent to video", "4d 5d latent", "reshape latent", "split clips"],
            inputs=[
                io.Latent.Input("samples", tooltip="Latents in any of these layouts; which one is seen by their shape."),
                io.Combo.Input("layout", options=[FRAMES_AS_BATCH, CLIP, INDEPENDENT], default=FRAMES_AS_BATCH,
                               tooltip="Frames as batch for the samplers of SD 1.5, AnimateDiff and SVD; a clip for nodes "
                                       "that want time as an axis of its own; independent images to have each latent "
                                       "decoded to a picture of its own."),
                io.Int.Input("clips", default=1, min=1, max=4096,
                             tooltip="How many clips of one length a batch holds, one after the other, when it "
                                     "becomes clips."),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, samples, layout: str, clips: int) -> io.NodeOutput:
        source = read(samples, "image" if layout == INDEPENDENT else "video")
        held = source.clips.shape[0]
        if layout == FRAMES_AS_BATCH and held > 1:
            raise LatentError(f"These latents hold {held} clips, and frames as batch are one clip. Take one with Latent "
                              f"From Batch first, or choose '{INDEPENDENT}'.")
        latent, mask = dict(samples), source.mask()
        if layout != CLIP:
            latent["samples"] = to_batch(source.clips).contiguous()
            if mask is not None and held > 1:  # each clip's goes to its own latents
                mask = mask.expand(held, -1, source.length, -1, -1)
            mask = None if mask is None else to_batch(mask[:, :1]).contiguous()
        elif source.as_batch:
            latent["samples"] = to_clips(samples["samples"], clips).contiguous()
            if mask is not None and mask.shape[2] > 1:
                mask = to_clips(to_batch(mask), clips).contiguous()
        if mask is not None:
            latent["noise_mask"] = mask
        if latent["samples"].shape != samples["samples"].shape:
            latent.pop("batch_index", None)
        found = read({**latent, "cv_vae": {}}, source.mode)
        remember(latent, source.mode, source.frames if found.length == source.length and held == 1 else found.frames,
                 found.length)
        clips = latent["samples"].shape[0] if layout == CLIP else 1
        return answer(cls, latent, f"\n{count(clips, 'clip')}" if layout == CLIP else f"\n{layout}")


class CVVAELatentStatistics(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAELatentStatistics",
            display_name="CV-VAE Latent Statistics",
            category=LATENT_CATEGORY,
            description="Mean, deviation, least and largest value of each channel, values that are NaN or infinite, and how "
                        "far all that is from what models expect, as a table and a plot: when a result is black, grey or "
                        "burnt. Takes frames as batch [t, C, h, w] and clips [B, C, t, h, w].",
            search_aliases=["cvvae", "latent stats", "nan check", "latent histogram", "debug latent", "inspect latent"],
            is_output_node=True,
            inputs=[io.Latent.Input("samples", tooltip="Latents of any channel count. The expected distribution is known "
                                                       "for 4 channels (SD 1.x, SD 2.x, SVD) and 16 (SD 3).")],
            outputs=[io.String.Output(display_name="report"), io.Image.Output(display_name="plot")],
        )

    @classmethod
    def execute(cls, samples) -> io.NodeOutput:
        source = read(samples)
        found, channels = statistics(source.clips), source.clips.shape[1]
        expected = expected_distribution(channels) if channels in EXPECTED else None
        clips, _, length, height, width = source.clips.shape
        title = (f"{count(source.frames, 'frame')} in {count(length, 'latent')} of {width} x {height}, "
                 f"{count(clips, 'clip')}, {str(source.clips.dtype).removeprefix('torch.')}")
        picture = as_image(plot(found, expected, title))
        return io.NodeOutput(table(found, expected, title), picture, ui=ui.PreviewImage(picture, cls=cls))


def table(found: Statistics, expected, title: str) -> str:
    """As text in Markdown."""
    columns = {name: getattr(found, name).tolist() for name in ("mean", "std", "min", "max")}
    if expected:
        columns["distance"] = found.distance(expected).tolist()
    lines = [title, "", f"| channel | {' | '.join(columns)} | not finite |", "|" + " ---: |" * (len(columns) + 2)]
    for channel, values in enumerate(zip(*columns.values(), strict=True)):
        numbers = " | ".join(f"{value:.4g}" for value in values)
        lines.append(f"| {channel} | {numbers} | {int(found.bad[channel])} |")
    if expected:
        lines += ["", f"Distance in nats from N({expected.mean:.4g}, {expected.std:.4g}^2), which {expected.family} expect "
                  "of every channel; 0 where equal."]
    return "\n".join(lines + [f"\n{remark}" for remark in found.remarks(expected)])


class CVVAENormalizeLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAENormalizeLatents",
            display_name="CV-VAE Match Latent Statistics",
            category=LATENT_CATEGORY,
            description="Gives latents the mean and deviation of a reference in every channel (AdaIN): the colours and the "
                        f"contrast of another clip, or no flicker. {BOTH_LAYOUTS}",
            search_aliases=["cvvae", "adain", "normalize latent", "match colors", "deflicker", "color transfer"],
            inputs=[
                io.Latent.Input("samples", tooltip="The latents that are changed."),
                io.Latent.Input("reference", optional=True,
                                tooltip="Latents of any length and size. Without it, what models expect of latents: only "
                                        "for latents that went wrong, because pictures are not alike."),
                io.Combo.Input("over", options=[WHOLE_CLIP, EACH_LATENT], default=WHOLE_CLIP,
                               tooltip=f"'{WHOLE_CLIP}' keeps fades as they are. '{EACH_LATENT}' takes flicker and fades "
                                       "out with a reference of one latent, and copies those of a reference as long "
                                       "as the clip."),
                io.Float.Input("strength", default=1.0, min=0.0, max=1.0, step=0.05,
                               tooltip="0 changes nothing, 1 goes all the way. Lower it when the result looks forced."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, samples, over: str, strength: float, reference=None) -> io.NodeOutput:
        source = read(samples)
        target = expected_distribution(source.clips.shape[1]) if reference is None else read(reference).clips
        clips = normalize(source.clips, target, over == EACH_LATENT, strength)
        return io.NodeOutput({**samples, "samples": to_batch(clips).contiguous() if source.as_batch else clips})


class CVVAEEmptyLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAEEmptyLatents",
            display_name="CV-VAE Empty Latents",
            category=LATENT_CATEGORY,
            description="Empty latents for a clip of so many frames, to sample from. SVD and AnimateDiff count latents: the "
                        "node shows both.",
            search_aliases=["cvvae", "empty latent video", "new latent", "blank latent"],
            inputs=[
                io.Int.Input("width", default=512, min=8, max=16384, step=8,
                             tooltip="Width of the frames in pixels. Set it to what the model that samples was made for."),
                io.Int.Input("height", default=512, min=8, max=16384, step=8,
                             tooltip="Height of the frames in pixels. Set it to what the model that samples was made for."),
                io.Int.Input("frames", default=61, min=1, max=65536,
                             tooltip="Length in frames. 1 + 4n fill their latents; of other lengths CV-VAE Decode leaves "
                                     "out the rest. 61 are the 16 latents that AnimateDiff was made for, 53 and 97 the 14 "
                                     "and 25 of SVD."),
                io.Combo.Input("channels", options=list(CHANNELS), default=next(iter(CHANNELS)),
                               tooltip="Channels of the latents: those of the model that samples. Change it for SD 3 and "
                                       "SD 3.5."),
                io.Combo.Input("layout", options=[FRAMES_AS_BATCH, CLIP], default=FRAMES_AS_BATCH,
                               tooltip="Keep frames as batch for SD 1.5, AnimateDiff and SVD: their samplers take no other "
                                       "form. Change it for nodes that want time as an axis of its own."),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, width: int, height: int, frames: int, channels: str, layout: str) -> io.NodeOutput:
        batch = torch.zeros(latents_of(frames), CHANNELS[channels], latent_side(height), latent_side(width),
                            device=comfy.model_management.intermediate_device())
        latent = {"samples": to_clips(batch) if layout == CLIP else batch}
        if layout == FRAMES_AS_BATCH:
            latent["downscale_ratio_spacial"] = SPACE_FACTOR  # for models of another factor, as the host's own node
        latent["cv_vae"] = {"mode": "video", "frames": frames, "height": height, "width": width}
        return answer(cls, latent)
