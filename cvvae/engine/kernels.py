"""Convolutions of the engine: kernels folded to what a layer really computes, and how each device runs them.

Activations are [T, C, H, W], kernels [K, C, kt, kh, kw]; padding is in the input already.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import arena, products
from .passes import Shares
from .winograd import COLUMNS, ROWS, TIME, Product, doubled, doubled_by_pairs, filtered, halved

FEW = 4  # frames that the libraries convolve at a time: what they give stays in the caches, and little of it in the heap
# Values that queries make with keys at a time: on the CPU, elsewhere, and where they are kept in float32 in between.
SCORES, SCORES_ELSEWHERE, SCORES_KEPT = 2 ** 21, 2 ** 27, 2 ** 25
ALIGNED = 8  # keys; rows of their scores begin where matrix units like to read
STACKED = 16  # channels that a GPU's matrix units take at once; of three they make a fifth of the speed
WIDE = 32  # channels from which on the CPU gains by convolving in two dimensions, frame by frame
# Channels from which on four outputs in time are made at once.  With fewer, that saves little time over two, and in
# tiles encoded and decoded again it cost a sixth to a half more rounding error.
FOURS_FROM = 128
# Channels from which on Winograd's method pays along rows and along columns too: with fewer, sums of rows cost as much
# as the products saved.  Rounding errors grow with each axis, so along one only from a width on, and along two of the
# three from twice that, unless channels are many: there it takes a fourteenth to an eleventh off 9x256x256.
ROWS_FROM, COLUMNS_FROM, LARGE = 128, 256, 64

# PyTorch 2.9 and 2.10 with cuDNN 9.10.2 to 9.14 run half-precision convolutions over time by kernels of their own, which
# take many times the memory, unless cuDNN is asked for by name.  ComfyUI asks too (comfy/ops.py).
ASKS_CUDNN = (torch.version.cuda is not None and torch.__version__.split(".")[:2] in (["2", "9"], ["2", "10"])
              and 91002 <= (torch.backends.cudnn.version() or 0) < 91500)

# Products of half-precision matrices that stay in float32 came with PyTorch 2.8, for CUDA.
WIDE_PRODUCTS = torch.version.cuda is not None and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


def empty(like: Tensor, frames: int, channels: int, height: int, width: int) -> Tensor:
    """Room for an activation, channels last."""
    return arena.empty(like, (frames, channels, height, width), torch.channels_last)


def for_stills(weight: Tensor, time_mode: str, front: int) -> Tensor:
    """[K, C, 3, kh, kw] -> [K, C, 1, kh, kw]: what is left of a kernel when the clip is one frame.

    Where time is padded by repeating frames every tap sees that frame; where it is padded with zeros only
    the tap behind the ``front`` padded frames does.
    """
    if weight.shape[2] == 1:
        return weight
    if time_mode != "replicate":
        return weight[:, :, front:front + 1]
    out = None
    if weight.device.type == "cuda":
        # Where `prepared` would copy it to: that many kernels launched less.
        out = torch.empty((*weight.shape[:2], 1, *weight.shape[3:]), dtype=weight.dtype, device=weight.device,
                          memory_format=torch.channels_last_3d)
    return torch.sum(weight, 2, keepdim=True, out=out)


def prepared(weight: Tensor) -> Tensor:
    """A layer's kernel, laid out as :func:`convolve` reads it best."""
    if weight.device.type == "cuda":
        return weight.contiguous(memory_format=torch.channels_last_3d)
    return products.packed(weight) if _by_tap(weight) else weight


