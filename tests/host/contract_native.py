"""What becomes of a CV-VAE, its latents and its videos in the host's own nodes; run and read as contract.py.

    cd COMFYUI; python contract_native.py PACK BASE_DIRECTORY [check ...]

Each line of the table of core nodes in docs/native_nodes.md is found here by one of the checks; test_native_nodes.py
sees to it.
"""

import asyncio
import functools
import importlib.util
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

spec = importlib.util.spec_from_file_location("contract_machinery", Path(__file__).with_name("contract.py"))
contract = importlib.util.module_from_spec(spec)
spec.loader.exec_module(contract)
CHECKS, host, clip, close, load, raises, run, shape, small, stock_vae = (
    getattr(contract, name) for name in "CHECKS host clip close load raises run shape small stock_vae".split())
CHECKS.clear()  # contract.py's own run by itself

WORKS, SETTING, NO, NOTHING = "works", "with a setting", "no", "-"
LINES = {}  # id of a core node -> what it does with frames as batch, and with clips
SINCE = {}  # id of a node -> the first version of the host that has it, where that is not the oldest

# Modules of comfy_extras whose nodes belong to models with latents of another kind.
FAMILIES = set("""
    ace ar_video audio bernini boogu chroma_radiance cosmos flux hidream_o1 hunyuan hunyuan3d joyimage kandinsky5 load_3d lt
    lt_audio lt_upsampler mage minimax_h3 minimax_music mochi model_patch pid qwen scail sdpose sdupscale seedvr
    stable_cascade trellis2 triposplat void wan wandancer wanmove zimage""".split())


def line(*nodes, batch=NOTHING, clip=NOTHING, since=None):
    """A check that finds what ``nodes`` do with latents [t, C, h, w] (or with what they make), and with [B, C, t, h, w]."""

    def register(function):
        for node in nodes:
            LINES[node] = batch, clip
            if since:
                SINCE[node] = since

        @functools.wraps(function)
        def guarded():
            missing = [node for node in nodes if node not in host.nodes.NODE_CLASS_MAPPINGS]
            if missing and since and version() < numbers(since):
                return
            assert not missing, f"this host has no {missing}"
            function()

        CHECKS[function.__name__] = guarded
        return guarded

    return register


def check(function):
    CHECKS[function.__name__] = function
    return function


def numbers(version_text):
    return [int(number) for number in version_text.split(".")]


def version():
    import comfyui_version

    return numbers(comfyui_version.__version__)


# -- helpers -----------------------------------------------------------------------------------------


def latents(t=5, h=6, w=8, seed=0):
    return host.torch.randn(t, 4, h, w, generator=host.torch.Generator().manual_seed(seed))


def as_clips(batch):
    return batch.movedim(0, 1)[None].contiguous()


def same_for_both(node, samples=None):
    """What ``node``, from LATENT to LATENT, makes of frames as batch, once it is seen to do the same to a clip."""
    samples = latents() if samples is None else samples
    given = samples.clone()
    batch = node({"samples": samples, "cv_vae": {"mode": "video"}})
    assert batch["cv_vae"] == {"mode": "video"}, "what CV-VAE Encode remembers is lost"
    close(as_clips(batch["samples"]), node({"samples": as_clips(samples)})["samples"])
    close(samples, given, 0)
    return batch["samples"]


def frames(samples, vae=None):
    return len(run("CVVAEDecode", samples={"samples": samples}, vae=vae or load())[0])


def conditioning(width=16):
    return [[host.torch.zeros(1, 7, width), {}]]


def vision():
    return SimpleNamespace(encode_image=lambda image: SimpleNamespace(image_embeds=host.torch.zeros(1, 768)))


@functools.cache
def diffusion_model(kind="SD15"):
    """A diffusion model with the layers of ``kind``, a class of the host's supported_models, but hardly any weights."""
    patcher = new_diffusion_model(kind)
    patcher.cached_patcher_init = new_diffusion_model, (kind,)  # for nodes that load it once more
    return patcher


def new_diffusion_model(kind, **_):
    import comfy.model_patcher
    import comfy.supported_models

    torch = host.torch
    unet = {"image_size": 32, "use_spatial_transformer": True, "legacy": False, "in_channels": 4, "out_channels": 4,
            "model_channels": 32, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1],
            "transformer_depth_middle": 1, "transformer_depth_output": [1] * 4, "use_linear_in_transformer": False,
            "context_dim": 16, "adm_in_channels": None, "use_temporal_attention": False, "use_temporal_resblock": False,
            "dtype": torch.float32}
    if kind == "SVD_img2vid":
        unet |= {"in_channels": 8, "use_temporal_attention": True, "use_temporal_resblock": True,
                 "disable_temporal_crossattention": False, "extra_ff_mix_layer": True, "use_spatial_context": True,
                 "merge_strategy": "learned_with_images", "merge_factor": 0.0, "video_kernel_size": [3, 1, 1],
                 "num_classes": "sequential", "adm_in_channels": 768, "use_linear_in_transformer": True}
    config = getattr(comfy.supported_models, kind)(unet)
    config.unet_config |= {"num_heads": 2, "num_head_channels": -1}
    with torch.inference_mode(False):
        model = config.get_model({}, "")
        for number, parameter in enumerate(model.parameters()):
            torch.nn.init.normal_(parameter, 0, 0.02, torch.Generator().manual_seed(number))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def svd_conditioning():
    embedding = [[host.torch.zeros(1, 1, 16), {"motion_bucket_id": 127, "fps": 6, "augmentation_level": 0.0,
                                               "concat_latent_image": host.torch.zeros(1, 4, 6, 8)}]]
    return embedding


