"""What a host must do with the pack.  Run inside ComfyUI by its own python; test_contract.py reads the results.

    cd COMFYUI; python contract.py PACK BASE_DIRECTORY [check ...]

prints one JSON line per check: {"check": name, "ok": bool, "detail": text, "seconds": of the processor}.
This file may be imported without ComfyUI (the checks' names become the tests'); ``main`` imports the host.
"""

import asyncio
import copy
import importlib.util
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

CHECKS = {}
host = SimpleNamespace()  # filled by main: torch, modules of ComfyUI and of the pack


def check(function):
    CHECKS[function.__name__] = function
    return function


# -- helpers -----------------------------------------------------------------------------------------


def load(batch_is="video clip", vae_name="tiny (built in)", dtype="fp32"):
    return run("CVVAELoader", vae_name=vae_name, batch_is=batch_is, dtype=dtype)[0]


def run(node_id, **inputs):
    """Call a node, V1 or V3, as the executor does; the outputs."""
    node = host.nodes.NODE_CLASS_MAPPINGS[node_id]
    if hasattr(node, "GET_SCHEMA"):
        defaults = {i.id: i.default for i in node.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}
        return node.execute(**(defaults | inputs)).args
    return getattr(node(), node.FUNCTION)(**inputs)


def clip(frames=9, height=48, width=64, seed=0):
    """A moving, smooth picture [T, H, W, 3] in [0, 1]."""
    torch = host.torch
    t, y, x = (torch.linspace(0, 1, n) for n in (frames, height, width))
    t, y, x = t[:, None, None] + seed, y[None, :, None], x[None, None, :]
    channels = [0.5 + 0.4 * torch.sin(6 * (y * a + x * b + t)) for a, b in ((1, 0.3), (0.2, 1), (0.7, 0.7))]
    return torch.stack(channels, -1)


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape, f"{list(a.shape)} instead of {list(b.shape)}"
    difference = (a.float() - b.float()).abs().max().item()
    assert difference <= tolerance, f"differ by {difference}"


def shape(tensor, *expected):
    assert tuple(tensor.shape) == expected, f"{list(tensor.shape)} instead of {list(expected)}"


def raises(message, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        assert message in str(error), f"{error!r} does not say {message!r}"
    else:
        raise AssertionError(f"no error; expected one that says {message!r}")


def model_of(vae):
    return vae.model


# -- the object --------------------------------------------------------------------------------------


@check
def the_private_line_sets_what_this_host_sets():
    """set_host_attributes must give every attribute that the host's own constructor gives."""
    import comfy.sd

    vae = object.__new__(comfy.sd.VAE)
    host.native.set_host_attributes(vae)
    stock = stock_vae()
    missing = set(vars(stock)) - set(vars(vae))
    assert not missing, f"not set: {sorted(missing)}"


def stock_vae():
    """The smallest VAE that this host makes of a file: a TAESD."""
    import comfy.sd
    import comfy.taesd.taesd

    vae = comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD().state_dict())
    assert vae.first_stage_model is not None
    return vae


@check
def it_is_a_native_vae_with_every_attribute():
    import comfy.sd

    vae = load()
    assert isinstance(vae, comfy.sd.VAE)
    stock = stock_vae()
    missing = [name for name in vars(stock) if not hasattr(vae, name)]
    assert not missing, f"missing: {missing}"
    assert vae.downscale_ratio == 8 and vae.latent_channels == 4 and vae.temporal_compression_decode() == 4
    assert vae.spacial_compression_encode() == 8 and vae.spacial_compression_decode() == 8
    assert vae.patcher.model is vae.first_stage_model and vae.patcher.load_device == vae.device


@check
def layers_are_the_hosts():
    """So that the host can stream weights and apply its work-arounds."""
    import comfy.ops

    assert isinstance(model_of(load()).decoder.conv_in, comfy.ops.disable_weight_init.Conv3d)


@check
def layers_that_load_lazily_are_filled():
    """With dynamic VRAM the host makes linear layers without weights until they are loaded."""
    import comfy.ops

    memory = getattr(comfy.ops.comfy, "memory_management", None)
    if not hasattr(memory, "aimdo_enabled"):
        return  # an older host
    before, memory.aimdo_enabled = memory.aimdo_enabled, True
    try:
        vae = load()
    finally:
        memory.aimdo_enabled = before
    assert {p.dtype for p in model_of(vae).parameters()} == {host.torch.float32}
    latents = host.torch.ones(2, 4, 2, 2)
    close(vae.decode(latents), load().decode(latents), 0)


