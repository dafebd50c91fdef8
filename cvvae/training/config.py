"""Training configs: a TOML file, checked key by key against these dataclasses, and overrides ``key=value``."""

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigError(ValueError):
    """A key or value the trainer does not understand."""


# A weight that may change over a run: a number, or [[step, value], ...], linear between and held outside.
Schedule = float | list[list[float]]


@dataclass
class ModelConfig:
    kind: str = "video"  # "video": a CV-VAE taught by an image VAE; "image": an image VAE from scratch
    teacher: str = "tiny"  # the frozen image VAE: "tiny" or a file that cvvae.load_image_vae reads
    student: str = ""  # a CV-VAE to go on from ("tiny" or a file); empty inflates the teacher
    # What is trained: "all"; one half, "encoder" or "decoder" (the latents then stay as they are); or "temporal",
    # the layers that see more than one frame, with all others as the image VAE left them.
    train: str = "all"
    latent_channels: int = 4  # this and the next three: kind = "image" only
    widths: list[int] = field(default_factory=lambda: [32, 32, 64, 64])
    blocks: int = 1
    norm_groups: int = 8


@dataclass
class Bucket:
    """Batches of one shape; ``share`` is how often they are drawn against the other buckets'."""

    frames: int = 1  # 1 + 4n
    height: int = 64  # of the crop, pixels, a multiple of 8
    width: int = 64
    batch: int = 8  # clips on each GPU in each forward pass
    share: float = 1.0


@dataclass
class DataConfig:
    # Videos, pictures, folders of them, .csv manifests and .tar shards, relative to the config file.
    sources: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)  # file names (no folder, no suffix) kept out of training
    buckets: list[Bucket] = field(default_factory=lambda: [Bucket()])
    max_stride: int = 8  # frames are taken 1 .. max_stride apart, as in the paper's training
    flip: bool = True  # mirror half of the clips
    workers: int = 2  # threads that decode ahead; 0 decodes between the steps
    validation_frames: int = 17
    validation_size: int = 128  # side of the centre crop
    validation_clips: int = 0  # how many of the held-out clips are scored; 0: all


@dataclass
class LossConfig:
    """Terms of the objective.  Every term is a mean, so no weight depends on clip or latent size."""

    reconstruction: str = "l1"  # or "l2"
    learn_logvar: bool = False  # reconstruction and regularizer divided by learned variances, as the reference does
    perceptual: str = "none"  # "lpips" (package lpips and its backbone's weights) or "ms-ssim" (kornia, no weights)
    perceptual_weight: Schedule = 0.5
    lpips_net: str = "vgg"  # or "alex"
    lpips_weights: str = ""  # file of the backbone's torchvision weights; empty looks in torch's hub folder
    # Paper and reference: KL 1.0 beside sums divided by learned variances; as a mean beside a mean L1 that
    # is about 1e-6 per latent value times latents per pixel.
    kl: Schedule = 1e-6
    # Eq. 1-3: "decoder" (lambda1; the paper's best), "encoder" (lambda2), "both" or "none".
    regularizer: str = "decoder"
    decoder_weight: Schedule = 1.0  # lambda1: the frozen image decoder must decode the video latents
    encoder_weight: Schedule = 1.0  # lambda2: the video decoder must decode the frozen image encoder's latents
    regularizer_loss: str = "l1"  # or "l2"; the paper writes L2, its released config uses L1
    mapping: str = "random"  # psi of the paper: which frame of its four a latent must decode to
    gan: str = "none"  # "hinge" or "non-saturating": a 3-D patch discriminator
    gan_weight: Schedule = 0.5
    gan_adaptive: bool = True  # times |gradient of reconstruction| / |gradient of GAN| at the last layer
    gan_start: int = 0  # step from which it trains and counts
    gan_passes: int = 2  # 1: one pass through the discriminator serves both sides, by reversing its gradient
    gan_channels: int = 64
    gan_layers: int = 4
    outliers: Schedule = 0.0  # latents further than outlier_sigmas from their channel's mean
    outlier_sigmas: float = 3.0
    statistics: Schedule = 0.0  # mean and deviation of each latent channel against the image VAE's