# -- the table is complete ---------------------------------------------------------------------------


@check
def every_core_node_with_latents_vaes_or_videos_is_in_the_table():
    """On each host: either by a line, or by the family of models it belongs to."""
    types = {"LATENT", "VAE", "VIDEO"}
    missing = []
    for name, node in host.nodes.NODE_CLASS_MAPPINGS.items():
        module = getattr(node, "RELATIVE_PYTHON_MODULE", "nodes")
        if not (module == "nodes" or module.startswith("comfy_extras.")):
            continue
        inputs = [kind[0] for kinds in node.INPUT_TYPES().values() if isinstance(kinds, dict) for kind in kinds.values()]
        found = {part for kind in [*inputs, *(node.RETURN_TYPES or ())] if isinstance(kind, str) for part in kind.split(",")}
        if types & found and name not in LINES and module.removeprefix("comfy_extras.nodes_") not in FAMILIES:
            missing.append(f"{name} of {module}")
    assert not missing, missing


@check
def latents_of_other_families_are_refused_by_name():
    other = run("EmptyHunyuanLatentVideo", width=64, height=64, length=17, batch_size=1)[0]
    raises("belong to another family", run, "VAEDecode", samples=other, vae=load())


# -- encode and decode -------------------------------------------------------------------------------


@line("VAEEncode", "VAEEncodeTiled", batch=WORKS)
def vae_encoders():
    vae, pixels = load(), clip(17)
    for inputs in {"node_id": "VAEEncode"}, {"node_id": "VAEEncodeTiled", "tile_size": 512, "overlap": 64}:
        close(run(**inputs, pixels=pixels, vae=vae)[0]["samples"], run("CVVAEEncode", pixels=pixels, vae=vae)[0]["samples"])


@line("VAEDecode", "VAEDecodeTiled", batch=WORKS, clip=WORKS)
def vae_decoders():
    vae, samples = load(), latents(3)
    expected = run("CVVAEDecode", samples={"samples": samples}, vae=vae)[0]
    for inputs in {"node_id": "VAEDecode"}, {"node_id": "VAEDecodeTiled", "tile_size": 512, "overlap": 64}:
        for layout in samples, as_clips(samples):
            close(run(**inputs, samples={"samples": layout}, vae=vae)[0], expected)


@line("VAEEncodeForInpaint", "InpaintModelConditioning", batch=WORKS)
def inpainting_encoders():
    vae, pixels, mask = load(), clip(5), host.torch.ones(1, 48, 64)
    shape(run("VAEEncodeForInpaint", pixels=pixels, vae=vae, mask=mask)[0]["samples"], 2, 4, 6, 8)
    text = {"positive": conditioning(), "negative": conditioning()}
    out = run("InpaintModelConditioning", **text, pixels=pixels, vae=vae, mask=mask)
    shape(out[2]["samples"], 2, 4, 6, 8)
    shape(out[0][0][1]["concat_latent_image"], 2, 4, 6, 8)


@line("InstructPixToPixConditioning", batch=WORKS)
def instruct_pix2pix():
    out = run("InstructPixToPixConditioning", positive=conditioning(), negative=conditioning(), pixels=clip(5), vae=load())
    shape(out[2]["samples"], 2, 4, 6, 8)
    shape(out[0][0][1]["concat_latent_image"], 2, 4, 6, 8)


@line("SVD_img2vid_Conditioning", batch=WORKS)
def svd_from_picture_to_frames():
    """The length is one of latents; what it makes is sampled and decoded to four times the frames."""
    model, vae = diffusion_model("SVD_img2vid"), load()
    positive, negative, empty = run("SVD_img2vid_Conditioning", clip_vision=vision(), init_image=clip(1), vae=vae, width=64,
                                    height=48, video_frames=5, motion_bucket_id=127, fps=6, augmentation_level=0.0)
    for part in positive, negative:
        part[0][0] = host.torch.zeros(1, 1, 16)  # as narrow as the small model
    sampled = sample(model, positive, empty)
    shape(sampled["samples"], 5, 4, 6, 8)
    assert frames(sampled["samples"], vae) == 17


@line("SV3D_Conditioning", batch=WORKS)
def sv3d():
    out = run("SV3D_Conditioning", clip_vision=vision(), init_image=clip(1), vae=load(), width=64, height=48, video_frames=5,
              elevation=0.0)
    shape(out[0][0][1]["concat_latent_image"], 1, 4, 6, 8)
    assert frames(out[2]["samples"]) == 17


