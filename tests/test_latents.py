"""Latent tools: what goes in comes out where it should, and what others get wrong in time does not happen here."""

import itertools
import math

import pytest
import torch
from random_weights import noise, video_clip, video_vae

from cvvae import latents as tools
from cvvae.frames import first_frame, frames_of, latent_of, latents_of
from cvvae.latents import LatentError
from cvvae.latents.interpolation import along, blend

CURVES, EASINGS = tools.CURVES, tuple(tools.EASINGS)
ENDS = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])


def clip(t, channels=4, batch=1, seed=0, h=6, w=5):
    return noise(batch, channels, t, h, w, seed=seed)


def equal(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


def numbered(t, start=0):
    """A clip whose latents are the numbers start, start + 1, ..."""
    return torch.arange(start, start + t).float().view(1, 1, t, 1, 1).expand(1, 4, t, 2, 2)


def numbers(latents):
    assert (latents == latents[:, :1, :, :1, :1]).all()
    return latents[0, 0, :, 0, 0].tolist()


# -- curves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", CURVES)
class TestBlend:
    def blend(self, a, b, curve, u=ENDS):
        return blend(a.expand(-1, -1, len(u), -1, -1), b.expand(-1, -1, len(u), -1, -1), u, curve)

    @pytest.mark.parametrize("channels, batch", [(4, 1), (4, 4), (16, 2), (16, 16)])
    def test_ends_are_exact(self, curve, channels, batch):
        """A batch as large as the channels is where the core's LatentInterpolate is off by 2."""
        a, b = clip(1, channels, batch), clip(1, channels, batch, seed=1)
        out = self.blend(a, b, curve)
        assert equal(out[:, :, :1], a) and equal(out[:, :, -1:], b)

    def test_clips_of_a_batch_do_not_see_each_other(self, curve):
        a, b = clip(1, batch=4), clip(1, batch=4, seed=1)
        out = self.blend(a, b, curve)
        for k in range(4):
            torch.testing.assert_close(out[k:k + 1], self.blend(a[k:k + 1], b[k:k + 1], curve))

    def test_equal_latents_stay(self, curve):
        """Slerp with acos over the whole tensor gives NaN for most of these."""
        for seed in range(200):
            a = clip(1, seed=seed, h=16, w=16)
            assert equal(self.blend(a, a.clone(), curve), a.expand(-1, -1, 5, -1, -1))

    def test_nearly_equal_latents_stay_between(self, curve):
        a = clip(1, h=16, w=16)
        for distance in (1e-7, 1e-5, 1e-4, 1e-3):
            b = a + distance * clip(1, seed=1, h=16, w=16)
            torch.testing.assert_close(self.blend(a, b, curve), self.blend(a, b, "lerp"), atol=2 * distance, rtol=0)

    @pytest.mark.parametrize("make", [lambda a: -a, lambda a: 0 * a, lambda a: a * 1e-30, lambda a: a * 3,
                                      lambda a: -a + 1e-6], ids=["opposite", "zero", "tiny", "parallel", "nearly opposite"])
    def test_opposite_zero_and_parallel_latents_are_finite(self, curve, make):
        a = clip(1)
        for one, other in ((a, make(a)), (make(a), a), (make(a), make(a))):
            out = self.blend(one, other, curve)
            assert out.isfinite().all()
            assert out.norm() <= 2.3 * max(one.norm(), other.norm())

    def test_frames_that_are_equal_do_not_brighten(self, curve):
        """One angle for the whole clip made frames 0-4 of these 1.171 times as large at the middle."""
        a, b = clip(9), clip(9, seed=1)
        b[:, :, :5] = a[:, :, :5]
        out = blend(a, b, torch.full((9,), 0.5), curve)
        assert equal(out[:, :, :5], a[:, :, :5])

    def test_half_precision_is_computed_in_single(self, curve):
        a, b = (200 * clip(1, seed=seed, h=64, w=64) for seed in (0, 1))  # squares overflow float16
        for kind in (torch.float16, torch.bfloat16):
            out = self.blend(a.to(kind), b.to(kind), curve)
            assert equal(out, self.blend(a.to(kind).float(), b.to(kind).float(), curve).to(kind)) and out.isfinite().all()


def test_positions_that_are_equal_do_not_brighten():
    a, b = clip(1), clip(1, seed=1)
    b[..., :3] = a[..., :3]
    for curve in ("lerp", "slerp per position"):
        out = blend(a, b, ENDS[2:3], curve)
        assert equal(out[..., :3], a[..., :3])
    out = blend(a, b, ENDS[2:3], "slerp per frame")
    mean = [x.mean((3, 4)) for x in (out, a, b)]
    torch.testing.assert_close(mean[0], (mean[1] + mean[2]) / 2)


def test_slerp_per_position_keeps_lengths():
    a, b = clip(5, 16, 2), 3 * clip(5, 16, 2, seed=1)
    u = ENDS.view(-1, 1, 1)
    expected = (1 - u) * a.norm(dim=1) + u * b.norm(dim=1)
    torch.testing.assert_close(blend(a, b, ENDS, "slerp per position").norm(dim=1), expected)


def test_slerp_turns_by_even_angles():
    a, b = torch.zeros(1, 4, 5, 1, 1), torch.zeros(1, 4, 5, 1, 1)
    a[:, 0], b[:, 1] = 1, 1
    out = blend(a, b, ENDS, "slerp per position")[0, :2, :, 0, 0]
    torch.testing.assert_close(torch.atan2(out[1], out[0]), ENDS * math.pi / 2)


def test_lerp_of_unlike_latents_loses_contrast_and_slerp_does_not():
    a, b = clip(1, 4, h=64, w=64), clip(1, 4, seed=1, h=64, w=64)
    half = ENDS[2:3]
    assert blend(a, b, half).std() == pytest.approx(0.71, abs=0.02)
    assert blend(a, b, half, "slerp per frame").std() == pytest.approx(1, abs=0.02)


def test_easings_begin_and_end_and_rise():
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    for name, ease in tools.EASINGS.items():
        eased = ease(u)
        assert eased[0] == 0 and eased[-1] == 1 and (eased.diff() >= 0).all(), name
    at = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert [tools.EASINGS[name](at).tolist() for name in ("in", "out", "in-out", "cubic", "hold")] == [
        [0.0625, 0.5625], [0.4375, 0.9375], [0.15625, 0.84375], [0.0625, 0.9375], [0, 0]]


class TestCatmullRom:
    def test_is_the_textbook_curve_where_nothing_overshoots(self):
        points, u = [0.0, 1.0, 3.0, 4.0], 0.3
        track = numbered(4)
        for k, value in enumerate(points):
            track = torch.where(torch.arange(4).view(1, 1, 4, 1, 1) == k, value, track)
        p0, p1, p2, p3 = points
        square, cube = 2 * p0 - 5 * p1 + 4 * p2 - p3, 3 * p1 - p0 - 3 * p2 + p3
        expected = 0.5 * (2 * p1 + (p2 - p0) * u + square * u**2 + cube * u**3)
        assert numbers(along(track, range(4), [1.3], "Catmull-Rom")) == pytest.approx([expected])

    def test_even_motion_stays_even_between_uneven_keyframes(self):
        track = torch.cat([numbered(1, k) for k in (0, 2, 3, 7)], dim=2)
        times = [k / 4 for k in range(29)]
        assert numbers(along(track, [0, 2, 3, 7], times, "Catmull-Rom")) == pytest.approx(times, abs=1e-6)

    def test_speed_does_not_jump_at_keyframes(self):
        track, e = clip(5).double(), 1e-3
        for closed in (None, 5):
            out = along(track.float(), range(5), [2 - e, 2, 2 + e], "Catmull-Rom", period=closed).double()
            torch.testing.assert_close(out[:, :, 1] - out[:, :, 0], out[:, :, 2] - out[:, :, 1], atol=3e-5, rtol=0)

    def test_never_leaves_the_range_of_its_two_keyframes(self):
        track, times = clip(6), [k / 10 for k in range(51)]
        out = along(track, range(6), times, "Catmull-Rom")
        for k, time in enumerate(times[:-1]):
            a, b = track[:, :, int(time)], track[:, :, int(time) + 1]
            assert (out[:, :, k] >= torch.minimum(a, b) - 1e-5).all() and (out[:, :, k] <= torch.maximum(a, b) + 1e-5).all()

    def test_what_two_keyframes_share_stays(self):
        track = clip(4)
        track[:, :, 2] = track[:, :, 1]
        out = along(track, range(4), [1.2, 1.5, 1.9], "Catmull-Rom")
        assert equal(out, track[:, :, 1:2].expand(-1, -1, 3, -1, -1))


# -- keyframes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("easing", EASINGS)
@pytest.mark.parametrize("curve", CURVES)
class TestInterpolate:
    def test_keyframes_stand_at_their_positions_once(self, curve, easing):
        keys, positions = [clip(1, seed=seed) for seed in range(4)], [0, 3, 4, 9]
        out = tools.interpolate(keys, positions, 10, curve, easing)
        assert out.shape == (1, 4, 10, 6, 5)
        for key, position in zip(keys, positions, strict=True):
            assert equal(out[:, :, position:position + 1], key)
        if easing != "hold":
            held = [k for k in range(9) if torch.equal(out[:, :, k], out[:, :, k + 1])]
            assert held == [], "a keyframe is shown twice"

    def test_a_loop_closes_without_a_duplicate(self, curve, easing):
        keys = [clip(1, seed=seed) for seed in range(3)]
        out = tools.interpolate(keys, [0, 3, 6], 8 + 1, curve, easing, period=8)
        assert equal(out[:, :, 8], out[:, :, 0])
        assert easing == "hold" or not any(torch.equal(out[:, :, k], out[:, :, k + 1]) for k in range(8))
        twice = tools.interpolate(keys, [0, 3, 6], 16, curve, easing, period=8)
        torch.testing.assert_close(twice[:, :, 8:], twice[:, :, :8])


class TestKeyframes:
    @pytest.mark.parametrize("channels, batch", [(4, 1), (16, 3)])
    def test_any_channels_and_batch(self, channels, batch):
        keys = [clip(1, channels, batch), clip(1, channels), clip(1, channels, batch, seed=2)]
        out = tools.interpolate(keys, [0, 2, 4], 5)
        assert out.shape == (batch, channels, 5, 6, 5)
        assert equal(out[:, :, 2], keys[1][:, :, 0].expand(batch, -1, -1, -1))
        torch.testing.assert_close(out[:, :, 1], (keys[0] + keys[1])[:, :, 0] / 2)

    def test_the_first_and_last_stay(self):
        assert numbers(tools.interpolate([numbered(1, 5), numbered(1, 7)], [2, 4], 7)) == [5, 5, 5, 6, 7, 7, 7]

    def test_one_keyframe_is_a_still(self):
        assert numbers(tools.interpolate([numbered(1, 5)], [0], 3)) == [5, 5, 5]

    def test_hold_jumps_at_the_next(self):
        assert numbers(tools.interpolate([numbered(1, 5), numbered(1, 7)], [0, 3], 5, easing="hold")) == [5, 5, 5, 7, 7]

    def test_a_loop_leads_back_from_the_last(self):
        out = tools.interpolate([numbered(1, 0), numbered(1, 4)], [0, 4], 9, period=8)
        assert numbers(out) == [0, 1, 2, 3, 4, 3, 2, 1, 0]
        shifted = tools.interpolate([numbered(1, 0), numbered(1, 4)], [2, 6], 8, period=8)
        assert numbers(shifted) == [2, 1, 0, 1, 2, 3, 4, 3]

    def test_half_precision_and_inputs_unchanged(self):
        keys = [clip(1, seed=seed).half() for seed in range(2)]
        before = [key.clone() for key in keys]
        out = tools.interpolate(keys, [0, 4], 5)
        assert equal(out[:, :, :1], keys[0]) and equal(out[:, :, 4:], keys[1])
        out.zero_()
        assert all(map(equal, keys, before))

    def test_clips_play_and_what_is_between_is_filled(self):
        out = tools.interpolate([numbered(3), numbered(2, 10)], [0, 5], 7)
        assert numbers(out) == [0, 1, 2, pytest.approx(2 + 8 / 3), pytest.approx(2 + 16 / 3), 10, 11]

    def test_clips_that_meet_cross_fade(self):
        out = tools.interpolate([numbered(6), numbered(6, 100)], [0, 4], 10)
        assert numbers(out) == [0, 1, 2, 3, 4, (5 + 101) / 2, 102, 103, 104, 105]
        assert equal(out, tools.join([numbered(6), numbered(6, 100)], overlap=2))
        three = tools.interpolate([numbered(4), numbered(4, 50), numbered(4, 90)], [0, 2, 4], 8)
        assert numbers(three)[:3] == [0, 1, 2] and numbers(three)[-2:] == [92, 93]

    def test_spread(self):
        assert tools.spread([1, 1, 1], 9) == [0, 4, 8]
        assert tools.spread([1, 1, 1], 9, loop=True) == [0, 3, 6]
        assert tools.spread([1, 1], 5) == [0, 4] and tools.spread([1], 5) == [0]
        assert tools.spread([4, 4], 8) == [0, 4] and tools.spread([4, 4], 6) == [0, 2]
        for count, length in itertools.product(range(2, 7), range(7, 20)):
            starts = tools.spread([1] * count, length)
            assert starts[0] == 0 and starts[-1] == length - 1
            assert max(b - a for a, b in itertools.pairwise(starts)) - min(b - a for a, b in itertools.pairwise(starts)) <= 1

    @pytest.mark.parametrize("message, arguments", [
        ("keyframe 2 has 16 channels and keyframe 1 has 4", ([clip(1), clip(1, 16)], [0, 1], 2)),
        ("keyframe 2 is 7 x 6 latents (56 x 48 pixels) and keyframe 1 is 5 x 6 (40 x 48 pixels)",
         ([clip(1), clip(1, w=7)], [0, 1], 2)),
        ("keyframe 1 holds 2 clips where another holds 3", ([clip(1, batch=2), clip(1, batch=3)], [0, 1], 2)),
        ("found shape [4, 6, 5]", ([clip(1)[0, :, 0]], [0], 2)),
        ("found nothing in them", ([clip(1)[:, :, :0]], [0], 2)),
        ("keyframe 2 begins at latent 3 and keyframe 1 at 3", ([clip(1), clip(1)], [3, 3], 5)),
        ("2 keyframes have 1 positions", ([clip(1), clip(1)], [3], 5)),
        ("expected 0 to 4", ([clip(1), clip(1)], [0, 5], 5)),
        ("expected 0 to 4", ([clip(1), clip(1)], [-1, 4], 5)),
        ("keyframe 2 ends at latent 3", ([clip(5), clip(2)], [0, 2], 6)),
        ("curve is 'bezier'", ([clip(1)], [0], 2, "bezier")),
        ("easing is 'bounce'", ([clip(1)], [0], 2, "lerp", "bounce")),
        ("the loop has 4", ([clip(1), clip(1)], [0, 4], 5, "lerp", "linear", 4)),
    ])
    def test_errors(self, message, arguments):
        with pytest.raises(LatentError) as error:
            tools.interpolate(*arguments)
        assert message in str(error.value)

    def test_too_many_keyframes_are_refused(self):
        with pytest.raises(LatentError, match="5 keyframes do not fit into 4 latents"):
            tools.spread([1] * 5, 4)


# -- time --------------------------------------------------------------------------------------------


class TestTime:
    def test_the_frame_map(self):
        assert [latent_of(frame) for frame in range(10)] == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3]
        assert all(latent_of(first_frame(k)) == k == latent_of(frames_of(k + 1) - 1) for k in range(40))

    def test_resample_keeps_both_ends_and_even_motion(self):
        latents = clip(5, 16, 2)
        for length, curve in itertools.product((2, 3, 5, 9, 12), CURVES):
            out = tools.resample(latents, length, curve)
            assert out.shape[2] == length
            assert equal(out[:, :, 0], latents[:, :, 0]) and equal(out[:, :, -1], latents[:, :, -1])
        assert equal(tools.resample(latents, 9)[:, :, ::2], latents) and equal(tools.resample(latents, 5), latents)
        assert numbers(tools.resample(numbered(5), 9)) == [k / 2 for k in range(9)]
        assert numbers(tools.resample(numbered(9), 3)) == [0, 4, 8] and numbers(tools.resample(numbered(9), 1)) == [0]
        assert numbers(tools.resample(numbered(1), 3)) == [0, 0, 0]

    def test_trim_and_reverse(self):
        assert numbers(tools.trim(numbered(5), 1, 4)) == [1, 2, 3]
        assert numbers(tools.reverse(numbered(3))) == [2, 1, 0]
        for start, stop in ((0, 6), (-1, 2), (2, 2), (3, 1)):
            with pytest.raises(LatentError, match="numbered 0 to 4"):
                tools.trim(numbered(5), start, stop)

    def test_join_leaves_out_the_one_frame_latents(self):
        assert numbers(tools.join([numbered(3), numbered(3, 10), numbered(2, 20)])) == [0, 1, 2, 11, 12, 21]
        assert numbers(tools.join([numbered(3), numbered(3, 10)], keep_first=True)) == [0, 1, 2, 10, 11, 12]
        assert numbers(tools.join([numbered(2), numbered(1, 10), numbered(2, 20)])) == [0, 1, 10, 21]
        assert numbers(tools.join([numbered(2)])) == [0, 1]

    def test_join_of_a_cut_clip_that_shares_a_frame_is_the_clip(self):
        latents = clip(9)
        assert equal(tools.join([latents[:, :, :5], latents[:, :, 4:]]), latents)

    def test_join_cross_fades_and_never_shows_the_one_frame_latent(self):
        fade = numbers(tools.join([numbered(5), numbered(5, 100)], overlap=4))
        assert fade == [0, 1, 0.75 * 2 + 0.25 * 101, 0.5 * 3 + 0.5 * 102, 0.25 * 4 + 0.75 * 103, 104]
        for curve in CURVES:
            others = [torch.cat([clip(1, seed=seed), clip(4, seed=9)], dim=2) for seed in (1, 2)]
            assert equal(*(tools.join([clip(5), other], 2, curve) for other in others))
        with pytest.raises(LatentError, match="cannot overlap by 5: expected at most 4"):
            tools.join([numbered(5), numbered(5)], overlap=5)

    def test_insert_and_replace(self):
        assert numbers(tools.insert(numbered(4), numbered(3, 10), 2)) == [0, 1, 11, 12, 2, 3]
        assert numbers(tools.insert(numbered(4), numbered(3, 10), 4)) == [0, 1, 2, 3, 11, 12]
        assert numbers(tools.insert(numbered(4), numbered(3, 10), 0)) == [10, 11, 12, 1, 2, 3]
        assert numbers(tools.insert(numbered(4), numbered(1, 10), 2)) == [0, 1, 10, 2, 3]
        assert numbers(tools.insert(numbered(2), numbered(2, 10), 1, keep_first=True)) == [0, 10, 11, 1]
        assert numbers(tools.replace(numbered(5), numbered(3, 10), 2)) == [0, 1, 11, 12, 4]
        assert numbers(tools.replace(numbered(5), numbered(3, 10), 0)) == [10, 11, 12, 3, 4]
        assert numbers(tools.replace(numbered(3), numbered(1, 10), 1)) == [0, 10, 2]
        with pytest.raises(LatentError, match="3 latents from number 2 on reach behind the end of a clip of 4"):
            tools.replace(numbered(4), numbered(4, 10), 2)
        with pytest.raises(LatentError, match="no latent number 5 here; expected 0 to 4"):
            tools.insert(numbered(4), numbered(1), 5)

    def test_there_and_back(self):
        assert numbers(tools.there_and_back(numbered(4))) == [0, 1, 2, 3, 2, 1, 0]
        assert numbers(tools.there_and_back(numbered(4), closed=False)) == [0, 1, 2, 3, 2, 1]
        assert latents_of(8 * (4 - 1)) == 7  # frames of the loop, its last left out

    def test_seamless(self):
        out = numbers(tools.seamless(numbered(9), 2))
        assert out == [2, 3, 4, 5, 6, 7, (8 + 1) / 2, 2]
        assert numbers(tools.seamless(numbered(9), 2, closed=False)) == out[:-1]
        for overlap in (0, 5):
            with pytest.raises(LatentError, match="expected 1 to 4"):
                tools.seamless(numbered(9), overlap)

    def test_nothing_is_written_into_or_shared(self):
        latents, other = clip(5), clip(3, seed=1)
        before = latents.clone(), other.clone()
        for out in (tools.trim(latents, 0, 5), tools.reverse(latents), tools.join([latents]),
                    tools.insert(latents, other, 1), tools.replace(latents, other, 0), tools.resample(latents, 5),
                    tools.there_and_back(latents), tools.seamless(latents, 1), tools.normalize(latents, other),
                    tools.interpolate([latents], [0], 5)):
            out.zero_()
        assert equal(latents, before[0]) and equal(other, before[1])


