"""Whole clips in and out: any size, any batch, either mode, every dtype, streamed or not."""

import gc
import re
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from compare import distance
from image_oracle import LAYOUTS, image_state
from random_weights import VARIANTS, noise, video_clip, video_vae

from cvvae import Tiling, load_image_vae

SIZES = [(8, 8), (9, 17), (17, 9), (8, 67), (67, 8)]
CUT = Tiling(window_frames=9, tile_pixels=16, overlap_pixels=8)


def latent_size(pixels: int) -> int:
    return (pixels + 7) // 8


class TestAnySize:
    @pytest.mark.parametrize("frames", [*range(1, 21), 33])
    def test_any_length_comes_back(self, frames):
        vae = video_vae()
        height, width = SIZES[frames % len(SIZES)]
        clip = video_clip(frames, height, width)
        latents = vae.encode(clip).mean
        t = 1 + (frames + 2) // 4
        assert latents.shape == (1, 4, t, latent_size(height), latent_size(width))
        decoded = vae.decode(latents, frames=frames, size=(height, width))
        assert decoded.shape == clip.shape
        assert decoded.isfinite().all()
        assert torch.equal(vae.reconstruct(clip), decoded)

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("mode", ["video", "image"])
    def test_any_height_and_width_come_back(self, variant, size, mode):
        clip = video_clip(3, *size)
        assert video_vae(variant, tiling=CUT).reconstruct(clip, mode).shape == clip.shape

    @pytest.mark.parametrize("frames", [1, 2, 4, 5, 7, 9, 10, 12])
    @pytest.mark.parametrize("size", [(16, 16), (9, 17)])
    @pytest.mark.parametrize("tiling", [None, CUT])
    def test_padding_repeats_the_last_frame_and_the_edge(self, frames, size, tiling):
        vae = video_vae(tiling=tiling)
        clip = video_clip(frames, *size)
        padded = torch.cat([clip] + [clip[:, :, -1:]] * (-(frames - 1) % 4), dim=2)
        padded = torch.cat([padded] + [padded[..., -1:, :]] * (-size[0] % 8), dim=-2)
        padded = torch.cat([padded] + [padded[..., -1:]] * (-size[1] % 8), dim=-1)
        assert torch.equal(vae.encode(clip).mean, vae.encode(padded).mean)
        assert torch.equal(vae.encode(clip).logvar, vae.encode(padded).logvar)

    def test_decode_trims_the_end(self):
        vae = video_vae()
        latents = noise(1, 4, 4, 2, 3)
        whole = vae.decode(latents)
        assert whole.shape == (1, 3, 13, 16, 24)
        assert torch.equal(vae.decode(latents, frames=7, size=(9, 20)), whole[:, :, :7, :9, :20])
        assert torch.equal(vae.decode(latents, frames=2, mode="image"), vae.decode(latents[:, :, :2], mode="image"))

    @pytest.mark.parametrize("shape", [(1, 8, 8), (5, 9, 17), (20, 67, 67)])
    def test_image_vae_pads_the_edge(self, shape):
        vae = load_image_vae(image_state(LAYOUTS["sd"]))
        count, height, width = shape
        frames = video_clip(count, height, width)[0].transpose(0, 1)
        padded = F.pad(frames, (0, -width % 8, 0, -height % 8), mode="replicate")
        mean = vae.encode(frames).mean
        assert mean.shape == (count, 4, latent_size(height), latent_size(width))
        assert torch.equal(mean, vae.encode(padded).mean)
        assert vae.decode(mean).shape == padded.shape