@dataclass
class CommonOptimConfig:
    """Of every training run."""

    steps: int = 1000
    optimizer: str = "adamw"  # or "adamw8bit" (package bitsandbytes, CUDA): a quarter of the optimizer's memory
    learning_rate: float = 1e-4
    warmup: int = 100
    final_ratio: float = 0.01  # of the learning rate, reached at the last step and held after it
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.01
    accumulate: int = 1  # forward passes in each step; batch 1 with accumulate 4 gives the step of batch 4
    clip_norm: float = 1.0
    skip_norm: float = 1e4  # a gradient larger than this, or not finite, is not applied
    stop_after_skips: int = 10  # in a row; the batch is then saved
    ema_decay: float = 0.999


@dataclass
class OptimConfig(CommonOptimConfig):
    discriminator_rate: float = 1e-4  # constant from gan_start on


@dataclass
class CommonRunConfig:
    """Of every training run."""

    out: str = "runs/train"  # folder for checkpoints, logs and the result, relative to where it is run
    seed: int = 0
    device: str = "auto"  # "auto": CUDA when there is one
    precision: str = "fp32"  # "bf16": autocast with float32 weights
    checkpointing: bool = False  # compute activations again in the backward pass: less memory, a third more time
    save_every: int = 500
    keep: int = 2  # checkpoints kept, the newest ones
    validate_every: int = 500
    tensorboard: bool = False  # package tensorboard; losses.csv and validation.csv are always written
    name: str = ""  # what the resulting file says it is


@dataclass
class RunConfig(CommonRunConfig):
    channels_last: bool = False  # memory format of the kernels; faster on most GPUs
    videos: int = 2  # held-out clips drawn side by side at each validation


@dataclass
class TrainConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


COMMON_CHOICES = {"optim.optimizer": ("adamw", "adamw8bit"), "run.precision": ("fp32", "bf16")}
COMMON_LEAST = {"optim.steps": 1, "optim.accumulate": 1, "optim.stop_after_skips": 1, "run.save_every": 1, "run.keep": 1,
                "run.validate_every": 1, "data.workers": 0}
CHOICES = {
    "model.kind": ("video", "image"),
    "model.train": ("all", "decoder", "encoder", "temporal"),
    "loss.reconstruction": ("l1", "l2"),
    "loss.perceptual": ("none", "lpips", "ms-ssim"),
    "loss.lpips_net": ("vgg", "alex"),
    "loss.regularizer": ("decoder", "encoder", "both", "none"),
    "loss.regularizer_loss": ("l1", "l2"),
    "loss.mapping": ("first", "slice", "average", "random"),
    "loss.gan": ("none", "hinge", "non-saturating"),
    "loss.gan_passes": (1, 2),
} | COMMON_CHOICES
LEAST = {"data.max_stride": 1, "data.validation_clips": 0, "loss.gan_start": 0, "loss.gan_layers": 2,
         "loss.gan_channels": 8, "run.videos": 0} | COMMON_LEAST


