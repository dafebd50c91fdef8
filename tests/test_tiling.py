"""The chunk plan: everything is covered once, the default is the reference's, and bad values are refused."""

import random

import pytest
import torch
import torch.nn.functional as F
from compare import distance
from random_weights import noise, video_config
from torch import Tensor, nn

from cvvae import Tiling, VideoVAE
from cvvae.engine.executor import Executor, Statistics
from cvvae.tiling import Plan, make_plan

TILINGS = [Tiling(), Tiling(5, 24, 0), Tiling(5, 32, 16), Tiling(9, 24, 8), Tiling(13, 64, 32), Tiling(17, 144, 32),
           Tiling(None, 72, 16), Tiling(17, None), None]
SIZES = [(1, 1, 1), (2, 3, 5), (5, 8, 9), (6, 72, 73), (9, 16, 17), (11, 128, 127), (13, 129, 60), (30, 17, 75)]


def random_plans(count: int) -> list[Plan]:
    draw = random.Random(0)
    plans = []
    for _ in range(count):
        tile = draw.randint(2, 12)
        tiling = Tiling(1 + 4 * draw.randint(1, 5), 8 * tile, 8 * draw.randint(0, tile // 2))
        plans.append(make_plan(draw.randint(1, 30), draw.randint(1, 40), draw.randint(1, 40), tiling))
    return plans


PLANS = [make_plan(*size, tiling) for size in SIZES for tiling in TILINGS] + random_plans(60)


def size_of(plan: Plan) -> tuple[int, int, int]:
    return plan.windows[-1].stop, plan.tiles[-1].rows.stop, plan.tiles[-1].cols.stop


class TestCoverage:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("tiling", TILINGS)
    def test_a_plan_ends_where_the_latents_end(self, size, tiling):
        assert size_of(make_plan(*size, tiling)) == size

    @pytest.mark.parametrize("scale", [1, 8])
    def test_blending_weights_sum_to_one(self, scale):
        for plan in PLANS:
            _, h, w = size_of(plan)
            total = torch.zeros(h * scale, w * scale)
            for tile in plan.tiles:
                weight = tile.weight(scale)
                assert weight.shape == (len(tile.rows) * scale, len(tile.cols) * scale)
                assert weight.min() >= 0
                rows, cols = tile.rows, tile.cols
                total[rows.start * scale:rows.stop * scale, cols.start * scale:cols.stop * scale] += weight
            assert (total - 1).abs().max() < 1e-6

    def test_windows_own_every_latent_and_frame_once(self):
        for plan in PLANS:
            t, _, _ = size_of(plan)
            assert [k for window in plan.windows for k in range(t)[window.latents()][window.before:]] == list(range(t))
            frames = range(4 * t - 3)
            assert [f for window in plan.windows for f in frames[window.frames()][window.before:]] == list(frames)

    def test_a_window_gets_the_frames_of_its_latents(self):
        for plan in PLANS:
            t, _, _ = size_of(plan)
            frames = range(4 * t - 3)
            for window in plan.windows:
                given = frames[window.frames()]
                assert len(given) == 4 * len(window) - 3
                assert given[window.before:] == frames[max(0, 4 * (window.start + window.before) - 3):4 * window.stop - 3]

    @pytest.mark.parametrize("tiling", [tiling for tiling in TILINGS if tiling and tiling.tile_pixels])
    def test_no_piece_is_larger_than_asked(self, tiling):
        for size in SIZES:
            plan = make_plan(*size, tiling)
            assert max(max(len(tile.rows), len(tile.cols)) for tile in plan.tiles) * 8 <= tiling.tile_pixels
            if tiling.window_frames:
                assert max(4 * len(window) - 3 for window in plan.windows) <= tiling.window_frames

    def test_neighbours_share_the_overlap(self):
        plan = make_plan(11, 100, 1, Tiling(17, 64, 24))
        for above, below in zip(plan.tiles, plan.tiles[1:], strict=False):
            assert above.rows.stop - below.rows.start == 3
        assert [(window.start, window.stop) for window in plan.windows] == [(0, 5), (4, 9), (8, 11)]

    @pytest.mark.parametrize("tiling", [None, Tiling(None, None), Tiling(401, 4000)])
    def test_uncut_plans_have_one_piece(self, tiling):
        plan = make_plan(20, 100, 90, tiling)
        assert len(plan) == len(plan.windows) == len(plan.tiles) == 1
        assert torch.equal(plan.tiles[0].weight(1), torch.ones(100, 90))

    def test_length_counts_windows_times_tiles(self):
        assert len(make_plan(9, 100, 129, Tiling())) == 2 * (2 * 3)


# -- the reference's plan, written from its description ------------------------------------------------


class ToneEncoder(nn.Module):
    """8x8 means, changed by what else is in the tile: neighbouring tiles disagree, as with group norms."""

    def forward(self, clip: Tensor) -> Tensor:
        means = F.avg_pool3d(clip[:, :, ::4], (1, 8, 8)).repeat(1, 3, 1, 1, 1)[:, :8]
        return means * (1 + clip[:, :, -1].mean() * 300) + clip[..., -1, -1].mean()


class ToneDecoder(nn.Module):
    def forward(self, latents: Tensor) -> Tensor:
        frames = latents[:, :3].repeat_interleave(4, dim=2)[:, :, 3:]
        frames = frames.repeat_interleave(8, dim=-1).repeat_interleave(8, dim=-2)
        return frames * (1 + latents.mean() * 30) + latents[..., -1, -1].mean()


def reference_starts(length: int, tile: int, overlap: int) -> list[int]:
    """A tile every ``tile - overlap`` until one reaches the end."""
    starts = [0]
    while starts[-1] + tile < length:
        starts.append(starts[-1] + tile - overlap)
    return starts


def blend_in_place(before: Tensor, tile: Tensor, axis: int, overlap: int) -> None:
    for i in range(overlap):
        weight = i / overlap
        here = tile.select(axis, i)
        here.copy_(before.select(axis, before.shape[axis] - overlap + i) * (1 - weight) + here * weight)


def reference_tiled(x: Tensor, network, tile: int, overlap: int, scale: float) -> Tensor:
    """Tiles blended in place, first with the tile above, then with the one to the left, then cropped and joined."""
    out_overlap, out_stride = int(overlap * scale), int((tile - overlap) * scale)
    rows = []
    for top in reference_starts(x.shape[-2], tile, overlap):
        rows.append([network(x[..., top:top + tile, left:left + tile]).clone()
                     for left in reference_starts(x.shape[-1], tile, overlap)])
    joined = []
    for i, row in enumerate(rows):
        kept = []
        for j, piece in enumerate(row):
            if i > 0:
                blend_in_place(rows[i - 1][j], piece, piece.ndim - 2, out_overlap)
            if j > 0:
                blend_in_place(row[j - 1], piece, piece.ndim - 1, out_overlap)
            last_row, last_col = i == len(rows) - 1, j == len(row) - 1
            kept.append(piece[..., :None if last_row else out_stride, :None if last_col else out_stride])
        joined.append(torch.cat(kept, dim=-1))
    return torch.cat(joined, dim=-2)


# Up to 3 x 3 tiles of 72 latents sharing 16; below, at and above the sizes where one more tile starts.
LATENT_SIZES = [(1, 1), (5, 72), (72, 72), (73, 72), (72, 73), (73, 90), (128, 128), (129, 128), (100, 184), (184, 184)]


class TestReference:
    @pytest.fixture
    def vae(self):
        vae = VideoVAE(video_config("v1"))
        vae.encoder, vae.decoder = ToneEncoder(), ToneDecoder()
        vae.register_parameter("anchor", nn.Parameter(torch.zeros(1)))  # says dtype and device
        assert vae.tiling == Tiling(17, 576, 128)
        return vae

    @pytest.mark.parametrize("h, w", LATENT_SIZES)
    def test_encode_equals_the_recursion(self, vae, h, w):
        clip = noise(1, 3, 1, 8 * h, 8 * w, seed=h + w)
        expected = reference_tiled(clip, vae.encoder, 576, 128, scale=1 / 8)
        assert distance(vae.encode(clip).mean, expected[:, :4]) < 1e-5

    @pytest.mark.parametrize("h, w", LATENT_SIZES)
    def test_decode_equals_the_recursion(self, vae, h, w):
        latents = noise(1, 4, 1, h, w, seed=h + w)
        assert distance(vae.decode(latents), reference_tiled(latents, vae.decoder, 72, 16, scale=8)) < 1e-5

    @pytest.mark.parametrize("tile, overlap", [(16, 0), (16, 8), (64, 32), (144, 32)])
    def test_other_tilings_equal_the_recursion(self, vae, tile, overlap):
        vae.tiling = Tiling(17, tile, overlap)
        clip, latents = noise(1, 3, 1, 304, 232), noise(1, 4, 1, 38, 29)
        assert distance(vae.encode(clip).mean, reference_tiled(clip, vae.encoder, tile, overlap, 1 / 8)[:, :4]) < 1e-5
        expected = reference_tiled(latents, vae.decoder, tile // 8, overlap // 8, 8)
        assert distance(vae.decode(latents), expected) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_blended_in_float32(self, vae, dtype):
        """Halves of a white clip add up to white exactly, which weights rounded to half precision would not."""
        vae.to(dtype).tiling = Tiling(17, 72, 24)
        vae.decoder.forward = lambda latents: torch.ones(1, 3, 1, *(8 * n for n in latents.shape[-2:]), dtype=dtype)
        assert torch.equal(vae.decode(noise(1, 4, 1, 20, 20)), torch.ones(1, 3, 1, 160, 160, dtype=dtype))

    @pytest.mark.parametrize("t", [1, 2, 5, 6, 9, 10, 14])
    def test_windows_are_cut_hard_every_four_latents(self, t):
        starts = reference_starts(t, 5, 1)
        windows = make_plan(t, 1, 1, Tiling()).windows
        assert [window.start for window in windows] == starts
        assert [window.before for window in windows] == [0] + [1] * (len(starts) - 1)


class TestRefusedValues:
    WRONG = {
        "window_frames": [0, 1, 2, 4, 6, 16, 18, -3, -17, 17.0, True, "17", [17]],
        "tile_pixels": [0, 7, 8, 12, 20, 100, -16, 576.0, True, "576"],
        "overlap_pixels": [12, 4, -8, 296, 576, 128.0, True, False, "128", None],
        "overlap_frames": [0, 2, 4, -3, 13, 17, 5.0, True, "5", None],
        "even": [1, None, "yes"],
        "statistics": ["frame", None, True],
    }

    @pytest.mark.parametrize("field, value", [(field, value) for field, values in WRONG.items() for value in values])
    def test_the_message_names_the_field_and_the_value(self, field, value):
        with pytest.raises(ValueError) as error:
            Tiling(**{field: value})
        assert str(error.value).startswith(f"Tiling.{field} is {value!r}")

    def test_overlap_may_be_half_a_tile_but_no_more(self):
        assert Tiling(17, 64, 32).overlap_pixels == 32
        with pytest.raises(ValueError, match="overlap_pixels is 40, more than half of tile_pixels = 64; at most 32"):
            Tiling(17, 64, 40)

    @pytest.mark.parametrize("values", [{}, {"window_frames": 5}, {"window_frames": None}, {"tile_pixels": None},
                                        {"tile_pixels": 16, "overlap_pixels": 8}, {"overlap_pixels": 0}])
    def test_values_that_work_are_taken(self, values):
        Tiling(**values)


class TestEvenTiles:
    @pytest.mark.parametrize("side", range(2, 60))
    def test_as_many_as_before_all_of_one_size_or_one_less(self, side):
        for tile, overlap in ((12, 0), (12, 2), (12, 6), (9, 4)):
            uneven, even = (make_plan(1, 1, side, Tiling(17, 8 * tile, 8 * overlap, even=flag)).tiles
                            for flag in (False, True))
            lengths = [len(piece.cols) for piece in even]
            assert len(even) <= len(uneven) and max(lengths) <= tile
            assert even[-1].cols.stop == side
            assert max(lengths) - min(lengths) < max(2, len(even))

    def test_the_sliver_is_gone(self):
        assert [len(tile.cols) for tile in make_plan(1, 1, 73, Tiling()).tiles] == [72, 17]
        assert [len(tile.cols) for tile in make_plan(1, 1, 73, Tiling(even=True)).tiles] == [45, 44]


class TestCrossFade:
    """Windows that share more than one latent: their common part goes over from one to the next linearly."""

    class Level(nn.Module):
        """Frames as bright as the window's first latent: every window has its own level."""

        def forward(self, latents: Tensor) -> Tensor:
            size = 4 * latents.shape[2] - 3, *(8 * n for n in latents.shape[-2:])
            return latents[0, 0, 0].mean().expand(1, 3, *size).clone()

    @pytest.fixture
    def vae(self):
        vae = VideoVAE(video_config("v1"))
        vae.decoder = self.Level()
        vae.tiling = Tiling(17, None, overlap_frames=5)
        return vae

    def test_levels_meet_on_a_ramp(self, vae):
        latents = torch.arange(8.)[None, None, :, None, None].expand(1, 4, 8, 1, 1)
        levels = vae.decode(latents)[0, 0, :, 0, 0]
        assert torch.equal(levels[:13], torch.zeros(13))
        # Five shared frames: the first is still the old window's, the one after the last the new one's.
        assert torch.allclose(levels[12:17], 3 * torch.arange(5) / 5)
        assert torch.equal(levels[17:24], torch.full((7,), 3.))
        assert len(levels) == 29

    @pytest.mark.parametrize("tiling", [Tiling(9, None, overlap_frames=5), Tiling(13, 24, 8, overlap_frames=5),
                                        Tiling(17, None, overlap_frames=9),
                                        pytest.param(Tiling(9, 24, 8, statistics="window"), marks=pytest.mark.slow)])
    def test_streams_equal_the_whole(self, tiling):
        vae = VideoVAE(video_config("v1"))
        vae.tiling = tiling
        clip = noise(1, 3, 22, 32, 24)
        mean = vae.encode(clip).mean
        assert distance(torch.cat(list(vae.encode_stream(clip.split(7, dim=2))), dim=2), mean) < 1e-5
        frames = vae.decode(mean)
        assert distance(torch.cat(list(vae.decode_stream(mean.split(2, dim=2))), dim=2), frames) < 1e-5
        assert distance(vae.decode(mean, frames=11), frames[:, :, :11]) < 1e-5


class TestSharedStatistics:
    @pytest.fixture(autouse=True)
    def no_gradients(self):
        with torch.no_grad():
            yield

    @pytest.fixture
    def vae(self):
        return VideoVAE(video_config("v1"))

    def test_one_piece_is_its_own_statistics(self, vae):
        clip = noise(1, 3, 5, 16, 16)
        expected = vae.encode(clip, tiling=Tiling(17, None)).mean
        for statistics in ("window", "clip"):
            assert torch.equal(vae.encode(clip, tiling=Tiling(17, None, statistics=statistics)).mean, expected)

    def test_pooling_copies_of_one_piece_changes_nothing(self, vae):
        latents, statistics = noise(1, 4, 2, 6, 5), Statistics()
        expected = Executor(lambda *_: 4, statistics=statistics).decode(vae.decoder, latents)
        Executor(lambda *_: 4, statistics=statistics).decode(vae.decoder, latents)
        statistics.pool()
        pooled = Executor(lambda *_: 4, statistics=statistics).decode(vae.decoder, latents)
        assert distance(pooled, expected) < 1e-5

    def test_pooling_makes_a_tile_depend_on_the_others(self, vae):
        latents = noise(1, 4, 2, 4, 12)
        changed = torch.cat([latents[..., :8], 2 * latents[..., 8:]], dim=-1)
        for statistics, equal in (("tile", True), ("window", False)):
            first, second = (vae.decode(z, tiling=Tiling(17, 32, 0, statistics=statistics))[..., :64]
                             for z in (latents, changed))
            assert torch.equal(first, second) == equal

    def test_each_piece_is_counted_twice(self, vae):
        seen = []
        vae.decode(noise(1, 4, 5, 2, 6), tiling=Tiling(9, 32, 16, statistics="clip"), progress=lambda *at: seen.append(at))
        assert seen[-1] == (8, 8) and len(seen) == 8

    def test_a_stream_cannot_know_the_whole_clip(self, vae):
        vae.tiling = Tiling(9, None, statistics="clip")
        with pytest.raises(ValueError, match="statistics is 'clip', but the clip is still coming in"):
            list(vae.encode_stream(noise(1, 3, 12, 8, 8).split(4, dim=2)))
