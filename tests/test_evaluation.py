"""Scores are what they are called, and pictures show what they should."""

import csv
import json
import math

import drawn
import numpy as np
import pytest
import torch
from PIL import Image
from random_weights import noise

import cvvae
from cvvae import metrics
from cvvae.training import pictures
from cvvae.training.evaluation import EXACT, SCORES, evaluate_clip, mean_scores
from cvvae.video import to_clip


def clip(frames: int = 17, seed: int = 0) -> torch.Tensor:
    return to_clip(drawn.frames(frames, 32, 40, seed))


@pytest.fixture(scope="module")
def models():
    """A video VAE that is its image VAE, held: not trained yet."""
    image_vae = drawn.small_image_vae()
    return cvvae.inflate(image_vae), image_vae


@pytest.fixture(scope="module")
def evaluation():
    """The built-in models on a moving clip."""
    return evaluate_clip(cvvae.load("tiny"), cvvae.load_image_vae("tiny"), clip())


class TestScores:
    def test_a_still_clip_through_an_inflated_model_is_the_image_vae_everywhere(self, models):
        still = clip(1).expand(-1, -1, 9, -1, -1)
        scores = evaluate_clip(*models, still).scores
        for name in ("psnr", "compatibility_psnr", "stills_psnr", "psnr_frame_0", "psnr_position_3"):
            assert scores[name] == pytest.approx(scores["image_vae_psnr"], abs=1e-3), name
        assert scores["ssim"] == pytest.approx(scores["image_vae_ssim"], abs=1e-4)
        assert scores["latent_mean_gap"] < 1e-4 and scores["latent_std_gap"] < 1e-4

    def test_are_those_of_the_definitions_step_by_step(self, evaluation):
        vae, image_vae, source = cvvae.load("tiny"), cvvae.load_image_vae("tiny"), clip()
        frames = source[0].transpose(0, 1)
        latents = vae.encode(source).mode()
        decoded = image_vae.decode(latents[0].transpose(0, 1))
        of_frame = [0] + [k for k in range(1, 5) for _ in range(4)]
        image_latents = image_vae.encode(frames).mode()
        stills = vae.decode(image_latents.transpose(0, 1)[None], mode="image")
        expected = {"psnr": metrics.psnr(vae.reconstruct(source), source),
                    "image_vae_psnr": metrics.psnr(image_vae.decode(image_latents), frames),
                    "compatibility_psnr": metrics.psnr(decoded[of_frame], frames),
                    "stills_psnr": metrics.psnr(stills, source)}
        assert {name: evaluation.scores[name] for name in expected} == pytest.approx(expected, abs=1e-4)

    def test_all_are_known_finite_and_ready_for_json(self, evaluation):
        assert set(evaluation.scores) <= set(SCORES)
        assert set(SCORES) - set(evaluation.scores) == {"lpips", "seam_ratio"}  # no network given, and one window only
        json.dumps([evaluation.scores, evaluation.channels], allow_nan=False)
        assert {len(values) for values in evaluation.channels.values()} == {4}

    def test_positions_average_to_the_whole(self, evaluation):
        def error(name: str) -> float:
            return 10 ** (-evaluation.scores[name] / 10)

        whole = (error("psnr_frame_0") + 4 * sum(error(f"psnr_position_{k}") for k in range(1, 5))) / 17
        assert -10 * math.log10(whole) == pytest.approx(evaluation.scores["psnr"], abs=1e-3)

    def test_a_clip_that_ends_within_a_group_and_a_block(self, models):
        odd = clip(7)[..., :27, :33]
        found = evaluate_clip(*models, odd)
        assert {picture.shape for picture in found.pictures.values()} == {odd.shape}
        assert found.scores["compatibility_psnr"] > 0 and "psnr_position_4" in found.scores

    def test_one_frame_has_no_positions(self, models):
        scores = evaluate_clip(*models, clip(1)).scores
        assert "psnr_frame_0" in scores and not any("position" in name or "seam" in name for name in scores)

    def test_without_a_teacher_only_what_needs_none(self, models):
        found = evaluate_clip(models[0], None, clip(5))
        assert list(found.pictures) == ["source", "video VAE"] and set(found.channels) == {"mean", "std"}
        assert not any("image" in name or "compat" in name or "latent" in name for name in found.scores)

    def test_an_image_vae_is_scored_frame_by_frame(self, models):
        found = evaluate_clip(models[1], None, clip(5))
        assert list(found.scores) == ["psnr", "ssim"] and list(found.pictures) == ["source", "image VAE"]

    def test_lpips_is_the_mean_over_frames(self, models):
        batches = []

        def distance(a, b):
            batches.append(len(a))
            assert a.shape[1:] == b.shape[1:] == (3, 32, 40) and a.abs().max() <= 1
            return (a - b).abs().mean()

        source = clip(9)
        found = evaluate_clip(models[0], None, source, distance)
        expected = (found.pictures["video VAE"].clamp(-1, 1) - source).abs().mean().item()
        assert found.scores["lpips"] == pytest.approx(expected, rel=1e-5) and batches == [8, 1]

    def test_frames_too_small_for_ssim_go_without(self, models):
        assert "ssim" not in evaluate_clip(*models, clip(5)[..., :8, :8]).scores

    def test_an_exact_result_has_a_number(self, models, monkeypatch):
        source = clip(5)
        monkeypatch.setattr(models[0], "decode", lambda *_, **__: source)
        assert evaluate_clip(models[0], None, source).scores["psnr"] == EXACT

    def test_a_broken_model_is_said_to_be(self, models, monkeypatch):
        monkeypatch.setattr(models[0], "decode", lambda *_, **__: clip(5) * math.nan)
        with pytest.raises(FloatingPointError, match="not finite"):
            evaluate_clip(models[0], None, clip(5))

    def test_another_latent_space_is_refused(self, models):
        other = cvvae.ImageVAE(cvvae.Config("image", 16, (8, 8, 8, 8), 1, norm_groups=4))
        with pytest.raises(ValueError, match="16 latent channels"):
            evaluate_clip(models[0], other, clip(5))

    def test_means_are_over_the_clips_that_have_the_score(self):
        assert mean_scores([{"a": 1.0, "b": 5.0}, {"a": 3.0}]) == {"a": 2.0, "b": 5.0}
        assert mean_scores([]) == {}