@check
def dtypes_are_those_asked_for():
    torch = host.torch
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
        vae = load(dtype=name)
        assert vae.vae_dtype == dtype and {p.dtype for p in model_of(vae).parameters()} == {dtype}
    latents = vae.encode(clip(5, 16, 16))
    assert latents.dtype == torch.float32 and vae.decode(latents).dtype == torch.float32


@check
def memory_estimates_count_one_window_of_one_tile():
    vae = load()
    dtype = host.torch.float32
    one = vae.memory_used_decode((5, 4, 72, 72), dtype)
    assert 0 < one < vae.memory_used_decode((1, 4, 5, 144, 144), dtype) < 1.5 * one
    assert vae.memory_used_decode((500, 4, 72, 72), dtype) == one
    assert vae.memory_used_encode((1, 3, 1000, 576, 576), dtype) == vae.memory_used_encode((17, 3, 576, 576), dtype)
    images = load("independent images")
    picture, pictures = (images.memory_used_decode((count, 4, 72, 72), dtype) for count in (1, 500))
    assert picture < one
    # Their kernels are folded once and kept meanwhile.
    assert pictures == picture + host.cvvae.engine.folded_bytes(model_of(images).decoder, dtype)


# -- native nodes ------------------------------------------------------------------------------------


@check
def vae_encode_and_decode():
    vae, pixels = load(), clip(17)
    latents = run("VAEEncode", pixels=pixels, vae=vae)[0]
    shape(latents["samples"], 5, 4, 6, 8)
    images = run("VAEDecode", samples=latents, vae=vae)[0]
    shape(images, 17, 48, 64, 3)
    assert 0 <= images.min() and images.max() <= 1


@check
def native_nodes_equal_the_library():
    vae, pixels = load(), clip(33)
    library = host.cvvae.load("tiny")
    expected = library.encode(pixels.movedim(-1, 0)[None] * 2 - 1).mode()
    latents = run("VAEEncode", pixels=pixels, vae=vae)[0]
    close(latents["samples"], expected[0].movedim(0, 1))
    decoded = library.decode(expected)[0].movedim(0, -1) / 2 + 0.5
    close(run("VAEDecode", samples=latents, vae=vae)[0], decoded.clamp(0, 1))


@check
def sizes_are_cropped_as_native_vaes_crop():
    vae, pixels = load(), clip(5, 51, 69)
    shape(vae.encode(pixels), 2, 4, 6, 8)
    close(vae.encode(pixels), vae.encode(pixels[:, 1:49, 2:66]))


@check
def clips_with_a_batch_axis():
    vae = load()
    two = host.torch.stack([clip(5), clip(5, seed=0.3)])
    latents = vae.encode(two)
    shape(latents, 2, 4, 2, 6, 8)
    close(latents[1].movedim(1, 0), vae.encode(two[1]))
    images = run("VAEDecode", samples={"samples": latents}, vae=vae)[0]
    shape(images, 10, 48, 64, 3)
    close(images[5:], vae.decode(latents[1].movedim(1, 0)))


@check
def one_frame():
    vae = load()
    latents = vae.encode(clip(1))
    shape(latents, 1, 4, 6, 8)
    shape(vae.decode(latents), 1, 48, 64, 3)


@check
def a_batch_of_independent_images():
    vae, pixels = load("independent images"), clip(3)
    latents = run("VAEEncode", pixels=pixels, vae=vae)[0]
    shape(latents["samples"], 3, 4, 6, 8)
    close(latents["samples"][1:2], vae.encode(pixels[1:2]))
    images = run("VAEDecode", samples=latents, vae=vae)[0]
    shape(images, 3, 48, 64, 3)
    close(images[2:], vae.decode(latents["samples"][2:]))
    shape(vae.decode(latents["samples"].movedim(0, 1)[None]), 1, 9, 48, 64, 3)


@check
def newer_hosts_say_not_video():
    vae, pixels = load(), clip(3)
    close(vae.encode(pixels, not_video=True), load("independent images").encode(pixels))
    close(vae.encode(pixels, not_video=None), vae.encode(pixels))


