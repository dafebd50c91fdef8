"""Training configs: a TOML file, checked key by key against these dataclasses, and overrides ``key=value``."""

import dataclasses
import difflib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigError(ValueError):
    """A key or value the trainer does not understand."""


@dataclass
class ModelConfig:
    kind: str = "video"  # "video": a CV-VAE taught by an image VAE; "image": an image VAE from scratch
    teacher: str = "tiny"  # the frozen image VAE: "tiny" or a file that cvvae.load_image_vae reads
    student: str = ""  # a CV-VAE to go on from; empty inflates the teacher
    latent_channels: int = 4  # this and the next three: kind = "image" only
    widths: list[int] = field(default_factory=lambda: [32, 32, 64, 64])
    blocks: int = 1
    norm_groups: int = 8


@dataclass
class Bucket:
    """Batches of one shape; ``share`` is how often they are drawn against the other buckets'."""

    frames: int = 1
    size: int = 64  # side of the square crop
    batch: int = 8
    share: float = 1.0


@dataclass
class DataConfig:
    sources: list[str] = field(default_factory=list)  # files or folders, relative to the config file
    validation: list[str] = field(default_factory=list)  # file names (no folder, no suffix) kept out of training
    buckets: list[Bucket] = field(default_factory=lambda: [Bucket()])
    max_stride: int = 4  # frames are taken 1 .. max_stride apart
    validation_frames: int = 17
    validation_size: int = 128
    cache_gb: float = 2.0  # decoded frames kept in memory


@dataclass
class LossConfig:
    """Weights of the objective.  Every term is a mean, so none depends on clip or latent size."""

    # Paper and reference: KL 1.0 beside sums divided by learned variances; as a mean beside a mean L1 that
    # is about 1e-6 per latent value times latents per pixel.
    kl: float = 1e-6
    regularizer: float = 1.0  # lambda1 of the paper's eq. 3: through the frozen image decoder
    mapping: str = "random"  # psi of the paper: which frame of its four a latent must decode to


@dataclass
class OptimConfig:
    steps: int = 1000
    learning_rate: float = 1e-4
    warmup: int = 100
    final_ratio: float = 0.01  # of the learning rate, reached at the last step and held after it
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999


@dataclass
class RunConfig:
    out: str = "runs/train"  # folder for checkpoints, logs and the result, relative to where it is run
    seed: int = 0
    device: str = "auto"  # "auto": CUDA when there is one
    precision: str = "fp32"  # "bf16": autocast with float32 weights
    save_every: int = 500
    validate_every: int = 500
    name: str = ""  # what the resulting file says it is


@dataclass
class TrainConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


CHOICES = {
    "model.kind": ("video", "image"),
    "loss.mapping": ("first", "slice", "average", "random"),
    "run.precision": ("fp32", "bf16"),
}


def read_config(path: str | Path, overrides: list[str] = ()) -> TrainConfig:
    """Read a TOML file and apply overrides like ``optim.steps=200``.

    Data sources are resolved against the file's folder.  Raises ConfigError naming the key.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        for override in overrides:
            _apply(table, override)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}.") from None
    config = _build(TrainConfig, table, "")
    config.data.sources = [str((path.parent / source).resolve()) for source in config.data.sources]
    _check_values(config)
    return config


def _apply(table: dict, override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"Override {override!r}: expected key=value, for example optim.steps=200.")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is text
    *sections, name = key.strip().split(".")
    for section in sections:
        table = table.setdefault(section, {})
    table[name] = parsed


def _build(kind: type, table: dict, where: str) -> Any:
    if not isinstance(table, dict):
        raise ConfigError(f"{where.rstrip('.')} is {table!r}; expected a table of settings.")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in table:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {where}{near[0]}?" if near else f"; known here: {', '.join(fields)}."
            raise ConfigError(f"Unknown setting {where}{name}{hint}")
    return kind(**{name: _convert(fields[name].type, value, where + name) for name, value in table.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where + ".")
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where} is {value!r}; expected a list.")
        return [_convert(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where} is {value!r}; expected {kind.__name__}.")
    return value


def _check_values(config: TrainConfig) -> None:
    for key, choices in CHOICES.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value not in choices:
            raise ConfigError(f"{key} is {value!r}; expected one of {', '.join(choices)}.")
    for key in ("optim.steps", "run.save_every", "run.validate_every", "data.max_stride"):
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value < 1:
            raise ConfigError(f"{key} is {value}; expected 1 or more.")
    if not config.data.sources:
        raise ConfigError("data.sources is empty; list the files or folders of videos and pictures to train on.")
    for i, bucket in enumerate(config.data.buckets):
        if bucket.frames < 1 or bucket.frames % 4 != 1:
            raise ConfigError(f"data.buckets[{i}].frames is {bucket.frames}; expected 1 + 4n (1 for pictures).")
        if bucket.size < 16 or bucket.size % 8:
            raise ConfigError(f"data.buckets[{i}].size is {bucket.size}; expected a multiple of 8, at least 16.")
        if bucket.batch < 1 or bucket.share < 0:
            raise ConfigError(f"data.buckets[{i}]: batch must be at least 1 and share 0 or more.")
        if config.model.kind == "image" and bucket.frames != 1:
            raise ConfigError(f"data.buckets[{i}].frames is {bucket.frames}; an image VAE trains on single frames.")
    if not any(bucket.share for bucket in config.data.buckets):
        raise ConfigError("data.buckets: every share is 0, so there is nothing to draw.")