@pytest.fixture(scope="module")
def vae():
    return video_vae()


class TestThroughFrames:
    def decode(self, vae):
        return lambda latents: vae.decode(latents)

    def encode(self, vae):
        return lambda frames: vae.encode(frames).mode()

    def test_the_first_latent_of_a_cut_clip_stands_for_one_frame(self, vae):
        latents = vae.encode(video_clip(33, batch=2)).mode()
        first = tools.one_frame_latent(latents, 4, self.decode(vae), self.encode(vae))
        # Windows of 9 frames: the context of four latents is whole windows, so this is the whole clip's.
        frames = vae.decode(latents)[:, :, 16:]
        torch.testing.assert_close(first, vae.encode(frames).mode()[:, :, :1])
        assert tools.one_frame_latent(latents.half(), 0, self.decode(vae), self.encode(vae)).dtype == torch.float16

    def test_reencode_keeps_what_did_not_change(self, vae):
        frames, latents = video_clip(17), clip(5, h=2, w=2)
        out = tools.reencode(latents, frames, self.encode(vae), before=2, behind=1)
        assert equal(out[:, :, :2], latents[:, :, :2]) and equal(out[:, :, 4:], latents[:, :, 4:])
        torch.testing.assert_close(out[:, :, 2:4], vae.encode(frames[:, :, 4:13]).mode()[:, :, 1:])
        torch.testing.assert_close(tools.reencode(latents, frames, self.encode(vae)), vae.encode(frames).mode())
        assert equal(tools.reencode(latents, frames, self.encode(vae), before=5), latents)
        longer = tools.reencode(latents, video_clip(20), self.encode(vae), before=5)
        assert equal(longer[:, :, :5], latents) and longer.shape[2] == latents_of(20)


