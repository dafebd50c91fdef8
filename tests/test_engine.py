"""The fast executor gives the definition's numbers, however little memory it has and however it is cut."""

import sys
import weakref

import pytest
import torch
from compare import distance
from random_weights import VARIANTS, noise, video_clip, video_vae
from torch import nn

import cvvae
from cvvae import engine
from cvvae.engine import kernels, passes, products, winograd
from cvvae.engine.activation import Activation
from cvvae.engine.arena import Arena, empty, scratch
from cvvae.engine.executor import Executor
from cvvae.engine.store import Store
from cvvae.tiling import make_plan

WHOLE = cvvae.Tiling(None, None)


@pytest.fixture(params=VARIANTS)
def vae(request):
    vae = video_vae(request.param)
    vae.tiling = WHOLE
    return vae


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=[False, True], ids=["products", "convolutions"])
def cpu(request, monkeypatch):
    """Each kind of CPU: how one computes works on the other, only slower."""
    monkeypatch.setattr(products, "BY_CONVOLUTION", request.param)


def laid_out(x):
    """``x`` in the engine's layout."""
    return kernels.empty(x, *x.shape).copy_(x)


def latents_for(vae, t: int, h: int, w: int):
    return noise(1, vae.config.latent_channels, t, h, w)


class TestExecutors:
    SIZES = [(1, 6, 5), (2, 3, 4), (3, 7, 3)]

    @pytest.mark.parametrize("t, h, w", SIZES)
    def test_decode(self, vae, cpu, t, h, w):
        z = latents_for(vae, t, h, w)
        fast = vae.decode(z)
        vae.executor = "plain"
        assert distance(fast, vae.decode(z)) < 2e-5

    @pytest.mark.parametrize("t, h, w", SIZES)
    def test_encode(self, vae, cpu, t, h, w):
        clip = video_clip(4 * t - 3, 8 * h, 8 * w)
        fast = vae.encode(clip)
        vae.executor = "plain"
        plain = vae.encode(clip)
        assert distance(fast.mean, plain.mean) < 2e-5
        assert distance(fast.logvar, plain.logvar) < 2e-5

    @pytest.mark.parametrize("mode", ["video", "image"])
    def test_windows_tiles_and_images(self, vae, mode):
        tiling = cvvae.Tiling(9, 32, 16)
        clip = video_clip(10, 44, 36)
        fast = vae.encode(clip, mode, tiling=tiling).mean
        decoded = vae.decode(fast, mode=mode, tiling=tiling)
        vae.executor = "plain"
        assert distance(fast, vae.encode(clip, mode, tiling=tiling).mean) < 2e-5
        assert distance(decoded, vae.decode(fast, mode=mode, tiling=tiling)) < 2e-5

    def test_image_vae(self):
        image_vae = cvvae.load_image_vae("tiny")
        images = noise(9, 3, 40, 24).clamp(-1, 1)
        latents, decoded = image_vae.encode(images).mean, image_vae.decode(noise(9, 4, 5, 3))
        image_vae.executor = "plain"
        assert distance(latents, image_vae.encode(images).mean) < 2e-5
        assert distance(decoded, image_vae.decode(noise(9, 4, 5, 3))) < 2e-5

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_stays_as_close_to_float32_as_the_definition(self, dtype):
        z = noise(1, 4, 3, 5, 6)
        exact, half = video_vae("v1"), video_vae("v1", dtype)
        expected = exact.decode(z)
        fast = half.decode(z)
        assert fast.dtype == dtype
        half.executor = "plain"
        assert (fast - expected).square().mean() < 1.5 * (half.decode(z) - expected).square().mean()

    def test_weights_are_never_changed(self, vae):
        before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
        vae.decode(vae.encode(video_clip(9, 32, 24)).mean)
        assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())

    def test_changed_weights_are_seen(self, vae):
        z = latents_for(vae, 2, 3, 3)
        vae.decode(z)
        vae.decoder.conv_in.weight.mul_(0.5)
        fast = vae.decode(z)
        vae.executor = "plain"
        assert distance(fast, vae.decode(z)) < 2e-5

    def test_an_unknown_name_is_refused(self, vae):
        vae.executor = "turbo"
        with pytest.raises(ValueError, match="executor is 'turbo'; it must be one of 'fast', 'compiled', 'plain'"):
            vae.decode(latents_for(vae, 1, 2, 2))

    def test_layers_put_in_or_watched_are_called(self, vae):
        z = latents_for(vae, 2, 3, 3)
        assert engine.knows(vae.decoder)
        seen = []
        handle = vae.decoder.mid.block_1.conv1.register_forward_hook(lambda *_: seen.append(1))
        vae.decode(z)
        assert seen and not engine.knows(vae.decoder)
        handle.remove()
        assert engine.knows(vae.decoder)
        vae.decoder.norm_out = nn.Identity()
        assert not engine.knows(vae.decoder)
        vae.decode(z)


