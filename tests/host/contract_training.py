"""What inflating, training, measuring and saving must do in a host; run and read as contract.py, whose machinery this is.

    cd COMFYUI; python contract_training.py PACK BASE_DIRECTORY [check ...]
"""

import importlib.util
import re
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

spec = importlib.util.spec_from_file_location("contract_machinery", Path(__file__).with_name("contract.py"))
contract = importlib.util.module_from_spec(spec)
spec.loader.exec_module(contract)
CHECKS, host, Messages, check, clip, close, load, model_of, raises, run, shape, small, stock_vae = (
    getattr(contract, name) for name in
    "CHECKS host Messages check clip close load model_of raises run shape small stock_vae".split())
CHECKS.clear()  # contract.py's own run by itself


def finetune(name, **inputs):
    """A run of a few steps on four drawn clips and a teacher of a few thousand weights; the node's outputs."""
    prepare()
    return run("CVVAEFinetune", **(dict(folder="clips", preset="check", steps=6, learning_rate=1e-3, run=name,
                                        teacher="teacher.safetensors") | inputs))


def prepare():
    """The clips, the teacher and the preset of these checks."""
    folder = host.base / "input" / "clips"
    if folder.exists():
        return
    folder.mkdir()
    for seed, name in enumerate(("a", "b", "c", "d")):
        host.training.write_clip(folder / f"{name}.mkv", clip(9, 32, 40, seed=seed))
    host.cvvae.save(image_vae(), host.base / "models" / "vae" / "teacher.safetensors")
    shapes = [(1, 16, 16, 2, 0.5), (5, 16, 24, 1, 0.5)]
    host.presets.PRESETS["check"] = host.presets.Preset(shapes, 5, 16, checkpointing=False, perceptual="none")


def image_vae(seed=0):
    host.torch.manual_seed(seed)
    with host.torch.inference_mode(False):
        return host.cvvae.ImageVAE(host.cvvae.Config("image", 4, (8, 8, 8, 8), 1, norm_groups=4))


def as_the_hosts(image_vae):
    """The host's VAE object around a model that its own loader would take for a larger one."""
    vae = stock_vae()
    vae.first_stage_model = image_vae
    return vae


def run_folder(name):
    return host.base / "output" / "cv-vae" / name


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    different = [name for name in a if not host.torch.equal(a[name].float(), b[name].float())]
    assert not different, f"different: {different[:5]}"


def interrupt_in_step(number):
    """Press Cancel during step ``number`` of the next run, and watch its trainers; undone at the end of a with block."""
    def take_step(self, batch):
        if self.step == number - 1:
            host.management.interrupt_current_processing()
        return original(self, batch)

    @contextmanager
    def changed():
        host.trainer.Trainer._take_step = take_step
        try:
            yield
        finally:
            host.trainer.Trainer._take_step = original
            host.management.interrupt_current_processing(False)

    original = host.trainer.Trainer._take_step
    return changed()


def cancelled(function, *args, **kwargs):
    """The host's exception, which ``function`` must raise."""
    try:
        function(*args, **kwargs)
    except host.management.InterruptProcessingException as error:
        return error
    raise AssertionError("not cancelled")


def what_trainers_hold():
    """Appended to by every trainer built inside a with block: weak references to it and its tensors."""
    original = host.trainer.Trainer.__init__

    @contextmanager
    def watched():
        held = []

        def init(self, *args, **kwargs):
            original(self, *args, **kwargs)
            held.extend(map(weakref.ref, [self, *self.trained, *self.ema.state.values(), *self.teacher.parameters()]))

        host.trainer.Trainer.__init__ = init
        try:
            yield held
        finally:
            host.trainer.Trainer.__init__ = original

    return watched()


def all_gone(held):
    alive = sum(reference() is not None for reference in held)
    assert held and not alive, f"{alive} of {len(held)} are still there"