@line("StableZero123_Conditioning", "StableZero123_Conditioning_Batched", batch=SETTING)
def views_are_independent_images():
    inputs = {"clip_vision": vision(), "init_image": clip(1), "vae": load(), "width": 64, "height": 48, "batch_size": 3,
              "elevation": 0.0, "azimuth": 0.0}
    for out in (run("StableZero123_Conditioning", **inputs),
                run("StableZero123_Conditioning_Batched", **inputs, elevation_batch_increment=0.0,
                    azimuth_batch_increment=30.0)):
        shape(out[0][0][1]["concat_latent_image"], 1, 4, 6, 8)
        assert frames(out[2]["samples"], load("independent images")) == 3 != frames(out[2]["samples"])


@line("ControlNetApplyAdvanced", "ControlNetApplySD3", "ControlNetInpaintingAliMamaApply", batch=WORKS)
def control_nets_that_see_latents():
    """Those of SD 3 encode their pictures with the VAE: as many latents as the clip has."""
    import comfy.controlnet
    import comfy.latent_formats

    vae = host.native.NativeVAE(small("sd3", 16), "video", host.torch.float32)
    net = comfy.controlnet.ControlNet(latent_format=comfy.latent_formats.SD3(), load_device=host.torch.device("cpu"))
    net.control_model_wrapped = None  # the host copies it
    inputs = {"positive": conditioning(), "negative": conditioning(), "control_net": net, "image": clip(9), "vae": vae,
              "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    for out in (run("ControlNetApplyAdvanced", **inputs), run("ControlNetApplySD3", **inputs),
                run("ControlNetInpaintingAliMamaApply", **inputs, mask=host.torch.ones(1, 48, 64))):
        control = out[0][0][1]["control"]
        assert control.vae is vae
        shape(control.vae.encode(control.cond_hint_original.movedim(1, -1)), 3, 16, 6, 8)


@line("ReferenceLatent", batch=WORKS, clip=WORKS)
def reference_latent():
    for samples in latents(), as_clips(latents()):
        out = run("ReferenceLatent", conditioning=conditioning(), latent={"samples": samples})[0]
        close(out[0][1]["reference_latents"][0], samples, 0)


@line("MakeTrainingDataset", batch=WORKS)
def training_datasets():
    text = SimpleNamespace(tokenize=lambda text: text, encode_from_tokens_scheduled=lambda tokens: conditioning())
    found = run("MakeTrainingDataset", images=[clip(1), clip(1, seed=1)], vae=[load()], clip=[text], texts=["one", "two"])[0]
    for number, latent in enumerate(found):
        close(latent["samples"], load().encode(clip(1, seed=number)))


@line("ResolutionBucket", "SaveTrainingDataset", "LoadTrainingDataset", batch=WORKS)
def training_datasets_are_kept():
    given = [{"samples": latents(1)}, {"samples": latents(1, seed=1)}]
    texts = [conditioning(), conditioning()]
    bucket = run("ResolutionBucket", latents=given, conditioning=texts)[0]
    close(bucket[0]["samples"], host.torch.cat([latents(1), latents(1, seed=1)]), 0)
    run("SaveTrainingDataset", latents=given, conditioning=texts, folder_name=["kept"], shard_size=[1000])
    again = run("LoadTrainingDataset", folder_name="kept")[0]
    close(again[1]["samples"], latents(1, seed=1), 0)


# -- files -------------------------------------------------------------------------------------------


@line("VAELoader", batch=NO)
def vae_loader():
    path = host.base / "models" / "vae" / "for_vae_loader.safetensors"
    host.cvvae.save(load().model, path)
    try:
        vae = run("VAELoader", vae_name=path.name)[0]
        vae.decode(latents(1))
    except Exception:
        return
    raise AssertionError("the host reads CV-VAE files now")


@line("CheckpointLoaderSimple", "CheckpointLoader", "ImageOnlyCheckpointLoader", "unCLIPCheckpointLoader", "DiffusersLoader",
      batch=WORKS)
def vaes_of_checkpoints_are_teachers():
    """What these loaders give as VAE is the host's object around an image VAE."""
    import comfy.sd

    torch = host.torch
    with torch.device("meta"):  # the only widths that the host knows
        names = host.cvvae.ImageVAE(host.cvvae.Config("image", 4, (128, 256, 512, 512), 2)).state_dict()
    state = {name: torch.full(tensor.shape, 0.01) for name, tensor in names.items()}
    vae = run("CVVAEInflate", image_vae=comfy.sd.VAE(sd=state))[0]
    assert vae.model.config.widths == (128, 256, 512, 512) and vae.latent_channels == 4
    first = vae.model.encoder.conv_in.weight
    assert torch.allclose(first.sum(2), torch.tensor(0.01)) and first.dtype == torch.float32


@line("VAESave", batch=WORKS)
def vae_save():
    vae = load()
    run("VAESave", vae=vae, filename_prefix="vae/native")
    [path] = (host.base / "output" / "vae").glob("native_*.safetensors")
    close(host.cvvae.load(path).state_dict()["decoder.conv_in.weight"], vae.model.state_dict()["decoder.conv_in.weight"], 0)


