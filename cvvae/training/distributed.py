"""Several processes, started by torchrun, that train one model on torch's own engine.

FSDP is not needed at this size: 182M float32 weights with gradients, both AdamW moments and EMA are 3.6 GB; what fills
a GPU is activations, which it would not shard.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Group:
    """This process among those of the run."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether ``flag`` holds in any process: all must leave the loop after the same step."""
        if self.world == 1:
            return flag
        flags = torch.tensor(float(flag), device=device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def gathered(self, value: Any) -> list[Any]:
        """``value`` of every process, in order of rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """For every process to come here."""
        self.gathered(None)

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def torchrun_group() -> Group:
    """What torchrun's environment says of this process; one alone where there is none.  Joins nothing."""
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return Group()
    return Group(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", 0)))


def join_group(device: str) -> Group:
    """The group torchrun's environment describes, joined.

    device: "cuda" has processes talk through NCCL, each on the GPU of its local rank; any other, through Gloo.
    """
    group = torchrun_group()
    if group.world == 1:
        return Group()
    if device == "cuda":
        torch.cuda.set_device(group.local_rank)
    if not dist.is_initialized():
        # Long enough for a rank that validates alone while the others wait.
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=2))
    return group


def share(items: Sequence, group: Group) -> list[tuple[int, Any]]:
    """(index, item) of those this process takes."""
    return [(i, item) for i, item in enumerate(items) if i % group.world == group.rank]
