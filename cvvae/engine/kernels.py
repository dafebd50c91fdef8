"""Convolutions of the engine: kernels folded to what a layer really computes, and how each device runs them.

Activations are [T, C, H, W], kernels [K, C, kt, kh, kw]; padding is in the input already.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import winograd

WIDE = 64  # channels from which on the CPU gains by convolving in two dimensions, frame by frame


def empty(like: Tensor, frames: int, channels: int, height: int, width: int) -> Tensor:
    """Room for an activation, in the layout in which its device computes best.

    On GPUs channels come last.  On the CPU they do not: its convolution of that layout is a quarter faster,
    but sums all products of an output in one chain, which costs half a digit at every layer.
    """
    layout = torch.contiguous_format if like.device.type == "cpu" else torch.channels_last
    return torch.empty(frames, channels, height, width, dtype=like.dtype, device=like.device, memory_format=layout)


def for_stills(weight: Tensor, time_mode: str, front: int) -> Tensor:
    """[K, C, 3, kh, kw] -> [K, C, 1, kh, kw]: what is left of a kernel when the clip is one frame.

    Where time is padded by repeating frames every tap sees that frame; where it is padded with zeros only
    the tap behind the ``front`` padded frames does.
    """
    if weight.shape[2] == 1:
        return weight
    return weight.sum(2, keepdim=True) if time_mode == "replicate" else weight[:, :, front:front + 1]


def upsampled(weight: Tensor, row: int, column: int) -> Tensor:
    """The 2x2 kernel that a 3x3 one behind nearest 2x up-sampling is, over the small picture.

    row, column: parity of the output.  Even outputs see the pixel before and their own, odd ones their own
    and the next; a pixel of the small picture that lies under two taps gets their sum.
    """
    for dim, odd in ((3, row), (4, column)):
        first, middle, last = weight.unbind(dim)
        weight = torch.stack([first + middle, last] if odd else [first, middle + last], dim)
    return weight


def convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int] = (1, 1)) -> Tensor:
    """Valid convolution [T, C, H, W] -> [T', K, H', W']; ``stride`` in time and in space."""
    time, space = stride
    by_tap = x.device.type == "cpu" and x.dtype == torch.float32 and weight.shape[1] >= WIDE
    if weight.shape[2] == 1:
        if by_tap and space == 1:
            by_rows = winograd.convolve_picture if x.shape[0] == 1 else winograd.convolve_frames
            return by_rows(x, weight[:, :, 0], bias)
        return F.conv2d(x, weight[:, :, 0], bias, space)
    if by_tap and stride == (1, 1):
        return winograd.convolve(x, weight, bias)
    if by_tap:
        count = (x.shape[0] - 3) // time + 1
        taps = [F.conv2d(x[k:k + time * (count - 1) + 1:time], tap, bias if k == 0 else None, space)
                for k, tap in enumerate(weight.unbind(2))]
        return taps[0].add_(taps[1]).add_(taps[2])
    return F.conv3d(x.transpose(0, 1)[None], weight, bias, (time, space, space))[0].transpose(0, 1)