@check
def alpha_is_ignored():
    vae, pixels = load(), clip(1)
    with_alpha = host.torch.cat([pixels, host.torch.ones_like(pixels[..., :1])], -1)
    close(vae.encode(with_alpha), vae.encode(pixels))


@check
def vae_encode_tiled():
    vae, pixels = load(), clip(9, 64, 136)
    whole = run("VAEEncodeTiled", pixels=pixels, vae=vae, tile_size=512, overlap=64)[0]["samples"]
    close(whole, vae.encode(pixels))
    tiled = run("VAEEncodeTiled", pixels=pixels, vae=vae, tile_size=64, overlap=32)[0]["samples"]
    with tiling(vae, tile_pixels=64, overlap_pixels=32):
        close(tiled, vae.encode(pixels))
    assert not host.torch.equal(tiled, whole), "the tile size was not used"


@check
def vae_decode_tiled():
    vae = load()
    latents = vae.encode(clip(9, 32, 72))
    whole = run("VAEDecodeTiled", samples={"samples": latents}, vae=vae, tile_size=512, overlap=64)[0]
    close(whole, vae.decode(latents))
    tiled = run("VAEDecodeTiled", samples={"samples": latents}, vae=vae, tile_size=64, overlap=16, temporal_size=8)[0]
    with tiling(vae, window_frames=5, tile_pixels=64, overlap_pixels=16):
        close(tiled, vae.decode(latents))
    shape(tiled, 9, 32, 72, 3)
    assert not host.torch.equal(tiled, whole), "the tile size was not used"
    five = latents.movedim(0, 1)[None]
    close(run("VAEDecodeTiled", samples={"samples": five}, vae=vae, tile_size=512, overlap=64)[0], whole)


@check
def any_tile_size_works():
    vae = load()
    pixels = clip(5, 40, 40)
    for tile_x, tile_y, overlap, tile_t in ((64, 64, 64, 8), (8, 8, 0, 1), (100, 70, 33, 30), (None, None, None, None)):
        latents = vae.encode_tiled(pixels, tile_x=tile_x, tile_y=tile_y, overlap=overlap, tile_t=tile_t, overlap_t=4)
        shape(latents, 2, 4, 5, 5)
    for tile, overlap, tile_t in ((8, 8, 2), (1, 0, 1), (3, 2, 999), (None, None, None)):
        images = vae.decode_tiled(latents, tile_x=tile, tile_y=tile, overlap=overlap, tile_t=tile_t, overlap_t=1)
        shape(images, 5, 40, 40, 3)


def tiling(vae, **fields):
    from contextlib import contextmanager

    @contextmanager
    def changed():
        model, before = model_of(vae), model_of(vae).tiling
        model.tiling = host.cvvae.Tiling(**fields)
        try:
            yield
        finally:
            model.tiling = before

    return changed()


@check
def vae_encode_for_inpaint():
    pixels = clip(5, 50, 68)
    mask = host.torch.zeros(1, 50, 68)
    mask[:, 10:20, 10:20] = 1
    latents = run("VAEEncodeForInpaint", pixels=pixels, vae=load(), mask=mask)[0]
    shape(latents["samples"], 2, 4, 6, 8)
    assert "noise_mask" in latents


@check
def inpaint_model_conditioning():
    torch = host.torch
    cond = [[torch.zeros(1, 77, 8), {}]]
    positive, _, latents = run("InpaintModelConditioning", positive=cond, negative=cond, pixels=clip(1, 50, 68),
                               vae=load(), mask=torch.zeros(1, 50, 68), noise_mask=True)
    shape(latents["samples"], 1, 4, 6, 8)
    shape(positive[0][1]["concat_latent_image"], 1, 4, 6, 8)


@check
def svd_img2vid_conditioning():
    import comfy_extras.nodes_video_model as svd

    vision = SimpleNamespace(encode_image=lambda image: SimpleNamespace(image_embeds=host.torch.zeros(1, 1024)))
    positive, _, latents = svd.SVD_img2vid_Conditioning().encode(
        vision, clip(1), load(), width=64, height=48, video_frames=5, motion_bucket_id=127, fps=6,
        augmentation_level=0.0)
    shape(positive[0][1]["concat_latent_image"], 1, 4, 6, 8)
    shape(load().decode(latents["samples"]), 17, 48, 64, 3)