@line("CheckpointSave", "ImageOnlyCheckpointSave", batch=SETTING)
def checkpoints_carry_it():
    """The host's loaders do not know it in there; Load CV-VAE does, once the file lies in models/vae."""
    vae = load()
    run("CheckpointSave", model=diffusion_model(), clip=None, vae=vae, filename_prefix="checkpoints/a")
    run("ImageOnlyCheckpointSave", model=diffusion_model("SVD_img2vid"), clip_vision=None, vae=vae,
        filename_prefix="checkpoints/b")
    for path in sorted((host.base / "output" / "checkpoints").glob("*.safetensors")):
        moved = path.rename(host.base / "models" / "vae" / path.name)
        close(load(vae_name=moved.name).decode(latents(2)), vae.decode(latents(2)), 0)


@line("SaveLatent", "LoadLatent", batch=WORKS, clip=WORKS)
def latents_in_files():
    """The numbers are kept; what CV-VAE Encode remembered is not."""
    for number, samples in enumerate([latents(), as_clips(latents())]):
        run("SaveLatent", samples={"samples": samples, "cv_vae": {"frames": 15}}, filename_prefix=f"latents/{number}")
        [path] = (host.base / "output" / "latents").glob(f"{number}_*.latent")
        path.rename(host.base / "input" / path.name)
        again = run("LoadLatent", latent=path.name)[0]
        close(again["samples"], samples, 0)
        assert "cv_vae" not in again
        assert len(run("CVVAEDecode", samples=again, vae=load(), frames=15)[0]) == 15


# -- samplers ----------------------------------------------------------------------------------------


def sample(model, positive, latent, **inputs):
    return run("KSampler", **{"model": model, "seed": 0, "steps": 1, "cfg": 2.0, "sampler_name": "euler",
                              "scheduler": "normal", "positive": positive, "negative": positive, "latent_image": latent,
                              "denoise": 0.6} | inputs)[0]


@line("KSampler", "KSamplerAdvanced", batch=WORKS, clip=NO)
def samplers():
    latent = {"samples": latents(), "cv_vae": {"mode": "video", "frames": 15}}
    out = sample(diffusion_model(), conditioning(), latent)
    shape(out["samples"], 5, 4, 6, 8)
    assert len(run("CVVAEDecode", samples=out, vae=load())[0]) == 15
    advanced = {"add_noise": "enable", "noise_seed": 0, "steps": 2, "cfg": 2.0, "sampler_name": "euler",
                "scheduler": "normal", "positive": conditioning(), "negative": conditioning(), "start_at_step": 1,
                "end_at_step": 2, "return_with_leftover_noise": "disable", "model": diffusion_model()}
    shape(run("KSamplerAdvanced", **advanced, latent_image=latent)[0]["samples"], 5, 4, 6, 8)
    five = {"samples": as_clips(latents())}
    raises("conv2d", sample, diffusion_model(), conditioning(), five)
    raises("conv2d", run, "KSamplerAdvanced", **advanced, latent_image=five)
    raises("dimensions", sample, diffusion_model("SVD_img2vid"), svd_conditioning(), five)


@line("SetLatentNoiseMask", batch=WORKS, clip=WORKS)
def a_mask_keeps_what_it_covers():
    """One mask for all latents, or one for each latent (not for each frame)."""
    mask = host.torch.zeros(5, 48, 64)
    mask[2:] = 1
    masked = run("SetLatentNoiseMask", samples={"samples": latents()}, mask=mask)[0]
    out = sample(diffusion_model(), conditioning(), masked)["samples"]
    close(out[:2], latents()[:2], 1e-4)
    assert (out[2:] - latents()[2:]).abs().max() > 0.1
    five = run("SetLatentNoiseMask", samples={"samples": as_clips(latents())}, mask=mask)[0]
    trimmed = run("CVVAETrimLatents", samples=five, start=0, frames=9)[0]
    shape(trimmed["noise_mask"], 1, 1, 3, 48, 64)


@line("SamplerCustom", "SamplerCustomAdvanced", batch=WORKS, clip=NO)
def custom_samplers():
    parts = custom_sampling()
    for latent, expected in (latents(), True), (as_clips(latents()), False):
        one = {"model": diffusion_model(), "add_noise": True, "noise_seed": 0, "cfg": 2.0, "positive": conditioning(),
               "negative": conditioning(), "sampler": parts.sampler, "sigmas": parts.sigmas,
               "latent_image": {"samples": latent}}
        other = {"noise": parts.noise, "guider": parts.guider, "sampler": parts.sampler, "sigmas": parts.sigmas,
                 "latent_image": {"samples": latent}}
        for node, inputs in ("SamplerCustom", one), ("SamplerCustomAdvanced", other):
            if expected:
                shape(run(node, **inputs)[0]["samples"], 5, 4, 6, 8)
            else:
                raises("conv2d", run, node, **inputs)


def custom_sampling():
    model = diffusion_model()
    return SimpleNamespace(
        sampler=run("KSamplerSelect", sampler_name="euler")[0], noise=run("RandomNoise", noise_seed=0)[0],
        sigmas=run("BasicScheduler", model=model, scheduler="normal", steps=1, denoise=0.6)[0],
        guider=run("CFGGuider", model=model, positive=conditioning(), negative=conditioning(), cfg=2.0)[0])