def read_table(kind: type, path: Path, overrides: Sequence[str]) -> Any:
    """A TOML file as a dataclass ``kind``, with overrides like ``optim.steps=200``.  Raises ConfigError naming the key."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        for override in overrides:
            _apply(table, override)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}.") from None
    return _build(kind, table, "")


def read_config(path: str | Path, overrides: list[str] = ()) -> TrainConfig:
    """Read a TOML file and apply overrides like ``optim.steps=200``.

    Data sources and ``loss.lpips_weights`` are resolved against the file's folder.  Raises ConfigError naming the key.
    """
    path = Path(path)
    config = read_table(TrainConfig, path, overrides)
    config.data.sources = [str((path.parent / source).resolve()) for source in config.data.sources]
    if config.loss.lpips_weights:
        config.loss.lpips_weights = str((path.parent / config.loss.lpips_weights).resolve())
    check(config)
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
    if kind == Schedule:
        return _schedule(value, where)
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


def _schedule(value: Any, where: str) -> Any:
    if not isinstance(value, list):
        return _convert(float, value, where)
    points = _convert(list[list[float]], value, where)
    steps = [point[0] for point in points if len(point) == 2]
    if not points or len(steps) < len(points) or steps != sorted(set(steps)):
        raise ConfigError(f"{where} is {value!r}; expected a number or [[step, value], ...] with rising steps.")
    return points


def at_step(schedule: "Schedule", step: int) -> float:
    """The value of a :data:`Schedule` at ``step``."""
    if isinstance(schedule, float):
        return schedule
    for (before, low), (after, high) in zip(schedule, schedule[1:], strict=False):
        if before <= step < after:
            return low + (high - low) * (step - before) / (after - before)
    return schedule[0][1] if step < schedule[0][0] else schedule[-1][1]


def _value(config: Any, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def check_values(config: Any, choices: dict[str, tuple], least: dict[str, float]) -> None:
    """Raise ConfigError where a value is none of ``choices`` or less than ``least``, naming the key."""
    for key, known in choices.items():
        if _value(config, key) not in known:
            raise ConfigError(f"{key} is {_value(config, key)!r}; expected one of {', '.join(map(str, known))}.")
    for key, smallest in least.items():
        if _value(config, key) < smallest:
            raise ConfigError(f"{key} is {_value(config, key)}; expected {smallest} or more.")


def check(config: TrainConfig) -> None:
    """Raise ConfigError for values that no run can have, naming the key."""
    check_values(config, CHOICES, LEAST)
    if not config.data.sources:
        raise ConfigError("data.sources is empty; list the files or folders of videos and pictures to train on.")
    if config.data.validation_frames % 4 != 1 or config.data.validation_size % 8:
        raise ConfigError(f"data.validation_frames is {config.data.validation_frames}, data.validation_size "
                          f"{config.data.validation_size}; expected 1 + 4n frames and a multiple of 8 pixels.")
    for i, bucket in enumerate(config.data.buckets):
        if bucket.frames < 1 or bucket.frames % 4 != 1:
            raise ConfigError(f"data.buckets[{i}].frames is {bucket.frames}; expected 1 + 4n (1 for pictures).")
        for name in ("height", "width"):
            side = getattr(bucket, name)
            if side < 16 or side % 8:
                raise ConfigError(f"data.buckets[{i}].{name} is {side}; expected a multiple of 8, at least 16.")
        if bucket.batch < 1 or bucket.share < 0:
            raise ConfigError(f"data.buckets[{i}]: batch must be at least 1 and share 0 or more.")
        if config.model.kind == "image" and bucket.frames != 1:
            raise ConfigError(f"data.buckets[{i}].frames is {bucket.frames}; an image VAE trains on single frames.")
    if config.loss.gan_channels % 4:
        raise ConfigError(f"loss.gan_channels is {config.loss.gan_channels}; expected a multiple of 4, for its group norms.")
    if config.loss.gan == "non-saturating" and config.loss.gan_passes == 1:
        raise ConfigError("loss.gan_passes is 1, which has both sides share one loss; with loss.gan = 'non-saturating' they "
                          "have two. Set loss.gan_passes to 2, or loss.gan to 'hinge'.")
    if config.loss.gan != "none" and config.loss.gan_adaptive and config.model.train == "encoder":
        raise ConfigError("loss.gan_adaptive compares gradients at the decoder's last layer, which model.train = 'encoder' "
                          "freezes. Set loss.gan_adaptive to false.")
    if config.model.kind == "image" and config.model.train != "all":
        raise ConfigError(f"model.train is {config.model.train!r}; an image VAE is trained from scratch, so with 'all'.")
    if not any(bucket.share for bucket in config.data.buckets):
        raise ConfigError("data.buckets: every share is 0, so there is nothing to draw.")
    loss = config.loss
    if config.model.kind == "image" and loss.statistics != 0:
        raise ConfigError("loss.statistics compares latents with the image VAE's; an image VAE has none to compare with.")
    if config.model.train == "encoder" and loss.regularizer == "encoder":
        raise ConfigError("loss.regularizer is 'encoder' and model.train 'encoder': encoder regularization trains the video "
                          "decoder only. Set loss.regularizer to decoder, or model.train to all or decoder.")
