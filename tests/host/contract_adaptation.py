"""What adapting a sampler must do in a host; run and read as contract.py, whose machinery this is.

    cd COMFYUI; python contract_adaptation.py PACK BASE_DIRECTORY [check ...]

Samplers are of the host's own classes, at a width that takes seconds, with random weights.
"""

import importlib
import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

spec = importlib.util.spec_from_file_location("contract_machinery", Path(__file__).with_name("contract.py"))
contract = importlib.util.module_from_spec(spec)
spec.loader.exec_module(contract)
CHECKS, host, check, clip, close, load, raises, run = (
    getattr(contract, name) for name in "CHECKS host check clip close load raises run".split())
CHECKS.clear()  # contract.py's own run by itself

FRAMES = 17  # 5 latents
HELD_OUT = ["f"]


# -- samplers, clips, runs ---------------------------------------------------------------------------


def lib(name):
    """A module of the pack's library."""
    return importlib.import_module(f"{host.cvvae.__name__}.{name}")


def unet_config(kind):
    """As the host's detection has it for SD 1.x, SD 2.x and SVD, one level of 64 channels.

    "sd15 in full": all levels and blocks of SD 1.5, at a tenth of its width.
    """
    config = dict(image_size=32, in_channels=4, out_channels=4, model_channels=64, num_res_blocks=[1], channel_mult=[1],
                  transformer_depth=[1], transformer_depth_output=[1, 1], transformer_depth_middle=1, context_dim=16,
                  use_spatial_transformer=True, legacy=False, dtype=host.torch.float32,
                  use_linear_in_transformer=not kind.startswith("sd15"), adm_in_channels=None, use_temporal_attention=False,
                  use_temporal_resblock=False)
    if kind == "sd15 in full":
        config |= dict(model_channels=32, num_res_blocks=[2] * 4, channel_mult=[1, 2, 4, 4], num_heads=8,
                       transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0], transformer_depth_output=[1] * 9 + [0] * 3)
    if kind == "svd":
        config |= dict(in_channels=8, num_classes="sequential", adm_in_channels=768, use_temporal_attention=True,
                       use_temporal_resblock=True, extra_ff_mix_layer=True, use_spatial_context=True, merge_factor=0.0,
                       merge_strategy="learned_with_images", video_kernel_size=[3, 1, 1])
    return config


def sampler(kind, seed=0):
    """A MODEL of the host."""
    from comfy import model_base, model_patcher, supported_models

    classes = {"sd15": supported_models.SD15, "sd21": supported_models.SD20, "svd": supported_models.SVD_img2vid}
    config = classes[kind.split()[0]](unet_config(kind))
    config.set_inference_dtype(host.torch.float32, None)
    if kind == "svd":
        model = model_base.SVD_img2vid(config)
    else:
        model = model_base.BaseModel(config, model_base.ModelType["V_PREDICTION" if kind == "sd21" else "EPS"])
    generator = host.torch.Generator().manual_seed(seed)
    for parameter in model.diffusion_model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        parameter.data = host.torch.randn(parameter.shape, generator=generator) / fan_in ** 0.5
    cpu = host.torch.device("cpu")
    return model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def latents():
    """A folder of latents of six clips, a moving pattern each."""
    folder = host.base / "latents"
    if not (folder / "manifest.csv").exists():
        videos = host.base / "input" / "moving"
        videos.mkdir(exist_ok=True)
        for seed, name in enumerate("abcdef"):
            host.training.write_clip(videos / f"{name}.mkv", clip(FRAMES, 64, 64, seed=seed))
        dataset = lib("dataset")
        with host.torch.inference_mode(False):
            dataset.encode_dataset(host.cvvae.load("tiny"), [str(videos)], folder, dataset.Settings())
    return folder