class TestStrips:
    """Any height of strips and any room for them: the same numbers, and nothing held at the end."""

    @pytest.mark.parametrize("limit", [None, 10 ** 6, pytest.param(2 * 10 ** 5, marks=pytest.mark.slow), 0])
    def test_same_numbers(self, vae, limit):
        t, h, w = (2, 6, 3) if limit else (2, 3, 3)
        z, clip = latents_for(vae, t, h, w), video_clip(4 * t - 3, 8 * h, 8 * w)
        for network, x, run in ((vae.decoder, z, "decode"), (vae.encoder, clip, "encode")):
            expected = network(x)
            for rows in (4, 6, 1000):
                executor = Executor(lambda *_, rows=rows: rows, memory=limit)
                assert distance(getattr(executor, run)(network, x), expected) < 2e-5, rows
                assert executor.store.held == 0

    def test_room_is_kept_to(self, vae):
        z, held = latents_for(vae, 2, 10, 6), []
        limit = 15 * 10 ** 5
        executor = Executor(lambda *_: 4, memory=limit, check=lambda: held.append(executor.store.held))
        executor.decode(vae.decoder, z)
        unlimited = []
        free = Executor(lambda *_: 4, check=lambda: unlimited.append(free.store.held))
        free.decode(vae.decoder, z)
        assert max(held) <= limit < max(unlimited)

    def test_rows_that_are_made_together_are_made_once(self):
        made = []

        def compute(start, stop, moments):
            made.append((start, stop))
            return torch.arange(start, stop).float()[None, None, :, None]

        layer = Activation((1, 1, 10, 1), 3, compute, torch.empty(0), None, step=2)
        assert layer.strip == 4
        for start, stop in ((0, 3), (3, 7), (5, 10)):
            assert layer.rows(start, stop).flatten().tolist() == list(range(start, stop))
        assert made == [(0, 4), (4, 8), (8, 10)]

    def test_cancel_stops_within_a_window(self, vae):
        calls = []

        def check():
            calls.append(None)
            if len(calls) == 20:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            vae.decode(latents_for(vae, 2, 6, 6), check=check)
        assert len(calls) == 20

    def test_store_counts_what_it_holds(self):
        store = Store(100)
        assert store.has_room(100) and not store.has_room(101)
        kept = store.keep(torch.zeros(1, 10, 1, 1))
        assert store.held == 40 and not store.has_room(61)
        store.release(kept)
        assert store.held == 0