@line("AddNoise", batch=WORKS, clip=WORKS)
def add_noise():
    parts = custom_sampling()
    for samples in latents(), as_clips(latents()):
        out = run("AddNoise", model=diffusion_model(), noise=parts.noise, sigmas=parts.sigmas,
                  latent_image={"samples": samples})[0]
        shape(out["samples"], *samples.shape)


@line("TrainLoraNode", batch=WORKS, clip=NO)
def training_a_lora():
    settings = {"batch_size": 1, "steps": 1, "training_dtype": "fp32", "lora_dtype": "fp32", "grad_accumulation_steps": 1,
                "learning_rate": 1e-4, "rank": 1, "optimizer": "SGD", "seed": 0, "loss_function": "MSE",
                "algorithm": "LoRA", "gradient_checkpointing": False, "existing_lora": "[None]", "checkpoint_depth": 1,
                "offloading": False, "quantized_backward": False, "bucket_mode": False, "bypass_mode": False}
    known = {widget.id for widget in host.nodes.NODE_CLASS_MAPPINGS["TrainLoraNode"].GET_SCHEMA().inputs}
    inputs = {name: [value] for name, value in settings.items() if name in known}
    train = functools.partial(run, "TrainLoraNode", **inputs, model=[diffusion_model()], positive=[conditioning()])
    assert train(latents=[{"samples": latents(1)}])
    raises("", train, latents=[{"samples": as_clips(latents())}])


# -- latents -----------------------------------------------------------------------------------------


@line("EmptyLatentImage", batch=WORKS)
def empty_latents():
    empty = run("EmptyLatentImage", width=64, height=48, batch_size=5)[0]
    shape(empty["samples"], 5, 4, 6, 8)
    assert frames(empty["samples"]) == 17


@line("EmptySD3LatentImage", batch=WORKS)
def empty_latents_of_sixteen_channels():
    empty = run("EmptySD3LatentImage", width=64, height=48, batch_size=2)[0]
    assert frames(empty["samples"], host.native.NativeVAE(small("sd3", 16), "video", host.torch.float32)) == 5


@line("LatentUpscale", "LatentUpscaleBy", batch=WORKS, clip=WORKS)
def upscaling():
    for method in "nearest-exact", "bilinear", "bicubic", "bislerp":
        by = same_for_both(lambda x, m=method: run("LatentUpscaleBy", samples=x, upscale_method=m, scale_by=1.5)[0])
        shape(by, 5, 4, 9, 12)
    to = same_for_both(lambda x: run("LatentUpscale", samples=x, upscale_method="bilinear", width=128, height=96,
                                     crop="center")[0])
    shape(to, 5, 4, 12, 16)


@line("LatentFlip", "LatentRotate", batch=WORKS, clip=NO)
def flips_and_turns():
    torch, samples = host.torch, latents()
    for method, axis in ("x-axis: vertically", -2), ("y-axis: horizontally", -1):
        close(run("LatentFlip", samples={"samples": samples}, flip_method=method)[0]["samples"], samples.flip(axis), 0)
    turned = run("LatentRotate", samples={"samples": samples}, rotation="90 degrees")[0]["samples"]
    close(turned, torch.rot90(samples, 1, (-1, -2)), 0)
    five = as_clips(samples)
    flipped = run("LatentFlip", samples={"samples": five}, flip_method="x-axis: vertically")[0]["samples"]
    close(flipped, five.flip(2), 0)  # time runs backward
    shape(run("LatentRotate", samples={"samples": five}, rotation="90 degrees")[0]["samples"], 1, 4, 6, 5, 8)


@line("LatentCrop", batch=WORKS, clip=NO)
def crops():
    samples = latents(5, 16, 16)
    inputs = {"width": 64, "height": 72, "x": 16, "y": 8}
    close(run("LatentCrop", samples={"samples": samples}, **inputs)[0]["samples"], samples[:, :, 1:10, 2:10], 0)
    cropped = run("LatentCrop", samples={"samples": as_clips(latents(12, 16, 16))}, **inputs)[0]["samples"]
    assert cropped.shape[2] < 12 and cropped.shape[-1] == 16, "cropped in time"


@line("LatentComposite", "LatentCompositeMasked", batch=WORKS, clip=NO)
def composites():
    below, above = latents(9), latents(9, 3, 4, seed=1)
    expected = below.clone()
    expected[:, :, 2:5, 1:5] = above
    plain = {"x": 8, "y": 16, "feather": 0}
    close(run("LatentComposite", samples_to={"samples": below}, samples_from={"samples": above}, **plain)[0]["samples"],
          expected, 0)
    masked = {"x": 8, "y": 16, "resize_source": False}
    for mask in None, host.torch.ones(1, 24, 32):
        out = run("LatentCompositeMasked", destination={"samples": below}, source={"samples": above}, mask=mask, **masked)
        close(out[0]["samples"], expected, 0)
    below, above = as_clips(below), as_clips(above)
    raises("", run, "LatentComposite", samples_to={"samples": below}, samples_from={"samples": above}, **plain)
    raises("", run, "LatentCompositeMasked", destination={"samples": below}, source={"samples": above}, **masked)