@check
def vae_save_writes_a_file_that_loads_again():
    import comfy_extras.nodes_model_merging as merging

    for number, vae in enumerate([load(), host.native.NativeVAE(small("sd3", 16), "video", host.torch.float32)]):
        merging.VAESave().save(vae, f"vae/saved{number}")
        written = next((host.base / "output" / "vae").glob(f"saved{number}_*.safetensors"))
        written.rename(host.base / "models" / "vae" / f"saved{number}.safetensors")
        again = load(vae_name=f"saved{number}.safetensors")
        assert model_of(again).config == model_of(vae).config
        latents = vae.encode(clip(5, 16, 16))
        close(again.encode(clip(5, 16, 16)), latents, 0)
        close(again.decode(latents), vae.decode(latents), 0)


def small(variant, latent_channels):
    config = host.cvvae.Config(variant, latent_channels, (32, 32, 32, 32), 1)
    return host.cvvae.VideoVAE(config)


@check
def sixteen_channels():
    vae = host.native.NativeVAE(small("sd3", 16), "video", host.torch.float32)
    assert vae.latent_channels == 16
    latents = run("VAEEncode", pixels=clip(5), vae=vae)[0]
    shape(latents["samples"], 2, 16, 6, 8)
    shape(run("VAEDecode", samples=latents, vae=vae)[0], 5, 48, 64, 3)


@check
def copies_work():
    vae = load()
    twin = copy.copy(vae)
    latents = vae.encode(clip(5))
    twin.batch_is = "image"
    twin.patcher = vae.patcher.clone()
    of_copy, of_original = (v.memory_used_decode((9, 4, 8, 8), host.torch.float32) for v in (twin, vae))
    assert of_copy < of_original, "the copy's estimates look at the original"
    shape(twin.decode(latents), 2, 48, 64, 3)
    shape(vae.decode(latents), 5, 48, 64, 3)


# -- memory, Cancel ----------------------------------------------------------------------------------


def failing(model, error, after):
    """Make the decoder raise ``error`` at call number ``after``, once; returns what undoes it."""
    forward, calls = model.decoder.forward, []

    def broken(z):
        calls.append(z.shape)
        if len(calls) == after:
            raise error
        return forward(z)

    model.decoder.forward = broken
    return lambda: model.decoder.__dict__.pop("forward"), calls


@check
def out_of_memory_is_retried_with_less_memory_first():
    vae = load()
    latents = vae.encode(clip(5, 16, 168))
    expected = vae.decode(latents)
    mend, calls = failing(model_of(vae), host.management.OOM_EXCEPTION("faked"), 1)
    with Messages() as messages:
        close(vae.decode(latents), expected)
    mend()
    assert len(calls) == 2 and calls[0] == calls[1], f"tiles {calls}"
    assert any("out of device memory" in text and "differs" not in text for text in messages.texts), messages.texts


@check
def out_of_memory_is_retried_with_smaller_tiles_then():
    vae = load()
    latents = vae.encode(clip(5, 16, 168))
    with tiling(vae, tile_pixels=128, overlap_pixels=32):
        expected = vae.decode(latents)
    forward = model_of(vae).decoder.forward

    def broken(z):
        if max(z.shape[-2:]) > 16:
            raise host.management.OOM_EXCEPTION("faked")
        return forward(z)

    model_of(vae).decoder.forward = broken
    with Messages() as messages:
        close(vae.decode(latents), expected)
    del model_of(vae).decoder.forward
    assert any("tiles of 128 pixels" in text and "differs" in text for text in messages.texts), messages.texts
    assert model_of(vae).tiling == host.cvvae.Tiling(), "the smaller tiles stayed"


@check
def out_of_memory_is_retried_with_shorter_windows_at_last():
    vae = load()
    latents = vae.encode(clip(17, 16, 16))
    with tiling(vae, window_frames=9):
        expected = vae.decode(latents)
    forward = model_of(vae).decoder.forward

    def broken(z):
        if z.shape[2] > 3:
            # As a CPU says it.
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return forward(z)

    model_of(vae).decoder.forward = broken
    with Messages() as messages:
        close(vae.decode(latents), expected)
    del model_of(vae).decoder.forward
    assert any("again with 9 frames" in text and "differs" in text for text in messages.texts), messages.texts