# -- layout, statistics ------------------------------------------------------------------------------


class TestLayout:
    def test_there_and_back(self):
        latents = clip(3, batch=2)
        batch = tools.to_batch(latents)
        assert equal(batch[4], latents[1, :, 1]) and equal(tools.to_clips(batch, 2), latents)
        assert tools.to_clips(batch).shape == (1, 4, 6, 6, 5)

    def test_errors(self):
        with pytest.raises(LatentError, match="6 latents cannot be 4 clips"):
            tools.to_clips(noise(6, 4, 2, 2), 4)
        with pytest.raises(LatentError, match=r"Expected latents \[t, C, h, w\]"):
            tools.to_clips(clip(2))
        with pytest.raises(LatentError, match="torch.int64"):
            tools.to_batch(torch.zeros(1, 4, 2, 2, 2, dtype=torch.int64))


class TestStatistics:
    def test_numbers(self):
        latents = clip(5, batch=2)
        latents[:, 1] = latents[:, 1] * 3 + 7
        found = tools.statistics(latents)
        values = latents.movedim(1, 0).flatten(1).double()
        torch.testing.assert_close(found.mean, values.mean(1))
        torch.testing.assert_close(found.std, values.std(1, correction=0))
        assert torch.equal(found.min, values.amin(1)) and torch.equal(found.max, values.amax(1))
        assert found.bad.sum() == 0 and found.count == 2 * 5 * 6 * 5

    def test_what_is_not_finite_is_counted_and_left_out(self):
        latents = clip(2).half()
        expected = tools.statistics(latents[..., 1:])
        latents[..., 0] = torch.tensor([torch.nan, torch.inf]).view(1, 1, 2, 1)
        found = tools.statistics(latents)
        torch.testing.assert_close(found.mean, expected.mean)
        torch.testing.assert_close(found.std, expected.std)
        assert torch.equal(found.max, expected.max) and found.bad.tolist() == [12] * 4
        latents[:, 2] = torch.nan
        found = tools.statistics(latents)
        assert found.mean.isnan().tolist() == [False, False, True, False] == found.min.isnan().tolist()
        assert "NaN or infinite" in found.remarks(None)[0]
        assert tools.plot(found).shape[2] == 3

    @pytest.mark.parametrize("channels", [4, 16])
    def test_distance_from_what_models_expect(self, channels):
        expected = tools.expected_distribution(channels)
        latents = expected.mean + expected.std * clip(9, channels, h=32, w=32)
        assert tools.statistics(latents).distance(expected).max() < 1e-3
        assert tools.statistics(latents).remarks(expected) == []
        away = tools.statistics(latents + expected.std).distance(expected)
        torch.testing.assert_close(away, torch.full_like(away, 0.5), atol=0.05, rtol=0)
        assert "another family" in tools.statistics(latents * 4).remarks(expected)[0]
        assert "multiplied by a model's factor" in tools.statistics(latents * 0.18215).remarks(expected)[0]
        assert "flat" in tools.statistics(latents * 0 + 1).remarks(expected)[0]
        picture = tools.plot(tools.statistics(latents), expected, "latents")
        assert picture.dtype.name == "uint8" and picture.ndim == 3 and picture.std() > 10

    def test_other_families_need_a_reference(self):
        with pytest.raises(LatentError, match="8 channels; expected 4 or 16"):
            tools.expected_distribution(8)