@line("LatentBlend", "LatentAdd", "LatentSubtract", "LatentMultiply", batch=WORKS, clip=WORKS)
def arithmetic():
    one, other = latents(), latents(seed=1)

    def second(x):
        return {"samples": other if x["samples"].ndim == 4 else as_clips(other)}

    for node, inputs, expected in (("LatentBlend", {"blend_factor": 0.25}, 0.25 * one + 0.75 * other),
                                   ("LatentAdd", {}, one + other), ("LatentSubtract", {}, one - other)):
        close(same_for_both(lambda x, n=node, i=inputs: run(n, samples1=x, samples2=second(x), **i)[0]), expected)
    close(same_for_both(lambda x: run("LatentMultiply", samples=x, multiplier=2.0)[0]), 2 * one)


@line("LatentInterpolate", batch=NO, clip=SETTING)
def interpolation():
    """It looks for the channels' length along another axis: right for one clip with a time axis only."""
    def halfway(one, other):
        return run("LatentInterpolate", samples1={"samples": one}, samples2={"samples": other}, ratio=1.0)[0]["samples"]

    one, other = as_clips(latents()), as_clips(latents(seed=1))
    close(halfway(one, other), one, 1e-5)
    raises("size", halfway, latents(), latents(seed=1))  # five latents
    wrong = halfway(latents(4), latents(4, seed=1))  # as many as channels: no error
    middle = run("LatentInterpolate", samples1={"samples": latents(4)}, samples2={"samples": latents(4, seed=1)},
                 ratio=0.5)[0]["samples"]
    right = run("LatentInterpolate", samples1={"samples": as_clips(latents(4))},
                samples2={"samples": as_clips(latents(4, seed=1))}, ratio=0.5)[0]["samples"]
    assert wrong.shape == middle.shape and (as_clips(middle) - right).abs().max() > 0.1


@line("LatentConcat", "LatentCut", "LatentCutToBatch", batch=SETTING, clip=SETTING)
def joining_and_cutting():
    """In space they work; "t" is the channel axis of frames as batch, and of clips it puts latents of four frames first."""
    def joined(dim, x):
        return run("LatentConcat", samples1=x, samples2={"samples": x["samples"] * 2}, dim=dim)[0]

    for dim, axis, order in ("x", -1, (1, 2)), ("-y", -2, (2, 1)):
        close(same_for_both(functools.partial(joined, dim)), host.torch.cat([latents() * k for k in order], axis), 0)
    part = same_for_both(lambda x: run("LatentCut", samples=x, dim="y", index=1, amount=3)[0])
    close(part, latents()[:, :, 1:4], 0)
    batch = {"samples": latents()}
    shape(run("LatentCutToBatch", samples=batch, dim="x", slice_size=4)[0]["samples"], 10, 4, 6, 4)
    shape(joined("t", batch)["samples"], 5, 8, 6, 8)
    shape(run("LatentCut", samples=batch, dim="t", index=1, amount=3)[0]["samples"], 5, 3, 6, 8)
    five = {"samples": as_clips(latents())}
    assert frames(joined("t", five)["samples"]) == 37, "two clips of 17 frames"
    shape(run("LatentCut", samples=five, dim="t", index=0, amount=3)[0]["samples"], 1, 4, 3, 6, 8)


@line("LatentFromBatch", batch=SETTING, clip=WORKS)
def parts_of_a_batch():
    """From the first latent on it is the beginning of the clip; from another one on, four frames are taken for one."""
    picked = run("LatentFromBatch", samples={"samples": latents()}, batch_index=0, length=3)[0]
    close(picked["samples"], latents()[:3], 0)
    two = host.torch.cat([as_clips(latents()), as_clips(latents(seed=1))])
    close(run("LatentFromBatch", samples={"samples": two}, batch_index=1, length=1)[0]["samples"], two[1:], 0)


@line("RepeatLatentBatch", batch=NO, clip=WORKS)
def repeats():
    inputs = {"amount": 2}
    assert frames(run("RepeatLatentBatch", samples={"samples": latents()}, **inputs)[0]["samples"]) == 37
    assert frames(run("RepeatLatentBatch", samples={"samples": as_clips(latents())}, **inputs)[0]["samples"]) == 34


@line("LatentBatch", "BatchLatentsNode", batch=SETTING, clip=WORKS)
def batches():
    """Frames as batch become one longer clip, in which the second one's first latent stands for four frames."""
    for layout, in_all in (latents, 37), (lambda **inputs: as_clips(latents(**inputs)), 34):
        one, other = {"samples": layout()}, {"samples": layout(seed=1)}
        for out in (run("LatentBatch", samples1=one, samples2=other),
                    run("BatchLatentsNode", latents={"latent0": one, "latent1": other})):
            assert frames(out[0]["samples"]) == in_all
    pictures = run("LatentBatch", samples1={"samples": latents()}, samples2={"samples": latents()})[0]["samples"]
    assert frames(pictures, load("independent images")) == 10