@check
def inflate_equals_the_library():
    prepare()
    vae = run("CVVAEInflate", teacher="teacher.safetensors")[0]
    host.torch.manual_seed(0)
    inflated = host.cvvae.inflate(image_vae())
    same_weights(model_of(vae), inflated)
    assert {p.dtype for p in model_of(vae).parameters()} == {host.torch.float32}
    shape(run("VAEDecode", samples=run("VAEEncode", pixels=clip(5), vae=vae)[0], vae=vae)[0], 5, 48, 64, 3)
    host.torch.manual_seed(1)
    expected = host.torch.rand(1)
    host.torch.manual_seed(1)
    run("CVVAEInflate", teacher="teacher.safetensors")
    assert host.torch.equal(host.torch.rand(1), expected), "the host's random numbers were moved"


@check
def finetune_equals_the_library_and_native_nodes_take_the_result():
    drawn_next = host.torch.get_rng_state()
    vae, loss_map, name, plot = finetune("library")
    assert host.torch.equal(host.torch.get_rng_state(), drawn_next), "what the host draws has changed"
    assert name == "library" and host.torch.is_inference_mode_enabled()
    shape(plot, 1, *plot.shape[1:3], 3)
    shape(run("VAEDecode", samples={"samples": host.torch.zeros(2, 4, 4, 4)}, vae=vae)[0], 5, 32, 32, 3)
    config = host.config.TrainConfig()
    config.model.teacher = str(host.base / "models" / "vae" / "teacher.safetensors")
    config.data.sources, config.data.validation = [str(host.base / "input" / "clips")], ["a"]
    config.data.buckets = [host.config.Bucket(1, 16, 16, 2, 0.5), host.config.Bucket(5, 16, 24, 1, 0.5)]
    config.data.validation_frames, config.data.validation_size = 5, 16
    config.optim.steps, config.optim.learning_rate, config.optim.warmup = 6, 1e-3, 0
    config.run.out, config.run.device = str(host.base / "library"), "cpu"
    config.run.precision = "bf16" if host.management.should_use_bf16(host.torch.device("cpu")) else "fp32"
    with host.torch.inference_mode(False):
        same_weights(model_of(vae), host.cvvae.load(host.trainer.Trainer(config).run()))
    library = (host.base / "library" / "losses.csv").read_text()
    assert library == (run_folder("library") / "losses.csv").read_text()
    assert len(loss_map["loss"]) == 6 and len(set(loss_map["loss"])) > 1


@check
def finetune_on_frames_holds_the_last_out():
    frames = clip(12, 32, 40)
    finetune("frames", folder="", images=host.torch.cat([frames, frames[..., :1]], -1), steps=2)
    folder = run_folder("frames")
    for name, expected in (("images", frames[:7]), ("images_held_out", frames[7:])):
        found = [frame.pixels for frame in host.video.read_frames(folder / f"{name}.mkv")]
        close(host.torch.stack([host.torch.from_numpy(pixels) for pixels in found]) / 255, expected, 0.51 / 255)
    assert len((folder / "validation.csv").read_text().splitlines()) == 4  # a heading; before, after one, after two
    finetune("few_frames", folder="", images=frames[:9], steps=2)
    assert not (run_folder("few_frames") / "images_held_out.mkv").exists()
    raises("5 are needed", finetune, "one_frame", folder="", images=frames[:1], steps=2)


@check
def finetune_takes_vaes_from_sockets():
    teacher = as_the_hosts(image_vae(1))
    start = run("CVVAEInflate", image_vae=teacher)[0]
    vae = finetune("sockets", image_vae=teacher, cv_vae=start, steps=2)[0]
    folder = run_folder("sockets")
    same_weights(host.cvvae.load_image_vae(folder / "teacher.safetensors"), teacher.first_stage_model)
    same_weights(host.cvvae.load(folder / "start.safetensors"), model_of(start))
    assert not host.torch.equal(model_of(vae).encoder.conv_in.weight, model_of(start).encoder.conv_in.weight)
    assert all(p.grad is None for model in (teacher.first_stage_model, model_of(start)) for p in model.parameters())