def motion_file(places=("down_blocks.0.motion_modules.0", "up_blocks.0.motion_modules.0", "up_blocks.0.motion_modules.1"),
                channels=(64, 64, 64), length=32, seed=4):
    """A motion module of AnimateDiff for a narrow UNet, its weights random; returns the file."""
    motion, torch = lib("adaptation.motion"), host.torch
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for place, width in zip(places, channels, strict=True):
        for name, tensor in motion.TemporalTransformer(width, length).state_dict().items():
            tensors[f"{place}.temporal_transformer.{name}"] = torch.randn(tensor.shape, generator=generator) / width ** 0.5
    file = host.base / f"motion_{len(places)}_{length}_{seed}.ckpt"
    torch.save({"epoch": 1, "state_dict": tensors}, file)
    return file


def put_into(unet, file):
    with host.torch.inference_mode(False):
        lib("adaptation.comfyui").put_into(unet, lib("adaptation.motion").load_motion(file))


class PictureEncoder:
    """Stands in for SVD's CLIP_VISION, which is 630M weights."""

    def encode_image(self, picture):
        assert picture.shape[0] == 1 and picture.shape[3] == 3 and 0 <= picture.min() and picture.max() <= 1
        return {"image_embeds": picture.mean((1, 2)).repeat(1, 6)[:, :16]}


def conditioner(model, **settings):
    comfyui, torch = lib("adaptation.comfyui"), host.torch
    if model.shows_first_frame:
        config = lib("adaptation.config").ConditioningConfig(**settings)
        return comfyui.FirstFrameConditioner(model, PictureEncoder(), host.cvvae.load("tiny"), config, {})
    context = torch.randn(7, 16, generator=torch.Generator().manual_seed(5))
    return comfyui.FixedConditioner(context, torch.zeros(7, 16), {})


def config(name, train="output", layers=(), steps=6, rate=1e-3, motion="", **run_settings):
    settings = lib("adaptation.config")
    config = settings.AdaptConfig(
        settings.ModelConfig(motion=str(motion), train=train, layers=list(layers), rank=4),
        settings.DataConfig(latents=str(latents()), validation=HELD_OUT, batch=2, workers=0),
        optim=settings.OptimConfig(steps=steps, learning_rate=rate, warmup=0, ema_decay=0.9),
        run=settings.RunConfig(out=str(host.base / "runs" / name), device="cpu",
                               **(dict(save_every=2, validate_every=1000) | run_settings)))
    settings.check(config)
    return config


def trainer(model, config, resume=False):
    """As the command and the node make one; outside of inference mode."""
    comfyui, conditions = lib("adaptation.comfyui"), lib("adaptation.conditions")
    motion = config.model.motion
    taken = comfyui.Sampler(model, lib("adaptation.motion").load_motion(motion) if motion else None)
    folder = host.base / f"told_{taken.shows_first_frame}"  # once for all runs
    conditions.encode_conditions(lib("dataset").LatentDataset(config.data.latents), conditioner(taken), folder)
    return lib("adaptation.trainer").AdaptationTrainer(config, taken, folder, resume)


@contextmanager
def trainable():
    with host.torch.inference_mode(False), host.torch.enable_grad():
        yield


def outputs(unet, kind):
    """What ``unet`` makes of fixed inputs."""
    torch = host.torch
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 8 if kind == "svd" else 4, 8, 8, generator=generator)
    context = torch.randn(5, 1, 16, generator=generator)
    y = torch.randn(5, 768, generator=generator) if kind == "svd" else None
    with torch.no_grad():
        return unet(x, torch.full((5,), 0.3 if kind == "svd" else 300.0), context=context, y=y, num_video_frames=5,
                    transformer_options={}).clone()


def loaded(model, file, strength=1.0):
    """``model`` with ``file`` as the host's LoRA loader makes it, its weights patched."""
    import comfy.sd
    import comfy.utils

    patched = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(file)), strength, 0)[0]
    host.management.load_models_gpu([patched])
    return patched.model.diffusion_model