class TestBatchesAndModes:
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("mode", ["video", "image"])
    def test_a_batch_equals_its_clips(self, variant, mode):
        vae = video_vae(variant, tiling=CUT)
        clip = video_clip(5, 8, 17, batch=2)
        latents = vae.encode(clip, mode).mean
        decoded = vae.decode(latents, mode=mode)
        for b in range(2):
            assert torch.equal(latents[b:b + 1], vae.encode(clip[b:b + 1], mode).mean)
            assert torch.equal(decoded[b:b + 1], vae.decode(latents[b:b + 1], mode=mode))

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_image_mode_is_each_frame_by_itself(self, variant):
        vae = video_vae(variant)
        clip = video_clip(6, batch=2)
        posterior = vae.encode(clip, mode="image")
        decoded = vae.decode(posterior.mean, mode="image")
        assert posterior.mean.shape[2] == decoded.shape[2] == 6
        for k in range(6):
            alone = vae.encode(clip[:, :, k:k + 1])
            assert torch.equal(posterior.mean[:, :, k:k + 1], alone.mean)
            assert torch.equal(posterior.logvar[:, :, k:k + 1], alone.logvar)
            assert torch.equal(decoded[:, :, k:k + 1], vae.decode(alone.mean))

    def test_video_mode_is_not_image_mode(self):
        vae = video_vae()
        latents = noise(1, 4, 3, 2, 2)
        assert vae.decode(latents).shape[2] == 9
        assert vae.decode(latents, mode="image").shape[2] == 3

    @pytest.mark.parametrize("large", [Tiling(None, None), Tiling(17, 64, 32), Tiling(21, 576, 128)])
    def test_not_cutting_equals_one_large_piece(self, large):
        vae = video_vae(tiling=large)
        clip, latents = video_clip(15, 20, 30), noise(1, 4, 5, 3, 4)
        cut = vae.encode(clip).mean, vae.decode(latents)
        vae.tiling = None
        assert torch.equal(cut[0], vae.encode(clip).mean)
        assert torch.equal(cut[1], vae.decode(latents))

    def test_a_moments_clamp_keeps_the_variance_finite(self):
        vae = video_vae()
        vae.encoder.conv_out.bias.data[4:] = 1000.0
        assert vae.encode(video_clip(1)).logvar.max() == 20


class TestDtypesAndDevices:
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.05), (torch.bfloat16, 0.4)])
    @pytest.mark.parametrize("tiling", [None, CUT])
    def test_half_precision_stays_close(self, variant, dtype, tolerance, tiling):
        full, half = video_vae(variant, tiling=tiling), video_vae(variant, dtype, tiling)
        clip = video_clip(6, 16, 17)
        latents, half_latents = full.encode(clip).mean, half.encode(clip).mean
        decoded, half_decoded = full.decode(latents), half.decode(latents)
        assert half_latents.dtype == half_decoded.dtype == dtype
        assert distance(half_latents, latents) < tolerance
        assert distance(half_decoded, decoded) < tolerance

    @pytest.mark.parametrize("executor", ["fast", "plain"])
    def test_an_overflow_of_float16_is_an_error_that_says_so(self, executor):
        vae = video_vae(dtype=torch.float16)
        vae.executor = executor
        latents = vae.encode(video_clip(1)).mean
        for conv in (vae.encoder.conv_out, vae.decoder.conv_out):
            conv.weight.data.mul_(1e5)
        with pytest.raises(FloatingPointError, match="Decoding in float16 .* Load the model in bfloat16 or float32"):
            vae.decode(latents)
        with pytest.raises(FloatingPointError, match="Encoding in float16"):
            vae.encode(video_clip(1))
        assert not vae.decode(latents * float("nan")).isfinite().any()  # what came in, not the model's doing

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_results_have_the_dtype_of_the_weights_not_of_the_input(self, dtype):
        vae = video_vae()
        posterior = vae.encode(video_clip(5).to(dtype))
        assert posterior.mean.dtype == posterior.logvar.dtype == torch.float32
        assert vae.decode(posterior.mean.to(dtype)).dtype == torch.float32

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("mode", ["video", "image"])
    def test_results_are_where_the_input_is(self, mode):
        gpu, vae, clip = torch.device("cuda"), video_vae(tiling=CUT), video_clip(11, 24, 17)
        expected = vae.encode(clip, mode).mean
        vae.to(gpu)
        latents = vae.encode(clip, mode).mean
        assert latents.device == clip.device
        assert vae.decode(latents, mode=mode).device == clip.device
        assert vae.encode(clip.to(gpu), mode).mean.device.type == "cuda"
        assert distance(latents, expected) < 0.05
        assert vae.to("cpu").encode(clip.to(gpu), mode).mean.device.type == "cuda"


