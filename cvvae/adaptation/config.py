"""Settings of an adaptation, read and checked as those of ``cvvae/training/config.py``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..training.config import (
    COMMON_CHOICES,
    COMMON_LEAST,
    CommonOptimConfig,
    CommonRunConfig,
    ConfigError,
    check_values,
    read_table,
)


@dataclass
class ModelConfig:
    checkpoint: str = ""  # a checkpoint that ComfyUI loads, its text or image encoder in it; relative to the config file
    motion: str = ""  # SD 1.5: AnimateDiff's motion module (v2 or v3), which the model is to be sampled with
    vae: str = ""  # the CV-VAE the latents are of; needed for SVD, which is shown the first frame
    comfyui: str = ""  # folder of ComfyUI, whose loader and model classes are used; empty: COMFYUI_PATH, else ~/ComfyUI
    # "output": the last convolution (the paper's choice for SVD); "output+input": the first one too; "layers": all
    # parameters that ``layers`` names; "lora": low-rank differences to the weights that ``layers`` names.
    train: str = "output"
    layers: list[str] = field(default_factory=list)  # patterns such as "*.time_stack.*"; empty with "lora": temporal layers
    rank: int = 16  # of "lora"


@dataclass
class DataConfig:
    latents: str = ""  # folder that encode-dataset wrote, relative to the config file
    validation: list[str] = field(default_factory=list)  # videos (no folder, no suffix) kept out of training and measured on
    frames: int = 0  # latents of a clip, from its start; 0: all there are
    batch: int = 1  # clips on each GPU in each forward pass
    workers: int = 1  # threads that read ahead


@dataclass
class ConditioningConfig:
    prompt: str = ""  # text models: for clips without a caption of their own
    dropout: float = 0.1  # share of clips shown the empty prompt or no first frame, for classifier-free guidance
    # SVD: what its embeddings are told.
    fps: float = 0.0  # of the latents; 0: a quarter of the clip's
    motion_bucket: int = 127
    # SVD: noise on the first frame, exp(N(mean, std)) of a picture in [-1, 1]; the defaults are those of its training.
    augmentations: int = 4  # encoded for each clip before training, one drawn in each step; 0: no noise
    augmentation_mean: float = -3.0
    augmentation_std: float = 0.5


@dataclass
class NoiseConfig:
    # "schedule": every step of the model's own schedule alike (SD 1.x, 2.x); "lognormal": exp(N(mean, std)) (EDM models);
    # "auto": as the model was trained.
    distribution: str = "auto"
    mean: float = 0.7  # with std, of SVD's image-to-video training
    std: float = 1.6


@dataclass
class OptimConfig(CommonOptimConfig):
    steps: int = 5000  # this, the rate and its being constant: the paper's, section 4.1
    learning_rate: float = 1e-5
    final_ratio: float = 1.0
    weight_decay: float = 0.0  # on differences: it would pull back to the original model


@dataclass
class RunConfig(CommonRunConfig):
    out: str = "runs/adapt"


@dataclass
class AdaptConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


CHOICES = {"model.train": ("output", "output+input", "layers", "lora"),
           "noise.distribution": ("auto", "schedule", "lognormal")} | COMMON_CHOICES
LEAST = {"model.rank": 1, "data.frames": 0, "data.batch": 1, "conditioning.fps": 0, "conditioning.motion_bucket": 1,
         "conditioning.augmentations": 0, "conditioning.augmentation_std": 0, "noise.std": 0} | COMMON_LEAST


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> AdaptConfig:
    """Read a TOML file and apply overrides like ``optim.steps=200``; its files are resolved against its folder.

    Raises ConfigError naming the key.
    """
    path = Path(path)
    config = read_table(AdaptConfig, path, overrides)
    for section, name in ((config.model, "checkpoint"), (config.model, "motion"), (config.model, "vae"),
                          (config.data, "latents")):
        value = getattr(section, name)
        if value and value != "tiny":
            setattr(section, name, str((path.parent / value).resolve()))
    if not config.model.checkpoint:
        raise ConfigError("model.checkpoint is empty; name the checkpoint file of the sampler to adapt.")
    check(config)
    return config


def check(config: AdaptConfig) -> None:
    """Raise ConfigError for values that no run can have, naming the key."""
    check_values(config, CHOICES, LEAST)
    if not config.data.latents:
        raise ConfigError("data.latents is empty; name a folder that encode-dataset wrote.")
    if not 0 <= config.conditioning.dropout <= 1:
        raise ConfigError(f"conditioning.dropout is {config.conditioning.dropout}; expected a share, 0 to 1.")
    if config.model.train == "layers" and not config.model.layers:
        raise ConfigError("model.train is 'layers', but model.layers is empty; name parameters, for example "
                          '["out.*", "*.time_stack.*"].')
    if config.model.layers and config.model.train not in ("layers", "lora"):
        raise ConfigError(f"model.layers has no part in model.train = {config.model.train!r}; set that to 'layers' or "
                          "'lora'.")
