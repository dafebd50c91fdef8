"""What the sampler is told of each clip: encoded once, before training, and kept beside the run.

    conditioning/conditioner.json            of what: other settings, other files
    conditioning/empty.safetensors           what it is told where conditioning is dropped
    conditioning/shard-000000.safetensors    of the clips in the shard of latents of that name

Tensors, as the UNet takes them:  context [L, C]: text, or SVD's picture embedding, for cross-attention;
concat [A, C, h, w] and y [A, D], SVD only: the first frame's latents, and rates and noise embedded, of A draws of noise.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import write_whole
from ..dataset import LatentDataset, Sample
from ..training.distributed import Group, share

ALONE = Group()


class Conditioner(Protocol):
    """Encodes what a sampler is told of a clip."""

    facts: dict[str, Any]  # all that its tensors depend on, as JSON has it

    def empty(self) -> dict[str, Tensor]:
        """What takes the place of a clip's tensors of these names where conditioning is dropped; zeros for concat."""

    def __call__(self, sample: Sample, latents: Tensor) -> dict[str, Tensor]:
        """Of a clip, latents [C, t, h, w] unscaled."""


@torch.no_grad()
def encode_conditions(data: LatentDataset, conditioner: Conditioner, folder: Path, group: Group = ALONE,
                      report: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Encode what is not there yet; the processes of ``group`` share the shards, and all return when all are there.

    report: called with clips done and all, may raise to cancel.
    """
    facts = conditioner.facts | {"latents": {name: data.plan[name] for name in ("weights", "settings", "files")}}
    written = json.dumps(facts, indent=1)
    about = folder / "conditioner.json"
    if group.leads:
        if about.exists() and about.read_text(encoding="utf-8") != written:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(about, lambda partial: Path(partial).write_text(written, encoding="utf-8"))
        save(conditioner.empty(), folder / "empty.safetensors")
    group.wait()
    shards: dict[str, list[int]] = {}
    for i, sample in enumerate(data.samples):
        shards.setdefault(sample.shard, []).append(i)
    done = 0
    for _, (name, clips) in share(list(shards.items()), group):
        tensors = {}
        for i in clips:
            if not (folder / name).exists():
                sample = data.samples[i]
                tensors |= {f"{sample.key}.{what}": tensor for what, tensor in conditioner(sample, data[i]).items()}
            done += 1
            report(done, len(data))
        if tensors:
            save(tensors, folder / name)
    group.wait()


def save(tensors: dict[str, Tensor], path: Path) -> None:
    tensors = {name: tensor.float().cpu().contiguous().clone() for name, tensor in tensors.items()}  # shared are refused
    write_whole(path, lambda partial: save_file(tensors, partial))


class Conditions:
    """Of the clips of ``data``, from the folder that :func:`encode_conditions` filled."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._empty = self._read("empty.safetensors", "")

    def of(self, sample: Sample, rng: Random | None = None, dropout: float = 0.0) -> dict[str, Tensor]:
        """context, and where the model takes them concat and y, of one clip.

        rng: draws one of the noised first frames, and whether conditioning is dropped; None: the first, and nothing is.
        """
        found = self._read(sample.shard, sample.key + ".")
        if "concat" in found:
            draw = rng.randrange(len(found["concat"])) if rng else 0
            found |= {name: found[name][draw] for name in ("concat", "y")}
        if rng and rng.random() < dropout:
            found |= self._empty
            if "concat" in found:
                found["concat"] = found["concat"] * 0
        return found

    def _read(self, name: str, prefix: str) -> dict[str, Tensor]:
        with safe_open(self.folder / name, framework="pt") as file:
            return {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}