@check
def whatever_ends_a_run_leaves_nothing_behind():
    """Also while the error is kept, as the host keeps it; and what was loaded can be unloaded."""
    vae, pixels = load(), clip(17, 48, 48)
    latents = vae.encode(pixels)
    expected = vae.decode(latents)
    for run_it in (lambda: vae.decode(latents), lambda: vae.encode(pixels)):
        times = ended_after(None, None, run_it)
        assert times > 4
        for error in (KeyboardInterrupt(), host.management.InterruptProcessingException(), ValueError("broken")):
            before = bytes_held()
            ended_after(times // 2, error, run_it)
            assert bytes_held() <= before, f"{bytes_held() - before} bytes are kept after {error!r}"
            host.management.unload_all_models()
            assert not [entry for entry in host.management.current_loaded_models if entry.model is vae.patcher]
    close(vae.decode(latents), expected, 0)


def ended_after(last, error, function):
    """Call ``function``, which ``error`` ends when it asks for the ``last`` time whether to go on; how often it asked."""
    before, count = host.management.throw_exception_if_processing_interrupted, 0

    def asked():
        nonlocal count
        count += 1
        if count == last:
            raise error

    host.management.throw_exception_if_processing_interrupted = asked
    try:
        function()
        assert error is None, "it was not ended"
    except BaseException as found:
        assert found is error, found
    finally:
        host.management.throw_exception_if_processing_interrupted = before
    return count


def bytes_held():
    import gc

    gc.collect()
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), host.torch.Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@check
def less_memory_changes_no_number_and_cancel_works_within_a_window():
    vae = load()
    latents = vae.encode(clip(5, 48, 48))
    expected = vae.decode(latents)
    checks = []
    with tiling(vae, memory=host.cvvae.tiling.SMALLEST_MEMORY):
        close(vae.decode(latents), expected)
    before = host.management.throw_exception_if_processing_interrupted

    def cancelled():
        checks.append(None)
        if len(checks) > 10:
            raise host.management.InterruptProcessingException()

    host.management.throw_exception_if_processing_interrupted = cancelled
    try:
        vae.decode(latents)
        raise AssertionError("not cancelled")
    except host.management.InterruptProcessingException:
        pass
    finally:
        host.management.throw_exception_if_processing_interrupted = before
    close(vae.decode(latents), expected, 0)


@check
def out_of_memory_at_the_smallest_size_is_raised():
    vae = load()
    latents = vae.encode(clip(5, 16, 16))
    forward = model_of(vae).decoder.forward

    def broken(z):
        raise host.management.OOM_EXCEPTION("faked")

    model_of(vae).decoder.forward = broken
    raises("faked", vae.decode, latents)
    model_of(vae).decoder.forward = forward
    shape(vae.decode(latents), 5, 16, 16, 3)


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())

    def __enter__(self):
        logger = logging.getLogger()
        logger.addHandler(self)
        self.level_before = logger.level
        logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *_):
        logging.getLogger().removeHandler(self)
        logging.getLogger().setLevel(self.level_before)


@check
def cancel_is_honoured_between_pieces_and_harms_nothing():
    vae = load()
    latents = vae.encode(clip(49, 16, 16))
    expected = vae.decode(latents)
    forward, calls = model_of(vae).decoder.forward, []

    def cancelled_in_the_second_window(z):
        calls.append(z)
        out = forward(z)
        if len(calls) == 2:
            host.management.interrupt_current_processing()
        return out

    model_of(vae).decoder.forward = cancelled_in_the_second_window
    try:
        vae.decode(latents)
        raise AssertionError("not cancelled")
    except host.management.InterruptProcessingException:
        pass
    finally:
        del model_of(vae).decoder.forward
        host.management.interrupt_current_processing(False)
    assert len(calls) == 2, f"{len(calls)} windows were computed"
    close(vae.decode(latents), expected, 0)


@check
def progress_counts_windows_and_tiles():
    import comfy.utils

    seen = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, *args, **kwargs: seen.append((value, total)))
    try:
        vae = load()
        latents = vae.encode(clip(33, 16, 16))
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    shape(latents, 9, 4, 2, 2)
    assert seen[-1] == (2, 2), seen