class TestMemory:
    """The networks are never given more than one clip, window and tile."""

    @staticmethod
    def record(network):
        shapes = []
        network.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
        return shapes

    @pytest.mark.parametrize("mode, most_frames, most_latents", [("video", 9, 3), ("image", 1, 1)])
    def test_one_window_and_tile_at_a_time(self, mode, most_frames, most_latents):
        vae = video_vae(tiling=CUT)
        encoded, decoded = self.record(vae.encoder), self.record(vae.decoder)
        latents = vae.encode(video_clip(11, 22, 24, batch=2), mode).mean
        vae.decode(latents, mode=mode)
        for batch, _, frames, height, width in encoded:
            assert batch == 1 and frames <= most_frames and height <= 16 and width <= 16
        for batch, _, t, h, w in decoded:
            assert batch == 1 and t <= most_latents and h <= 2 and w <= 2
        assert max(shape[2] for shape in encoded) == most_frames

    def test_streams_hold_one_window(self):
        vae = video_vae(tiling=CUT)
        encoded, decoded = self.record(vae.encoder), self.record(vae.decoder)
        latents = list(vae.encode_stream([video_clip(40, 16, 24)]))
        list(vae.decode_stream(latents))
        assert max(shape[2] for shape in encoded) == 9
        assert max(shape[2] for shape in decoded) == 3

    def test_streams_let_go_of_what_is_done(self):
        """When a window is done, frames are held of it and of the part that arrived beyond it, and no earlier ones."""
        vae, alive = video_vae(tiling=Tiling(9, None)), []

        def look() -> None:
            frames = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // (3 * 40 * 48 * x.itemsize)
                      for x in gc.get_objects() if type(x) is torch.Tensor and x.shape[-2:] == (40, 48)}
            alive.append(sum(frames.values()))

        parts = (noise(1, 3, 2, 40, 48) for _ in range(17))
        deque(vae.decode_stream(vae.encode_stream(parts, look), look), maxlen=0)
        assert len(alive) == 10 and max(alive) <= 9 + 2

    def test_nothing_keeps_the_graph(self):
        vae = video_vae()
        clip = video_clip(5).requires_grad_()
        latents = vae.encode(clip).mean
        assert not latents.requires_grad
        assert not vae.decode(latents).requires_grad
        assert not any(part.requires_grad for part in vae.decode_stream(vae.encode_stream([clip])))


