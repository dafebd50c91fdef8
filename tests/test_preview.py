"""The linear preview of latents: the least squares it claims to be, and worth looking at for clips it was not fitted to."""

import hashlib
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from random_weights import noise

import cvvae
from cvvae.checkpoint import BUILT_IN
from cvvae.latents import LatentError, LinearPreview, fit_preview, load_preview, save_preview
from cvvae.latents.preview import pairs_of, rows_of
from cvvae.video import read_frames, to_clip

MEDIA = Path(__file__).parents[1] / "workflows" / "media"
EIGHTH = 9.0  # dB above a picture in the mean colour: an eighth of its squared error


def some_map(channels=4):
    return LinearPreview(noise(3, channels, seed=5) / (2 * channels), torch.tensor([0.1, -0.2, 0.05]))


def shown_by(preview, latents):
    """A clip whose colours are exactly what ``preview`` makes of ``latents``, though no two of its frames are alike."""
    rgb = preview.pictures(latents, scale=1).movedim(2, 0)
    motion = 0.01 * torch.tensor([-3.0, -1.0, 1.0, 3.0])
    frames = [rgb[0], *(picture + shift for picture in rgb[1:] for shift in motion)]
    clip = torch.stack(frames, dim=2)
    texture = 0.02 * torch.tensor([1.0, -1.0]).repeat(4)
    return clip.repeat_interleave(8, 3).repeat_interleave(8, 4) + texture.repeat(latents.shape[-1])


class TestFit:
    @pytest.mark.parametrize("channels, batch", [(4, 1), (16, 2)])
    def test_finds_the_map_behind_a_clip(self, channels, batch):
        wanted, latents = some_map(channels), noise(batch, channels, 3, 5, 6) / 2
        found = fit_preview([(latents, shown_by(wanted, latents))])
        torch.testing.assert_close(found.weight, wanted.weight, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.bias, wanted.bias, atol=1e-5, rtol=0)
        assert found.score([(latents, shown_by(wanted, latents))])["r2"] > 0.9999

    def test_no_other_map_shows_them_better(self):
        latents, clip = noise(1, 4, 3, 5, 6), noise(1, 3, 9, 40, 48, seed=1) / 3
        best = fit_preview([(latents, clip)])
        least = best.score([(latents, clip)])["psnr"]
        for k in range(12):
            nudge = torch.zeros(3, 4)
            nudge.view(-1)[k] = 0.02
            assert LinearPreview(best.weight + nudge, best.bias).score([(latents, clip)])["psnr"] < least

    def test_independent_images(self):
        latents = noise(1, 4, 5, 3, 3)
        clip = some_map().pictures(latents, scale=1).repeat_interleave(8, 3).repeat_interleave(8, 4)
        torch.testing.assert_close(fit_preview([(latents, clip)], "image").weight, some_map().weight, atol=1e-5, rtol=0)

    def test_one_colour_is_that_colour(self):
        """Nothing tells the channels apart, and still there is an answer."""
        flat = torch.full((1, 3, 5, 16, 16), 0.25)
        found = fit_preview([(torch.ones(1, 4, 2, 2, 2), flat)])
        torch.testing.assert_close(found.pictures(torch.ones(1, 4, 1, 2, 2)), flat[:, :, :1])

    def test_odd_sizes_are_padded_as_the_encoder_pads(self):
        clip = noise(1, 3, 7, 20, 27)
        rows = rows_of(clip)
        assert rows.shape == (3 * 3 * 4, 3)
        corner = clip[0, :, [5, 6, 6, 6], 16:, 24:].mean(1)  # frames 5 to 8 of a clip that ends with frame 6
        height, width = torch.tensor([1, 1, 1, 5.0]), torch.tensor([1, 1, 6.0])
        torch.testing.assert_close(rows[-1], torch.einsum("chw,h,w->c", corner, height, width) / 64)

    def test_what_does_not_fit_is_explained(self):
        latents, clip = noise(1, 4, 3, 5, 6), noise(1, 3, 9, 40, 48)
        with pytest.raises(LatentError, match="nothing to fit"):
            fit_preview([])
        with pytest.raises(LatentError, match="are not of a clip of shape"):
            fit_preview([(latents, clip[:, :, :5])])
        with pytest.raises(LatentError, match="4 and 16 channels"):
            fit_preview([(latents, clip), (noise(1, 16, 3, 5, 6), clip)])
        with pytest.raises(LatentError, match="Expected a clip"):
            fit_preview([(latents, clip[0])])


