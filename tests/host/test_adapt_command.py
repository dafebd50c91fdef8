"""``python -m cvvae adapt``: from a checkpoint file, through ComfyUI's own loader, to a file that ComfyUI loads."""

import socket
import subprocess
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace

import pytest
import torch
from comfy_host import REPOSITORY, find_host
from random_weights import motion_state
from safetensors import safe_open
from small_run import kill_when_saved

pytestmark = pytest.mark.slow

# The published checkpoints' widths would take gigabytes, so the loader is told of reduced ones; the encoders, which have no
# reduced form, are stood in for.  Started in the repository, whose nodes/ must not hide ComfyUI's nodes.py.
RUNNER = """
import importlib.util, sys
import torch
from pathlib import Path
from cvvae import cli
from cvvae.adaptation import comfyui, command
torch.set_num_threads(1)
comfyui.find_comfyui({comfyui!r})
assert importlib.util.find_spec("nodes").origin == {comfyui!r} + "/nodes.py", importlib.util.find_spec("nodes").origin
spec = importlib.util.spec_from_file_location("adaptation", {contract!r})
adaptation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(adaptation)
adaptation.host.torch = torch
import comfy.supported_models
from comfy.supported_models import SD15, SVD_img2vid

class TinySVD(SVD_img2vid):
    unet_config = dict(model_channels=64, in_channels=8, context_dim=16, use_temporal_attention=True)

class TinySD15(SD15):
    unet_config = dict(model_channels=64, in_channels=4, context_dim=16, use_temporal_attention=False)

comfy.supported_models.models += [TinySVD, TinySD15]

class Text:
    def tokenize(self, text):
        return text

    def encode_from_tokens(self, text):
        return torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(len(text)))

def load(path):
    model, clip, clip_vision = comfyui.load(path)
    assert clip is None and clip_vision is None
    return model, Text(), adaptation.PictureEncoder()

path = Path({checkpoint!r})
if not path.exists():
    import comfy.utils
    state = adaptation.sampler({kind!r}).model.diffusion_model.state_dict()
    state = {{"model.diffusion_model." + name: tensor.half() for name, tensor in state.items()}}
    comfy.utils.save_torch_file(state, str(path))
if {encoders}:
    command.load = load
sys.exit(cli.main(sys.argv[1:]))
"""

CONFIG = """
[model]
checkpoint = "sampler.safetensors"
vae = "tiny"
comfyui = "{comfyui}"
[data]
latents = "latents"
validation = ["d"]
[optim]
steps = 4
learning_rate = 1e-3
warmup = 0
[run]
out = "{out}"
save_every = 2
validate_every = 2
"""


@pytest.fixture
def host():
    return find_host("newest")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of latents of four clips, made by this interpreter: it is the same file format everywhere."""
    import drawn

    import cvvae
    from cvvae.dataset import Settings, encode_dataset

    folder = tmp_path_factory.mktemp("clips")
    (folder / "videos").mkdir()
    for seed, name in enumerate("abcd"):
        drawn.write_video(folder / "videos" / f"{name}.mp4", 9, 64, 64, seed=seed)
    encode_dataset(cvvae.load("tiny"), [str(folder / "videos")], folder / "latents", Settings())
    return folder


def adapt(host, clips, tmp_path, kind, *arguments, encoders=True, environment=None):
    """Start the command; returns the process."""
    (clips / f"{kind}.toml").write_text(CONFIG.format(comfyui=host.path, out=tmp_path / "run").replace(
        "sampler.safetensors", f"{kind}.safetensors"))
    runner = RUNNER.format(comfyui=str(host.path), contract=str(Path(__file__).with_name("contract_adaptation.py")),
                           kind=kind, checkpoint=str(clips / f"{kind}.safetensors"), encoders=encoders)
    return subprocess.Popen([host.python, "-c", runner, "adapt", clips / f"{kind}.toml", *arguments], cwd=REPOSITORY,
                            env=host.environment() | (environment or {}), text=True, stdout=PIPE, stderr=PIPE)


def finished(process):
    """Its return code and what it printed."""
    try:
        out, error = process.communicate(timeout=300)
    finally:
        process.kill()
    return SimpleNamespace(returncode=process.returncode, stdout=out, stderr=error)


def adapter(folder):
    with safe_open(folder / "run" / "adapter.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def assert_adapted(done, clips, folder, steps):
    assert done.returncode == 0, done.stderr[-3000:]
    assert "adapter.safetensors: held_out_loss " in done.stdout and "LoraLoaderModelOnly" in done.stdout
    with safe_open(folder / "run" / "adapter.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"diffusion_model.out.2.diff", "diffusion_model.out.2.diff_b"}
        assert str(clips) not in file.metadata()["cvvae"] and f'"steps": {steps}' in file.metadata()["cvvae"]
        assert all(file.get_tensor(name).abs().max() > 0 for name in file.keys())


def test_adapts_a_checkpoint_with_a_motion_module(host, clips, tmp_path):
    places = ("down_blocks.0.motion_modules.0", "up_blocks.0.motion_modules.0", "up_blocks.0.motion_modules.1")
    torch.save({name: tensor for place in places for name, tensor in motion_state(place).items()}, clips / "motion.ckpt")
    assert_adapted(finished(adapt(host, clips, tmp_path, "sd15", "model.motion=motion.ckpt")), clips, tmp_path, 4)
    with safe_open(tmp_path / "run" / "adapter.safetensors", framework="pt") as file:
        assert '"motion": "motion.ckpt"' in file.metadata()["cvvae"]


def test_kill_9_loses_the_steps_since_the_last_save_and_nothing_else(host, clips, tmp_path):
    process = adapt(host, clips, tmp_path / "killed", "svd", "optim.steps=100000", "run.validate_every=100000")
    steps = kill_when_saved(process, tmp_path / "killed" / "run" / "checkpoints") + 2
    overrides = [f"optim.steps={steps}", "run.validate_every=100000"]
    assert_adapted(finished(adapt(host, clips, tmp_path / "killed", "svd", *overrides, "--resume")), clips,
                   tmp_path / "killed", steps)
    done = finished(adapt(host, clips, tmp_path / "whole", "svd", *overrides))
    assert done.returncode == 0, done.stderr[-3000:]
    resumed, whole = adapter(tmp_path / "killed"), adapter(tmp_path / "whole")
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    losses = [(tmp_path / run / "run" / "losses.csv").read_text() for run in ("killed", "whole")]
    assert losses[0] == losses[1]


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(host, clips, tmp_path):
    done = finished(adapt(host, clips, tmp_path / "one", "svd", "data.batch=2", "data.frames=3"))
    assert done.returncode == 0, done.stderr[-3000:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [adapt(host, clips, tmp_path / "two", "svd", "data.frames=3",
                       environment=common | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    for process in processes:
        done = finished(process)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, atol=1e-6) and tensor.abs().max() > 1e-4, name


def test_a_checkpoint_without_its_encoder_is_named(host, clips, tmp_path):
    failed = finished(adapt(host, clips, tmp_path, "svd", encoders=False))
    assert failed.returncode == 2 and "has no image encoder" in failed.stderr, failed.stderr[-2000:]


def test_no_comfyui_is_named(host, clips, tmp_path):
    (clips / "none.toml").write_text(CONFIG.format(comfyui=tmp_path, out=tmp_path / "run"))
    failed = subprocess.run([host.python, "-m", "cvvae", "adapt", clips / "none.toml"], cwd=REPOSITORY, text=True,
                            env=host.environment(), capture_output=True, timeout=300)
    assert failed.returncode == 2 and f"there is no ComfyUI in {tmp_path}" in failed.stderr