def same_state(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return host.torch.equal(a, b) if isinstance(a, host.torch.Tensor) else a == b


def load_file(path):
    import comfy.utils

    return comfy.utils.load_torch_file(str(path))


def newest(trainer):
    return host.torch.load(trainer.checkpoints.files()[-1], weights_only=True)


# -- the objective -----------------------------------------------------------------------------------


@check
def targets_are_those_the_host_denoises_with():
    """The target, given back as the network's output, must denoise to the clean latents; and it is what papers say it is."""
    torch, objective = host.torch, lib("adaptation.objective")
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(6, 4, 8, 8, generator=generator) for _ in range(2))
    for kind in ("sd15", "sd21", "svd"):
        sampling = sampler(kind).model.model_sampling
        sigma = torch.tensor([0.05, 0.3, 1.0, 2.0, 7.0, 14.0])
        s = sigma[:, None, None, None]
        noisy = sampling.noise_scaling(s, noise, clean)
        close(noisy, clean + s * noise, 1e-5)
        wanted = objective.target(sampling, sigma, noisy, clean)
        close(sampling.calculate_denoised(sigma, wanted, noisy), clean, 1e-4)
        v = (noise - s * clean) / (1 + s ** 2) ** 0.5  # of a velocity model, and of EDM's preconditioning in the host's sign
        close(wanted, noise if kind == "sd15" else v, 2e-4)


@check
def edm_targets_too():
    from comfy import model_sampling

    class Sampling(model_sampling.ModelSamplingContinuousEDM, model_sampling.EDM):
        pass

    torch, objective = host.torch, lib("adaptation.objective")
    sampling = Sampling()
    sampling.set_parameters(0.002, 80.0, 0.5)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    sigma = torch.tensor([0.05, 1.0, 20.0])
    s, data = sigma[:, None, None, None], 0.5
    noisy = clean + s * noise
    wanted = objective.target(sampling, sigma, noisy, clean)
    c_skip, c_out = data ** 2 / (s ** 2 + data ** 2), s * data / (s ** 2 + data ** 2) ** 0.5  # Karras et al., table 1
    close(wanted, (clean - c_skip * noisy) / c_out, 1e-4)
    close(sampling.calculate_denoised(sigma, wanted, noisy), clean, 1e-4)


@check
def noise_levels_follow_the_model():
    torch, objective = host.torch, lib("adaptation.objective")
    config = lib("adaptation.config").NoiseConfig()
    quantiles = (torch.arange(20000) + 0.5) / 20000
    discrete = sampler("sd15").model.model_sampling
    found = objective.NoiseLevels(discrete, config)(quantiles)
    assert torch.equal(found[10::20], discrete.sigmas), "not every step of the schedule alike"
    log = objective.NoiseLevels(sampler("svd").model.model_sampling, config)(quantiles).log()
    assert abs(log.mean() - 0.7) < 0.01 and abs(log.std() - 1.6) < 0.02, (log.mean(), log.std())


@check
def the_network_is_called_as_the_sampler_calls_it():
    """Denoised by our own call of the UNet == by the host's apply_model."""
    torch, comfyui = host.torch, lib("adaptation.comfyui")
    objective = lib("adaptation.objective")
    for kind in ("sd15", "sd21", "svd"):
        model = sampler(kind)
        taken = comfyui.Sampler(model)
        ours = objective.Objective(taken.unet, torch.nn.Module(), taken.sampling, lib("adaptation.config").NoiseConfig())
        generator = torch.Generator().manual_seed(1)
        noisy, context = torch.randn(5, 4, 8, 8, generator=generator), torch.randn(1, 7, 16, generator=generator)
        sigma, given, theirs = torch.full((5,), 3.0), {"context": context}, {"c_crossattn": context.repeat(5, 1, 1)}
        if kind == "svd":
            first = torch.randn(1, 4, 8, 8, generator=generator)
            y = model.model.encode_adm(fps=6, motion_bucket_id=127, augmentation_level=0.02)
            given |= {"concat": first, "y": y}
            theirs |= {"c_concat": first.repeat(5, 1, 1, 1), "y": y.repeat(5, 1), "num_video_frames": 5}
        with torch.no_grad():
            output = ours.output(noisy, sigma, given, 5)
            found = taken.sampling.calculate_denoised(sigma, output, noisy)
            close(found, model.model.apply_model(noisy, sigma, **theirs), 1e-5)


# -- training and what it leaves ---------------------------------------------------------------------


