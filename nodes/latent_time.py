"""Nodes that cut, turn, repeat, stretch, join and insert clips of latents, and know what each latent stands for."""

from comfy_api.v0_0_2 import io
from torch import Tensor

from ..cvvae.frames import TIME_FACTOR, first_frame, frames_of, latent_of, latents_of
from ..cvvae.latents import (
    LatentError,
    insert,
    join,
    one_frame_latent,
    reencode,
    replace,
    resample,
    reverse,
    seamless,
    there_and_back,
    trim,
)
from ..cvvae.latents.time import CONTEXT
from .interpolate import curve_input, easing_input
from .latent_dict import (
    BOTH_LAYOUTS,
    LATENT_CATEGORY,
    LERP,
    Latents,
    Operation,
    answer,
    changed,
    coders,
    natural_frames,
    one_mode,
    outputs,
    read,
    read_all,
    vae_input,
)

FORWARD, BACKWARD, THERE_AND_BACK, SEAMLESS = "forward", "backward", "there and back (loop)", "end fades into start (loop)"
INSERT, REPLACE = "insert", "replace"


class CVVAETrimLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAETrimLatents",
            display_name="CV-VAE Trim, Reverse, Loop Latents",
            category=LATENT_CATEGORY,
            description="Takes a part of a clip, plays it forward, backward or as a loop, and repeats it. A latent holds "
                        f"four frames, the first holds one: cuts fall between latents. {BOTH_LAYOUTS}",
            search_aliases=["cvvae", "cut latents", "reverse latents", "ping-pong", "boomerang", "seamless loop",
                            "repeat latents"],
            inputs=[
                io.Latent.Input("samples", tooltip="A clip, or independent images."),
                io.Int.Input("start", default=0, min=0, max=65536,
                             tooltip="First frame of the part; rounded up to 0, 4, 8 and so on, where latents begin."),
                io.Int.Input("frames", default=0, min=0, max=65536,
                             tooltip="Length of the part in frames; 0 takes all to the end."),
                io.Combo.Input("play", options=[FORWARD, BACKWARD, THERE_AND_BACK, SEAMLESS], default=FORWARD,
                               tooltip=f"'{SEAMLESS}' loops without a turn, and shortens the clip by 'fade'. Both loops end "
                                       "with the latent they began with; CV-VAE Decode leaves out its last frame, so that "
                                       "none is shown twice."),
                io.Int.Input("fade", default=8, min=4, max=4096, step=4,
                             tooltip=f"Frames over which the end fades into the start, for '{SEAMLESS}' only. Raise it when "
                                     "you see the loop close."),
                io.Int.Input("repeat", default=1, min=1, max=1000,
                             tooltip="How many times to play it. Raise it to show a loop several times in one file."),
                vae_input("Connect it when a cut stutters at its first frames, or to turn around cleanly: backward, each "
                          "latent's four frames still run forward. Frames are then decoded and encoded again where that "
                          "is needed, which costs some sharpness."),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, samples, start: int, frames: int, play: str, fade: int, repeat: int, vae=None) -> io.NodeOutput:
        source = read(samples)
        video = source.mode == "video"
        first, last, kept = part(source, start, frames)
        overlap = -(-fade // TIME_FACTOR) if video else fade

        def played(clips, curve):
            clip = trim(clips[0], first, last + 1)
            if play == BACKWARD:
                clip = reverse(clip)
            elif play == THERE_AND_BACK:
                clip = there_and_back(clip, closed=video)
            elif play == SEAMLESS:
                clip = seamless(clip, overlap, closed=video)
            return clip

        def repeated(clips, curve):
            return join([played(clips, curve)] * repeat, keep_first=not video)

        # Frames of the last latent that are not to be seen: the one that closes a loop, or what only fills the latent.
        loops = play in (THERE_AND_BACK, SEAMLESS) and video and last > first
        padding = 1 if loops else natural_frames(source.mode, last - first + 1) - kept
        clips = None
        if vae is not None and video:
            once = through_frames(source, first, last, kept, play, overlap, *coders(vae))
            clips = join([once] * repeat)
            if loops and play == THERE_AND_BACK:
                padding = frames_of(once.shape[2]) - (2 * kept - 2)
        latent = changed(repeated, [source], LERP if play == SEAMLESS else None, clips, padding=padding)
        begins = first * TIME_FACTOR if video else first
        return answer(cls, latent, f"\nfrom frames {begins} to {begins + kept - 1} of {source.frames}")


def part(source: Latents, start: int, frames: int) -> tuple[int, int, int]:
    """First and last latent of ``frames`` frames from ``start``, and how many frames these are."""
    video = source.mode == "video"
    first = latent_of(start) if video else start
    begins = first * TIME_FACTOR if video else start
    kept = frames or source.frames - begins
    if begins + kept > source.frames or kept < 1:
        raise LatentError(f"start {start} and frames {frames} ask for the frames {begins} to {begins + max(kept, 1) - 1}, "
                          f"but the clip has {source.frames}, numbered 0 to {source.frames - 1}. Lower them.")
    return first, first + (latents_of(kept) if video else kept) - 1, kept


def through_frames(source: Latents, first: int, last: int, kept: int, play: str, overlap: int, decode, encode) -> Tensor:
    """What ``play`` makes of the latents ``first`` to ``last``, with true frames where latents alone go wrong."""
    clip = trim(source.clips, first, last + 1)
    if play == SEAMLESS:
        looped = seamless(clip, overlap)
        looped[:, :, :1] = one_frame_latent(clip, overlap, decode, encode)
        return looped
    if first > 0:
        clip[:, :, :1] = one_frame_latent(source.clips, first, decode, encode)
    if play == FORWARD:
        return clip
    before = min(first, CONTEXT)
    pixels = decode(source.clips[:, :, first - before:last + 1])[:, :, TIME_FACTOR * before:][:, :, :kept]
    if play == BACKWARD:
        return reencode(clip, pixels.flip(2), encode)
    return reencode(clip, there_and_back(pixels), encode, whole(kept))


def whole(frames: int) -> int:
    """Latents that the first of ``frames`` frames fill."""
    return 1 + (frames - 1) // TIME_FACTOR if frames else 0


class CVVAEResampleLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAEResampleLatents",
            display_name="CV-VAE Resample Latents in Time",
            category=LATENT_CATEGORY,
            description="Stretches or shortens a clip to another number of latents, from the same first to the same last "
                        f"one. Its decoder already makes four frames of a latent: this is for another speed. {BOTH_LAYOUTS}",
            search_aliases=["cvvae", "slow motion", "speed up", "time stretch", "retime", "latent frame rate"],
            inputs=[
                io.Latent.Input("samples", tooltip="A clip, or independent images."),
                io.Float.Input("speed", default=1.0, min=0.01, max=100.0, step=0.05,
                               tooltip="2 plays twice as fast in half the frames, 0.5 is slow motion. Where the new number "
                                       "of frames is not 1 + 4n, CV-VAE Decode leaves out the rest."),
                io.Int.Input("frames", default=0, min=0, max=65536,
                             tooltip="New length in frames, instead of 'speed'; 0 leaves it to 'speed'."),
                curve_input("How what lies between two latents is made. 'lerp' suits most clips, whose neighbours are "
                            "alike; 'Catmull-Rom' moves more smoothly in slow motion; slerp is for noise."),
                vae_input("Connect it to resample the frames instead of the latents: cleaner where much moves, because no "
                          "decoder has learned latents of half-speed motion. Costs a round trip and fades "
                          "neighbouring frames."),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, samples, speed: float, frames: int, curve: str, vae=None) -> io.NodeOutput:
        source = read(samples)
        frames = frames or max(1, round(source.frames / speed))
        length = latents_of(frames) if source.mode == "video" else frames
        clips = None
        if vae is not None and source.mode == "video":
            decode, encode = coders(vae)
            clips = reencode(source.clips, resample(source.pixels(decode), frames), encode)
        latent = changed(lambda clips, curve: resample(clips[0], length, curve), [source], curve, clips, frames)
        return answer(cls, latent, f"\nfrom {source.frames} frames in {source.length}")


class CVVAEJoinLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        clip = io.Latent.Input("clip", tooltip="The next clip or picture. All of one size.")
        return io.Schema(
            node_id="CVVAEJoinLatents",
            display_name="CV-VAE Join Latents",
            category=LATENT_CATEGORY,
            description="Joins clips of latents in time, with cuts or cross-fades. Each but the first goes without its "
                        "first latent, which holds one frame and would stand still for four; a clip that begins with the "
                        f"frame the one before ended with goes on without a seam. {BOTH_LAYOUTS}",
            search_aliases=["cvvae", "concatenate latents", "append latents", "crossfade", "dissolve", "stitch clips"],
            inputs=[
                io.Autogrow.Input("clips", template=io.Autogrow.TemplatePrefix(clip, "clip", min=2, max=50),
                                  tooltip="In their order; a free socket appears below the last."),
                io.Int.Input("overlap", default=0, min=0, max=4096, step=4,
                             tooltip="Frames over which neighbours cross-fade; 0 is a cut."),
                curve_input("How a cross-fade mixes latents. 'lerp' for pictures; slerp where the result is sampled again, "
                            "because it keeps the contrast of unlike latents. 'Catmull-Rom' is 'lerp' here."),
                easing_input("a cross-fade"),
                vae_input("Connect it when no frame may be lost at a cut: what follows the first clip is then decoded and "
                          "encoded again, which costs some sharpness. Without effect on cross-fades."),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clips: io.Autogrow.Type, overlap: int, curve: str, easing: str, vae=None) -> io.NodeOutput:
        sources = read_all(clips)
        if not sources:
            raise LatentError("There is no clip. Connect latents to clip0.")
        mode = one_mode(sources)
        video, latents = mode == "video", overlap
        if video:
            latents = -(-overlap // TIME_FACTOR)

        def joined(clips, curve):
            return join(clips, latents, curve, easing, keep_first=not video)

        if vae is not None and video and not overlap:
            decode, encode = coders(vae)
            pixels = join([source.pixels(decode) for source in sources], keep_first=True)
            exact = reencode(sources[0].clips, pixels, encode, whole(sources[0].frames))
            order = by_frames(sources, [(number, range(source.frames)) for number, source in enumerate(sources)])
            latent = changed(order, sources, clips=exact, frames=pixels.shape[2], mode=mode)
        else:
            latent = changed(joined, sources, curve if overlap else None, mode=mode, padding=sources[-1].padding)
        return answer(cls, latent, "\nfrom clips of " + " + ".join(str(source.frames) for source in sources) + " frames")


class CVVAEInsertLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CVVAEInsertLatents",
            display_name="CV-VAE Insert or Replace Latent Frames",
            category=LATENT_CATEGORY,
            description="Puts a clip or a picture into another clip, between its latents or in their place. What is put in "
                        "goes without its first latent, which holds one frame, unless it comes first; a single picture "
                        f"stays, for four frames. {BOTH_LAYOUTS}",
            search_aliases=["cvvae", "replace latent frames", "insert latents", "overwrite frames", "splice latents"],
            inputs=[
                io.Latent.Input("samples", tooltip="The clip that is changed."),
                io.Latent.Input("inserted", tooltip="The clip or picture that is put in; of the same size."),
                io.Int.Input("frame", default=0, min=0, max=65536,
                             tooltip="Where it begins. Without a VAE rounded down to 0, 1, 5, 9 and so on, where "
                                     "latents begin."),
                io.Combo.Input("action", options=[REPLACE, INSERT], default=REPLACE,
                               tooltip=f"'{REPLACE}' keeps the length of the clip, '{INSERT}' makes room."),
                vae_input("Connect it to begin at exactly this frame and keep every frame of what is put in: from there on "
                          "the clip is decoded and encoded again, which costs some sharpness."),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, samples, inserted, frame: int, action: str, vae=None) -> io.NodeOutput:
        source, other = read(samples), read(inserted)
        mode = one_mode([source, other])
        video = mode == "video"
        if frame > source.frames - (action == REPLACE):
            raise LatentError(f"frame is {frame}; the clip has {source.frames}, numbered 0 to {source.frames - 1}.")
        if vae is not None and video:
            latent, begins = exactly(source, other, frame, action, *coders(vae)), frame
        else:
            latent, begins = between_latents(source, other, frame, action, mode)
        return answer(cls, latent, f"\nwhat was put in begins at frame {begins}")


def between_latents(source: Latents, other: Latents, frame: int, action: str, mode: str) -> tuple[dict, int]:
    """``other`` put into ``source`` where the latent of ``frame`` begins, and that place."""
    video = mode == "video"
    at = latent_of(frame) if video else frame
    if action == INSERT and frame == source.frames:
        at = source.length
    operation = insert if action == INSERT else replace

    def put(clips, curve):
        return operation(*clips, at, keep_first=not video)

    return changed(put, [source, other], padding=source.padding, mode=mode), first_frame(at) if video else at


def exactly(source: Latents, other: Latents, frame: int, action: str, decode, encode) -> dict:
    """``other`` put into ``source`` at ``frame``, through frames."""
    new = other.pixels(decode)
    if action == REPLACE:
        old, resumes, frames = decode(source.clips), frame + new.shape[2], source.frames
        if resumes > source.frames:
            raise LatentError(f"{new.shape[2]} frames from frame {frame} on reach behind the end of a clip of "
                              f"{source.frames}. Trim what is put in, or begin earlier.")
        behind = source.length - 1 - latent_of(resumes - 1)
    else:
        old, resumes, behind, frames = source.pixels(decode), frame, 0, source.frames + new.shape[2]
    pixels = join([part for part in (old[:, :, :frame], new, old[:, :, resumes:]) if part.shape[2]], keep_first=True)
    clips = reencode(source.clips, pixels, encode, whole(frame), behind)
    order = by_frames([source, other], [(0, range(frame)), (1, range(new.shape[2])), (0, range(resumes, old.shape[2]))])
    return changed(order, [source, other], clips=clips, frames=frames, mode="video")


def by_frames(sources: list[Latents], pieces: list[tuple[int, range]]) -> Operation:
    """What belongs to latents (masks) put where their frames are: ``pieces`` are frames of the source of that number.

    Each new latent takes after the one that held the last of its frames.
    """
    frames = [(number, frame) for number, piece in pieces for frame in piece]
    starts = [sum(source.length for source in sources[:number]) for number in range(len(sources))]
    order = []
    for latent in range(latents_of(len(frames))):
        number, frame = frames[min(TIME_FACTOR * latent, len(frames) - 1)]
        order.append(starts[number] + latent_of(frame))
    return lambda tensors, curve: join(tensors, keep_first=True)[:, :, order]