class TestPictures:
    def test_every_clip_and_latent_by_itself(self):
        latents = noise(2, 4, 3, 5, 6)
        whole = some_map().pictures(latents)
        assert whole.shape == (2, 3, 3, 40, 48) and whole.abs().max() <= 1
        for b in range(2):
            for k in range(3):
                one = some_map().pictures(latents[b:b + 1, :, k:k + 1])
                torch.testing.assert_close(one[0, :, 0], whole[b, :, k])

    def test_types_and_scale(self):
        latents = noise(1, 4, 2, 5, 6)
        for kind in (torch.float16, torch.bfloat16):
            assert some_map().pictures(latents.to(kind), 3).dtype == torch.float32
        assert some_map().pictures(latents, 3).shape == (1, 3, 2, 15, 18)
        by_hand = (some_map().weight @ latents[0, :, 1, 2, 3] + some_map().bias).clamp(-1, 1)
        torch.testing.assert_close(some_map().pictures(latents, 1)[0, :, 1, 2, 3], by_hand)

    def test_what_cannot_be_shown_is_explained(self):
        latents = noise(1, 4, 3, 5, 6)
        latents[0, 2, 1, 0, :2] = torch.tensor([torch.nan, torch.inf])
        with pytest.raises(LatentError, match="2 of 360 values are NaN or infinite, the first of them in latent 1"):
            some_map().pictures(latents)
        with pytest.raises(LatentError, match="have 16 channels, and this preview is of a model with 4"):
            some_map().pictures(noise(1, 16, 3, 5, 6))


class TestFiles:
    def test_there_and_back(self, tmp_path):
        save_preview(LinearPreview(some_map().weight, some_map().bias, {"model": "mine"}), tmp_path / "mine.json")
        found = load_preview(tmp_path / "mine.json")
        torch.testing.assert_close(found.weight, some_map().weight, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.bias, some_map().bias, atol=1e-6, rtol=0)
        assert found.about == {"model": "mine"} and [path.name for path in tmp_path.iterdir()] == ["mine.json"]

    @pytest.mark.parametrize("text, message", [("no", "is no preview of latents"), ("{}", "is no preview"),
                                               (json.dumps({"weight": [[1]], "bias": [1]}), r"found \[1, 1\] and \[1\]")])
    def test_other_files_are_refused(self, tmp_path, text, message):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_preview(tmp_path / "x.json")


@pytest.fixture(scope="module")
def media():
    """Latents and frames of the example media; flower and goats were kept out of the model's training too."""
    vae, pairs = cvvae.load("tiny"), {}
    for name in load_preview().about["files"]:
        clip = to_clip([frame.pixels for frame in islice(read_frames(MEDIA / name), 9)])
        pairs[name] = vae.encode(clip).mode(), clip
    return pairs


def test_the_built_in_map_is_of_the_built_in_model_and_scores_what_it_says(media):
    preview = load_preview("tiny")
    assert preview.about["sha256"] == hashlib.sha256((BUILT_IN / "tiny.safetensors").read_bytes()).hexdigest(), \
        "the model changed; run benchmarks/preview.py"
    found = preview.score(media.values())
    for name, value in preview.about["fit"].items():
        assert abs(found[name] - value) < 0.02, f"{name}: {found[name]} instead of {value}"


@pytest.mark.parametrize("name", ["flower.mp4", "goats.mp4"])
def test_a_clip_it_was_not_fitted_to_is_recognised(media, name):
    found = fit_preview([pair for other, pair in media.items() if other != name]).score([media[name]])
    assert found["psnr"] > found["baseline"] + EIGHTH, found


def test_variants_hold_more_colours():
    clip = noise(1, 3, 1, 8, 8).clamp(-1, 1)
    same, darker, lighter = (latents for latents, variant in pairs_of(lambda variant: variant, [clip]))
    assert torch.equal(same, clip) and darker.max() <= 0 <= lighter.min()
    torch.testing.assert_close(darker.std(), clip.std() / 2)