def adapts(name, kind, train, layers=(), steps=25, rate=1e-2, gain=0.02, motion=""):
    """Held-out loss falls, by ``gain`` of it; only what was named changes; the host's loader gives the trained model.

    At strength 0 it gives the original.
    """
    model = sampler(kind)
    if motion:
        put_into(model.model.diffusion_model, motion)
    before = {key: tensor.clone() for key, tensor in model.model.diffusion_model.state_dict().items()}
    original = outputs(model.model.diffusion_model, kind)
    with trainable():
        running = trainer(model, config(name, train, layers, steps, rate, motion))
        file = running.run()
        assert running.scores["loss"] < (1 - gain) * running.scores["unadapted"], running.scores
        with running.ema.applied_to(running.adapter):
            trained = outputs(running.sampler.unet, kind)
    assert not host.torch.equal(trained, original)
    moved = {key.replace("/", ".") for key in running.adapter.parts}
    ends = ("out.2.", "input_blocks.0.0.") if train == "output+input" else "out.2."
    wanted = {key for key in before if key.startswith(ends)}
    if train == "layers":
        wanted = {key for key in before if ".time_mixer." in key or key.startswith("out.")}
    elif train == "lora":
        wanted = {key for key in before if ".time_stack." in key and key.endswith(".weight") and before[key].ndim > 1}
    assert moved == wanted, f"{sorted(moved ^ wanted)[:5]}"
    if train == "lora":  # one token is attended to whatever the query and key are, so those have no gradient
        wanted -= {key for key in wanted if key.endswith(("attn2.to_q.weight", "attn2.to_k.weight"))}
    patched = loaded(model, file)
    changed = {key for key, tensor in patched.state_dict().items() if not host.torch.equal(tensor, before[key])}
    assert changed == wanted, f"{sorted(changed ^ wanted)[:5]}"
    assert host.torch.equal(outputs(patched, kind), trained), "the loaded file is not the trained model"
    assert host.torch.equal(outputs(loaded(model, file, 0.0), kind), original), "strength 0 is not the original"
    host.management.unload_all_models()
    assert same_state(dict(model.model.diffusion_model.state_dict()), before), "the given model was changed"
    return running


@check
def svd_output_layer():
    running = adapts("output", "svd", "output")
    assert sum(parameter.numel() for parameter in running.adapter.parameters()) == 64 * 4 * 9 + 4


@check
def sd15_output_layer():
    adapts("output_sd15", "sd15", "output")


@check
def sd21_output_and_input_layers():
    adapts("output_input_sd21", "sd21", "output+input", rate=3e-3)


@check
def svd_layers_by_name():
    adapts("layers", "svd", "layers", ("*.time_mixer.*", "out.*"))


@check
def svd_lora_on_temporal_layers():
    adapts("lora", "svd", "lora", gain=0.005)


# -- AnimateDiff -------------------------------------------------------------------------------------


@check
def motion_modules_sit_where_animatediff_puts_them():
    """By hooks == inserted into the UNet's lists of layers, at the places that AnimateDiff has for SD 1.5."""
    torch, motion = host.torch, lib("adaptation.motion")
    widths = {"down_blocks": (32, 64, 128, 128), "up_blocks": (128, 128, 64, 32)}
    places = {f"{side}.{level}.motion_modules.{k}": width for side, levels in widths.items()
              for level, width in enumerate(levels) for k in range(2 if side == "down_blocks" else 3)}
    for middle in ({}, {"mid_block.motion_modules.0": 128}):  # v3, v2
        named = places | middle
        file = motion_file(named, named.values())
        hooked, inserted = (sampler("sd15 in full").model.diffusion_model for _ in range(2))
        plain = outputs(hooked, "sd15")
        put_into(hooked, file)

        class Inserted(torch.nn.Module):
            def __init__(self, transformer):
                super().__init__()
                self.transformer = transformer

            def forward(self, x):
                return self.transformer(x, 5)

        modules = {place: Inserted(module) for place, module in motion.load_motion(file).places.items()}
        for block, place in zip((1, 2, 4, 5, 7, 8, 10, 11), list(places)[:8], strict=True):
            inserted.input_blocks[block].append(modules[place])
        for block, place in enumerate(list(places)[8:]):
            layers = inserted.output_blocks[block]
            layers.insert(len(layers) - (block in (2, 5, 8)), modules[place])  # in front of Upsample
        for place in middle:
            inserted.middle_block.insert(2, modules[place])
        found = outputs(hooked, "sd15")
        assert torch.equal(found, outputs(inserted, "sd15")) and not torch.allclose(found, plain, atol=1e-2)


