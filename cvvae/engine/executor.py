"""Runs an encoder or decoder of :mod:`cvvae.model` without gradients: the same numbers, faster, in bounded memory.

It walks the same modules in the same order and differs in how each layer is computed:

* Activations are [T, C, H, W] and come in strips of rows, see :mod:`.activation`; the padded input of a
  convolution is written once, normalised and activated on the way.
* Up-sampling and the convolution behind it are one step over the small picture, and frames that a temporal
  up-sampler would drop are not made.
* Independent images ("stills") use kernels folded to two dimensions, and statistics by frame.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..model import Decoder, Downsample, Encoder, Padding, ResnetBlock, SpatialAttention, TemporalAttention, Upsample
from . import kernels
from .activation import Activation, Compute, Statistics, settle
from .passes import EAGER, Border, Moments, Passes, affine_of
from .store import Store

Weights = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
Folded = dict[nn.Module, tuple[Tensor, Tensor]]  # kernel and bias of each layer


def own_weights(module: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``module`` as they are; a host that keeps weights elsewhere has its own way."""
    return module.weight, module.bias


class Executor:
    """One pass of a clip through an encoder or a decoder.

    strip_rows: (frames, width, channels) of a layer -> rows of a strip; channels read or made, whichever are more.
    memory: bytes that kept activations may take; None for no limit.
    stills: the frames are independent images, not a clip.
    check: called after every strip; may raise to cancel.
    weights: where layers' weights come from.
    statistics: what group norms share with other runs.
    passes: how activations are bordered, normalised and measured.
    folded: what stills share with those before and after them; None keeps nothing.
    """

    def __init__(self, strip_rows: Callable[[int, int, int], int], memory: int | None = None, stills: bool = False,
                 check: Callable[[], None] = lambda: None, weights: Weights = own_weights,
                 statistics: Statistics | None = None, passes: Passes = EAGER, folded: Folded | None = None):
        self.strip_rows = strip_rows
        self.stills = stills
        self.store = Store(memory)
        self.check = check
        self.weights = weights
        self.statistics = statistics
        self.passes = passes
        self.folded = folded
        self.norms = 0

    def encode(self, encoder: Encoder, clip: Tensor) -> Tensor:
        """[1, 3, T, H, W] -> moments [1, 2C, t, h, w]; of stills, t = T."""
        x = self._input(clip)
        x = self._settle(self._convolved(encoder.conv_in, x, encoder.padding), x)
        for level in encoder.down:
            for block in level.block:
                x = self._block(block, x)
            if hasattr(level, "downsample"):
                x = self._settle(self._downsampled(level.downsample, x), x)
        x = self._middle(encoder.mid, x)
        return self._output(self._convolved(encoder.conv_out, x, encoder.padding, encoder.norm_out), x)

    def decode(self, decoder: Decoder, latents: Tensor) -> Tensor:
        """[1, C, t, h, w] -> [1, 3, 4t - 3, 8h, 8w]; of stills, T = t."""
        if hasattr(decoder, "latent_shift"):
            latents = latents - decoder.latent_shift.to(latents)[:, None, None, None]
        x = self._input(latents)
        x = self._settle(self._convolved(decoder.conv_in, x, decoder.padding), x)
        x = self._middle(decoder.mid, x)
        for level in reversed(decoder.up):
            for block in level.block:
                x = self._block(block, x)
            if hasattr(level, "upsample"):
                x = self._settle(self._upsampled(level.upsample, x), x)
        return self._output(self._convolved(decoder.conv_out, x, decoder.padding, decoder.norm_out), x)

    # -- blocks --------------------------------------------------------------------------------------

    def _middle(self, mid: nn.Module, x: Activation) -> Activation:
        return self._block(mid.block_2, self._attended(mid.attn_1, self._block(mid.block_1, x)))

    def _block(self, block: ResnetBlock, x: Activation) -> Activation:
        h = self._convolved(block.conv1, x, block.padding, block.norm1, bare=True)
        missing = None
        if not hasattr(block, "nin_shortcut"):
            shortcut = x
            self._settle(h)
        else:
            weight, bias = self.weights(block.nin_shortcut, h.like)
            weight = kernels.prepared(weight.flatten(2)[..., None, None])
            given = x
            if self.passes.late_bias:
                bias, missing = None, bias  # the second convolution's pass adds it with its own

            def compute(start: int, stop: int, moments: Moments | None) -> Tensor:
                return self._applied(weight, bias, given.rows(start, stop), moments)

            shortcut = self._layer(h.shape, compute, h.like, weight.shape[1], measured=False)
            if weight.shape[0] < weight.shape[1]:
                # Smaller than its input, which can go while the first convolution runs.
                settle([h, shortcut], [x], self.store, self.check)
                x = shortcut
            else:
                self._settle(h)
        return self._settle(self._convolved(block.conv2, h, block.padding, block.norm2, shortcut, missing), x, h)

    def _attended(self, attention: SpatialAttention, x: Activation) -> Activation:
        """Whole frames at once: this is the smallest layer, and each position looks at all others."""
        whole = x.rows(0, x.shape[2])
        h = attention.norm(whole).contiguous(memory_format=torch.channels_last)
        q, k, v = (self._pointwise(layer, h) for layer in (attention.q, attention.k, attention.v))
        spatial = self._pointwise(attention.proj_out, kernels.attend(q, k, v, self.passes.shares))
        out = whole + self._along_time(attention, spatial)
        attended = self._layer(x.shape, None, out).keep(out, self.store)
        x.drop(self.store)
        return attended

    def _along_time(self, attention: SpatialAttention, spatial: Tensor) -> Tensor:
        """What frames gave, [T, C, h, w], on its way to the residual sum."""
        if not self.stills or not isinstance(attention, TemporalAttention):
            return attention.along_time(spatial.transpose(0, 1)[None])[0].transpose(0, 1)
        # A still sees no other frame: of what its positions ask and offer nothing but their values counts.
        positions = spatial.movedim(1, -1)
        seen = attention.proj_out_t(attention.v_t(attention.norm_t(positions)))
        return attention.joined(positions, seen).movedim(-1, 1)

    # -- layers --------------------------------------------------------------------------------------

    def _convolved(self, conv: nn.Module, x: Activation, padding: Padding, norm: nn.Module | None = None,
                   shortcut: Activation | None = None, missing: Tensor | None = None, bare: bool = False) -> Activation:
        """``conv`` of ``x``, which is normalised and activated first where there is a ``norm``; and ``shortcut`` added.

        missing: bias that ``shortcut`` lacks.
        bare: only a norm reads the result, so where a bias takes a pass of its own that norm's factors bring it.
        """
        if isinstance(conv, nn.Conv2d):
            border = Border((1, 1), "zeros")
        else:
            border = Border((1, 1), padding.space_mode, padding.time, padding.time_mode)
        kernel, bias, border = self._kernel(conv, border, x.like)
        affine = None if norm is None else self._affine(norm, x)
        frames, channels, height, width = x.shape
        own = bias if missing is None else bias.float() + missing
        if bare := bare and self.passes.late_bias and self.statistics is None:
            own = None

        def compute(start: int, stop: int, moments: Moments | None) -> Tensor:
            rows = self._bordered(x, start - 1, stop + 1, border, affine)
            return self._applied(kernel, own, rows, moments, shortcut=shortcut and shortcut.pieces(start, stop))

        made = self._layer((frames, kernel.shape[0], height, width), compute, x.like, channels)
        if bare:
            made.moments.missing = bias
        return made

    def _downsampled(self, down: Downsample, x: Activation) -> Activation:
        border = Border(down.space, down.space_mode, (2, 0) if down.temporal else (0, 0))
        kernel, bias, border = self._kernel(down.conv, border, x.like)
        time = 1 if self.stills or not down.temporal else down.conv.stride[0]
        frames, channels, height, width = x.shape
        before, behind = down.space
        small = [(side + before + behind - 3) // 2 + 1 for side in (height, width)]

        def compute(start: int, stop: int, moments: Moments | None) -> Tensor:
            rows = self._bordered(x, 2 * start - before, 2 * stop + 1 - before, border)
            return self._applied(kernel, bias, rows, moments, (time, 2))

        # No more rows than a strip of the larger input has, of which they take twice as many.
        return self._layer(((frames - 1) // time + 1, channels, *small), compute, x.like, most=x.strip)

    def _upsampled(self, up: Upsample, x: Activation) -> Activation:
        border = Border((1, 1), up.space_mode, (1, 1) if up.temporal else (0, 0))
        kernel, bias, border = self._kernel(up.conv, border, x.like)
        frames, channels, height, width = x.shape
        if not up.time:
            parts = [(kernel, bias, 0, slice(None))]  # kernel, bias, first padded frame seen, frames made
        else:
            # Each frame becomes two, but the first of the first is dropped and so never made.
            second = (kernel[channels:], bias[channels:], 0, slice(0, None, 2))
            first = (kernel[:channels], bias[:channels], 1, slice(1, None, 2))
            if self.stills:
                parts = [(*second[:3], slice(None))]
            else:
                parts = [second, first][:frames]
                frames = 2 * frames - 1
        phases = self.passes.interleaved and [kernels.prepared(kernels.phases(part)) for part, *_ in parts]

        def compute(start: int, stop: int, moments: Moments | None) -> Tensor:
            rows = self._bordered(x, start // 2 - 1, stop // 2 + 1, border)
            if phases:
                out = kernels.empty(rows, frames, channels, stop - start, 2 * width)
                for (_, part_bias, offset, place), part in zip(parts, phases, strict=True):
                    made = kernels.convolve(rows[offset:], part, None)
                    self.passes.interleaved(made, part_bias, out[place])
            else:
                made = [kernels.convolve_upsampled(rows[offset:], part, part_bias) for part, part_bias, offset, _ in parts]
                if len(made) == 1:
                    out = made[0]
                else:
                    out = kernels.empty(rows, frames, channels, stop - start, 2 * width)
                    for piece, (*_, place) in zip(made, parts, strict=True):
                        out[place] = piece
            if moments is not None:
                moments.add(out)
            return out

        # Neighbouring rows are made of the same ones: a request for one brings both.
        return self._layer((frames, channels, 2 * height, 2 * width), compute, x.like, step=2)

    def _pointwise(self, conv: nn.Module, x: Tensor) -> Tensor:
        weight, bias = self.weights(conv, x)
        return self._applied(kernels.prepared(weight.flatten(2)[..., None, None]), bias, x, None)

    # -- pieces of layers ----------------------------------------------------------------------------

    def _kernel(self, conv: nn.Module, border: Border, like: Tensor) -> tuple[Tensor, Tensor, Border]:
        """[K, C, kt, kh, kw] and bias, folded for stills; and the border that is left."""
        left = Border(border.space, border.space_mode) if self.stills else border
        if self.folded is not None and conv in self.folded:
            return *self.folded[conv], left
        weight, bias = self.weights(conv, like)
        if weight.ndim == 4:
            weight = weight[:, :, None]
        if self.stills:
            weight = kernels.for_stills(weight, border.time_mode, border.time[0])
        kernel = kernels.prepared(weight)
        if self.folded is not None:
            self.folded[conv] = kernel, bias
        return kernel, bias, left

    def _affine(self, norm: nn.Module, x: Activation) -> tuple[Tensor, Tensor]:
        """Group norm as a factor and a summand for each channel (and frame, for stills)."""
        weight, bias = self.weights(norm, x.like)
        if self.statistics is None:
            return x.moments.affine(weight, bias, norm.num_groups, norm.eps)
        mean, square = self.statistics.exchange(self.norms, x.moments)
        self.norms += 1
        return affine_of(mean, square, weight, bias, norm.num_groups, norm.eps)

    def _bordered(self, x: Activation, start: int, stop: int, border: Border,
                  affine: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` of ``x``, which may lie outside it, with ``border``; through norm and SiLU."""
        frames, channels, height, width = x.shape
        (left, right), (front, back) = border.space, border.time
        out = kernels.empty(x.like, front + frames + back, channels, stop - start, left + width + right)
        pieces = x.pieces(max(start, 0), min(stop, height))
        self.passes.bordered(pieces, start, stop, height, border, affine, out)
        return out

    def _applied(self, kernel: Tensor, bias: Tensor | None, x: Tensor, moments: Moments | None,
                 stride: tuple[int, int] = (1, 1), shortcut: Iterable[tuple[int, Tensor]] | None = None) -> Tensor:
        """The convolution of ``x``, and ``shortcut`` added, which comes in pieces; measured where there are ``moments``."""
        late = bias if self.passes.late_bias else None
        out = kernels.convolve(x, kernel, bias if late is None else None, stride)
        if shortcut is None:
            self.passes.add(out, None, late, moments)
            return out
        row, measured = 0, None
        for _, piece in shortcut:
            behind = row + piece.shape[2]
            measured = moments if behind - row == out.shape[2] else None  # else when all is there
            self.passes.add(out[:, :, row:behind], piece, late, measured)
            row = behind
        if measured is not moments:
            self.passes.add(out, None, None, moments)
        return out

    # -- activations ---------------------------------------------------------------------------------

    def _layer(self, shape: tuple[int, int, int, int], compute: Compute | None, like: Tensor,
               channels: int = 0, most: float = math.inf, measured: bool = True, step: int = 1) -> Activation:
        """channels: that are read.  most: rows of a strip.  measured: for a norm that reads it.  step: of its rows."""
        rows = self.strip_rows(shape[0], shape[3], max(channels, shape[1]))
        moments = self.passes.moments(self.stills) if measured else None
        return Activation(shape, min(rows, most), compute, like, moments, step)

    def _input(self, x: Tensor) -> Activation:
        """[1, C, T, H, W], all there from the start."""
        x = x[0].transpose(0, 1)
        return self._layer(tuple(x.shape), None, x, measured=False).keep(x, self.store)

    def _settle(self, made: Activation, *parents: Activation) -> Activation:
        settle([made], parents, self.store, self.check)
        return made

    def _output(self, made: Activation, x: Activation) -> Tensor:
        """All of ``made`` as [1, C, T, H, W]."""
        frames, channels, height, width = made.shape
        whole = x.like.new_empty(1, channels, frames, height, width)
        settle([made], [x], self.store, self.check, result=whole[0].transpose(0, 1))
        return whole