class TestArena:
    def test_gives_out_each_place_once_and_joins_gaps(self):
        arena = Arena()
        sizes = 1000, 5, 7000, 64
        places = [arena.empty((1, n, 1, 1), torch.float32, torch.contiguous_format).fill_(n) for n in sizes]
        assert all((place == n).all() for place, n in zip(places, sizes, strict=True))
        for k in (1, 0, 3, 2):
            places[k] = None
        assert arena.gaps == [(0, 0, arena.CHUNK)]

    def test_what_no_chunk_holds_gets_its_own(self):
        arena = Arena()
        small = arena.empty((16,), torch.uint8, torch.contiguous_format)
        large = arena.empty((arena.CHUNK + 16,), torch.uint8, torch.contiguous_format)
        assert len(arena.chunks) == 2 and large.nbytes == arena.CHUNK + 16
        del small, large
        assert arena.gaps == [(0, 0, arena.CHUNK), (1, 0, arena.CHUNK + 64)]

    def test_a_view_holds_its_place(self):
        arena = Arena()
        view = arena.empty((2, 3, 4, 5), torch.float32, torch.channels_last)[1:, 0].transpose(1, 2)
        held = arena.gaps[:]
        assert held != [(0, 0, arena.CHUNK)]
        view = view.clone()
        assert arena.gaps == [(0, 0, arena.CHUNK)]

    @pytest.mark.parametrize("line", range(10))
    def test_what_goes_while_a_place_is_sought_is_not_given_out_twice(self, line):
        def lies(place):
            start = place.data_ptr() - arena.chunks[0].ctypes.data
            return 0, start, start + place.nbytes

        def drop(frame, event, _):
            # As the garbage collector would, between any two lines.
            if event == "call":
                return drop if frame.f_code is Arena.empty.__code__ else None
            lines.append(frame.f_lineno)
            if len(lines) == line + 1:
                places[0] = None
            return drop

        arena, lines, layout = Arena(), [], torch.contiguous_format
        places = [arena.empty((64 * n,), torch.uint8, layout) for n in (4, 1, 2, 1)]
        places[2] = None  # the gap that is wanted, behind the one that will appear
        tracing = sys.gettrace()
        sys.settrace(drop)
        try:
            places.append(arena.empty((64 * 2,), torch.uint8, layout))
        finally:
            sys.settrace(tracing)
        assert places[0] is None
        pieces = sorted([lies(place) for place in places if place is not None] + arena.gaps)
        assert [piece[1] for piece in pieces] == [0, *(piece[2] for piece in pieces[:-1])]
        assert pieces[-1][2] == arena.CHUNK

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_layout_and_dtype(self, layout, dtype):
        place = Arena().empty((2, 3, 4, 5), dtype, layout)
        expected = torch.empty(2, 3, 4, 5, dtype=dtype, memory_format=layout)
        assert (place.shape, place.dtype, place.stride()) == (expected.shape, dtype, expected.stride())

    def test_only_what_is_large_and_made_within_scratch_lies_there(self):
        like, shape, layout = torch.zeros(1), (1, 1, 512, 512), torch.contiguous_format
        before = empty(like, shape, layout)
        with scratch() as arena:
            small, large = empty(like, (1, 1, 8, 8), layout), empty(like, shape, layout)
            assert len(arena.chunks) == 1 and arena.gaps == [(0, large.nbytes, arena.CHUNK)]
        behind = empty(like, shape, layout)
        assert arena.gaps == [(0, large.nbytes, arena.CHUNK)]
        assert all(tensor.is_contiguous() for tensor in (before, small, large, behind))


