"""ComfyUI's VAE object around a CV-VAE: the only place that knows the host's private parts.

A subclass of ``comfy.sd.VAE``, so every native node takes it.  What it computes, it leaves to the library;
what it adds is the host's side: [0, 1] images with the channels last, device memory, progress, Cancel.
"""

import contextlib
import dataclasses
import gc
import logging
import traceback
from functools import partial

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from .. import cvvae
from ..cvvae import engine, keys
from ..cvvae.engine.memory import SMALLEST_TILE, free
from ..cvvae.frames import SPACE_FACTOR, TIME_FACTOR, frames_of, latent_side, latents_of, pictures_of
from ..cvvae.latents.preview import LinearPreview
from ..cvvae.tiling import WHOLE, Tiling, parse_memory

log = logging.getLogger(__name__)

# bfloat16 before float32, as the host's own VAEs; never float16 unasked: its range is the one that overflows.
WORKING_DTYPES = [torch.bfloat16, torch.float32]
LEAST_MEMORY = 256 * 2 ** 20  # bytes; with less a pass computes strips again more than it is worth


def load_native(source, batch_is: str, dtype: torch.dtype | None = None) -> "NativeVAE":
    """Load a CV-VAE (see ``cvvae.load``) as a native VAE.

    batch_is: "video" if a 4-D batch of latents or images is one clip, "image" if it is independent images.
    dtype: of weights and computation; None leaves the choice to ComfyUI and its --fp16-vae and similar flags.
    """
    # The host's layers, so that it can stream weights from the offload device.
    model = cvvae.load(source, ops=comfy.ops.disable_weight_init)
    model.weights_of = host_weights
    return NativeVAE(model, batch_is, dtype)


def host_weights(module: torch.nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of one of the host's layers for computing with ``like``, as the layer itself gets them."""
    if not (module.comfy_cast_weights or module.weight_function or module.bias_function):
        return module.weight, module.bias
    weight, bias, stream = comfy.ops.cast_bias_weight(module, like, offloadable=True)
    try:
        # The host lends them until the next layer; the engine uses them for a whole walk over a layer.
        return weight.clone(), bias.clone()
    finally:
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)


def set_host_attributes(vae: comfy.sd.VAE) -> None:
    """Give ``vae`` every attribute this ComfyUI's VAE has: the one private contract of this pack.

    The host's constructor sets them before it looks at the weights.  This key names its smallest model (no
    weights at all), which stays out of the way until it is replaced.
    """
    comfy.sd.VAE.__init__(vae, sd={"pixel_space_vae": torch.tensor(1.0)})
    if getattr(vae, "first_stage_model", None) is None:
        raise RuntimeError("This ComfyUI builds its VAE object in a way this version of CV-VAE does not know. "
                           "Update the CV-VAE node pack.")


class Managed(torch.nn.Module):
    """What the host's patcher moves around: it writes attributes, ``device`` among them, on its module."""

    def __init__(self, model: cvvae.VideoVAE):
        super().__init__()
        self.model = model