@check
def animatediff_output_layer():
    running = adapts("animatediff", "sd15", "output", motion=motion_file())
    assert running.data.longest == 5
    linear = host.torch.linspace(0.00085, 0.012, 1000, dtype=host.torch.float64)
    kept = (1 - linear).cumprod(0)
    close(running.sampler.sampling.sigmas, ((1 - kept) / kept).sqrt().float(), 1e-6)
    assert running.sampler.sampling.sigmas[-1] > 15  # SD 1.5's own end at 14.6


@check
def checkpointed_motion_modules_change_nothing():
    with trainable():
        plain, less = (trainer(sampler("sd15"), config(f"motion_{kept}", "output+input", steps=2, checkpointing=not kept,
                                                       motion=motion_file())) for kept in (True, False))
        plain.run()
        less.run()
    assert same_state(dict(plain.adapter.state_dict()), dict(less.adapter.state_dict()))


@check
def motion_modules_that_do_not_fit_are_refused():
    def taken(kind, *drawn):
        return lib("adaptation.comfyui").Sampler(sampler(kind), lib("adaptation.motion").load_motion(motion_file(*drawn)))

    with trainable():
        raises("only one of them has down_blocks", taken, "sd15 in full")
        raises("only one of them has down_blocks.0", taken, "sd15", ["mid_block.motion_modules.0"], [64])
        raises("are for SD 1.5", taken, "sd21")
        short = motion_file(("mid_block.motion_modules.0", "down_blocks.0.motion_modules.0", "up_blocks.0.motion_modules.0",
                             "up_blocks.0.motion_modules.1"), (64,) * 4, length=3)
        raises("up to 5 latents, and the motion module has positions for 3. Set data.frames to 3", trainer, sampler("sd15"),
               config("short", motion=short))
        trainer(sampler("sd15"), config("moved", steps=2, motion=motion_file())).run()
        raises("another model", trainer, sampler("sd15"), config("moved", steps=4, motion=motion_file(seed=5)), True)
        raises("no temporal layers of its own", trainer, sampler("sd15"), config("no_lora", "lora", motion=motion_file()))


@check
def the_node_adapts_for_animatediff():
    text = [[host.torch.ones(1, 7, 16), {}]]
    told = {"positive": text, "vae": None, "clip_vision": None}
    folder = host.base / "models" / "animatediff_models"
    folder.mkdir(exist_ok=True)
    file = motion_file().rename(folder / "v3_test.ckpt")
    listed = host.nodes.NODE_CLASS_MAPPINGS["CVVAEAdapt"].define_schema
    assert listed().inputs[-1].options == ["none"]
    host.folder_paths.add_model_folder_path("animatediff_models", str(folder))
    try:
        assert listed().inputs[-1].options == ["none", "v3_test.ckpt"]
        name = adapt("motion", sampler("sd15"), motion_module="v3_test.ckpt", **told)[1]
        plain = adapt("no_motion", sampler("sd15"), **told)[1]
    finally:
        del host.folder_paths.folder_names_and_paths["animatediff_models"]
        file.unlink()
    a, b = (load_file(host.base / "models" / "loras" / name) for name in (name, plain))
    assert a.keys() == b.keys() and not same_state(a, b), "the motion module made no difference"


@check
def what_is_put_into_a_model_while_it_samples_is_not_left_out_in_silence():
    from comfy.patcher_extension import PatcherInjection

    model = sampler("sd15")
    model.set_injections("ADE", [PatcherInjection(lambda patcher: None, lambda patcher: None)])
    raises("modules put into it while it samples (ADE)", lib("adaptation.comfyui").Sampler, model)