class TestMeasures:
    def test_colour_shift_is_the_offset(self):
        source = clip(5) * 0.5
        offset = torch.tensor([3.0, -6.0, 0.0])[:, None, None, None] / 127.5
        assert metrics.colour_shift(source + offset, source) == pytest.approx(3, abs=1e-3)
        assert metrics.colour_shift(source, source) == 0

    def test_a_seam_raises_the_ratio_and_only_at_the_border(self):
        source = clip(33)
        found = source + 0.02 * noise(*source.shape)
        assert metrics.seam_ratio(found, source) == pytest.approx(1, abs=0.1)
        for first, seen in ((17, True), (16, False), (18, False)):
            shifted = found.clone()
            shifted[:, :, first:] += 0.2
            assert (metrics.seam_ratio(shifted, source) > 5) == seen
        assert math.isnan(metrics.seam_ratio(found[:, :, :17], source[:, :, :17]))
        assert metrics.window_borders(17) == [16] and metrics.window_borders(40) == [16, 32]

    def test_it_is_scored_where_a_clip_has_two_windows(self, models):
        assert evaluate_clip(models[0], None, clip(18)).scores["seam_ratio"] > 0

    def test_frame_errors_average_to_the_clips(self):
        a, b = clip(7), clip(7, seed=1)
        assert metrics.frame_mse(a, b).mean().item() == pytest.approx(metrics.mse(a, b), rel=1e-5)

    def test_held_repeats_a_latent_for_its_frames(self):
        assert metrics.held(torch.arange(3)[:, None], 9)[:, 0].tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2]
        assert metrics.held(torch.arange(3)[:, None], 6)[:, 0].tolist() == [0, 1, 1, 1, 1, 2]

    def test_latent_gaps_are_the_planted_ones(self, models, monkeypatch):
        """Latents of the image VAE, doubled around a mean that moves by half a deviation."""
        vae, image_vae = models
        still = clip(1).expand(-1, -1, 5, -1, -1)
        latents = image_vae.encode(still[0].transpose(0, 1)[:2]).mode()
        mean, deviation = (part[:, None, None] for part in metrics.channel_statistics(latents))
        moved = ((latents - mean) * 2 + mean + 0.5 * deviation).transpose(0, 1)[None]

        class Moved:
            def mode(self):
                return moved

        monkeypatch.setattr(vae, "encode", lambda _: Moved())
        scores = evaluate_clip(vae, image_vae, still).scores
        assert scores["latent_mean_gap"] == pytest.approx(0.5, abs=1e-3)
        assert scores["latent_std_gap"] == pytest.approx(1, abs=1e-3)