def phases(weight: Tensor) -> Tensor:
    """[K, C, kt, 3, 3] -> [4K, C, kt, 2, 2]: a convolution behind nearest 2x up-sampling, over the small picture.

    Between four neighbouring pixels lie four of the large picture, which see no others: the last of the upper left
    one's, the first of the lower right one's, and so on.  A 2x2 kernel over the small picture makes them all, in turn
    (row, column) as channels.
    """
    # Sums of two neighbouring taps, beyond the kernel's edge 0: along an axis [first], [first + middle], [middle + last],
    # [last]; even outputs see the first and the third, odd ones, which come first, the others.
    sums = F.avg_pool2d(weight.flatten(1, 2), 2, 1, padding=1, divisor_override=1)
    by_phase = sums.unflatten(3, (2, 2)).unflatten(2, (2, 2)).flip(3, 5).permute(3, 5, 0, 1, 2, 4)
    return by_phase.flatten(0, 2).unflatten(1, weight.shape[1:3])


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int] = (1, 1)) -> Tensor:
    """Valid convolution [T, C, H, W] -> [T', K, H', W']; ``stride`` in time and in space."""
    time, space = stride
    if not _by_tap(weight):
        if weight.shape[2] == 1:
            return F.conv2d(x, weight[:, :, 0], bias, space)
        few = x.device.type != "cpu" and math.prod(weight.shape[1:3]) <= STACKED
        if stride == (1, 1) and (few or _float32_on_cpu(weight)):
            return _convolve_stacked(x, weight, bias)
        return _convolve_over_time(x.transpose(0, 1)[None], weight, bias, (time, space, space))[0].transpose(0, 1)
    taps = weight.unbind(2)
    if space == 1 and len(taps) == 3:
        return filtered(x, taps, bias, TIME, _convolve_behind_time, fours=weight.shape[1] >= FOURS_FROM)
    if space == 1:
        return _convolve_frames(x, taps[0], bias)
    count = (x.shape[0] - len(taps)) // time + 1
    out = [_direct(x[k:k + time * (count - 1) + 1:time], tap, None if k else bias, space) for k, tap in enumerate(taps)]
    return out[0] if len(out) == 1 else out[0].add_(out[1]).add_(out[2])