@check
def the_schedule_put_on_a_model_is_the_one_trained():
    from comfy import model_sampling

    class Velocity(model_sampling.ModelSamplingDiscrete, model_sampling.V_PREDICTION):
        pass

    patched, wanted = sampler("sd15").clone(), Velocity()
    wanted.set_sigmas(host.torch.linspace(0.1, 9, 500))
    patched.add_object_patch("model_sampling", wanted)
    with trainable():
        taken = lib("adaptation.comfyui").Sampler(patched)
    assert host.torch.equal(taken.sampling.sigmas, wanted.sigmas) and isinstance(taken.sampling, Velocity)


# -- runs --------------------------------------------------------------------------------------------


@check
def a_resumed_run_equals_an_uninterrupted_one():
    with trainable():
        whole = trainer(sampler("svd"), config("whole", "lora"))
        file = whole.run()
        halves = config("halves", "lora", steps=3)
        trainer(sampler("svd"), halves).run()
        halves.optim.steps = 6
        resumed = trainer(sampler("svd"), halves, resume=True)
        assert resumed.step == 3
        again = resumed.run()
    a, b = newest(whole), newest(resumed)
    for state in (a, b):
        del state["config"]
    assert same_state(a, b)
    assert same_state(load_file(file), load_file(again))


@check
def a_run_goes_on_with_its_own_model_only():
    with trainable():
        trainer(sampler("svd"), config("own", steps=2)).run()
        raises("holds a run already", trainer, sampler("svd"), config("own", steps=2))
        raises("another model", trainer, sampler("svd", seed=1), config("own", steps=4), True)
        raises("model.train was 'output'", trainer, sampler("svd"), config("own", "lora", steps=4), True)
        raises("no temporal layers", trainer, sampler("sd15"), config("none", "lora"))
        raises("matches none", trainer, sampler("sd15"), config("none", "layers", ["outt.*"]))


@check
def checkpointed_activations_change_nothing():
    with trainable():
        plain = trainer(sampler("svd"), config("plain", "lora", steps=2))
        plain.run()
        less = trainer(sampler("svd"), config("less", "lora", steps=2, checkpointing=True))
        less.run()
    assert same_state(dict(plain.adapter.state_dict()), dict(less.adapter.state_dict()))


@check
def only_the_last_layer_keeps_activations():
    """With the output layer trained, nothing before it is kept for the backward pass."""
    torch = host.torch
    with trainable():
        kept = {}
        for train in ("output", "output+input"):
            running = trainer(sampler("svd"), config(f"kept_{train}", train))
            batch = running.data.batch(0, 0)
            tensors = {}

            def pack(tensor, tensors=tensors):
                tensors[tensor.data_ptr()] = tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                running.objective(*running._inputs(batch), running._seeds(0, 2), 0)
            kept[train] = sum(tensors.values())
        frames = 2 * 5 * 8 * 8
        # The convolution's input of 64 channels and its weight; target and output of 4 channels for the squared error.
        assert kept["output"] <= frames * (64 + 3 * 4) + 64 * 4 * 9 * 2, kept
        assert kept["output+input"] > 20 * kept["output"], kept


@check
def bf16_trains():
    with trainable():
        running = trainer(sampler("svd"), config("bf16", "lora", precision="bf16", steps=2))
        running.run()
        assert all(tensor.dtype == host.torch.float32 for tensor in running.adapter.state_dict().values())
        assert running.scores["loss"] < 10


# -- what the sampler is told ------------------------------------------------------------------------


@check
def svd_is_told_the_first_frame_and_its_noise():
    torch, comfyui = host.torch, lib("adaptation.comfyui")
    data = lib("dataset").LatentDataset(latents())
    sample = data.samples[0]
    with trainable(), torch.no_grad():
        model = sampler("svd")
        told = conditioner(comfyui.Sampler(model))(sample, data[0])
        plain = conditioner(comfyui.Sampler(model), augmentations=0)(sample, data[0])
        again = conditioner(comfyui.Sampler(model))(sample, data[0])
    assert told["concat"].shape == (4, 4, 8, 8) and told["y"].shape == (4, 768) and told["context"].shape == (1, 16)
    close(plain["concat"][0], data[0][:, 0], 0)
    # 24 fps of frames are 6 of latents.
    expected = model.model.encode_adm(fps=6, motion_bucket_id=127, augmentation_level=0.0)
    close(plain["y"], expected, 0)
    assert same_state(told, again), "not the same each time"
    apart = (told["concat"] - data[0][:, 0]).square().mean((1, 2, 3)).sqrt()
    assert 1e-3 < apart.min() and apart.max() < data[0].std(), apart