class TestClipPictures:
    def test_side_by_side_holds_every_pixel_and_is_even(self):
        columns = {name: clip(5, seed)[..., :31, :] for seed, name in enumerate(("source", "image VAE", "video VAE"))}
        frames = list(pictures.side_by_side(columns))
        assert len(frames) == 5 and {frame.shape for frame in frames} == {frames[0].shape}
        height, width, _ = frames[0].shape
        assert height % 2 == width % 2 == 0 and height >= 31 + pictures.FONT and width >= 3 * 40
        for t, frame in enumerate(frames):
            for picture in columns.values():
                shown = ((picture[0, :, t] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
                assert _holds(frame, shown)

    def test_captions_are_there_and_apart(self):
        frame = next(pictures.side_by_side({"source": clip(1), "image decoder": clip(1)}))
        written = (frame[:20] != frame[0, 0]).any((0, 2))
        gap = frame.shape[1] // 2
        assert written[:gap].any() and written[gap:].any() and not written[gap - 2:gap + 2].any()

    def test_clips_of_different_shape_are_refused(self):
        with pytest.raises(ValueError, match="one shape"):
            next(pictures.side_by_side({"source": clip(5), "video VAE": clip(6)}))

    def test_a_contact_sheet_has_a_row_for_each_picture_and_the_last_frame(self):
        shown = {"source": torch.full((1, 3, 9, 64, 64), -0.5), "video VAE": torch.zeros(1, 3, 9, 64, 64)}
        shown["source"][:, :, 8] = 1.0
        sheet = pictures.contact_sheet([("a.mp4", shown), ("b.mp4", shown)], columns=4)
        assert _count(sheet, 255) == 2 * 64 * 64  # the last frame, once for each clip
        assert _count(sheet, 128) == 2 * 4 * 64 * 64

    def test_frames_are_scaled_to_be_seen(self):
        for side, shown in ((16, 64), (128, 128), (512, 256)):
            sheet = pictures.contact_sheet([("a", {"source": torch.full((1, 3, 1, side, side), 1.0)})])
            assert _count(sheet, 255) == shown * shown

    def test_pngs_are_whole_or_not_there(self, tmp_path):
        pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
        pictures.save_png(tmp_path / "a.png", pixels)
        assert np.array_equal(np.array(Image.open(tmp_path / "a.png")), pixels)
        with pytest.raises(TypeError):
            pictures.save_png(tmp_path / "b.png", pixels.astype(np.complex64))
        assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


class TestPlots:
    colour = pictures.COLOURS[0]

    def test_a_curve_is_drawn_where_it_is(self):
        steps = list(range(11))
        plot = pictures.plot({"loss": (steps, steps)})
        assert plot.shape == (520, 900, 3) and plot.dtype == np.uint8
        rows, columns = np.nonzero((plot[60:] == self.colour).all(-1))
        assert np.corrcoef(columns, -rows)[0, 1] > 0.999  # a rising straight line
        assert np.ptp(columns) > 780 and np.ptp(rows) > 380
        other = pictures.plot({"loss": (steps, steps[::-1])})
        assert (plot != other).any()

    def test_each_curve_has_its_colour(self):
        plot = pictures.plot({f"loss {k}": ([0, 1], [k, k]) for k in range(6)})
        assert all((plot == colour).all(-1).sum() > 500 for colour in pictures.COLOURS[:6])

    @pytest.mark.parametrize("log", [False, True])
    @pytest.mark.parametrize("xs, ys, drawn", [
        ([], [], False),
        ([3], [2.0], True),
        ([0, 1, 2], [5.0, 5.0, 5.0], True),
        ([0, 1, 2], [1e-12, 1e-12, 1e-12], True),
        ([0, 1, 2, 3], [1.0, math.nan, math.inf, 2.0], True),
        ([0, 1], [math.nan, -math.inf], False),
        ([0, 10**7], [1e-30, 1e30], True),
    ])
    def test_degenerate_curves(self, xs, ys, drawn, log):
        with np.errstate(all="raise"):
            plot = pictures.plot({"loss": (xs, ys)}, "title", "dB", log)
        assert (plot[90:] == self.colour).all(-1).any() == drawn

    def test_no_curve_at_all(self):
        assert pictures.plot({}).shape == (520, 900, 3)

    def test_what_has_no_logarithm_breaks_a_curve(self):
        whole = pictures.plot({"loss": ([0, 1, 2, 3, 4], [1.0, 1.0, 1.0, 1.0, 1.0])}, log=True)
        broken = pictures.plot({"loss": ([0, 1, 2, 3, 4], [1.0, 1.0, -1.0, 1.0, 1.0])}, log=True)
        painted = [(plot[90:] == self.colour).all(-1).sum() for plot in (whole, broken)]
        assert 0.4 < painted[1] / painted[0] < 0.6

    @pytest.mark.parametrize("low, high, expected", [
        (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]), (0, 50000, ["0k", "10k", "20k", "30k", "40k", "50k"]),
        (24.1, 27.9, ["25", "26", "27"]), (0.0123, 0.0131, ["0.0124", "0.0126", "0.0128", "0.0130"])])
    def test_ticks_are_round_numbers(self, low, high, expected):
        assert [text for _, text in pictures._ticks(low, high, 5)] == expected

    def test_logarithmic_ticks(self):
        def ticks(low: float, high: float) -> str:
            return " ".join(text for _, text in pictures._log_ticks(math.log10(low), math.log10(high)))

        assert ticks(0.0009, 1.1) == "0.001 0.01 0.1 1" and ticks(0.09, 1.1) == "0.1 0.2 0.5 1"
        assert ticks(0.97, 1.05) == "0.98 1.00 1.02 1.04"


class TestLossPlot:
    def write(self, path, rows):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return path

    def log(self, folder, count):
        rng = np.random.default_rng(0)
        return self.write(folder / "losses.csv", [
            {"step": step, "total": math.exp(-step / 100 + 0.3 * rng.normal()), "perceptual": 0.2 if step % 2 else "",
             "generator": "" if step < 50 else rng.normal(), "gradient_norm": "nan", "learning_rate": 1e-4, "frames": 17}
            for step in range(1, count + 1)])

    def test_panels_for_positive_and_signed_losses_and_validation(self, tmp_path):
        losses = self.log(tmp_path, 200)
        assert pictures.loss_plot(losses).shape == (2 * 520, 900, 3)
        scores = self.write(tmp_path / "validation.csv", [{"step": step, "psnr": 20 + step / 50, "ssim": 0.8,
                                                           "compatibility_psnr": 19} for step in (0, 100, 200)])
        plot = pictures.loss_plot(losses, scores)
        assert plot.shape == (3 * 520, 900, 3)
        assert (plot[-520 + 90:] == pictures.COLOURS[1]).all(-1).sum() > 500

    def test_a_run_that_has_just_begun(self, tmp_path):
        (tmp_path / "losses.csv").write_text("step,total,kl\n")
        assert pictures.loss_plot(tmp_path / "losses.csv", tmp_path / "validation.csv").shape == (520, 900, 3)
        assert pictures.loss_plot(self.log(tmp_path, 1)).shape == (520, 900, 3)

    def test_smoothing_is_the_mean_around_and_passes_over_what_is_not_finite(self):
        assert pictures._running_mean([1.0, 2.0, 3.0]) == [1, 2, 3]
        values = [0.0, 2.0] * 200
        assert np.ptp(pictures._running_mean(values)[20:-20]) < 0.2
        values[7] = math.nan
        assert np.isfinite(pictures._running_mean(values)).all()
        assert math.isnan(pictures._running_mean([math.nan])[0])


def _count(sheet: np.ndarray, level: int) -> int:
    return (sheet == level).all(-1).sum()


def _holds(frame: np.ndarray, part: np.ndarray) -> bool:
    height, width, _ = part.shape
    windows = np.lib.stride_tricks.sliding_window_view(frame, part.shape)[:, :, 0]
    return any(np.array_equal(windows[y, x], part) for y, x in np.argwhere((frame[:-height + 1 or None, :-width + 1 or None]
                                                                            == part[0, 0]).all(-1)))