class TestKernels:
    @pytest.mark.parametrize("axis", [winograd.TIME, winograd.ROWS, winograd.COLUMNS])
    @pytest.mark.parametrize("count", [3, 4, 5, 6, 7, 19])
    @pytest.mark.parametrize("fours", [True, False])
    def test_winograd_is_the_filter(self, axis, count, fours):
        shape = [4, 3, 4, 4]
        shape[axis] = count
        x, taps, bias = noise(*shape), noise(3, 5, 3, 1, 1).unbind(0), noise(5)

        def product(x, tap, bias):
            return nn.functional.conv2d(x, tap, bias)

        expected = sum(product(x.double().narrow(axis, k, count - 2), tap.double(), None) for k, tap in enumerate(taps))
        found = winograd.filtered(x, taps, bias, axis, product, fours)
        assert distance(found, expected + bias[:, None, None]) < 2e-6

    @pytest.mark.parametrize("frames", [1, 7])
    @pytest.mark.parametrize("channels", [8, 64, 256])
    @pytest.mark.parametrize("stride", [(1, 1), (1, 2), (2, 2)])
    @pytest.mark.parametrize("taps", [1, 3])
    @pytest.mark.parametrize("large", [2, 64])  # in large pictures Winograd's method runs along rows and columns too
    def test_convolve(self, channels, stride, taps, frames, large, cpu, monkeypatch):
        monkeypatch.setattr(kernels, "LARGE", large)
        x, weight, bias = noise(frames + taps - 1, channels, 9, 11), noise(channels, channels, taps, 3, 3), noise(channels)
        weight /= (9 * taps * channels) ** 0.5
        time = 1 if taps == 1 else stride[0]
        expected = nn.functional.conv3d(x.transpose(0, 1)[None].double(), weight.double(), bias.double(),
                                        (time, stride[1], stride[1]))[0].transpose(0, 1)
        found = kernels.convolve(laid_out(x), kernels.prepared(weight), bias, (time, stride[1]))
        assert distance(found, expected) < 4e-5
        # Torch's own convolution, without AVX-512 chains of up to 2304 products: 1.8e-6.
        error = (found - expected).square().mean().sqrt() / expected.std()
        assert error < (2e-6 if large == 2 else 8e-7)

    @pytest.mark.parametrize("taps", [1, 3])
    @pytest.mark.parametrize("channels", [4, 64])
    @pytest.mark.parametrize("width", [1, 6, 7])
    def test_upsampled_is_nearest_then_convolution(self, width, taps, channels, cpu):
        x, weight, bias = noise(4, channels, 5, width), noise(3, channels, taps, 3, 3) / channels ** 0.5, noise(3)
        large = nn.functional.interpolate(x, scale_factor=2, mode="nearest").transpose(0, 1)[None]
        expected = nn.functional.conv3d(large.double(), weight.double(), bias.double(), padding=(0, 1, 1))
        padded = nn.functional.pad(x, (1, 1, 1, 1))
        found = kernels.convolve_upsampled(laid_out(padded), kernels.prepared(weight), bias)
        assert distance(found, expected[0].transpose(0, 1)) < 5e-6

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_attention(self, cpu, dtype, monkeypatch):
        monkeypatch.setattr(kernels, "SCORES", 50)  # a few queries at a time
        q, k, v = (laid_out(noise(2, 16, 5, 7, seed=seed).to(dtype)) for seed in range(3))
        flat = [x.double().flatten(2).transpose(1, 2) for x in (q, k, v)]
        expected = nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2).unflatten(2, (5, 7))
        assert distance(kernels.attend(q, k, v), expected) < 5e-6

    def test_cudnn_by_name(self, monkeypatch):
        """Where PyTorch would not call it; no GPU is needed to see what it is asked for."""
        def cudnn(x, weight, *, padding, stride, dilation, groups, benchmark, deterministic, allow_tf32):
            return nn.functional.conv3d(x, weight, None, stride, padding, dilation, groups)

        monkeypatch.setattr(torch, "cudnn_convolution", cudnn)
        x, weight, bias = noise(1, 4, 5, 6, 7), noise(3, 4, 3, 3, 3), noise(3)
        found = kernels._convolve_by_cudnn(x, weight, bias, (2, 1, 2))
        assert torch.allclose(found, nn.functional.conv3d(x, weight, bias, (2, 1, 2)), atol=1e-5)

    def test_packed_is_the_kernel(self):
        weight = noise(80, 5, 3, 2, 2)
        found = products.packed(weight[:, :, 1:])
        assert torch.equal(found, weight[:, :, 1:])
        assert all(tap.is_contiguous() for tap in found.flatten(2).unbind(2))

    def test_stills_see_one_frame(self):
        weight = noise(2, 3, 3, 1, 1)
        assert torch.equal(kernels.for_stills(weight, "replicate", 2), weight.sum(2, keepdim=True))
        assert torch.equal(kernels.for_stills(weight, "zeros", 1), weight[:, :, 1:2])
        assert kernels.for_stills(weight[:, :, :1], "zeros", 0).shape[2] == 1


