"""How much of kept strips there may be."""

from torch import Tensor

from .arena import Arena, layout_of


class Store:
    """Holds strips up to ``limit`` bytes; None is no limit.  On the CPU they are copied into an arena of its own."""

    def __init__(self, limit: int | None):
        self.limit = limit
        self.held = 0
        self.arena = Arena()

    def has_room(self, size: int) -> bool:
        return self.limit is None or self.held + size <= self.limit

    def keep(self, x: Tensor) -> Tensor:
        """``x`` [T, C, H, W], held from now on, whether or not there is room."""
        self.held += x.nbytes
        if x.device.type != "cpu":
            return x
        return self.arena.empty(x.shape, x.dtype, layout_of(x)).copy_(x)

    def release(self, x: Tensor) -> None:
        """Count what :meth:`keep` returned no more; who has it lets go of it."""
        self.held -= x.nbytes
