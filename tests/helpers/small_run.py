"""Training runs of a few steps, on drawn clips and a random teacher of a few thousand weights."""

import time

import drawn
import torch

from cvvae import checkpoint
from cvvae.training.config import read_config

CONFIG = """
[model]
teacher = "{teacher}"
[data]
sources = ["clips"]
validation = ["held_out"]
buckets = [{{ frames = 1, height = 16, width = 16, batch = 2 }}, {{ frames = 5, height = 16, width = 24, batch = 1 }}]
workers = 0
validation_frames = 5
validation_size = 16
[optim]
steps = 6
learning_rate = 1e-3
warmup = 2
[run]
out = "{out}"
save_every = 2
validate_every = 100
"""


def make_folder(folder):
    """A teacher and three clips, one of them held out."""
    (folder / "clips").mkdir()
    for seed, name in enumerate(("a", "b", "held_out")):
        drawn.write_video(folder / "clips" / f"{name}.mp4", 9, 32, 40, seed=seed)
    checkpoint.save(drawn.small_image_vae(), folder / "teacher.safetensors")
    return folder


def write_config(folder, name):
    path = folder / f"{name}.toml"
    path.write_text(CONFIG.format(teacher=(folder / "teacher.safetensors").as_posix(), out=(folder / name).as_posix()))
    return path


def config(folder, name, *overrides):
    return read_config(write_config(folder, name), list(overrides))


def kill_when_saved(process, checkpoints):
    """kill -9 a run, started with pipes, once it has saved; returns the step it can go on from."""
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step_*.pt")):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.01)
    process.kill()
    process.communicate()
    return max(int(file.stem.split("_")[1]) for file in checkpoints.glob("step_*.pt"))


def final_state(trainer):
    return torch.load(trainer.checkpoints.files()[-1], weights_only=True)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