class TestFoldedKernels:
    """Pictures of one call share them; no call sees another's."""

    @pytest.fixture
    def folds(self, monkeypatch):
        """Counts how often a kernel is folded."""
        calls, fold = [], kernels.for_stills
        monkeypatch.setattr(kernels, "for_stills", lambda *arguments: (calls.append(1), fold(*arguments))[1])
        return calls

    def test_are_made_once_for_all_pictures_of_a_call(self, vae, folds):
        clip = video_clip(3, 24, 16)
        alone = [vae.encode(frame).mean for frame in clip.split(1, dim=2)]
        layers, expected = len(folds) // 3, torch.cat(alone, dim=2)
        folds.clear()
        assert torch.equal(vae.encode(clip, "image").mean, expected) and len(folds) == layers > 10

    def test_are_dropped_with_the_call(self, vae, monkeypatch):
        made, prepare = [], kernels.prepared

        def prepared(weight):
            kernel = prepare(weight)
            made.append(weakref.ref(kernel))
            return kernel

        monkeypatch.setattr(kernels, "prepared", prepared)
        vae.decode(latents_for(vae, 2, 3, 2), mode="image")
        own = set(map(id, vae.parameters()))
        left = [kernel() for kernel in made]
        assert made and all(kernel is None or id(kernel) in own for kernel in left)

    def test_follow_the_weights(self, vae):
        z = latents_for(vae, 2, 3, 2)
        before = vae.decode(z, mode="image")
        for parameter in vae.parameters():
            parameter.data.mul_(1.01)  # which torch does not count as a change
        after = vae.decode(z, mode="image")
        other = video_vae(vae.config.variant)
        other.load_state_dict(vae.state_dict())
        other.tiling = WHOLE
        assert torch.equal(after, other.decode(z, mode="image")) and distance(after, before) > 1e-3

    def test_are_not_kept_where_memory_is_short(self, vae, folds, monkeypatch):
        monkeypatch.setattr(engine, "together", lambda *_: engine.Together(1, 1, 0))
        z = latents_for(vae, 3, 3, 2)
        vae.decode(z[:, :, :1], mode="image")
        layers = len(folds)
        vae.decode(z, mode="image")
        assert len(folds) == 4 * layers > 0

    def test_their_size(self, vae):
        folded = {}
        for network, x in ((vae.encoder, video_clip(1, 16, 16)), (vae.decoder, latents_for(vae, 1, 2, 2))):
            folded.clear()
            executor = Executor(lambda *_: 4, stills=True, folded=folded)
            executor.encode(network, x) if network is vae.encoder else executor.decode(network, x)
            assert sum(kernel.nbytes for kernel, _ in folded.values()) == engine.folded_bytes(network, torch.float32)


class TestPasses:
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("own", [False, True], ids=["of_all_frames", "of_each_frame"])
    @pytest.mark.parametrize("cached", [1, 500, 2 ** 21], ids=["by_frame", "by_two", "at_once"])
    def test_a_few_frames_at_a_time(self, cached, own, layout, monkeypatch):
        monkeypatch.setattr(passes, "CACHED", cached)
        x = noise(5, 4, 3, 4).contiguous(memory_format=layout)
        scale, shift, pilot = noise(3, 5 if own else 1, 4, 1, 1).unbind()
        out = torch.empty(5, 4, 5, 6).contiguous(memory_format=layout)[:, :, 1:-1, 1:-1]
        passes.activate(x, scale, shift, out)
        y = x.double() * scale + shift
        assert torch.allclose(out.double(), y * y.sigmoid(), atol=1e-6)
        first, second = passes.sums(x, pilot)
        steps = x.double() - pilot
        assert torch.allclose(first.double(), steps.sum(3, keepdim=True), atol=1e-6)
        assert torch.allclose(second.double(), steps.square().sum(3, keepdim=True), atol=1e-5)