class TestNormalize:
    def moments(self, latents, dims=(2, 3, 4)):
        return latents.mean(dims), latents.std(dims, correction=0)

    def test_takes_the_reference_s_moments(self):
        latents, reference = clip(5, 16, 2), 3 * clip(7, 16, 2, seed=1, h=4, w=9) + 2
        before = reference.clone()
        out = tools.normalize(latents, reference)
        torch.testing.assert_close(self.moments(out), self.moments(reference))
        assert equal(reference, before), "the reference was written into"
        torch.testing.assert_close(tools.normalize(latents, latents), latents)

    def test_of_each_frame_takes_flashes_out(self):
        latents = clip(5)
        flashing = latents + 5 * (torch.arange(5) == 2).view(1, 1, 5, 1, 1)
        out = tools.normalize(flashing, latents[:, :, :1], per_frame=True)
        torch.testing.assert_close(out.mean((3, 4)), latents[:, :, :1].mean((3, 4)).expand(-1, -1, 5))
        reference = clip(5, seed=3)
        out = tools.normalize(latents, reference, per_frame=True)
        torch.testing.assert_close(self.moments(out, (3, 4)), self.moments(reference, (3, 4)))

    def test_a_fade_stays_a_fade_over_the_clip(self):
        latents = clip(5) * torch.linspace(1, 0, 5).view(1, 1, 5, 1, 1)
        out = tools.normalize(latents, clip(3, seed=1))
        assert out[:, :, 0].std() > 2 * out[:, :, 3].std()

    def test_flat_channels_only_move(self):
        latents = clip(3)
        latents[:, 1] = 4.2
        out = tools.normalize(latents, clip(3, seed=1) + 1)
        assert out.isfinite().all() and out[:, 1].std() < 1e-5
        torch.testing.assert_close(tools.normalize(0 * latents, 0 * latents), 0 * latents)

    def test_strength_type_and_distribution(self):
        latents, reference = clip(3).half(), clip(3, seed=1).half() + 1
        assert equal(tools.normalize(latents, reference, strength=0.0), latents)
        assert tools.normalize(latents, reference).dtype == torch.float16
        out = tools.normalize(clip(3), tools.expected_distribution(4))
        torch.testing.assert_close(self.moments(out)[1], torch.full((1, 4), 1 / 0.18215))

    @pytest.mark.parametrize("message, reference, per_frame", [
        ("16 channels and the latents have 4", clip(3, 16), False),
        ("2 clips and the latents have 1", clip(3, batch=2), False),
        ("5 latents and the latents have 3", clip(5), True),
    ])
    def test_errors(self, message, reference, per_frame):
        with pytest.raises(LatentError, match=message):
            tools.normalize(clip(3), reference, per_frame)