@check
def dropped_conditioning_is_the_hosts_negative():
    from random import Random

    torch, conditions = host.torch, lib("adaptation.conditions")
    with trainable():
        trainer(sampler("svd"), config("dropped", steps=2))
        told = conditions.Conditions(host.base / "told_True")
        sample = lib("dataset").LatentDataset(latents()).samples[0]
        dropped, kept = told.of(sample, Random(0), 1.0), told.of(sample, Random(0), 0.0)
        shares = [bool(told.of(sample, Random(seed), 0.1)["concat"].abs().sum() == 0) for seed in range(300)]
    assert dropped["context"].abs().sum() == 0 and dropped["concat"].abs().sum() == 0 and dropped["context"].shape == (1, 16)
    assert torch.equal(dropped["y"], kept["y"]) and kept["concat"].abs().sum() > 0
    assert 0.05 < sum(shares) / 300 < 0.16, sum(shares)


@check
def captions_are_encoded_once():
    comfyui, torch = lib("adaptation.comfyui"), host.torch
    encoded = []

    class Clip:
        def tokenize(self, text):
            return text

        def encode_from_tokens(self, text):
            encoded.append(text)
            return torch.full((1, 77, 16), float(len(text)))

    told = comfyui.TextConditioner(Clip(), "a film", {})
    samples = [SimpleNamespace(caption=caption) for caption in ("a cat", "", "a cat")]
    found = [told(sample, None)["context"][0, 0].item() for sample in samples]
    assert found == [5, 6, 5] and encoded == ["a cat", "a film"], (found, encoded)
    assert told.empty()["context"].shape == (77, 16)


# -- the node ----------------------------------------------------------------------------------------


def adapt(name, model, **inputs):
    """The node's outputs, of a few steps; in inference mode, as the host runs it."""
    latents()
    return run("CVVAEAdapt", **(dict(model=model, folder=str(host.base / "latents"), steps=6, learning_rate=1e-3, run=name,
                                     latents=0, vae=load(), clip_vision=PictureEncoder()) | inputs))


def folder_of(name):
    return host.base / "output" / "cv-vae" / name


@check
def the_node_gives_the_model_its_file_makes():
    torch = host.torch
    latents()  # before numbers are watched
    for kind in ("svd", "sd15"):
        model = sampler(kind)
        told = {}
        if kind == "sd15":
            text = [[torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(2)), {}]]
            told = {"positive": text, "negative": [[torch.zeros(1, 7, 16), {}]], "vae": None, "clip_vision": None}
        original = outputs(model.model.diffusion_model, kind)
        torch.manual_seed(1)
        expected = torch.rand(1)
        torch.manual_seed(1)
        adapted, name, losses, plot = adapt(f"node_{kind}", model, **told)
        assert torch.equal(torch.rand(1), expected), "the host's random numbers were moved"
        assert name == f"cv-vae/node_{kind}.safetensors" and len(losses["loss"]) >= 6 and plot.ndim == 4
        assert name in host.folder_paths.get_filename_list("loras")
        import nodes

        loader = nodes.LoraLoaderModelOnly()
        by_hand = loader.load_lora_model_only(sampler(kind), name, 1.0)[0]
        host.management.load_models_gpu([adapted])
        found = outputs(adapted.model.diffusion_model, kind)
        host.management.load_models_gpu([by_hand])
        assert torch.equal(found, outputs(by_hand.model.diffusion_model, kind)) and not torch.equal(found, original)
        host.management.unload_all_models()
        assert torch.equal(outputs(model.model.diffusion_model, kind), original), "the given model was changed"