class TestStreams:
    """Joined, what comes out of a stream is what the whole call gives, to the last bit."""

    SPLITS = [[1] * 27, [27], [9, 8, 8, 2], [10, 17], [3, 1, 15, 8]]
    LATENT_SPLITS = [[1] * 8, [8], [3, 2, 2, 1], [4, 4], [1, 5, 2]]

    @pytest.mark.parametrize("tiling", [None, pytest.param(CUT, marks=pytest.mark.slow), Tiling(9, None)])
    def test_encode(self, tiling):
        vae = video_vae(tiling=tiling)
        clip = video_clip(27, 17, 24)
        whole = vae.encode(clip).mode()
        for split in self.SPLITS:
            streamed = torch.cat(list(vae.encode_stream(clip.split(split, dim=2))), dim=2)
            assert torch.equal(streamed, whole), split

    @pytest.mark.parametrize("tiling", [None, pytest.param(CUT, marks=pytest.mark.slow), Tiling(9, None)])
    def test_decode(self, tiling):
        vae = video_vae(tiling=tiling)
        latents = noise(1, 4, 8, 1, 3)
        whole = vae.decode(latents)
        for split in self.LATENT_SPLITS:
            streamed = torch.cat(list(vae.decode_stream(latents.split(split, dim=2))), dim=2)
            assert torch.equal(streamed, whole), split

    @pytest.mark.parametrize("frames", range(1, 20))
    def test_every_length(self, frames):
        vae = video_vae()
        clip = video_clip(frames, 8, 8)
        latents = torch.cat(list(vae.encode_stream(clip.split(2, dim=2))), dim=2)
        assert torch.equal(latents, vae.encode(clip).mode())
        decoded = torch.cat(list(vae.decode_stream(latents.split(1, dim=2))), dim=2)
        assert torch.equal(decoded, vae.decode(latents))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("tiling", [None, Tiling(5, 16, 8)])
    def test_in_half_precision(self, dtype, tiling):
        vae = video_vae("v1", dtype, tiling)
        clip = video_clip(6, 8, 17)
        latents = vae.encode(clip).mode()
        streamed = torch.cat(list(vae.encode_stream(clip.split(4, dim=2))), dim=2)
        assert streamed.dtype == dtype
        assert torch.equal(streamed, latents)
        decoded = torch.cat(list(vae.decode_stream(latents.split(1, dim=2))), dim=2)
        assert decoded.dtype == dtype
        assert torch.equal(decoded, vae.decode(latents))

    def test_results_come_as_windows_fill(self):
        vae, taken = video_vae(), []

        def parts():
            for part in video_clip(27).split(1, dim=2):
                taken.append(part)
                yield part

        next(vae.encode_stream(parts()))
        assert len(taken) == 10

    def test_progress_is_called_after_each_tile(self):
        vae, calls = video_vae(tiling=CUT), []
        list(vae.encode_stream(video_clip(11, 16, 32).split(5, dim=2), lambda: calls.append("encode")))
        list(vae.decode_stream(noise(1, 4, 4, 2, 4).split(1, dim=2), lambda: calls.append("decode")))
        assert calls == ["encode"] * 6 + ["decode"] * 6

    @pytest.mark.parametrize("stream, message", [("encode_stream", "no frames"), ("decode_stream", "no latents")])
    def test_nothing_to_do_is_an_error(self, stream, message):
        with pytest.raises(ValueError, match=message):
            list(getattr(video_vae(), stream)([]))

    @pytest.mark.parametrize("stream, shape", [("encode_stream", (1, 4, 2, 16, 16)), ("decode_stream", (1, 3, 2, 2, 2)),
                                               ("encode_stream", (3, 2, 16, 16)), ("decode_stream", (4, 2, 2, 2))])
    def test_wrong_parts_are_refused(self, stream, shape):
        with pytest.raises(ValueError, match=re.escape(f"found shape {list(shape)}")):
            list(getattr(video_vae(), stream)([torch.zeros(shape)]))


class TestProgress:
    """10 frames are 2 windows here, 32 x 16 pixels are 3 tiles."""

    @pytest.mark.parametrize("mode, total", [("video", 2 * 2 * 3), ("image", 2 * 10 * 3)])
    def test_counts_every_piece(self, mode, total):
        vae, calls = video_vae(tiling=CUT), []
        latents = vae.encode(video_clip(10, 32, 16, batch=2), mode, progress=lambda *call: calls.append(call)).mean
        assert calls == [(done, total) for done in range(1, total + 1)]
        calls.clear()
        vae.decode(latents, mode=mode, progress=lambda *call: calls.append(call))
        assert calls == [(done, total) for done in range(1, total + 1)]

    def test_raising_cancels_and_leaves_the_vae_usable(self):
        class Cancelled(Exception):
            pass

        def cancel(done, total):
            calls.append(done)
            if done == 3:
                raise Cancelled

        vae, clip, calls = video_vae(tiling=CUT), video_clip(10, 32, 16), []
        latents = vae.encode(clip).mean
        decoded = vae.decode(latents)
        for work in (lambda: vae.encode(clip, progress=cancel), lambda: vae.decode(latents, progress=cancel)):
            calls.clear()
            with pytest.raises(Cancelled):
                work()
            assert calls == [1, 2, 3]
        assert torch.is_grad_enabled()
        assert torch.equal(vae.encode(clip).mean, latents)
        assert torch.equal(vae.decode(latents), decoded)