class NativeVAE(comfy.sd.VAE):
    """A CV-VAE that native nodes can use.

    Images are [T, H, W, 3] and latents [t, C, h, w]: the frames of one clip, or independent images, as
    ``batch_is`` says.  With one more dimension in front they are clips: [B, T, H, W, 3], [B, C, t, h, w].
    """

    def __init__(self, model: cvvae.VideoVAE, batch_is: str, dtype: torch.dtype | None = None):
        set_host_attributes(self)
        management = comfy.model_management
        self.batch_is = batch_is
        self.working_dtypes = WORKING_DTYPES if dtype is None else [dtype]
        self.device = management.vae_device()
        self.vae_dtype = dtype or management.vae_dtype(self.device, self.working_dtypes)
        self.output_device = management.intermediate_device()
        self.first_stage_model = Managed(model).to(self.vae_dtype)
        self.latent_channels = model.config.latent_channels
        self.output_channels = 3
        self.latent_dim = 3
        self.upscale_ratio = (lambda t: max(0, TIME_FACTOR * t - TIME_FACTOR + 1), SPACE_FACTOR, SPACE_FACTOR)
        # One number, not a tuple as in other video VAEs: widespread packs divide by it.
        self.downscale_ratio = SPACE_FACTOR
        self.upscale_index_formula = self.downscale_index_formula = (TIME_FACTOR, SPACE_FACTOR, SPACE_FACTOR)
        del self.memory_used_encode, self.memory_used_decode  # the host's; ours are methods
        self.disable_offload = False
        if hasattr(management, "archive_model_dtypes"):  # since 0.12
            management.archive_model_dtypes(self.first_stage_model)
        patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
        self.patcher = patcher(self.first_stage_model, load_device=self.device,
                               offload_device=management.vae_offload_device())
        self.size = None
        self.model_size()

    @property
    def model(self) -> cvvae.VideoVAE:
        return self.first_stage_model.model

    # -- what native nodes call ----------------------------------------------------------------------
    # Newer hosts pass more arguments than older ones, so unknown ones are taken and ignored.

    def encode(self, pixel_samples: Tensor, *args, not_video: bool | None = None, **kwargs) -> Tensor:
        """Images to latents; height and width are cropped to multiples of 8, as every native VAE does."""
        mode = "image" if not_video else self.batch_is
        return self.encode_clip(self._cropped(pixel_samples), mode, self.model.tiling)

    def encode_tiled(self, pixel_samples: Tensor, tile_x=None, tile_y=None, overlap=None, tile_t=None, *args,
                     not_video: bool | None = None, **kwargs) -> Tensor:
        """Encode in tiles of ``tile_x`` x ``tile_y`` pixels and ``tile_t`` frames."""
        mode = "image" if not_video else self.batch_is
        return self.encode_clip(self._cropped(pixel_samples), mode, self._tiling(tile_x, tile_y, overlap, tile_t))

    def decode(self, samples_in: Tensor, *args, **kwargs) -> Tensor:
        """Latents to images."""
        return self.decode_clip(samples_in, self.mode_of(samples_in), self.model.tiling)

    def decode_tiled(self, samples: Tensor, tile_x=None, tile_y=None, overlap=None, tile_t=None, *args,
                     **kwargs) -> Tensor:
        """Decode in tiles of ``tile_x`` x ``tile_y`` latents and ``tile_t`` latents in time."""
        in_pixels = [None if size is None else size * SPACE_FACTOR for size in (tile_x, tile_y, overlap)]
        tiling = self._tiling(*in_pixels, None if tile_t is None else frames_of(max(1, tile_t)))
        return self.decode_clip(samples, self.mode_of(samples), tiling)

    def get_sd(self) -> dict[str, Tensor]:
        """The weights under their published names, so that a file written by VAESave loads again."""
        return keys.published(self.model.state_dict(), self.model.config.variant)

    # -- what this pack's nodes call -----------------------------------------------------------------

    def mode_of(self, latents: Tensor) -> str:
        """"video" if ``latents`` are to be decoded as clips, "image" if as independent images."""
        return "video" if latents.ndim == 5 else self.batch_is

    def encode_clip(self, pixels: Tensor, mode: str, tiling: Tiling | None) -> Tensor:
        """[T, H, W, 3] in [0, 1] -> the posterior's mode [t, C, h, w]; 5-D clips stay 5-D.  Nothing is cropped."""
        if pixels.ndim not in (4, 5) or pixels.shape[-1] < 3:
            raise ValueError(f"Expected images [frames, height, width, 3], found shape {list(pixels.shape)}.")
        # Channels first, as a view; scaled to [-1, 1] by the host's rule.
        clip = self.process_input(pixels[..., :3].movedim(-1, -4))
        if pixels.ndim == 4:
            clip = clip[None]
        try:
            posterior = self._run(
                lambda tiling, **callbacks: self.model.encode(clip, mode, device=self.device, tiling=tiling, **callbacks),
                lambda tiling: self._bytes_encode(mode, clip.shape, self.vae_dtype, tiling), tiling, clip.shape[-2:])
        finally:
            clip = None  # a copy, which the host would keep with an error: see let_go
        latents = self._returned(posterior.mode())
        # Contiguous: a copy lets go of the log-variance, which shares the mode's memory.
        return (latents if pixels.ndim == 5 else latents[0].movedim(1, 0)).contiguous()

    def decode_clip(self, latents: Tensor, mode: str, tiling: Tiling | None, frames: int | None = None,
                    size: tuple[int, int] | None = None) -> Tensor:
        """[t, C, h, w] or [B, C, t, h, w] -> [T, H, W, 3] or [B, T, H, W, 3] in [0, 1], trimmed to frames and size."""
        clips = latents[None].movedim(1, 2) if latents.ndim == 4 else latents
        if clips.ndim != 5 or clips.shape[1] != self.latent_channels:
            channels = self.latent_channels
            raise ValueError(
                f"These latents have the shape {list(latents.shape)}; this CV-VAE decodes [t, {channels}, h, w] or "
                f"[clips, {channels}, t, h, w]. Latents with another number of channels belong to another family of "
                "models: SD 1.x, SD 2.x and SVD have 4, SD 3 has 16. Load the CV-VAE of that family.")
        clips = clips.to(self.output_device)
        pixels = self._run(
            lambda tiling, **callbacks: self.model.decode(clips, frames, size, mode, device=self.device, tiling=tiling,
                                                          **callbacks),
            lambda tiling: self._bytes_decode(mode, clips.shape, self.vae_dtype, tiling), tiling,
            [side * SPACE_FACTOR for side in clips.shape[-2:]])
        images = self.process_output(self._returned(pixels)).movedim(-4, -1)
        return images if latents.ndim == 5 else images[0]

    # -- how -----------------------------------------------------------------------------------------

    def _cropped(self, pixels: Tensor) -> Tensor:
        """The host's crop, applied to height and width only (it would crop the frames of 5-D images too)."""
        if pixels.ndim < 4 or min(pixels.shape[-3:-1]) < SPACE_FACTOR:
            return pixels  # refused with a clear message by encode_clip and the library
        return self.vae_encode_crop_pixels(pixels.flatten(0, -4)).unflatten(0, pixels.shape[:-3])

    def _returned(self, x: Tensor) -> Tensor:
        dtype = self.vae_output_dtype() if hasattr(self, "vae_output_dtype") else torch.float32  # since 0.18
        return x.to(self.output_device, dtype)

    def _tiling(self, tile_x: int | None, tile_y: int | None, overlap: int | None, frames: int | None) -> Tiling:
        """The nearest plan of ours to what a native tiled node asks for, in pixels and frames.

        Tiles are square.  Windows only get shorter than the model's own: its group norms look at a whole
        window, so a longer one than the weights were made for costs quality, and the native default of 64
        frames is meant as a limit on memory.
        """
        own = self.model.tiling or WHOLE
        sides = [side for side in (tile_x, tile_y) if side is not None]
        tile = max(2 * SPACE_FACTOR, min(sides) // SPACE_FACTOR * SPACE_FACTOR) if sides else own.tile_pixels
        overlap = own.overlap_pixels if overlap is None else overlap // SPACE_FACTOR * SPACE_FACTOR
        if tile is not None:
            overlap = min(overlap, tile // 2 // SPACE_FACTOR * SPACE_FACTOR)
        window = own.window_frames
        if frames is not None:
            shorter = frames_of(max(2, 1 + (frames - 1) // TIME_FACTOR))
            window = shorter if window is None else min(window, shorter)
        shared = min(own.overlap_frames, frames_of(1 + ((window or own.overlap_frames) - 1) // 2 // TIME_FACTOR))
        return dataclasses.replace(own, window_frames=window, tile_pixels=tile, overlap_pixels=overlap,
                                   overlap_frames=shared)

    def _run(self, compute, estimate, tiling: Tiling | None, size):
        """Call ``compute(tiling, progress=, check=)``; out of device memory, again with less, then smaller pieces."""
        management = comfy.model_management
        device_context = getattr(management, "cuda_device_context", contextlib.nullcontext)
        tiling = tiling or WHOLE
        while True:
            management.throw_exception_if_processing_interrupted()
            try:
                with device_context(self.device):
                    management.load_models_gpu([self.patcher], memory_required=estimate(tiling),
                                               force_full_load=self.disable_offload)
                    return compute(tiling, progress=Progress(),
                                   check=management.throw_exception_if_processing_interrupted)
            except FloatingPointError as error:
                let_go(error)
                raise ValueError(f"{error} Choose bf16 or fp32 in the Load CV-VAE node, and start ComfyUI without "
                                 "--fp16-vae.") from None
            except BaseException as error:
                less = less_demanding(tiling, *size, free(self.device)) if is_out_of_memory(error) else None
                if less is None:
                    let_go(error)
                    raise
            # Outside the except block: the exception keeps the tensors of the failed pass alive.
            management.soft_empty_cache()
            log.warning("CV-VAE ran out of device memory with %s; trying again with %s.%s", in_words(tiling), in_words(less),
                        "" if same_pieces(tiling, less) else " Group norms then see less of the picture, so the result "
                        "differs slightly.")
            tiling = less

    # Estimates for the host's memory management.  Hosts and packs call the first two with the shapes that
    # native nodes use; both assume the model's current tiling.

    def memory_used_encode(self, shape, dtype: torch.dtype) -> int:
        """Bytes to encode images [N, 3, H, W] or clips [B, 3, T, H, W]."""
        return self._bytes_encode(self.batch_is if len(shape) == 4 else "video", shape, dtype, self.model.tiling)

    def memory_used_decode(self, shape, dtype: torch.dtype) -> int:
        """Bytes to decode latents [t, C, h, w] or [B, C, t, h, w]."""
        return self._bytes_decode(self.batch_is if len(shape) == 4 else "video", shape, dtype, self.model.tiling)

    def _bytes_encode(self, mode: str, shape, dtype: torch.dtype, tiling: Tiling | None) -> int:
        clips, frames = (1, shape[0]) if len(shape) == 4 else (shape[0], shape[2])
        t = frames if mode == "image" else latents_of(frames)
        size = t, *map(latent_side, shape[-2:])
        return self._bytes(self.model.encoder, size, pictures_of(mode, clips, t), dtype, tiling or WHOLE)

    def _bytes_decode(self, mode: str, shape, dtype: torch.dtype, tiling: Tiling | None) -> int:
        clips, t = (1, shape[0]) if len(shape) == 4 else (shape[0], shape[2])
        return self._bytes(self.model.decoder, (t, *shape[-2:]), pictures_of(mode, clips, t), dtype, tiling or WHOLE)

    def _bytes(self, network: torch.nn.Module, size: tuple[int, int, int], pictures: int | None, dtype: torch.dtype,
               tiling: Tiling) -> int:
        return engine.working_memory(self.model.config, network is self.model.encoder, size, pictures, dtype, self.device,
                                     tiling, partial(engine.folded_bytes, network, dtype))


# -- training ----------------------------------------------------------------------------------------


def weights_of(vae: comfy.sd.VAE) -> keys.State:
    """The weights of any of the host's VAEs, as float32 tensors of their own on the CPU, fit for training.

    Nodes run in inference mode, and what is made there can never be trained: so these are copies made outside of it.
    """
    if getattr(vae, "first_stage_model", None) is None:
        raise ValueError("The VAE that is connected holds no model: ComfyUI did not recognise its file. Choose another.")
    with torch.inference_mode(False):
        return {name: tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None, copy=True)
                for name, tensor in vae.get_sd().items()}


def with_lora(model, path):
    """``model`` with the LoRA file ``path`` at strength 1, as the host's own loader does it."""
    return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(path), safe_load=True), 1.0, 0)[0]


def training_device() -> tuple[str, str]:
    """Where the host computes, and the precision that suits training there: "bf16" or "fp32"."""
    device = comfy.model_management.get_torch_device()
    return str(device), "bf16" if comfy.model_management.should_use_bf16(device) else "fp32"


@contextlib.contextmanager
def all_memory():
    """The device without the host's models inside a with block, and everything given back after, also after an error."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    try:
        yield
    except BaseException as error:
        let_go(error)
        raise
    finally:
        gc.collect()  # modules hold each other
        comfy.model_management.soft_empty_cache()


def check_cancelled() -> None:
    """Raise the host's exception if the user pressed Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def show_text(text: str, node_id: str | None) -> None:
    """Write ``text`` on the node while it runs; nowhere where ``node_id`` is None, outside of a queue."""
    if node_id is None:
        return
    from server import PromptServer  # here, as the host's own nodes do: it is there once the host runs

    PromptServer.instance.send_progress_text(text, node_id)


LATENT_FORMATS = {4: comfy.latent_formats.SD15, 16: comfy.latent_formats.SD3}


def latent_colours(channels: int) -> LinearPreview:
    """The host's own preview of the latents of SD 1.5 or SD 3, for latents as they travel between nodes."""
    latent_format = LATENT_FORMATS[channels]()
    # Its factors are for latents as models compute with them: scaled and shifted, channel by channel.
    shift = latent_format.process_in(torch.zeros(channels))
    scale = latent_format.process_in(torch.ones(channels)) - shift
    factors = torch.tensor(latent_format.latent_rgb_factors).T
    bias = torch.tensor(latent_format.latent_rgb_factors_bias or [0.0] * 3)
    return LinearPreview(factors * scale, factors @ shift + bias, {"source": "ComfyUI"})


# -- progress and memory -----------------------------------------------------------------------------


class Progress:
    """Called after each piece: moves the host's progress bar, and raises when the user cancelled."""

    def __init__(self):
        self.bar = None

    def __call__(self, done: int, total: int) -> None:
        # Asked here too because newer hosts' bars skip most updates, and old ones' layers do not ask.
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self.bar is None:
            self.bar = comfy.utils.ProgressBar(total)
        self.bar.update_absolute(done, total)


def let_go(error: BaseException) -> None:
    """Free what the frames hold that ``error`` went through: the host keeps the error for a while."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
        return True
    management = comfy.model_management
    if hasattr(management, "is_oom"):  # since 0.17
        return management.is_oom(error)
    return isinstance(error, management.OOM_EXCEPTION)


def less_demanding(tiling: Tiling, height: int, width: int, unused: int | None) -> Tiling | None:
    """What to try when ``tiling`` did not fit for frames of this size.

    First less memory for the same pieces, which costs time only; then half the tile, then half the window.
    unused: bytes that the device could still give.
    """
    memory = parse_memory(tiling.memory)
    if not isinstance(memory, int):
        memory = unused
    if memory is not None and memory // 2 >= LEAST_MEMORY:
        return dataclasses.replace(tiling, memory=max(LEAST_MEMORY, memory // 4))
    side = max(height, width)
    tile = min(side, tiling.tile_pixels or side)
    if tile > SMALLEST_TILE:
        tile = max(SMALLEST_TILE, tile // 2 // SPACE_FACTOR * SPACE_FACTOR)
        overlap = min(tiling.overlap_pixels, tile // 4 // SPACE_FACTOR * SPACE_FACTOR)
        return dataclasses.replace(tiling, tile_pixels=tile, overlap_pixels=overlap)
    latents = latents_of(tiling.window_frames or 17)
    if latents <= 2:
        return None
    window = frames_of(1 + latents // 2 if latents > 3 else 2)
    return dataclasses.replace(tiling, window_frames=window, overlap_frames=1)


def same_pieces(one: Tiling, other: Tiling) -> bool:
    return dataclasses.replace(one, memory=None) == dataclasses.replace(other, memory=None)


def in_words(tiling: Tiling) -> str:
    window = "the whole clip" if tiling.window_frames is None else f"{tiling.window_frames} frames"
    tile = "untiled" if tiling.tile_pixels is None else f"in tiles of {tiling.tile_pixels} pixels"
    memory = f" and {tiling.memory // 10 ** 6} MB" if isinstance(tiling.memory, int) else ""
    return f"{window} at a time, {tile}{memory}"