@check
def the_adapted_model_samples():
    torch = host.torch
    from comfy import samplers

    adapted = adapt("sampled", sampler("svd"))[0]
    first = lib("dataset").LatentDataset(latents())[0][:, 0][None]
    told = {"motion_bucket_id": 127, "fps": 6, "augmentation_level": 0.0}
    positive = [[torch.ones(1, 1, 16), told | {"concat_latent_image": first}]]
    negative = [[torch.zeros(1, 1, 16), told | {"concat_latent_image": torch.zeros_like(first)}]]
    assert "euler" in samplers.KSampler.SAMPLERS
    sampled = run("KSampler", model=adapted, seed=1, steps=2, cfg=2.5, sampler_name="euler", scheduler="karras",
                  positive=positive, negative=negative, latent_image={"samples": torch.zeros(5, 4, 8, 8)}, denoise=1.0)
    samples = sampled[0]["samples"]
    assert samples.shape == (5, 4, 8, 8) and samples.isfinite().all()
    assert run("VAEDecode", samples={"samples": samples}, vae=load())[0].shape == (17, 64, 64, 3)


@check
def cancel_keeps_what_was_trained_and_the_next_run_goes_on():
    trainers = lib("adaptation.trainer").AdaptationTrainer
    original = trainers._take_step

    def take_step(self, batches):
        if self.step == 3:
            host.management.interrupt_current_processing()
        return original(self, batches)

    whole = adapt("uncancelled", sampler("svd"))[0]
    trainers._take_step = take_step
    try:
        adapt("cancelled", sampler("svd"))
        raise AssertionError("not cancelled")
    except host.management.InterruptProcessingException:
        pass
    finally:
        trainers._take_step = original
        host.management.interrupt_current_processing(False)
    assert not (host.base / "models" / "loras" / "cv-vae" / "cancelled.safetensors").exists()
    kept = sorted(path.name for path in (folder_of("cancelled") / "checkpoints").glob("step_*.pt"))
    assert kept[-1] == "step_00000003.pt", kept
    raises("There is a run 'cancelled' already", adapt, "cancelled", sampler("svd"), resume=False)
    again = adapt("cancelled", sampler("svd"))[0]
    for model in (whole, again):
        host.management.load_models_gpu([model])
    a, b = (folder_of(name) / "adapter.safetensors" for name in ("uncancelled", "cancelled"))
    assert same_state(load_file(a), load_file(b)), "not what an uncancelled run trains"


@check
def a_lora_on_the_model_counts_as_part_of_it():
    """The adapter of an adapted model is a difference to that one."""
    torch, comfyui = host.torch, lib("adaptation.comfyui")
    adapted = adapt("first", sampler("svd"))[0]
    host.management.load_models_gpu([adapted])
    expected = outputs(adapted.model.diffusion_model, "svd")
    assert torch.equal(outputs(comfyui.Sampler(adapted).unet, "svd"), expected), "while it is loaded"
    host.management.unload_all_models()
    assert torch.equal(outputs(comfyui.Sampler(adapted).unet, "svd"), expected), "while it is not"


@check
def the_node_encodes_videos():
    latents()
    _, name, losses, _ = adapt("videos", sampler("svd"), folder="moving", latents=3, width=48, height=40, steps=2)
    data = lib("dataset").LatentDataset(folder_of("videos") / "latents")
    assert len(data) == 6 and data[0].shape == (4, 3, 5, 6)
    raises("connect a CV-VAE", adapt, "videos2", sampler("svd"), folder="moving", vae=None)
    raises("image encoder", adapt, "videos3", sampler("svd"), clip_vision=None)
    raises("'positive'", adapt, "videos4", sampler("sd15"))
    raises("folder is empty", adapt, "videos5", sampler("svd"), folder=" ")


@check
def other_models_are_refused():
    comfyui = lib("adaptation.comfyui")
    raises("adapting is for", comfyui.Sampler, SimpleNamespace(model=SimpleNamespace(diffusion_model=None)))
    inpainting = sampler("sd15")
    inpainting.model.diffusion_model.in_channels = 9
    raises("reads 5 channels", comfyui.Sampler, inpainting)


if __name__ == "__main__":
    contract.main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