class TestWrongInput:
    """Every refusal says what was found and what was expected."""

    @pytest.mark.parametrize("clip, found", [
        (torch.zeros(3, 5, 16, 16), r"clip \[B, 3, T, H, W\].*found shape \[3, 5, 16, 16\]"),
        (torch.zeros(1, 4, 5, 16, 16), r"found shape \[1, 4, 5, 16, 16\]"),
        (torch.zeros(1, 5, 3, 16, 16), r"found shape \[1, 5, 3, 16, 16\]"),
        (torch.zeros(1, 3, 0, 16, 16), r"none of the sizes 0; found shape \[1, 3, 0, 16, 16\]"),
        (torch.zeros(0, 3, 5, 16, 16), r"found shape \[0, 3, 5, 16, 16\]"),
        (torch.zeros(1, 3, 5, 16, 16, dtype=torch.uint8), "floating-point values.*uint8"),
        (torch.zeros(1, 3, 5, 7, 16), "7x16 are too small.*at least 8"),
        (torch.zeros(1, 3, 5, 16, 1), "16x1 are too small"),
        ([[0.0]], "found list"),
        (None, "found NoneType"),
    ])
    def test_clip(self, clip, found):
        vae = video_vae()
        with pytest.raises(ValueError, match=found):
            vae.encode(clip)
        with pytest.raises(ValueError, match=found):
            vae.reconstruct(clip)

    @pytest.mark.parametrize("latents, found", [
        (torch.zeros(1, 16, 2, 2, 2), r"latents \[B, 4, t, h, w\].*found shape \[1, 16, 2, 2, 2\]"),
        (torch.zeros(2, 4, 2, 2), r"found shape \[2, 4, 2, 2\]"),
        (torch.zeros(1, 4, 2, 0, 2), r"found shape \[1, 4, 2, 0, 2\]"),
        (torch.zeros(1, 4, 2, 2, 2, dtype=torch.int64), "int64"),
        ({}, "found dict"),
    ])
    def test_latents(self, latents, found):
        with pytest.raises(ValueError, match=found):
            video_vae().decode(latents)

    @pytest.mark.parametrize("mode", ["images", "", None])
    def test_mode(self, mode):
        vae = video_vae()
        with pytest.raises(ValueError, match=f"mode is {mode!r}; it must be 'video'"):
            vae.encode(video_clip(1), mode)
        with pytest.raises(ValueError, match=f"mode is {mode!r}; it must be 'video'"):
            vae.decode(noise(1, 4, 1, 2, 2), mode=mode)

    @pytest.mark.parametrize("mode, most", [("video", 9), ("image", 3)])
    def test_frames(self, mode, most):
        for frames in (0, -1, most + 1):
            with pytest.raises(ValueError, match=f"frames={frames} asked, but 3 latents decode to {most}"):
                video_vae().decode(noise(1, 4, 3, 2, 2), frames=frames, mode=mode)

    @pytest.mark.parametrize("size", [(16, 17), (8, 16), (16, 8), (0, 16), (24, 24)])
    def test_size(self, size):
        message = rf"size=\({size[0]}, {size[1]}\) asked, but latents of 2x2 hold 16x16"
        with pytest.raises(ValueError, match=message):
            video_vae().decode(noise(1, 4, 3, 2, 2), size=size)

    @pytest.mark.parametrize("frames, found", [
        (torch.zeros(1, 3, 5, 16, 16), r"frames \[N, 3, H, W\].*found shape \[1, 3, 5, 16, 16\]"),
        (torch.zeros(5, 16, 16, 3), r"found shape \[5, 16, 16, 3\]"),
        (torch.zeros(5, 3, 4, 16), "4x16 are too small"),
    ])
    def test_image_vae_frames(self, frames, found):
        with pytest.raises(ValueError, match=found):
            load_image_vae(image_state(LAYOUTS["sd"])).encode(frames)

    def test_image_vae_latents(self):
        with pytest.raises(ValueError, match=r"latents \[N, 4, h, w\].*found shape \[1, 16, 2, 2\]"):
            load_image_vae(image_state(LAYOUTS["sd"])).decode(torch.zeros(1, 16, 2, 2))