class TestMemory:
    """What a Tiling's ``memory`` does: nothing to the numbers, until tiles must shrink, and then the log says so."""

    def test_numbers_are_the_same(self, vae):
        clip = video_clip(5, 40, 24)
        vae.tiling = cvvae.Tiling(9, None, memory=None)
        expected = vae.encode(clip).mean
        decoded = vae.decode(expected)
        vae.tiling = cvvae.Tiling(9, None, memory="70 MB")
        assert distance(vae.encode(clip).mean, expected) < 2e-5
        assert distance(vae.decode(expected), decoded) < 2e-5

    @pytest.mark.parametrize("memory, tile", [("auto", 576), (None, 576), ("40 GB", 576), (10 ** 9, None)])
    def test_tiles_shrink_only_where_memory_is_too_little(self, memory, tile, caplog):
        config = cvvae.Config("v1", 4, (128, 256, 512, 512), 2)
        device = torch.device("cpu")
        tiling = cvvae.Tiling(memory=memory)
        found = engine.fitting(tiling, engine.budget(memory, device), config, False, (5, 72, 72), torch.float32, device)
        if tile:
            assert found == tiling and not caplog.records
        else:
            assert 128 <= found.tile_pixels < 576 and found.overlap_pixels <= found.tile_pixels // 4
            assert "too little for tiles of 576 pixels" in caplog.text

    @pytest.mark.parametrize("memory, rows, kept", [(None, 96, None), (5 * 10 ** 9, 96, None), (4 * 10 ** 9, 48, None),
                                                    (3_500_000_000, 24, None), (3_200_000_000, 8, None)])
    def test_a_gpu_takes_lower_strips_before_it_computes_any_again(self, memory, rows, kept):
        tile = engine.Footprint(False, 17, 576, 576, 128, 256, 512, 2, "cuda")
        strip_rows, keeps = tile.plan(memory)
        assert strip_rows(17, 576, 128) == rows and keeps == kept
        assert memory is None or tile._peak_elsewhere(10 ** 6 * {96: 256, 48: 128, 24: 64, 8: 32}[rows]) <= memory

    @pytest.mark.parametrize("frames, rows", [(4, 576), (5, 344)])
    def test_a_gpu_does_not_cut_a_layer_little_larger_than_a_strip(self, frames, rows):
        strip_rows, _ = engine.Footprint(False, frames, 576, 576, 128, 256, 512, 2, "cuda").plan(None)
        assert strip_rows(frames, 576, 128) == rows

    @pytest.mark.parametrize("device, memory, rows", [("cuda", 2_900, 8), ("cuda", 2_000, 4), ("cuda", 1_350, 4),
                                                      ("cuda", 1_250, 2), ("cpu", 2_000, 2)])
    def test_below_that_strips_are_computed_again(self, device, memory, rows):
        strip_rows, keeps = engine.Footprint(False, 17, 576, 576, 128, 256, 512, 2, device).plan(memory * 10 ** 6)
        assert strip_rows(17, 576, 128) == rows and 0 < keeps < 10 ** 6 * memory

    @pytest.mark.parametrize("pictures, at_once, made", [
        (1, (1, 4), [4, 2]), (3, (1, 4), 3 * [4, 2]), (5, (4, 1), 6 * [4] + 6 * [1]), (2, (2, 2), 3 * [4])])
    def test_a_gpu_computes_pictures_and_their_equal_tiles_together(self, pictures, at_once, made, monkeypatch):
        vae = video_vae(tiling=cvvae.Tiling(None, tile_pixels=16, overlap_pixels=8))
        clip = video_clip(pictures, 32, 24)  # 3 x 2 tiles
        expected = vae.encode(clip, "image").mean
        decoded = vae.decode(expected, mode="image")
        sizes = []
        compute = type(vae)._compute
        monkeypatch.setattr(type(vae), "_compute", lambda self, network, x, *rest: (
            sizes.append(x.shape[2]), compute(self, network, x, *rest))[1])
        monkeypatch.setattr(engine, "together", lambda *_: engine.Together(*at_once, 0))
        assert distance(vae.encode(clip, "image").mean, expected) < 2e-5 and sizes == made
        assert distance(vae.decode(expected, mode="image"), decoded) < 2e-5 and sizes == 2 * made
        vae.encode(video_clip(5, 32, 24))
        assert sizes == 2 * made + 6 * [5]  # tiles of a clip one by one

    @pytest.mark.parametrize("device, pictures, tiles, memory, found", [
        ("cpu", 1, 1, None, (1, 1, 0)), ("cpu", 9, 1, None, (1, 1, 7)), ("cpu", 1, 4, None, (1, 1, 7)),
        ("cuda", 1, 1, None, (1, 1, 0)), ("cuda", 1, 4, None, (1, 4, 0)), ("cuda", 9, 4, None, (4, 1, 7)),
        ("cuda", 3, 4, None, (3, 1, 7)), ("cuda", 2, 4, None, (2, 2, 7)), ("cuda", 9, 4, 10 ** 9, (1, 1, 7)),
        ("cpu", 9, 1, 10 ** 8, (1, 1, 0))])
    def test_how_many_pictures_at_once(self, device, pictures, tiles, memory, found):
        config = cvvae.Config("v1", 4, (128, 256, 512, 512), 2)
        plan = make_plan(1, 72, 56 * tiles + 16, cvvae.Tiling(17, 576, 128))
        assert len(plan.tiles) == tiles
        assert found == engine.together(config, False, pictures, plan.tiles, False, torch.float16, torch.device(device),
                                        memory, lambda: 7)

    @pytest.mark.parametrize("side, at_once", [(72, 1), (96, 1), (128, 4)])
    def test_only_equal_tiles_of_a_picture_are_computed_together(self, side, at_once):
        config = cvvae.Config("v1", 4, (128, 256, 512, 512), 2)
        tiles = make_plan(1, side, side, cvvae.Tiling(17, 576, 128)).tiles
        found = engine.together(config, False, 1, tiles, False, torch.float16, torch.device("cuda"), None, lambda: 7)
        assert found == (1, at_once, 7 if side == 96 else 0)

    @pytest.mark.parametrize("encodes, size, pictures, peak", [
        (True, (1, 128, 128), 1, 1389), (False, (1, 128, 128), 1, 1727), (True, (1, 96, 96), 1, 352),
        (True, (5, 32, 32), None, 1156), (False, (5, 32, 32), None, 1522), (True, (5, 72, 72), None, 3664),
        (False, (5, 72, 72), None, 4251)])
    def test_what_a_gpu_is_asked_for_is_what_it_takes_and_some_more(self, encodes, size, pictures, peak):
        """Peaks as measured on an H200 in float16, MB."""
        config = cvvae.Config("v1", 4, (128, 256, 512, 512), 2)
        told = engine.working_memory(config, encodes, size, pictures, torch.float16, torch.device("cuda"),
                                     cvvae.Tiling(memory=None), lambda: 0)
        assert peak * 10 ** 6 < told < 1.6 * peak * 10 ** 6

    def test_tiles_that_share_statistics_come_one_by_one(self):
        config = cvvae.Config("v1", 4, (128, 256, 512, 512), 2)
        tiles = make_plan(1, 72, 128, cvvae.Tiling(17, 576, 128)).tiles
        assert (1, 1, 7) == engine.together(config, False, 9, tiles, True, torch.float16, torch.device("cuda"), None,
                                            lambda: 7)

    def test_auto_is_less_than_the_machine_has(self):
        import psutil

        assert 0 < engine.budget("auto", torch.device("cpu")) < psutil.virtual_memory().total

    @pytest.mark.parametrize("text, size", [("2 GB", 2 * 10 ** 9), ("1.5GiB", 3 * 2 ** 29), (" 800 mb ", 8 * 10 ** 8),
                                            (10 ** 9, 10 ** 9), ("100000000", 10 ** 8)])
    def test_sizes_in_words(self, text, size):
        assert engine.budget(text, torch.device("cpu")) == size

    @pytest.mark.parametrize("value", [2, 0, -1, "2", "2 TB", "much", True, 1.5e9, "", "1e9"])
    def test_sizes_that_cannot_be_are_refused(self, value):
        with pytest.raises(ValueError, match="Tiling.memory is "):
            cvvae.Tiling(memory=value)


