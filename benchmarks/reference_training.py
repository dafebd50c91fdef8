"""The official training step, imported from a checkout of github.com/AILab-CVC/CV-VAE: its engine, losses, discriminator,
optimizers and 2-D decoder, as configs/cvvae_sd3_constraint_training.yaml sets them up.

Nothing of the official code is here.  It does not run as it is; what stands between it and a step is worked around:

* The packages ``lvdm``, ``lvdm.models`` and ``lvdm.modules`` import the diffusion models, text encoders and data loaders
  (open_clip, transformers, torchdata ...) that a step does not use; empty packages at the same place stand in for them.
* ``pytorch_lightning``: the few methods of a LightningModule that manual optimization on one device takes (`_Lightning`).
  It clips and toggles gradients as Lightning does; logs are kept in a dictionary and written nowhere.
* ``lvdm.lr_scheduler`` wraps transformers' schedules; a constant rate stands in.
* LPIPS would download VGG16 and its own weights: left out, with ``perceptual_weight`` 0.
* torchvision, matplotlib and xformers are imported and not used by this configuration.

The released configuration trains encoder and decoder on one batch and the discriminator on the next; a step here is both,
on the same clip.  It keeps no moving average: with ``ema_decay`` it raises KeyError at the first update.
"""

import importlib
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from reference import WORKING, replaced
from torch import Tensor, autocast, nn

from cvvae import keys

CONFIG = "configs/cvvae_sd3_constraint_training.yaml"
NEVER = 10**9  # a step that is not reached


