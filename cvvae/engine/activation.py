"""Activations that need not be in memory: kept in strips of rows while there is room, made again when not.

A group norm needs the statistics of a whole window before its first value can be normalised; nothing else
ties far-apart rows of a window together.  So each layer's output is walked once, strip by strip, to be
measured, and what was made is kept for the next layer as far as there is room.  A strip that could not be
kept is computed again from what was: the numbers are the same however little room there is.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .arena import empty_like
from .passes import Moments
from .store import Store

Compute = Callable[[int, int, Moments | None], Tensor]
RESERVE = 3  # strips
LOOK_BACK = 6  # rows above a strip that residual blocks and up-samplers still ask for


class Statistics:
    """Group-norm statistics pooled over several runs of one network: tiles of a window, or all of a clip.

    First every run is made once and recorded; after :meth:`pool` the same runs use what was recorded.  What
    is pooled was measured behind norms that still used their own statistics.
    """

    def __init__(self):
        self.sums: list[tuple[Tensor, Tensor, int]] = []
        self.pooled = False

    def pool(self) -> None:
        self.pooled = True

    def exchange(self, index: int, moments: Moments) -> tuple[Tensor, Tensor]:
        """Mean and mean square that norm number ``index`` of the network is to use."""
        mean, square = moments.mean_and_square()
        if not self.pooled:
            sums = mean * moments.count, square * moments.count, moments.count
            if index == len(self.sums):
                self.sums.append(sums)
            else:
                self.sums[index] = tuple(old + new for old, new in zip(self.sums[index], sums, strict=True))
            return mean, square
        mean, square, count = self.sums[index]
        return mean / count, square / count


class Activation:
    """One layer's output [T, C, H, W].

    strip: rows of a strip, or so many that ``step`` divides them; the last one may be lower.
    compute: (first row, row behind the last, what measures them or None) -> [T, C, rows, W]; None where all is kept from
        the start.
    like: a tensor of its dtype and device.
    moments: what its strips are measured with; None where no norm reads it.
    step: rows that are made together: ``compute`` is asked for as many, or some times as many.
    """

    def __init__(self, shape: tuple[int, int, int, int], strip: int, compute: Compute | None, like: Tensor,
                 moments: Moments | None, step: int = 1):
        self.shape = shape
        self.strip = strip = -(-strip // step) * step
        self.compute = compute
        self.like = like.new_empty(0)
        self.moments = moments
        self.step = step
        self.kept: list[Tensor | None] = [None] * -(-shape[2] // strip)
        # What was computed last without being kept: the next strip's kernels look back at it.
        self.recent: list[tuple[int, Tensor]] = []
        self.superseded: Sequence[Activation] = ()  # needed only to compute this one, see settle

    def rows_of(self, index: int) -> tuple[int, int]:
        return index * self.strip, min((index + 1) * self.strip, self.shape[2])

    def pieces(self, start: int, stop: int, moments: Moments | None = None) -> Iterator[tuple[int, Tensor]]:
        """Rows ``start`` to ``stop`` as (first row, [T, C, rows, W]), in order; ``moments`` measure what is computed."""
        row = start
        while row < stop:
            piece = self._at_hand(row, stop)
            if piece is None:
                # No more than a strip at a time: a request from a smaller layer can span many.
                end, below = min(stop, row + self.strip), (row // self.strip + 1) * self.strip
                if below < end and self.kept[below // self.strip] is not None:
                    end = below
                first, last = row // self.step * self.step, -(-end // self.step) * self.step
                self.recent.append((first, self.compute(first, last, moments)))
                self._forget(last)
                piece = self._at_hand(row, stop)
            yield row, piece
            row += piece.shape[2]

    def rows(self, start: int, stop: int, moments: Moments | None = None) -> Tensor:
        """The same in one tensor."""
        pieces = [piece for _, piece in self.pieces(start, stop, moments)]
        if len(pieces) == 1:
            return pieces[0]
        frames, channels, _, width = self.shape
        return torch.cat(pieces, dim=2, out=empty_like(pieces[0], (frames, channels, stop - start, width)))

    def _forget(self, stop: int) -> None:
        """Let go of recent pieces that end too far above row ``stop``, or lie below it: those are of the last walk."""
        first = stop - self.strip - LOOK_BACK
        self.recent = [(row, piece) for row, piece in self.recent if row < stop and row + piece.shape[2] > first]

    def _at_hand(self, row: int, stop: int) -> Tensor | None:
        """Rows from ``row`` on that need no computing, as far as they lie in one tensor."""
        index, offset = divmod(row, self.strip)
        if self.kept[index] is not None:
            return self.kept[index][:, :, offset:offset + stop - row]
        for first, tensor in self.recent:
            if first <= row < first + tensor.shape[2]:
                return tensor[:, :, row - first:stop - first]
        return None

    def keep(self, x: Tensor, store: Store) -> "Activation":
        """Hold, and measure, ``x``, all of this activation, whether or not ``store`` has room."""
        for i in range(len(self.kept)):
            self.kept[i] = store.keep(x[:, :, slice(*self.rows_of(i))])
            if self.moments is not None:
                self.moments.add(self.kept[i])
        return self

    def bytes_kept(self, start: int, stop: int, height: int) -> int:
        """Bytes kept of rows ``start`` to ``stop``, counted where this activation has ``height`` rows."""
        scale = height / self.shape[2]
        return sum(piece.nbytes for i, piece in enumerate(self.kept) if piece is not None
                   and start < self.rows_of(i)[1] * scale <= stop)

    def release(self, index: int, store: Store) -> None:
        if self.kept[index] is not None:
            store.release(self.kept[index])
            self.kept[index] = None

    def drop(self, store: Store) -> None:
        """Let go of everything, here and in what only this was computed from."""
        for index in range(len(self.kept)):
            self.release(index, store)
        self.recent.clear()
        self.computed(store)

    def computed(self, store: Store) -> None:
        """Nothing will be computed any more: let go of what that takes, kernels included."""
        self.compute = None
        superseded, self.superseded = self.superseded, ()
        for parent in superseded:
            parent.drop(store)


def settle(made: Sequence[Activation], parents: Sequence[Activation], store: Store, check: Callable[[], None],
           result: Tensor | None = None) -> None:
    """Walk every strip of the activations ``made`` (of equal height): measure it, and keep it if ``store`` has room.

    parents: what only these are made of: their strips go when what is made of them is kept.
    check: called after every strip; may raise to cancel.
    result: what the network gives: the one activation made goes there, and is not measured.
    """
    for activation in made:
        activation.superseded = parents
    count, height = len(made[0].kept), made[0].shape[2]
    for i in range(count):
        rows = made[0].rows_of(i)
        pieces = [activation.rows(*rows, activation.moments if result is None else None) for activation in made]
        if result is not None:
            made[0].kept[i] = result[:, :, slice(*rows)].copy_(pieces[0])
        else:
            size = sum(piece.nbytes for piece in pieces)
            # What takes the place of its parents may fill the store; else room stays for those that will.
            room = store.has_room((1 + RESERVE) * size)
            if not room and store.has_room(size):
                room = sum(parent.bytes_kept(*rows, height) for parent in parents) >= size
            for activation, piece in zip(made, pieces, strict=True):
                if room:
                    activation.kept[i] = store.keep(piece)
        del pieces
        for activation in made:
            activation.recent.clear()  # it is its parents that the next strip looks back at
        # The kernels of the next strip still look back at the rows under this one.
        finished = rows[i == count - 1]
        for parent in parents:
            _release(parent, made, i, finished, store)
        check()
    for activation in parents:
        activation.recent.clear()
    if all(piece is not None for activation in made for piece in activation.kept):
        for activation in made:
            activation.computed(store)


def _release(parent: Activation, made: Sequence[Activation], newest: int, finished: int, store: Store) -> None:
    """Let go of strips of ``parent`` above row ``finished`` of ``made`` where these, and their neighbours, are kept."""
    strip = made[0].strip
    scale = made[0].shape[2] / parent.shape[2]
    for i in range(len(parent.kept)):
        first, last = (row * scale for row in parent.rows_of(i))
        if last > finished:
            break
        near = range(max(0, int(first) // strip - 1), min(newest, -(-int(last) // strip)) + 1)
        if all(activation.kept[k] is not None for activation in made for k in near):
            parent.release(i, store)