# -- the pack's nodes --------------------------------------------------------------------------------


@check
def odd_sizes_and_lengths_come_back():
    vae, pixels = load(), clip(7, 45, 61)
    latents = run("CVVAEEncode", pixels=pixels, vae=vae)[0]
    shape(latents["samples"], 3, 4, 6, 8)
    images = run("CVVAEDecode", samples=latents, vae=vae)[0]
    shape(images, 7, 45, 61, 3)
    library = host.cvvae.load("tiny").reconstruct(pixels.movedim(-1, 0)[None] * 2 - 1)
    close(images, (library[0].movedim(0, -1) / 2 + 0.5).clamp(0, 1))


@check
def both_layouts_and_extra_keys():
    vae, pixels = load(), clip(7)
    batch = run("CVVAEEncode", pixels=pixels, vae=vae)[0]
    five = run("CVVAEEncode", pixels=pixels, vae=vae, layout="clip with time axis")[0]
    shape(five["samples"], 1, 4, 3, 6, 8)
    close(five["samples"][0].movedim(0, 1), batch["samples"], 0)
    images = run("CVVAEDecode", samples=batch | {"noise_mask": None}, vae=vae)[0]
    close(run("CVVAEDecode", samples=five, vae=vae)[0], images)
    close(run("CVVAEDecode", samples=five, vae=vae, frames=3)[0], images[:3])
    five.pop("cv_vae")
    shape(run("CVVAEDecode", samples=five, vae=vae)[0], 9, 48, 64, 3)


@check
def what_was_remembered_is_dropped_when_latents_changed():
    vae = load()
    latents = run("CVVAEEncode", pixels=clip(7, 45, 61), vae=vae)[0]
    first_two = latents | {"samples": latents["samples"][:2]}
    shape(run("CVVAEDecode", samples=first_two, vae=vae)[0], 5, 45, 61, 3)
    wider = latents | {"samples": host.torch.cat([latents["samples"]] * 2, dim=-1)}
    shape(run("CVVAEDecode", samples=wider, vae=vae)[0], 7, 48, 128, 3)


@check
def modes_of_the_nodes():
    vae, pixels = load(), clip(3)
    latents = run("CVVAEEncode", pixels=pixels, vae=vae, mode="independent images")[0]
    close(latents["samples"], load("independent images").encode(pixels))
    images = run("CVVAEDecode", samples=latents, vae=vae)[0]  # remembers the mode
    shape(images, 3, 48, 64, 3)
    shape(run("CVVAEDecode", samples=latents, vae=vae, mode="video clip")[0], 9, 48, 64, 3)


@check
def windows_and_tiles_of_the_nodes_are_the_librarys():
    vae, pixels = load(), clip(9, 32, 72)
    latents = run("CVVAEEncode", pixels=pixels, vae=vae, window=5, tile=64, overlap=16)[0]
    with tiling(vae, window_frames=5, tile_pixels=64, overlap_pixels=16):
        close(latents["samples"], vae.encode(pixels))
        expected = vae.decode(latents["samples"])
    close(run("CVVAEDecode", samples=latents, vae=vae, window=5, tile=64, overlap=16)[0], expected)


@check
def quality_shares_more_between_pieces():
    vae, pixels = load(), clip(25, 32, 40)
    latents = run("CVVAEEncode", pixels=pixels, vae=vae, pieces="quality")[0]
    with tiling(vae, overlap_frames=5):
        close(latents["samples"], vae.encode(pixels))
        expected = vae.decode(latents["samples"])
    close(run("CVVAEDecode", samples=latents, vae=vae, pieces="quality")[0], expected)
    assert (run("CVVAEDecode", samples=latents, vae=vae)[0] - expected).abs().max() > 1e-3


@check
def an_overflow_of_fp16_is_explained():
    vae = load(dtype="fp16")
    latents = vae.encode(clip(5, 16, 16))
    model_of(vae).decoder.conv_out.weight.data *= 1e5
    raises("Choose bf16 or fp32 in the Load CV-VAE node", run, "VAEDecode", samples={"samples": latents}, vae=vae)