@check
def cancel_keeps_the_checkpoint_and_the_next_run_goes_on():
    with what_trainers_hold() as held:
        with interrupt_in_step(3):
            error = cancelled(finetune, "cancelled")
        all_gone(held)
    assert error.__traceback__ is not None
    newest = max(path.name for path in (run_folder("cancelled") / "checkpoints").iterdir())
    assert newest == "step_00000003.pt", newest
    assert not (run_folder("cancelled") / "model.safetensors").exists()
    with Messages() as messages:
        vae, loss_map, *_ = finetune("cancelled")
    assert any("going on" in text and "step 3" in text for text in messages.texts), messages.texts
    whole, whole_map, *_ = finetune("uninterrupted")
    same_weights(model_of(vae), model_of(whole))
    assert loss_map == whole_map and len(loss_map["loss"]) == 6


@check
def a_finished_run_is_only_read_and_more_steps_go_on():
    first = finetune("longer", steps=2)
    with host.torch.inference_mode(False):
        again = finetune("longer", steps=2)  # as after a restart of the host
    same_weights(model_of(first[0]), model_of(again[0]))
    assert first[1] == again[1]
    assert len(finetune("longer", steps=4)[1]["loss"]) == 4


@check
def training_gives_its_memory_back():
    with what_trainers_hold() as held:
        kept = finetune("memory", steps=2)
        all_gone(held)
    assert kept
    forward = host.objective.Objective.forward

    def full(self, *args):
        raise host.torch.OutOfMemoryError("faked")

    host.objective.Objective.forward = full
    try:
        with what_trainers_hold() as held:
            finetune("memory", steps=4)
    except host.trainer.TrainingError as error:
        assert "smaller preset" in str(error) and "out of memory" in str(error)
        all_gone(held)
    else:
        raise AssertionError("no error")
    finally:
        host.objective.Objective.forward = forward
    assert len(finetune("memory", steps=4)[1]["loss"]) == 4


@check
def progress_tells_speed_time_left_and_shows_the_held_out_clip():
    import comfy.utils

    prepare()
    texts, previews = [], []
    host.training.show_text, show_text = (lambda text, node_id: texts.append(text)), host.training.show_text
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, **kwargs: previews.append((value, total, preview)))
    try:
        finetune("progress", steps=3)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        host.training.show_text = show_text
    assert re.fullmatch(r"step 1/3, [\d.]+ (steps/s|s/step), \d\d:\d\d left, loss [\d.]+", texts[0]), texts
    assert re.fullmatch(r"step 3/3, held-out clips [\d.]+ dB \(image VAE [\d.]+ dB\)", texts[-1]), texts
    kind, picture, size = previews[0][2]
    assert previews[0][:2] == (1, 3) and previews[-1][:2] == (3, 3) and kind == "JPEG" and size >= 256
    assert previews[-1][2], "what the last step gave is not shown"
    assert picture.width > 3 * 16 and picture.height >= 16
    words = host.training.in_words
    assert words(10, 1000, 0.25, 0.5) == "step 10/1000, 4.0 s/step, 1:06:00 left, loss 0.5000"


@check
def wrong_inputs_of_a_finetune_are_explained():
    raises("there is no", finetune, "wrong", folder="gone")
    raises("nothing to train on", finetune, "wrong", folder=" ")
    raises("expected a name", finetune, "../wrong")
    raises("expected a name", finetune, "")
    raises("does not fit", finetune, "wrong", image_vae=stock_vae())
    raises("not found", finetune, "wrong", teacher="gone.safetensors")
    assert not run_folder("wrong").exists()
    raises("image_vae", finetune, "wrong", cv_vae=stock_vae())
    raises("latent channels", finetune, "wrong", cv_vae=host.native.NativeVAE(small("sd3", 16), "video", None))
    finetune("wrong", steps=1)  # what went wrong before leaves nothing behind
    raises("Switch resume on", finetune, "wrong", resume=False)
    raises("began with another image VAE", finetune, "wrong", image_vae=as_the_hosts(image_vae(1)))
    raises("'seed'", finetune, "wrong", seed=1, steps=2)