def convolve_upsampled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest 2x up-sampling in space, then a 3x3 convolution: [T, C, H, W] -> [T', K, 2H - 4, 2W - 4].

    Computed over the small picture, of which one pixel on each side is border.
    """
    along_rows = doubled if _by_tap(weight) else halved
    along_columns = doubled_by_pairs if _by_tap(weight) else halved

    def columns(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return along_columns(x, weight, bias, COLUMNS, convolve)

    return along_rows(x, weight, bias, ROWS, columns)


def attend(q: Tensor, k: Tensor, v: Tensor, shares: Shares | None = None) -> Tensor:
    """Self-attention over the positions of each frame, [T, C, h, w]; a few rows of queries at a time.

    shares: see :class:`.passes.Passes`.
    """
    if shares is not None and WIDE_PRODUCTS:
        return _attend_by_products(q, k, v, shares)
    scores = SCORES if q.device.type == "cpu" else SCORES_ELSEWHERE
    rows = max(1, scores // (k[0, 0].numel() * q.shape[3]))
    out = torch.empty_like(q)
    for frame in range(q.shape[0]):
        keys, values = k[frame].flatten(1), v[frame].flatten(1).contiguous()  # once for all queries
        for start in range(0, q.shape[2], rows):
            queries = q[frame, :, start:start + rows].flatten(1)
            out[frame, :, start:start + rows] = _attend(queries, keys, values).unflatten(1, (-1, q.shape[3]))
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[C, queries], [C, positions], [C, positions] -> [C, queries]."""
    if not _float32_on_cpu(q):
        # Memory-efficient kernels want the channels of a position together.
        q, k, v = (x.t().contiguous()[None, None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)[0, 0].t()
    shares = products.multiply(q.t() * q.shape[0] ** -0.5, k).softmax(1)
    return products.multiply(shares, v.t()).t()


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor, shares: Shares) -> Tensor:
    """Scores in memory, in float32: a fused kernel would hold them in registers, but of 512 channels they leave it none."""
    height, width = q.shape[2:]
    q, k, v = (x.movedim(1, -1).flatten(1, 2) for x in (q, k, v))
    frames, positions, channels = q.shape
    if spare := -positions % ALIGNED:
        k, v = (F.pad(x, (0, 0, 0, spare)) for x in (k, v))
    out = torch.empty_like(q)
    rows = min(positions, max(1, SCORES_KEPT // k.shape[1]))
    together = max(1, SCORES_KEPT // (rows * k.shape[1]))
    for part in (slice(frame, frame + together) for frame in range(0, frames, together)):
        for some in (slice(row, row + rows) for row in range(0, positions, rows)):
            scores = _wide_product(q[part, some], k[part].transpose(1, 2))
            seen, sums = shares(scores, positions, channels ** -0.5, q.dtype)
            torch.div(_wide_product(seen, v[part]), sums, out=out[part, some])
    return out.movedim(-1, 1).unflatten(2, (height, width))


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """[N, I, J] by [N, J, K], in float32."""
    return a @ b if a.dtype == torch.float32 else torch.bmm(a, b, out_dtype=torch.float32)


def _by_tap(weight: Tensor) -> bool:
    return _float32_on_cpu(weight) and weight.shape[1] >= WIDE


def _float32_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


def _convolve_over_time(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int, int]) -> Tensor:
    """[1, C, T, H, W] with [K, C, kt, kh, kw]."""
    if ASKS_CUDNN and x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16):
        return _convolve_by_cudnn(x, weight, bias, stride)
    return F.conv3d(x, weight, bias, stride)


def _convolve_by_cudnn(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int, int]) -> Tensor:
    out = torch.cudnn_convolution(x, weight, padding=(0, 0, 0), stride=stride, dilation=(1, 1, 1), groups=1,
                                  benchmark=False, deterministic=False, allow_tf32=True)
    return out if bias is None else out.add_(bias[:, None, None, None])


# The pieces, on frames [T, C, H, W] with kernels [K, C, kh, kw].


def _convolve_behind_time(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One tap in time, or a sum of taps."""
    if _has(weight, ROWS_FROM) and x.shape[3] > (LARGE if _has(weight, COLUMNS_FROM) else 2 * LARGE):
        return _convolve_rows(x, weight, bias, _direct)
    return _direct(x, weight, bias)


def _convolve_frames(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _has(weight, ROWS_FROM) or x.shape[3] <= LARGE:
        return _direct(x, weight, bias)
    by_columns = _has(weight, COLUMNS_FROM) and x.shape[3] > 2 * LARGE
    return _convolve_rows(x, weight, bias, _convolve_columns if by_columns else _direct)


def _convolve_rows(x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
    return filtered(x, weight.split(1, dim=ROWS), bias, ROWS, product)


def _convolve_columns(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return filtered(x, weight.split(1, dim=COLUMNS), bias, COLUMNS, _direct)


def _convolve_stacked(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A kernel in time over few channels: what its taps see are channels of one convolution in two dimensions."""
    channels, taps = weight.shape[1:3]
    flat, frames = weight.transpose(1, 2).flatten(1, 2), x.shape[0] - taps + 1
    if x.device.type != "cpu":
        seen = empty(x, frames, STACKED, *x.shape[2:]).zero_()
        for k in range(taps):
            seen[:, k * channels:(k + 1) * channels] = x[k:k + frames]
        return F.conv2d(seen, F.pad(flat, (0, 0, 0, 0, 0, STACKED - taps * channels)), bias)

    def compute(start: int, stop: int) -> Tensor:
        return F.conv2d(torch.cat([x[start + k:stop + k] for k in range(taps)], dim=1), flat, bias)

    return _few_at_a_time(frames, compute)


def _direct(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    if weight.shape[0] < WIDE:
        way = F.conv2d
    elif products.BY_CONVOLUTION:
        way = products.convolve_in_chains
    else:
        return products.convolve(x, weight, bias, stride)
    return _few_at_a_time(x.shape[0], lambda start, stop: way(x[start:stop], weight, bias, stride))


def _few_at_a_time(frames: int, compute: Callable[[int, int], Tensor]) -> Tensor:
    """``compute`` of (first frame, frame behind the last), which lies in the C heap, for all ``frames``."""
    if frames <= FEW:
        return compute(0, frames)
    out = None
    for start in range(0, frames, FEW):
        made = compute(start, min(start + FEW, frames))
        if out is None:
            out = arena.empty_like(made, (frames, *made.shape[1:]))
        out[start:start + FEW] = made
    return out


def _has(weight: Tensor, channels: int) -> bool:
    return weight.shape[2] == 3 and min(weight.shape[:2]) >= channels
