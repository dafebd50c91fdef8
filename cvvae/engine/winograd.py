"""Fewer multiplications: Winograd's F(4, 3) along time, rows or columns, and filters behind up-sampling.

Four neighbouring outputs of a 3-tap filter need six products instead of twelve (Lavin & Gray, "Fast Algorithms
for Convolutional Neural Networks", 2015).  Here a product is a convolution of a sum of frames, rows or columns with
what is left of the kernel: by one of the CPU's libraries, which run near its peak, or by the same method along
another axis.

The method evaluates polynomials at six points.  The usual 0, 1, -1, 2, -2 and infinity lose a digit at every
layer; 0, +-sqrt(1/2), +-sqrt(2) and infinity keep sums and differences of like size, and rounding errors are those
of F(2, 3) (compare Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep
Neural Networks", 2020).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .arena import empty_like

TIME, ROWS, COLUMNS = 0, 2, 3  # axes of [T, C, H, W]

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x, tap, bias) -> one tap's convolution


def filtered(x: Tensor, taps: Sequence[Tensor], bias: Tensor | None, axis: int, product: Product,
             fours: bool = True) -> Tensor:
    """A 3-tap filter along ``axis``: by fours unless told not to, what is left by twos, what is left by one."""
    shape = [x.shape[0], taps[0].shape[0], *(x.shape[side] - taps[0].shape[side] + 1 for side in (ROWS, COLUMNS))]
    shape[axis] = count = x.shape[axis] - 2
    out, done = empty_like(x, shape), 0
    for step, method in ((4, _fours), (2, _twos), (1, _ones))[0 if fours else 1:]:
        many = (count - done) // step * step
        if many:
            places = _by_turns(out.narrow(axis, done, many), step, axis)
            method(x.narrow(axis, done, many + 2), taps, bias, axis, product, *places)
            done += many
    return out


def _fours(x: Tensor, taps: Sequence[Tensor], bias: Tensor | None, axis: int, product: Product,
           first: Tensor, second: Tensor, third: Tensor, fourth: Tensor) -> None:
    """F(4, 3) at 0, +-p, +-q and infinity; the products at p and q are scaled by the square of the point."""
    pp, qq = 0.5, 2.0  # squares of p and q
    p, q = pp ** 0.5, qq ** 0.5
    past, now, future = taps

    def at(k: int) -> Tensor:
        return _every(x, k, 4, x.shape[axis] - 2, axis)

    def pair(point: float, square: float, other: float) -> tuple[Tensor, Tensor]:
        """Sum and difference of the products at ``point`` and minus it."""
        even, odd = _difference(at(4), at(2), other), _difference(at(3), at(1), other)
        outer, inner = (past + future * square) / (2 * (square - other)), now * (point / (2 * (square - other)))
        # The bias goes where it comes out in all four outputs: through p, corrected at zero and infinity.
        shares = (None, None) if bias is None or point == q else (bias * ((1 + p) / 2), bias * ((1 - p) / 2))
        plus = product(_sum(even, odd, point), outer + inner, shares[0])
        minus = product(even.sub_(odd, alpha=point), outer - inner, shares[1])
        return _sum(plus, minus), _difference(plus, minus)

    def end(k: int, tap: Tensor, share: float) -> Tensor:
        """The product at zero or at infinity."""
        seen = _difference(at(k + 4), at(k + 2), pp + qq).add_(at(k), alpha=pp * qq)
        return product(seen, tap, None if bias is None else bias * share)

    (p_sum, p_difference), (q_sum, q_difference) = pair(p, pp, qq), pair(q, qq, pp)
    torch.add(p_sum, q_sum, out=third)
    torch.add(end(0, past / (pp * qq), 1 - 1 / pp).add_(p_sum, alpha=1 / pp), q_sum, alpha=1 / qq, out=first)
    del p_sum, q_sum
    torch.add(end(1, future, 1 - pp).add_(p_difference, alpha=p), q_difference, alpha=q, out=fourth)
    torch.add(p_difference.mul_(1 / p), q_difference, alpha=1 / q, out=second)


def _twos(x: Tensor, taps: Sequence[Tensor], bias: Tensor | None, axis: int, product: Product,
          even: Tensor, odd: Tensor) -> None:
    """F(2, 3)."""
    past, now, future = taps
    first, second, third, fourth = (_every(x, k, 2, x.shape[axis] - 2, axis) for k in range(4))
    outer = past + future
    both = product(_sum(second, third), (outer + now) / 2, bias)
    difference = product(_difference(third, second), (outer - now) / 2, None)
    torch.add(product(_difference(first, third), past, None).add_(both), difference, out=even)
    torch.sub(both.sub_(difference), product(_difference(second, fourth), future, None), out=odd)


def _ones(x: Tensor, taps: Sequence[Tensor], bias: Tensor | None, axis: int, product: Product, out: Tensor) -> None:
    """The plain filter, for one output."""
    before, at, after = x.split(1, axis)
    torch.add(product(before, taps[0], bias).add_(product(at, taps[1], None)), product(after, taps[2], None), out=out)


def doubled(x: Tensor, weight: Tensor, bias: Tensor | None, axis: int, product: Product) -> Tensor:
    """Nearest 2x up-sampling along ``axis``, then a 3-tap filter; of ``x`` the first and last are border.

    weight: [K, C, kt, kh, kw], filtering along its dimension ``axis`` + 1.

    Even outputs see the one before and their own, odd ones their own and the next.  What their own gives under the
    whole filter is common to both, and the steps between neighbours do the rest: three products instead of four.
    """
    first, middle, last = weight.split(1, dim=axis + 1)
    count = x.shape[axis] - 2
    common = product(x.narrow(axis, 1, count), first + middle + last, bias)
    steps = _difference(x.narrow(axis, 1, count + 1), x.narrow(axis, 0, count + 1))
    out, (even, odd) = _interleaved(common, 2, axis)
    torch.sub(common, product(steps.narrow(axis, 0, count), first, None), out=even)
    torch.add(common, product(steps.narrow(axis, 1, count), last, None), out=odd)
    return out


def doubled_by_pairs(x: Tensor, weight: Tensor, bias: Tensor | None, axis: int, product: Product) -> Tensor:
    """The same by five products for two pixels instead of six.

    Around every second pixel lie four outputs: the odd one of the pixel before, its own two, the even one of the next.
    What it gives under the whole filter is common to all four.
    """
    first, middle, last = weight.split(1, dim=axis + 1)
    count = x.shape[axis] - 2
    pairs = (count + 1) // 2  # the last may reach beyond
    channels = weight.shape[0]
    before, at, behind = (_every(x, k, 2, 2 * pairs, axis) for k in range(3))
    common = product(at, first + middle + last, bias)
    steps = product(_difference(at, before), torch.cat([first + middle, first]), None)
    out, places = _interleaved(common, 4, axis, 1 - count % 2)
    for place, made in zip(places[:2], steps.split(channels, 1), strict=True):
        torch.sub(common, made, out=place)
    steps = product(_difference(behind, at), torch.cat([last, middle + last]), None)
    for place, made in zip(places[2:], steps.split(channels, 1), strict=True):
        torch.add(common, made, out=place)
    if count % 2 == 0:
        end = product(x.narrow(axis, count, 1), first + middle, bias)
        out.narrow(axis, 2 * count, 1).copy_(end.add_(product(x.narrow(axis, count + 1, 1), last, None)))
    return out.narrow(axis, 1, 2 * count)


def halved(x: Tensor, weight: Tensor, bias: Tensor | None, axis: int, product: Product) -> Tensor:
    """The same by four products, of 2-tap filters: what lies under two taps gets their sum."""
    even_taps, odd_taps = halves(weight, axis + 1)
    count = x.shape[axis] - 1
    before = product(x.narrow(axis, 0, count), even_taps, bias)
    behind = product(x.narrow(axis, 1, count), odd_taps, bias)
    out, (even, odd) = _interleaved(before, 2, axis)
    even.copy_(before)
    odd.copy_(behind)
    return out


def halves(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """What even and odd outputs of nearest 2x up-sampling see of a 3-tap filter along ``dim``: 2-tap filters."""
    first, middle, last = weight.split(1, dim)
    return torch.cat([first, middle + last], dim), torch.cat([first + middle, last], dim)


def _sum(a: Tensor, b: Tensor, factor: float = 1) -> Tensor:
    """a + factor * b."""
    return torch.add(a, b, alpha=factor, out=empty_like(a))


def _difference(a: Tensor, b: Tensor, factor: float = 1) -> Tensor:
    """a - factor * b."""
    return torch.sub(a, b, alpha=factor, out=empty_like(a))


def _every(x: Tensor, start: int, step: int, count: int, axis: int) -> Tensor:
    """Frames or rows ``start``, ``start + step``, ... that the ``count`` outputs need."""
    picked = [slice(None)] * x.ndim
    picked[axis] = slice(start, start + count - step + 1, step)
    return x[tuple(picked)]


def _interleaved(like: Tensor, count: int, axis: int, more: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Room for ``count`` outputs by turns along ``axis``, each of the shape of ``like``, and ``more`` behind them; and
    each one's share of it."""
    shape = list(like.shape)
    turns = shape[axis] * count
    shape[axis] = turns + more
    out = empty_like(like, shape)
    return out, _by_turns(out.narrow(axis, 0, turns), count, axis)


def _by_turns(x: Tensor, count: int, axis: int) -> list[Tensor]:
    """``x`` dealt out along ``axis`` to ``count`` outputs, as views."""
    return [_every(x, k, count, x.shape[axis], axis) for k in range(count)]