@line("RebatchLatents", batch=SETTING, clip=WORKS)
def rebatching():
    """A batch cut into parts is cut into clips; with a batch size that holds all of it nothing changes."""
    parts = run("RebatchLatents", latents=[{"samples": latents()}], batch_size=[3])[0]
    assert [frames(part["samples"]) for part in parts] == [9, 5]
    [whole] = run("RebatchLatents", latents=[{"samples": latents()}], batch_size=[64])[0]
    close(whole["samples"], latents(), 0)
    two = host.torch.cat([as_clips(latents()), as_clips(latents(seed=1))])
    parts = run("RebatchLatents", latents=[{"samples": two}], batch_size=[1])[0]
    close(host.torch.cat([part["samples"] for part in parts]), two, 0)


@line("LatentBatchSeedBehavior", batch=WORKS, clip=WORKS)
def seeds():
    out = same_for_both(lambda x: run("LatentBatchSeedBehavior", samples=x, seed_behavior="fixed")[0])
    close(out, latents(), 0)


@line("LatentApplyOperation", batch=WORKS, clip=NO)
def operations():
    """Tone mapping works on clips too; sharpening, the other operation there is, does not."""
    sharpen = run("LatentOperationSharpen", sharpen_radius=2)[0]
    tone = run("LatentOperationTonemapReinhard")[0]
    for operation in sharpen, tone:
        out = run("LatentApplyOperation", samples={"samples": latents()}, operation=operation)[0]["samples"]
        one = run("LatentApplyOperation", samples={"samples": latents()[1:2]}, operation=operation)[0]["samples"]
        close(out[1:2], one)
    raises("", run, "LatentApplyOperation", samples={"samples": as_clips(latents())}, operation=sharpen)


@line("ReplaceVideoLatentFrames", batch=NO, clip=SETTING)
def replacing():
    inputs = {"destination": {"samples": as_clips(latents())}, "source": {"samples": as_clips(latents(2, seed=1))},
              "index": 0}
    expected = as_clips(host.torch.cat([latents(2, seed=1), latents()[2:]]))
    close(run("ReplaceVideoLatentFrames", **inputs)[0]["samples"], expected, 0)
    raises("", run, "ReplaceVideoLatentFrames", destination={"samples": latents()}, source={"samples": latents(2)}, index=0)


@line("TrimVideoLatent", batch=NO, clip=NO)
def trimming_the_start():
    """Rows of frames as batch; of a clip the first latents, so that one of four frames comes first."""
    shape(run("TrimVideoLatent", samples={"samples": latents()}, trim_amount=2)[0]["samples"], 5, 4, 4, 8)
    trimmed = run("TrimVideoLatent", samples={"samples": as_clips(latents())}, trim_amount=2)[0]["samples"]
    assert frames(trimmed) == 9, "three latents stand for 12 frames there"


@line("NormalizeVideoLatentStart", batch=NO, clip=WORKS)
def normalizing_the_start():
    inputs = {"start_frame_count": 1, "reference_frame_count": 4}
    five = run("NormalizeVideoLatentStart", latent={"samples": as_clips(latents())}, **inputs)[0]["samples"]
    close(five[:, :, 1:], as_clips(latents())[:, :, 1:], 0)
    assert not host.torch.equal(five[:, :, 0], as_clips(latents())[:, :, 0])
    raises("Dimension", run, "NormalizeVideoLatentStart", latent={"samples": latents()}, **inputs)


# -- devices -----------------------------------------------------------------------------------------


@line("SelectVAEDevice", batch=WORKS, since="0.23.0")
def a_device_chosen_by_hand():
    vae = load()
    chosen = run("SelectVAEDevice", vae=vae, device="default")[0]
    assert chosen is not vae and chosen.device == vae.device
    close(chosen.decode(latents(2)), vae.decode(latents(2)), 0)


# -- VIDEO -------------------------------------------------------------------------------------------


def film(frames_in_it=7, fps=Fraction(24000, 1001), rate=8000):
    """A VIDEO with sound, as Create Video makes it; and its sound."""
    from comfy_api.v0_0_2 import InputImpl, Types

    seconds = frames_in_it / fps
    wave = host.torch.sin(host.torch.arange(int(seconds * rate)) / 3)[None, None]
    sound = {"waveform": wave, "sample_rate": rate}
    parts = Types.VideoComponents(images=clip(frames_in_it), frame_rate=fps, audio=sound)
    return InputImpl.VideoFromComponents(parts), sound


@line("CreateVideo", "GetVideoComponents", batch=WORKS)
def videos_of_parts():
    vae = load()
    video = run("CreateVideo", images=clip(7), fps=12.0)[0]
    latent = run("CVVAEEncode", pixels=video, vae=vae)[0]
    close(latent["samples"], run("CVVAEEncode", pixels=clip(7), vae=vae)[0]["samples"], 0)
    images, decoded = run("CVVAEDecode", samples=latent, vae=vae)
    again, sound, fps = run("GetVideoComponents", video=decoded)[:3]
    close(again, images, 0)
    assert sound is None and fps == 12 and len(images) == 7


