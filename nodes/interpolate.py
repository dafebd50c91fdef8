"""CV-VAE Interpolate Latents: a clip through keyframes."""

import re
from itertools import pairwise

import torch
from comfy_api.v0_0_2 import io

from ..cvvae.frames import TIME_FACTOR, latent_of, latents_of
from ..cvvae.latents import CURVES, EASINGS, LatentError, interpolate, spread
from .common import IMAGES, MODES, VIDEO
from .latent_dict import BOTH_LAYOUTS, LATENT_CATEGORY, Latents, answer, changed, outputs, read_all

AUTO = "auto"


def curve_input(tooltip: str) -> io.Input:
    return io.Combo.Input("curve", options=list(CURVES), default=CURVES[0], tooltip=tooltip)


def easing_input(what: str) -> io.Input:
    return io.Combo.Input("easing", options=list(EASINGS), default="linear",
                          tooltip=f"How {what} passes. 'linear' is even, 'in' begins slowly, 'out' ends slowly, 'in-out' "
                                  "does both, 'cubic' does both more strongly, 'hold' waits and jumps.")


class CVVAEInterpolateLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        keyframe = io.Latent.Input("keyframe", tooltip="A picture, a batch of pictures, or a clip, which plays from its "
                                                       "position on. All of one size.")
        return io.Schema(
            node_id="CVVAEInterpolateLatents",
            display_name="CV-VAE Interpolate Latents",
            category=LATENT_CATEGORY,
            description="Makes a clip of latents that passes through two or many keyframes, each shown exactly and once. "
                        f"Clips that overlap cross-fade. {BOTH_LAYOUTS}",
            search_aliases=["cvvae", "latent keyframes", "latent travel", "morph", "slerp", "blend latents", "tween"],
            inputs=[
                io.Autogrow.Input("keyframes", template=io.Autogrow.TemplatePrefix(keyframe, "keyframe", min=1, max=50),
                                  tooltip="In the order of the clip; a free socket appears below the last."),
                io.Int.Input("frames", default=33, min=1, max=65536,
                             tooltip="Length of the clip in frames; 1 + 4n fill their latents. In a loop multiples of 4."),
                io.String.Input("positions", default="",
                                tooltip="The frame at which each keyframe stands or begins, such as '0, 16, 32'. Empty "
                                        "spreads them evenly. Each needs a latent of its own: frame 0, or one of four."),
                curve_input("'lerp' fades, best for pictures that are decoded as they are. 'slerp per frame' and 'slerp "
                            "per position' keep the contrast of unlike latents, which a fade loses: choose them for noise "
                            "and for latents that are sampled again; 'per position' leaves parts alone that do not change. "
                            "'Catmull-Rom' passes three or more keyframes without a jolt."),
                easing_input("the time between two keyframes"),
                io.Boolean.Input("loop", default=False,
                                 tooltip="Lead back from the last keyframe to the first. One more latent closes the loop, "
                                         "and CV-VAE Decode leaves out its last frame, which is the first again."),
                io.Combo.Input("batch_is", options=[AUTO, *MODES], default=AUTO, advanced=True,
                               tooltip=f"What a batch is. '{VIDEO}': one keyframe that plays. '{IMAGES}': as many "
                                       f"keyframes; choose it for a batch of sampled pictures. '{AUTO}': as CV-VAE Encode "
                                       "made it, else a clip."),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, keyframes: io.Autogrow.Type, frames: int, positions: str, curve: str, easing: str, loop: bool,
                batch_is: str = AUTO) -> io.NodeOutput:
        sources = read_all(keyframes, MODES.get(batch_is))
        if not sources:
            raise LatentError("There is no keyframe. Connect latents to keyframe0.")
        keys = [key for source in sources for key in pictures_of(source)]
        period = -(-frames // TIME_FACTOR) if loop else None
        length = period + 1 if loop else latents_of(frames)
        lengths = [key.shape[2] for key in keys]
        if positions.strip():
            starts = [latent_of(frame) for frame in whole_numbers(positions)]
        else:
            starts = spread(lengths, period or length, loop)

        def clip_of(tensors, curve):
            parts = [part for source, tensor in zip(sources, tensors, strict=True) for part in pictures_of(source, tensor)]
            return interpolate(parts, starts, length, curve, easing, period)

        latent = changed(clip_of, sources, curve, frames=TIME_FACTOR * period if loop else frames, mode="video")
        places = ", ".join(str(TIME_FACTOR * start) for start in starts)
        return answer(cls, latent, f"\nkeyframes at {places}{likeness(keys)}")


def pictures_of(source: Latents, tensor: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The keyframes in ``source``, or in what belongs to its latents: each of independent images, or the clip."""
    tensor = source.clips if tensor is None else tensor
    return list(tensor.split(1, dim=2)) if source.mode == "image" else [tensor]


def whole_numbers(text: str) -> list[int]:
    words = re.split(r"[\s,;]+", text.strip(" \t\n,;"))
    if not all(re.fullmatch(r"\d+", word) for word in words):
        raise LatentError(f"positions is {text!r}; expected the numbers of frames from 0 on, such as '0, 16, 32'.")
    return [int(word) for word in words]


def likeness(keys: list[torch.Tensor]) -> str:
    """How much alike neighbours are: where little, lerp loses contrast."""
    if len(keys) < 2:
        return ""
    cosines = []
    for a, b in pairwise(keys):
        ends = [x.float() - x.float().mean((3, 4), keepdim=True) for x in (a[:1, :, -1:], b[:1, :, :1])]
        cosines.append(torch.cosine_similarity(*(end.flatten() for end in ends), dim=0).item())
    return "\nneighbours alike: " + ", ".join(f"{cosine:.2f}" for cosine in cosines)
