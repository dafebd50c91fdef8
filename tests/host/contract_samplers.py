"""Samplers of the host on latents of ours, in both modes; run and read as contract.py, whose machinery this is.

    cd COMFYUI; python contract_samplers.py PACK BASE_DIRECTORY [check ...]

The models are narrow twins with random weights, built from the host's own classes and loaded by its own loaders: the
layers, shapes and latent formats are the published models', the pictures are noise.
"""

import asyncio
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

FOLDER = Path(__file__).parent


def module_of(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


contract = module_of("contract_machinery", FOLDER / "contract.py")
CHECKS, host, check, clip, close, load, run, shape = (
    getattr(contract, name) for name in "CHECKS host check clip close load run shape".split())
CHECKS.clear()  # contract.py's own run by itself

IMAGES = "independent images"


@cache
def stand_ins():
    """The pack that writes the twins; and the host's nodes for SVD, which it loads as a pack of its own."""
    extras = Path(host.nodes.__file__).parent / "comfy_extras" / "nodes_video_model.py"
    asyncio.run(host.nodes.load_custom_node(str(extras), module_parent="comfy_extras"))
    return module_of("stand_ins", FOLDER / "stand_ins" / "__init__.py")


@cache
def sd15():
    """The model, conditioning and stock VAE of the twin of Stable Diffusion 1.5."""
    stand_ins()
    model, text, vae = run("CheckpointLoaderSimple", ckpt_name="narrow_sd15.safetensors")
    positive, negative = (run("CLIPTextEncode", text=words, clip=text)[0] for words in ("a lighthouse", ""))
    return SimpleNamespace(model=model, positive=positive, negative=negative, vae=vae)


def sample(latent, of=None, **inputs):
    of = of or sd15()
    settings = {"seed": 7, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    return run("KSampler", model=of.model, positive=of.positive, negative=of.negative, latent_image=latent,
               **settings | inputs)[0]


def decode(latent, vae):
    return run("VAEDecode", samples=latent, vae=vae)[0]


def sound(images):
    """What every stock node expects of an IMAGE."""
    assert images.dtype == host.torch.float32 and images.device.type == "cpu", (images.dtype, images.device)
    assert images.min() >= 0 and images.max() <= 1 and images.isfinite().all()


# -- text to image, and to video ---------------------------------------------------------------------


@check
def text_to_image_in_image_mode():
    latent = sample(run("EmptyLatentImage", width=64, height=48, batch_size=1)[0])
    for mode in (IMAGES, "video clip"):  # one latent is one frame either way
        images = decode(latent, load(mode))
        shape(images, 1, 48, 64, 3)
        sound(images)


@check
def a_batch_of_seeds_is_pictures_or_a_clip():
    latent = sample(run("EmptyLatentImage", width=64, height=48, batch_size=5)[0])
    images = decode(latent, load(IMAGES))
    shape(images, 5, 48, 64, 3)
    alone = host.torch.cat([decode({"samples": one[None]}, load(IMAGES)) for one in latent["samples"]])
    close(images, alone)
    frames = decode(latent, load())
    shape(frames, 17, 48, 64, 3)
    sound(frames)
    assert not host.torch.allclose(frames[::4], images, atol=0.02), "time made no difference"


@check
def frames_as_batch_of_animatediff():
    """[t, 4, h, w] made for t latents, sampled, and decoded to 4t - 3 frames, the length that was asked for."""
    empty, frames = run("CVVAEEmptyLatents", width=64, height=48, frames=15)
    latent = sample(empty)
    shape(latent["samples"], 5, 4, 6, 8)
    decoded = run("CVVAEDecode", samples=latent, vae=load())[0]
    shape(decoded, 15, 48, 64, 3)
    close(decoded, decode(latent, load())[:15])


@check
def the_same_seed_gives_the_same_frames():
    empty = run("EmptyLatentImage", width=64, height=48, batch_size=2)[0]
    one, other = sample(empty), sample(empty)
    close(one["samples"], other["samples"], 0)
    close(decode(one, load()), decode(other, load()), 0)


@check
def image_mode_stands_in_for_the_stock_vae():
    """The same latents through both: shape, range, dtype and device; of the values only what an image VAE promises."""
    latent = sample(run("EmptyLatentImage", width=64, height=48, batch_size=3)[0])
    stock, ours = decode(latent, sd15().vae), decode(latent, load(IMAGES))
    assert (stock.shape, stock.dtype, stock.device) == (ours.shape, ours.dtype, ours.device)
    sound(stock), sound(ours)
    pixels = clip(3)
    stock, ours = (run("VAEEncode", pixels=pixels, vae=vae)[0]["samples"] for vae in (sd15().vae, load(IMAGES)))
    assert (stock.shape, stock.dtype, stock.device) == (ours.shape, ours.dtype, ours.device)


# -- from pictures and clips -------------------------------------------------------------------------


@check
def image_to_image_and_video_to_video():
    for mode, latents, back in ((IMAGES, 9, 9), ("video clip", 3, 9)):
        encoded = run("VAEEncode", pixels=clip(9), vae=load(mode))[0]
        latent = sample(encoded, denoise=0.5)
        shape(latent["samples"], latents, 4, 6, 8)
        shape(decode(latent, load(mode)), back, 48, 64, 3)
        untouched = sample(encoded, denoise=0.0)
        close(untouched["samples"], encoded["samples"])  # the model's scale goes on and comes off again
    encoded = run("CVVAEEncode", pixels=clip(11, 50, 66), vae=load())[0]
    shape(run("CVVAEDecode", samples=sample(encoded, denoise=0.5), vae=load())[0], 11, 50, 66, 3)


@check
def inpainting_keeps_what_is_not_masked():
    mask = host.torch.zeros(1, 48, 64)
    mask[:, :, 32:] = 1
    encoded = run("VAEEncode", pixels=clip(9), vae=load())[0]
    latent = sample(run("SetLatentNoiseMask", samples=encoded, mask=mask)[0])
    close(latent["samples"][..., :3], encoded["samples"][..., :3], 1e-4)
    assert (latent["samples"][..., 5:] - encoded["samples"][..., 5:]).abs().mean() > 0.1
    latent = sample(run("VAEEncodeForInpaint", pixels=clip(9), vae=load(), mask=mask, grow_mask_by=0)[0])
    shape(decode(latent, load()), 9, 48, 64, 3)


@check
def upscaled_latents():
    encoded = run("VAEEncode", pixels=clip(9), vae=load())[0]
    larger = run("LatentUpscaleBy", samples=encoded, upscale_method="bilinear", scale_by=2.0)[0]
    shape(decode(sample(larger, denoise=0.5), load()), 9, 96, 128, 3)


# -- other models ------------------------------------------------------------------------------------


@check
def svd_is_shown_a_picture_and_makes_four_times_the_frames():
    stand_ins()
    model, vision, _ = run("ImageOnlyCheckpointLoader", ckpt_name="narrow_svd.safetensors")
    positive, negative, latent = run("SVD_img2vid_Conditioning", clip_vision=vision, init_image=clip(1), vae=load(),
                                     width=64, height=48, video_frames=14, motion_bucket_id=127, fps=6,
                                     augmentation_level=0.02)
    shown = positive[0][1]["concat_latent_image"]
    shape(shown, 1, 4, 6, 8)
    svd = SimpleNamespace(model=model, positive=positive, negative=negative)
    latent = sample(latent, svd)
    shape(latent["samples"], 14, 4, 6, 8)
    frames = decode(latent, load())
    shape(frames, 53, 48, 64, 3)
    sound(frames)
    shape(decode(latent, load(IMAGES)), 14, 48, 64, 3)


@check
def what_svd_is_shown_is_the_picture():
    """Its conditioning holds the picture's latent as our VAE encodes one frame, in either mode."""
    stand_ins()
    vision = run("ImageOnlyCheckpointLoader", ckpt_name="narrow_svd.safetensors")[1]
    found = [run("SVD_img2vid_Conditioning", clip_vision=vision, init_image=clip(1), vae=load(mode), width=64, height=48,
                 video_frames=14, motion_bucket_id=127, fps=6, augmentation_level=0.0)[0][0][1]["concat_latent_image"]
             for mode in (IMAGES, "video clip")]
    close(found[0], found[1])
    close(found[0], run("VAEEncode", pixels=clip(1), vae=load())[0]["samples"])


@check
def sd21_predicts_v():
    """A model of another prediction and width of text, on the same latents."""
    import comfy.sd
    from comfy import model_base, supported_models

    width, text = stand_ins().WIDTH, 48

    class NarrowSD21(supported_models.SD20):
        unet_config = supported_models.SD20.unet_config | {"model_channels": width, "context_dim": text}
        unet_extra_config = supported_models.SD20.unet_extra_config | {"num_head_channels": width}

    supported_models.models.insert(0, NarrowSD21)
    torch = host.torch
    state = {}
    for name, weight in stand_ins().unet(NarrowSD21).items():
        state[name] = torch.randn(weight.shape) * (weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.5)
    model = comfy.sd.load_diffusion_model_state_dict(state)
    assert model.model.model_type == model_base.ModelType.V_PREDICTION
    sd21 = SimpleNamespace(model=model, positive=[[torch.randn(1, 77, text), {}]], negative=[[torch.zeros(1, 77, text), {}]])
    latent = sample(run("EmptyLatentImage", width=64, height=48, batch_size=5)[0], sd21)
    frames = decode(latent, load())
    shape(frames, 17, 48, 64, 3)
    sound(frames)


@check
def sd3_has_sixteen_channels_and_a_shift_of_its_own():
    """Scale and shift of SD 3's latents are the model's: what our VAE encodes goes in and comes out as it is."""
    import comfy.sd
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT

    torch, cvvae = host.torch, host.cvvae
    size = dict(input_size=None, patch_size=2, in_channels=16, depth=1, pos_embed_max_size=16, num_patches=256,
                adm_in_channels=2048, context_embedder_config={"target": "torch.nn.Linear",
                                                               "params": {"in_features": 4096, "out_features": 64}})
    with torch.inference_mode(False):
        mmdit = MMDiT(**size, operations=torch.nn, dtype=torch.float32)
        state = {name: torch.randn(weight.shape) * 0.05 for name, weight in mmdit.state_dict().items()}
        image_vae = cvvae.ImageVAE(cvvae.Config("image", 16, (8, 8, 8, 8), 1, norm_groups=4))
        path = host.base / "models" / "vae" / "sixteen.safetensors"
        host.checkpoint.save(cvvae.inflate(image_vae), path)
    model = comfy.sd.load_diffusion_model_state_dict(state)
    assert type(model.model).__name__ == "SD3", type(model.model)
    latent_format = model.model.latent_format
    assert latent_format.shift_factor and latent_format.scale_factor != 1
    vae = load(vae_name="sixteen.safetensors")
    encoded = run("VAEEncode", pixels=clip(9), vae=vae)[0]
    shape(encoded["samples"], 3, 16, 6, 8)
    told = [[torch.zeros(1, 8, 4096), {"pooled_output": torch.zeros(1, 2048)}]]
    sd3 = SimpleNamespace(model=model, positive=told, negative=told)
    close(sample(encoded, sd3, denoise=0.0)["samples"], encoded["samples"])
    latent = sample(encoded, sd3, denoise=0.5)
    frames = decode(latent, vae)
    shape(frames, 9, 48, 64, 3)
    sound(frames)


if __name__ == "__main__":
    contract.main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