@check
def the_hosts_loss_graph_takes_the_loss_map():
    import comfy_extras.nodes_train as training

    loss_map = finetune("one_step", steps=1)[1]
    node = training.LossGraphNode
    node.hidden = SimpleNamespace(prompt=None, extra_pnginfo=None)
    output = node.execute(loss_map, "loss_graph")
    assert output.ui.as_dict()["images"]


@check
def save_writes_numbered_files_that_the_loader_lists():
    prepare()
    vae = run("CVVAEInflate", teacher="teacher.safetensors")[0]
    for name in ("mine.safetensors", "mine", "folder/mine"):
        run("CVVAESave", vae=vae, name=name, dtype="fp32", description="drawn")
    listed = host.folder_paths.get_filename_list("vae")
    loader = host.nodes.NODE_CLASS_MAPPINGS["CVVAELoader"].INPUT_TYPES()["required"]["vae_name"]
    options = loader[0] if isinstance(loader[0], list) else loader[1]["options"]
    for name in ("mine.safetensors", "mine_2.safetensors", str(Path("folder", "mine.safetensors"))):
        assert name in listed and name in options, f"{name} is not in {listed}"
        same_weights(model_of(load(vae_name=name)), model_of(vae))
    assert host.checkpoint.read_metadata(host.base / "models" / "vae" / "mine.safetensors")["description"] == "drawn"
    run("CVVAESave", vae=vae, name="half", dtype="fp16")
    assert (host.base / "models/vae/half.safetensors").stat().st_size < \
        0.7 * (host.base / "models/vae/mine.safetensors").stat().st_size
    raises("expected a name", run, "CVVAESave", vae=vae, name="../mine", dtype="fp32")
    raises("VAESave", run, "CVVAESave", vae=stock_vae(), name="mine", dtype="fp32")


@check
def evaluate_equals_the_library():
    prepare()
    vae, frames = load(), clip(9, 32, 40)
    source = frames[:5].movedim(-1, 0)[None] * 2 - 1
    with host.torch.inference_mode(False):
        expected = host.evaluation.evaluate_clip(host.cvvae.load("tiny"), host.cvvae.load_image_vae("tiny"), source.clone())
    report, sheet = run("CVVAEEvaluate", vae=vae, images=frames, frames=5, title="Mine")
    assert report.startswith("Mine, 5 frames of 40 x 32\n"), report
    for name, score in expected.scores.items():
        assert f"- {name}: {host.evaluation.cell(expected.scores, name)} (" in report, f"{name} is not {score} in\n{report}"
    close(sheet, host.torch.from_numpy(host.pictures.clip_sheet("Mine", expected.pictures))[None].float() / 255, 0.02)
    without = run("CVVAEEvaluate", vae=vae, images=frames, frames=0, teacher="none")[0]
    assert "compatibility" not in without and "9 frames" in without
    with_socket = run("CVVAEEvaluate", vae=vae, images=frames, teacher="none", image_vae=as_the_hosts(image_vae()))[0]
    assert "compatibility" in with_socket
    raises("image_vae", run, "CVVAEEvaluate", vae=stock_vae(), images=frames)


@check
def loss_plot_reads_a_run_by_name_or_path():
    *_, name, plot = finetune("plotted", steps=2)
    close(run("CVVAELossPlot", run=name)[0], plot, 0)
    close(run("CVVAELossPlot", run=str(run_folder(name)))[0], plot, 0)
    raises("has begun", run, "CVVAELossPlot", run="gone")
    node = host.nodes.NODE_CLASS_MAPPINGS["CVVAELossPlot"]
    before = node.fingerprint_inputs(run=name)
    finetune("plotted", steps=3)
    assert node.fingerprint_inputs(run=name) != before and node.fingerprint_inputs(run="gone") is None


if __name__ == "__main__":
    contract.main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
