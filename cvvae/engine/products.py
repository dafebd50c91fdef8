"""Convolutions as matrix products, by what multiplies fastest on a CPU.

With channels last the pixels of a picture are the rows of a matrix, and so are they from any later pixel on: the
picture shifted by a tap's place.  A convolution is the sum of such products, one for each tap of the kernel.

MKL's matrix products are summed in blocks.  oneDNN's convolutions of this layout add all products of an output in one
chain, which costs 3 to 5 times the rounding error where that is a whole kernel's.  With AVX-512 they are more than
twice as fast, so there they take a few taps of a kernel at a time.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from .arena import empty

# oneDNN's; without AVX-512 both are equally fast.
BY_CONVOLUTION = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
CHAIN = 256  # products that one of these adds up, or as many as there are channels
PACKED = 32  # output channels that are laid out anew at a time


def packed(weight: Tensor) -> Tensor:
    """The same kernel [K, C, kt, kh, kw], each tap a matrix that lies together in memory."""
    out = weight.new_empty(*weight.shape[2:], *weight.shape[:2])
    # A copy walks its source once for each tap: by parts that stay in the caches meanwhile.
    for made, part in zip(out.split(PACKED, 3), weight.split(PACKED), strict=True):
        made.copy_(part.permute(2, 3, 4, 0, 1))
    return out.permute(3, 4, 0, 1, 2)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """Valid convolution of [T, C, H, W], channels last, with [K, C, kh, kw], frame by frame."""
    pixels = x.permute(0, 2, 3, 1)
    if weight.shape[2:] == (1, 1) and stride == 1:
        pixels = pixels.flatten(0, 1)[None]  # frames below each other are one picture: larger products run faster
    frames, height, width, _ = pixels.shape
    rows, columns = (height - weight.shape[2]) // stride + 1, (width - weight.shape[3]) // stride + 1
    if stride == 1:
        # Between the last output of a row and the first of the next lie some that see both; they are dropped.
        made_columns, count = width, (rows - 1) * width + columns
        pixels = pixels.flatten(1, 2)
    else:
        made_columns, count = columns, rows * columns
    out = empty(x, (frames, rows * made_columns, weight.shape[0]), torch.contiguous_format)
    for frame, i, j in product(*map(range, (frames, *weight.shape[2:]))):
        if stride == 1:
            seen = pixels[frame, i * width + j:][:count]
        else:
            seen = pixels[frame, i::stride, j::stride][:rows, :columns].flatten(0, 1)
        made, tap = out[frame, :count], weight[:, :, i, j].t()
        if i or j:
            made.addmm_(seen, tap)
        elif bias is None:
            torch.mm(seen, tap, out=made)
        else:
            torch.addmm(bias, seen, tap, out=made)
    out = out.unflatten(1, (rows, made_columns))[:, :, :columns]
    return out.reshape(x.shape[0], -1, columns, weight.shape[0]).permute(0, 3, 1, 2)


def convolve_in_chains(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """The same by convolutions with parts of the kernel, all frames at once."""
    channels, rows, columns = weight.shape[1:]
    height, width = ((side - taps) // stride * stride + 1 for side, taps in zip(x.shape[2:], (rows, columns), strict=True))
    together = max(1, CHAIN // channels)
    out = None
    for i, j in product(range(rows), range(0, columns, together)):
        part = weight[:, :, i:i + 1, j:j + together]
        made = F.conv2d(x[:, :, i:i + height, j:j + width + part.shape[3] - 1], part, None if i or j else bias, stride)
        out = out.add_(made) if i or j else made
    return out


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product, float32."""
    if not BY_CONVOLUTION:
        return a @ b
    pixels = a[None, None].movedim(3, 1)
    return F.conv2d(pixels, b.t()[:, :, None, None])[0, :, 0].t()