@line("LoadVideo", "SaveVideo", batch=WORKS)
def videos_in_files():
    import av
    import comfy.cli_args

    film()[0].save_to(str(host.base / "input" / "film.mp4"))
    video = run("LoadVideo", file="film.mp4")[0]
    vae = load()
    decoded = run("CVVAEDecode", samples=run("CVVAEEncode", pixels=video, vae=vae)[0], vae=vae)[1]
    node = host.nodes.NODE_CLASS_MAPPINGS["SaveVideo"]
    kinds = {widget.id: widget.get_io_type() for widget in node.GET_SCHEMA().inputs}
    codec = "auto" if kinds["codec"] == "COMBO" else None
    before, comfy.cli_args.args.disable_metadata = comfy.cli_args.args.disable_metadata, True
    try:
        run("SaveVideo", video=decoded, filename_prefix="film", format="auto", codec=codec)
    finally:
        comfy.cli_args.args.disable_metadata = before
    [path] = (host.base / "output").glob("film_*.mp4")
    with av.open(str(path)) as file:
        assert file.streams.audio and file.streams.video[0].average_rate == Fraction(23976, 1000)
        assert sum(1 for _ in file.decode(video=0)) == 7


@line("Video Slice", batch=WORKS, since="0.14.0")
def a_video_cut_by_seconds():
    film(17)[0].save_to(str(host.base / "input" / "long.mp4"))
    cut = run("Video Slice", video=run("LoadVideo", file="long.mp4")[0], start_time=0.0, duration=0.5, strict_duration=False)
    assert run("CVVAEEncode", pixels=cut[0], vae=load())[0]["cv_vae"]["frames"] == 12


@line("VideoTemporalCrop", "VideoRandomTemporalCrop", "VideoFrameSample", "LoadVideoDataSetFromFolder",
      "LoadVideoTextDataSetFromFolder", "ShuffleVideoDataset", "ShuffleVideoTextDataset", batch=WORKS, since="0.29.0")
def videos_from_folders():
    folder = host.base / "input" / "films"
    folder.mkdir()
    film(17)[0].save_to(str(folder / "film.mp4"))
    (folder / "film.txt").write_text("a film")
    [video] = run("LoadVideoDataSetFromFolder", folder="films")[0]
    [same] = run("LoadVideoTextDataSetFromFolder", folder="films")[0]
    [shuffled] = run("ShuffleVideoDataset", videos=[video], seed=[0])[0]
    [with_text] = run("ShuffleVideoTextDataset", videos=[same], texts=["a film"], seed=[0])[0]
    for length, cut in ((17, shuffled), (17, with_text),
                        (5, run("VideoTemporalCrop", video=video, start_frame=4, length=5)[0]),
                        (5, run("VideoRandomTemporalCrop", video=video, length=5, seed=0)[0]),
                        (4, run("VideoFrameSample", video=video, num_frames=4)[0])):
        latent = run("CVVAEEncode", pixels=cut, vae=load())[0]
        assert latent["cv_vae"]["frames"] == length, f"{latent['cv_vae']['frames']} instead of {length}"


@check
def speed_and_sound_of_a_video_come_back():
    vae, (video, sound) = load(), film()
    latent = run("CVVAEEncode", pixels=video, vae=vae)[0]
    parts = run("CVVAEDecode", samples=latent, vae=vae)[1].get_components()
    assert parts.frame_rate == Fraction(24000, 1001) and len(parts.images) == 7
    assert host.torch.equal(parts.audio["waveform"], sound["waveform"])


@check
def sound_does_not_stay_where_frames_went():
    vae, (video, _) = load(), film(9)
    latent = run("CVVAEEncode", pixels=video, vae=vae)[0]
    backward = run("CVVAETrimLatents", samples=latent, play="backward", vae=vae)[0]
    other_speed = {"samples": latent, "fps": 12.0}
    shorter = {"samples": latent, "frames": 5}
    for inputs, fps in ({"samples": backward}, Fraction(24000, 1001)), (other_speed, 12), (shorter, Fraction(24000, 1001)):
        parts = run("CVVAEDecode", **inputs, vae=vae)[1].get_components()
        assert parts.audio is None and parts.frame_rate == fps


@check
def frames_without_a_speed_get_one():
    vae = load()
    latent = run("CVVAEEncode", pixels=clip(5), vae=vae)[0]
    assert run("CVVAEDecode", samples=latent, vae=vae)[1].get_components().frame_rate == 24
    assert run("CVVAEDecode", samples=latent, vae=vae, fps=29.97)[1].get_components().frame_rate == Fraction(2997, 100)
    assert set(latent["cv_vae"]) == {"mode", "frames", "height", "width"}


@check
def other_nodes_take_videos():
    video, _ = film(9)
    of_video = run("CVVAEEvaluate", vae=load(), images=video, teacher="none", frames=5)
    of_images = run("CVVAEEvaluate", vae=load(), images=clip(9), teacher="none", frames=5)
    assert of_video[0] == of_images[0]
    images, fps, film_of_it = run("CVVAEExample", media="flower clip (33 frames)")
    close(film_of_it.get_components().images, images, 0)
    assert film_of_it.get_components().frame_rate == fps == 15


@check
def a_video_without_frames_is_refused():
    video = SimpleNamespace(get_components=lambda: SimpleNamespace(images=host.torch.zeros(0, 3, 0, 0)))
    raises("has no frames", run, "CVVAEEncode", pixels=video, vae=load())


def main(pack, base, names):
    def with_core_nodes(nodes):
        asyncio.run(nodes.init_builtin_extra_nodes())

    contract.main(pack, base, names, with_core_nodes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
