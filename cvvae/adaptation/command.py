"""From a config to a trainer that is ready: the model by ComfyUI's loader, and what it is told of each clip."""

from collections.abc import Callable
from pathlib import Path

from .. import checkpoint
from ..dataset import LatentDataset
from ..training.base import pick_device
from ..training.config import ConfigError
from ..training.distributed import Group, join_group
from ..training.runfolder import Checkpoints
from .comfyui import FirstFrameConditioner, Sampler, TextConditioner, find_comfyui, load, unload
from .conditions import Conditioner, encode_conditions
from .config import AdaptConfig
from .motion import load_motion
from .trainer import AdaptationTrainer


def make_trainer(config: AdaptConfig, resume: bool = False,
                 report: Callable[[int, int], None] = lambda done, total: None) -> AdaptationTrainer:
    """report: called with clips whose conditions are encoded, and all of them."""
    data = LatentDataset(config.data.latents)
    out = Path(config.run.out)
    if not resume and Checkpoints(out / "checkpoints", 1).files():
        raise ConfigError(f"{out} holds a run already: add --resume to go on with it, or choose another run.out.")
    find_comfyui(config.model.comfyui)
    group = join_group(pick_device(config.run.device).type)
    sampler = _loaded(config, data, out / "conditioning", group, report)
    unload()
    return AdaptationTrainer(config, sampler, out / "conditioning", resume)


def _loaded(config: AdaptConfig, data: LatentDataset, folder: Path, group: Group, report) -> Sampler:
    """The sampler, when what it is told is in ``folder``.  A function of its own, so that the encoders are gone after it."""
    model, clip, clip_vision = load(config.model.checkpoint)
    sampler = Sampler(model, load_motion(config.model.motion) if config.model.motion else None)
    encode_conditions(data, _conditioner(config, sampler, clip, clip_vision), folder, group, report)
    sampler.base = None  # the loader's model
    return sampler


def _conditioner(config: AdaptConfig, sampler: Sampler, clip, clip_vision) -> Conditioner:
    facts = {"checkpoint": Path(config.model.checkpoint).name}
    if sampler.shows_first_frame:
        if clip_vision is None:
            raise ConfigError(f"{config.model.checkpoint} has no image encoder, by which SVD is shown the first frame; use "
                              "the whole checkpoint, as it was published.")
        if not config.model.vae:
            raise ConfigError("model.vae is empty; SVD is shown the first frame of each clip, so name the CV-VAE that its "
                              "latents are of.")
        vae = checkpoint.load(config.model.vae, device=pick_device(config.run.device))
        return FirstFrameConditioner(sampler, clip_vision, vae, config.conditioning, facts)
    if clip is None:
        raise ConfigError(f"{config.model.checkpoint} has no text encoder; use the whole checkpoint, as it was published.")
    return TextConditioner(clip, config.conditioning.prompt, facts)
