"""Fewer multiplications along time: Winograd's F(2, 3) over frames, each product a 2-D convolution.

Two neighbouring outputs of a 3-tap filter need four products instead of six (Lavin & Gray, "Fast Algorithms
for Convolutional Neural Networks", 2015).  Here a product is a 2-D convolution of a sum of two frames, which
a CPU runs near its peak: 1.3 times the speed of its 3-D convolution, with rounding errors as small.  F(4, 3)
is faster still, but loses a digit at every layer, too many for the whole network; see docs/performance.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Valid convolution of frames [T, C, H, W] with [K, C, 3, kh, kw], stride 1 -> [T - 2, K, H', W']."""
    _, _, _, kh, kw = weight.shape
    past, now, future = weight.unbind(2)
    frames, _, height, width = x.shape
    out = x.new_empty(frames - 2, weight.shape[0], height - kh + 1, width - kw + 1)
    if frames > 3:
        # Frames 0 to 3 of every pair of outputs.
        first, second, third, fourth = x[0:-3:2], x[1:-2:2], x[2:-1:2], x[3::2]
        outer = past + future
        both = F.conv2d(second + third, (outer + now) / 2, bias)
        difference = F.conv2d(third - second, (outer - now) / 2)
        even = torch.add(both, difference, out=out[0:frames - 3:2])
        even += F.conv2d(first - third, past)
        odd = torch.sub(both, difference, out=out[1::2])
        odd -= F.conv2d(second - fourth, future)
    if frames % 2:
        last = F.conv2d(x[-3:-2], past, bias)
        last += F.conv2d(x[-2:-1], now)
        torch.add(last, F.conv2d(x[-1:], future), out=out[-1:])
    return out