@check
def wrong_inputs_are_explained():
    torch = host.torch
    raises("VAE Encode", run, "CVVAEEncode", pixels=clip(1), vae=stock_vae())
    raises("VAE Decode", run, "CVVAEDecode", samples={"samples": torch.zeros(1, 4, 8, 8)}, vae=None)
    raises("SD 3 has 16", run, "CVVAEDecode", samples={"samples": torch.zeros(1, 16, 8, 8)}, vae=load())
    raises("SD 3 has 16", run, "VAEDecode", samples={"samples": torch.zeros(1, 16, 8, 8)}, vae=load())
    raises("at least 8", run, "VAEEncode", pixels=clip(1, 4, 4), vae=load())
    raises("ask for 1 to 5", run, "CVVAEDecode", samples={"samples": torch.zeros(2, 4, 2, 2)}, vae=load(), frames=6)
    raises("overlap", run, "CVVAEEncode", pixels=clip(1), vae=load(), tile=64, overlap=64)


@check
def an_image_vae_file_is_refused_by_name():
    image_vae = host.cvvae.ImageVAE(host.cvvae.Config("image", 4, (32, 32, 32, 32), 1))
    host.cvvae.save(image_vae, host.base / "models" / "vae" / "image.safetensors")
    raises("is an image VAE", load, vae_name="image.safetensors")


@check
def example_media():
    images, fps, _ = run("CVVAEExample", media="flower clip (33 frames)")
    shape(images, 33, 160, 208, 3)
    assert fps == 15 and images.dtype == host.torch.float32 and 0 <= images.min() < images.max() <= 1
    images, fps, _ = run("CVVAEExample", media="cat photo")
    shape(images, 1, 296, 448, 3)
    assert fps == 1


@check
def importing_the_pack_is_light():
    """PyAV, kornia, downloads and the trainer wait until they are used; so ComfyUI starts as fast as without the pack."""
    heavy = {"kornia", "av", "einops", "huggingface_hub", "matplotlib", "lpips", "torchvision", "tensorboard"}
    found = {name for name in host.imported_with_pack if name.partition(".")[0] in heavy}
    late = (".cvvae.training", ".cvvae.video", ".nodes.training")
    found |= {name for name in host.imported_with_pack if name.endswith(late)}
    assert not found, f"imported with the pack: {found}"


# -- running -----------------------------------------------------------------------------------------


def main(pack: Path, base: Path, names: list[str], prepare: Callable = lambda nodes: None) -> None:
    """prepare: called with the host's nodes, to load more of them."""
    sys.argv = ["main.py", "--cpu", "--base-directory", str(base), "--disable-all-custom-nodes"]
    sys.path.insert(0, str(Path.cwd()))
    import comfy.options

    comfy.options.enable_args_parsing()
    import torch

    torch.set_num_threads(1)
    import comfy.model_management
    import folder_paths

    import nodes

    folder_paths.set_output_directory(str(base / "output"))
    before = set(sys.modules)
    asyncio.run(nodes.load_custom_node(str(pack)))
    host.imported_with_pack = set(sys.modules) - before
    assert "CVVAELoader" in nodes.NODE_CLASS_MAPPINGS, "the pack did not load; see the messages above"
    prepare(nodes)
    package = str(pack).replace(".", "_x_")
    host.torch, host.nodes, host.management, host.base = torch, nodes, comfy.model_management, base
    host.cvvae = importlib.import_module(f"{package}.cvvae")
    host.folder_paths = folder_paths
    modules = {"native": "nodes.host", "presets": "nodes.presets", "training": "nodes.training", "video": "cvvae.video",
               "checkpoint": "cvvae.checkpoint", "config": "cvvae.training.config", "trainer": "cvvae.training.trainer",
               "objective": "cvvae.training.objective", "evaluation": "cvvae.training.evaluation",
               "pictures": "cvvae.training.pictures"}
    for name, module in modules.items():
        setattr(host, name, importlib.import_module(f"{package}.{module}"))
    for name in names or CHECKS:
        result = {"check": name, "ok": True, "detail": ""}
        started = time.process_time()
        try:
            with torch.inference_mode():
                CHECKS[name]()
        except Exception:
            result |= {"ok": False, "detail": traceback.format_exc()}
        print(json.dumps(result | {"seconds": round(time.process_time() - started, 2)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