class OfficialStep:
    """The official engine with its optimizers.

    state: weights of encoder and decoder as our sd3 variant names them; image_decoder: of the 2-D decoder, likewise.
    gan: with the discriminator from the first step on, as the released configuration, or without it.
    recompute: the activations of each level are computed again in the backward pass, as the official code always does.
    """

    def __init__(self, path: str | Path, widths: tuple[int, ...], state: dict[str, Tensor], image_decoder: dict[str, Tensor],
                 device: str = "cpu", precision: str = "fp32", gan: bool = True, recompute: bool = True):
        settings = _settings(path)
        params = settings["params"]
        for name in ("encoder_config", "decoder_config", "constraint_decoder_config"):
            params[name]["params"]["block_out_channels"] = list(widths)
        loss = params["loss_config"]["params"]
        loss["perceptual_weight"] = 0.0
        loss["disc_start"] = params["disc_start_iter"] = 0 if gan else NEVER
        del params["ckpt_path"]
        with redirect_stdout(None):  # it greets
            self.engine = _official(Path(path).resolve()).AutoencodingEngineWithLatentConstraint(**params)
        _load(self.engine, keys.published(state, "sd3"))
        _load(self.engine.constraint_decoder, _image_decoder(image_decoder))
        _load(self.engine.loss.discriminator, discriminator(path).state_dict())
        for network in (self.engine.encoder, self.engine.decoder, self.engine.constraint_decoder):
            network.gradient_checkpointing = recompute
        self.engine.to(device).train()
        self.engine.learning_rate = settings["base_learning_rate"]
        self.engine.prepare()
        self.device, self.gan = device, gan
        self.autocast = precision == "bf16"

    def __call__(self, clip: Tensor) -> dict[str, float]:
        """A step on ``clip`` [B, 3, T, H, W] in [-1, 1] on the device; its losses, sums turned into our means."""
        with autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.autocast):
            for turn in range(1 + self.gan):
                self.engine.training_step({"frames": clip}, turn)
        return self._means(clip)

    def _means(self, clip: Tensor) -> dict[str, float]:
        """docs/training.md: sums over a frame, and over a clip's latents, are turned into means."""
        logged, (_, _, frames, height, width) = self.engine.logged, clip.shape
        frame = 3 * height * width
        latents = self.engine.decoder.conv_in.in_channels * ((frames + 3) // 4) * (height // 8) * (width // 8)
        found = {"reconstruction": logged["train/loss/rec"], "decoder_regularizer": logged["train/loss/rec2d"],
                 "kl": logged["train/kl_loss"] / latents, "total": logged["train/loss/total"] / frame,
                 "gradient_norm": self.engine.norms[0] / frame}
        if self.gan:
            found |= {"generator": logged["train/loss/g"], "adaptive_weight": logged["train/scalars/d_weight"] / frame}
        return {name: float(value) for name, value in found.items()}

    def tensors(self) -> Iterator[Tensor]:
        """All that is kept from one step to the next."""
        yield from self.engine.state_dict().values()
        yield from (parameter.grad for parameter in self.engine.parameters() if parameter.grad is not None)
        for optimizer in self.engine.optimizers():
            yield from (value for moments in optimizer.inner.state.values() for value in moments.values())


def discriminator(path: str | Path) -> nn.Module:
    """The official discriminator, [B, 3, T, H, W] -> scores of patches, with the weights it always gets here."""
    engine = _official(Path(path).resolve())
    torch.manual_seed(0)
    network = engine.instantiate_from_config(_settings(path)["params"]["loss_config"]["params"]["discriminator_config"])
    return network.apply(sys.modules["lvdm.modules.autoencoding.losses.discriminator_loss"].weights_init)


def _settings(path: str | Path) -> dict:
    """The model's part of the released configuration."""
    import yaml  # comes with huggingface_hub, which the official code needs anyway

    return yaml.safe_load((Path(path) / CONFIG).read_text())["model"]


def _load(module: nn.Module, state: dict[str, Tensor]) -> None:
    """As the official ``apply_ckpt`` does, but complaining of names that are not there."""
    unknown = module.load_state_dict(state, strict=False).unexpected_keys
    if unknown:
        raise SystemExit(f"The official model has no {', '.join(unknown[:3])}: this is not the code that was released.")


def _image_decoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An image VAE's decoder (our names, no "decoder." before them) as the official 2-D decoder is laid out."""
    named = keys.published({f"decoder.{name}": tensor for name, tensor in state.items() if name != "latent_shift"}, "sd3")
    # published() takes a shortcut's kernel for one with time, [O, I, 1, 1, 1].
    return {name.removeprefix("decoder."): tensor[..., None] if name.endswith("conv_shortcut.weight") else tensor
            for name, tensor in named.items()}


# -- what is imported --------------------------------------------------------------------------------


@cache
def _official(folder: Path) -> ModuleType:
    """The official ``lvdm.models.autoencoder``.  Exits with a message where it cannot be imported."""
    if not (folder / CONFIG).is_file():
        raise SystemExit(f"{folder.name} has no {CONFIG}: its training code is not there.")
    logging.getLogger("lvdm").setLevel(logging.ERROR)  # its modules warn that xformers is missing
    packages = {}
    for name in ("lvdm", "lvdm.models", "lvdm.modules"):
        packages[name] = ModuleType(name)
        packages[name].__path__ = [str(folder.joinpath(*name.split(".")))]
    sys.modules.update(packages)
    sys.modules["lvdm.lr_scheduler"] = _module("lvdm.lr_scheduler", get_scheduler=_ConstantRate)
    try:
        import diffusers.models.attention_processor  # noqa: F401  before xformers is found missing: it looks for it too

        with replaced({"pytorch_lightning": _module("pytorch_lightning", LightningModule=_Lightning),
                       "torchvision": _module("torchvision", models=None), "xformers": None,
                       "matplotlib": _module("matplotlib", colormaps=None, pyplot=None)}):
            engine = importlib.import_module("lvdm.models.autoencoder")
            importlib.import_module("lvdm.modules.autoencoding.losses.discriminator_loss").LPIPS = nn.Identity
            return engine
    except ImportError as error:
        raise SystemExit(f"The official training code cannot be imported ({error}); {WORKING}.") from None


def _module(name: str, **contents) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


class _ConstantRate:
    """Takes a schedule's place and its arguments."""

    def __init__(self, **_):
        pass

    def step(self) -> None:
        pass


class _Lightning(nn.Module):
    """pytorch_lightning.LightningModule, as far as a step on one device goes.

    logged: what the last steps logged.  norms: of the gradients, before they were clipped, optimizer by optimizer.
    """

    def prepare(self) -> None:
        """What Lightning does before the first step."""
        optimizers, self._schedulers = self.configure_optimizers()
        self._optimizers = [_Optimizer(self, optimizer) for optimizer in optimizers]
        self.global_step = 0
        self.logged: dict[str, Tensor] = {}
        self.norms: dict[int, Tensor] = {}

    def optimizers(self) -> list["_Optimizer"]:
        return self._optimizers

    def lr_schedulers(self) -> list[_ConstantRate]:
        return self._schedulers

    def manual_backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_gradients(self, optimizer: "_Optimizer", gradient_clip_val: float, gradient_clip_algorithm: str) -> None:
        self.norms[self._optimizers.index(optimizer)] = nn.utils.clip_grad_norm_(optimizer.parameters, gradient_clip_val)

    def log(self, name: str, value: Tensor, **_) -> None:
        self.logged[name] = value

    def log_dict(self, values: dict[str, Tensor], **_) -> None:
        self.logged |= values


class _Optimizer:
    """pytorch_lightning's LightningOptimizer around ``inner``."""

    def __init__(self, module: _Lightning, inner: torch.optim.Optimizer):
        self.module, self.inner = module, inner
        self.parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
        self.zero_grad = inner.zero_grad

    @contextmanager
    def toggle_model(self) -> Iterator[None]:
        """The other optimizers' parameters take no gradient inside."""
        others = [parameter for other in self.module.optimizers() if other is not self for parameter in other.parameters
                  if parameter.requires_grad]
        _require(others, False)
        yield
        _require(others, True)

    def step(self) -> None:
        self.inner.step()
        self.module.global_step += 1


def _require(parameters: Iterable[nn.Parameter], gradients: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(gradients)
