"""Image VAEs of every layout, and the video VAEs that start as them."""

import pytest
import torch
import torch.nn.functional as F
from compare import distance
from image_oracle import LAYOUTS, ImageOracle, image_state
from random_weights import noise, video_clip, video_vae
from torch import Tensor, nn

import cvvae
from cvvae.checkpoint import read_metadata

every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
# Where the layout makes no difference: one with four channels and quant convs, one with sixteen and none.
both_families = pytest.mark.parametrize("layout", [LAYOUTS["sdxl"], LAYOUTS["flux"]], ids=["sdxl", "flux"])


def image_vae(layout) -> cvvae.ImageVAE:
    return cvvae.load_image_vae(image_state(layout))


def frame(x: Tensor, index: int) -> Tensor:
    """[B, C, T, H, W] -> [B, C, H, W]"""
    return x[:, :, index]


def normalise_per_frame(vae: cvvae.VideoVAE) -> None:
    """Remove what couples the frames of an untrained model: group norms take each frame's own statistics."""

    class PerFrameNorm(nn.Module):
        def __init__(self, norm: nn.GroupNorm):
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            if x.ndim == 4:
                return self.norm(x)
            return torch.stack([self.norm(frame(x, k)) for k in range(x.shape[2])], dim=2)

    for parent in list(vae.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(parent, name, PerFrameNorm(child))


class TestImageVAE:
    """load_image_vae against the layers written out, quant convs unfolded."""

    @every_layout
    def test_encode(self, layout):
        frames = video_clip(2, 24, 40)[0].transpose(0, 1)
        posterior = image_vae(layout).encode(frames)
        mean, logvar = ImageOracle(image_state(layout), layout).encode(frames)
        assert distance(posterior.mean, mean) < 1e-4
        assert distance(posterior.logvar, logvar) < 1e-4

    @every_layout
    def test_decode(self, layout):
        latents = noise(2, layout.latent_channels, 3, 5)
        expected = ImageOracle(image_state(layout), layout).decode(latents)
        assert distance(image_vae(layout).decode(latents), expected) < 1e-4

    @every_layout
    def test_decode_is_right_at_the_border(self, layout):
        """A folded post_quant_conv must not put its bias into the zeros beyond the border."""
        latents = noise(1, layout.latent_channels, 2, 2)
        found = image_vae(layout).decode(latents)
        expected = ImageOracle(image_state(layout), layout).decode(latents)
        for border in (slice(0, 1), slice(-1, None)):
            assert distance(found[..., border], expected[..., border]) < 1e-4
            assert distance(found[..., border, :], expected[..., border, :]) < 1e-4

    @pytest.mark.parametrize("name", ["post_quant_conv.bias", "decoder.mid.attn_1.proj_out.bias"])
    def test_biases_of_the_test_weights_matter(self, name):
        """The comparisons above can fail: leaving out a bias shows."""
        layout = LAYOUTS["sd"]
        oracle, latents = ImageOracle(image_state(layout), layout), noise(1, 4, 2, 2)
        expected = oracle.decode(latents)
        oracle.state[name].zero_()
        assert distance(oracle.decode(latents), expected) > 0.01

    def test_many_frames_equal_each_one(self):
        vae = image_vae(LAYOUTS["sd"])
        frames = noise(vae.BATCH + 2, 3, 16, 16)
        mean = vae.encode(frames).mean
        assert distance(mean, torch.cat([vae.encode(one).mean for one in frames.split(1)])) < 1e-4
        assert distance(vae.decode(mean), torch.cat([vae.decode(one) for one in mean.split(1)])) < 1e-4

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        vae = cvvae.load_image_vae(image_state(LAYOUTS["sdxl"]), dtype)
        mean = vae.encode(noise(1, 3, 16, 16)).mean
        assert mean.dtype == vae.decode(mean.float()).dtype == dtype

    def test_names_under_a_prefix_and_other_parts(self):
        state = image_state(LAYOUTS["sd"]) | {"model.diffusion_model.out.2.weight": torch.zeros(1)}
        assert cvvae.load_image_vae(state).config == cvvae.Config("image", 4, (32, 32, 64, 64), 2)


class TestOneFrame:
    @every_layout
    def test_encode_equals_the_image_vae(self, layout):
        teacher = image_vae(layout)
        vae, clip = cvvae.inflate(teacher), video_clip(1, 24, 17)
        found, expected = vae.encode(clip), teacher.encode(frame(clip, 0))
        assert distance(frame(found.mean, 0), expected.mean) < 1e-4
        assert distance(frame(found.logvar, 0), expected.logvar) < 1e-4

    @every_layout
    def test_decode_equals_the_image_vae(self, layout):
        teacher = image_vae(layout)
        latents = noise(1, layout.latent_channels, 1, 3, 2)
        found = cvvae.inflate(teacher).decode(latents)
        assert distance(frame(found, 0), teacher.decode(frame(latents, 0))) < 1e-4

    @both_families
    def test_image_mode_equals_the_image_vae(self, layout):
        teacher = image_vae(layout)
        vae, clip = cvvae.inflate(teacher), video_clip(3)
        latents = vae.encode(clip, mode="image").mean
        decoded = vae.decode(latents, mode="image")
        for k in range(3):
            assert distance(frame(latents, k), teacher.encode(frame(clip, k)).mean) < 1e-4
            assert distance(frame(decoded, k), teacher.decode(frame(latents, k))) < 1e-4


class TestStillClip:
    @every_layout
    def test_decodes_to_identical_frames(self, layout):
        teacher = image_vae(layout)
        vae, still = cvvae.inflate(teacher), video_clip(1, 16, 24).repeat(1, 1, 9, 1, 1)
        latents = vae.encode(still).mean
        decoded = vae.decode(latents)
        expected_latent = teacher.encode(frame(still, 0)).mean
        expected = teacher.decode(expected_latent)
        assert latents.shape[2] == 3 and decoded.shape[2] == 9
        for k in range(3):
            assert distance(frame(latents, k), expected_latent) < 1e-4
        for k in range(9):
            assert distance(frame(decoded, k), frame(decoded, 0)) < 1e-4
            assert distance(frame(decoded, k), expected) < 1e-4

    def test_stands_still_after_training_too(self):
        """Repeated frames pad the ends of a clip, so kernels that have learnt to look around find no end."""
        vae, still = video_vae("inflated"), video_clip(1).repeat(1, 1, 9, 1, 1)
        for level in (3, 1):  # but an up-sampler may give its two frames different content
            for parameter in vae.decoder.up[level].upsample.conv.parameters():
                half = parameter.shape[0] // 2
                parameter.data[half:] = parameter.data[:half]
        latents = vae.encode(still).mean
        decoded = vae.decode(latents)
        assert all(distance(frame(latents, k), frame(latents, 0)) < 1e-4 for k in range(3))
        assert all(distance(frame(decoded, k), frame(decoded, 0)) < 1e-4 for k in range(9))


class TestMovingClip:
    """Without the group norms' coupling, the untrained model samples and holds frames."""

    @both_families
    def test_latent_k_is_the_image_latent_of_frame_4k(self, layout):
        teacher = image_vae(layout)
        vae, clip = cvvae.inflate(teacher), video_clip(21)
        normalise_per_frame(vae)
        posterior = vae.encode(clip)
        for k in range(6):
            expected = teacher.encode(frame(clip, 4 * k))
            assert distance(frame(posterior.mean, k), expected.mean) < 1e-4
            assert distance(frame(posterior.logvar, k), expected.logvar) < 1e-4

    @both_families
    def test_the_decoder_holds_each_latent_for_its_frames(self, layout):
        teacher = image_vae(layout)
        vae, latents = cvvae.inflate(teacher), noise(1, layout.latent_channels, 6, 2, 2)
        normalise_per_frame(vae)
        decoded = vae.decode(latents)
        for k in range(21):
            assert distance(frame(decoded, k), teacher.decode(frame(latents, (k + 3) // 4))) < 1e-4

    def test_group_norms_do_couple_the_frames(self):
        """The two tests above mean something: as it is, a latent depends on the rest of its window."""
        teacher = image_vae(LAYOUTS["sd"])
        vae, clip = cvvae.inflate(teacher), video_clip(9)
        assert distance(frame(vae.encode(clip).mean, 0), teacher.encode(frame(clip, 0)).mean) > 1e-3


class TestTemporalAttention:
    def test_is_silent_at_the_start(self):
        vae, latents = cvvae.inflate(image_vae(LAYOUTS["sd"])), noise(1, 4, 3, 2, 2)
        attention = vae.decoder.mid.attn_1
        before = vae.decode(latents)
        for layer in (attention.q_t, attention.k_t, attention.v_t, attention.proj_out_t):
            nn.init.normal_(layer.weight)
        assert torch.equal(vae.decode(latents), before)

    def test_speaks_when_the_gate_opens(self):
        vae, latents = cvvae.inflate(image_vae(LAYOUTS["sd"])), noise(1, 4, 3, 2, 2)
        before = vae.decode(latents)
        nn.init.ones_(vae.decoder.mid.attn_1.gamma_t)
        assert distance(vae.decode(latents), before) > 1e-2

    def test_the_gate_receives_gradient(self):
        vae = cvvae.inflate(image_vae(LAYOUTS["sd"]))
        gate = vae.decoder.mid.attn_1.gamma_t
        assert not gate.any()
        vae.decoder(noise(1, 4, 3, 2, 2)).square().sum().backward()
        assert gate.grad.abs().min() > 0


class TestResult:
    @both_families
    def test_round_trip_through_a_file(self, layout, tmp_path):
        vae = cvvae.inflate(image_vae(layout))
        cvvae.save(vae, tmp_path / "inflated.safetensors")
        loaded = cvvae.load(tmp_path / "inflated.safetensors")
        assert loaded.config == vae.config
        clip = video_clip(5)
        latents = vae.encode(clip).mean
        assert torch.equal(loaded.encode(clip).mean, latents)
        assert torch.equal(loaded.decode(latents), vae.decode(latents))

    @both_families
    def test_the_zero_border_is_on_record(self, layout, tmp_path):
        vae = cvvae.inflate(image_vae(layout))
        assert vae.config.variant == "inflated"
        assert vae.config.latent_channels == layout.latent_channels
        assert vae.config.describe()["conventions"]["space_padding"] == "zeros"
        cvvae.save(vae, tmp_path / "inflated.safetensors")
        assert read_metadata(tmp_path / "inflated.safetensors")["config"]["conventions"]["space_padding"] == "zeros"

    def test_only_the_present_frame_has_weight(self):
        vae = cvvae.inflate(image_vae(LAYOUTS["sd"]))
        for name, parameter in vae.named_parameters():
            if parameter.ndim == 5 and parameter.shape[2] == 3:
                present = 2 if name.startswith("encoder.") else 1
                assert parameter[:, :, present].any(), name
                assert not parameter[:, :, [tap for tap in range(3) if tap != present]].any(), name

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_keeps_the_dtype(self, dtype):
        vae = cvvae.inflate(cvvae.load_image_vae(image_state(LAYOUTS["sd"]), dtype))
        assert {parameter.dtype for parameter in vae.parameters()} == {dtype}

    def test_leaves_the_image_vae_alone(self):
        teacher = image_vae(LAYOUTS["sd"])
        vae = cvvae.inflate(teacher)
        with torch.no_grad():
            for parameter in vae.parameters():
                parameter.zero_()
        latents = noise(1, 4, 2, 2)
        assert torch.equal(teacher.decode(latents), image_vae(LAYOUTS["sd"]).decode(latents))

    @pytest.mark.parametrize("kind", ["inflated", "v1"])
    def test_refuses_a_video_vae(self, kind):
        with pytest.raises(TypeError, match="takes an image VAE .*found VideoVAE"):
            cvvae.inflate(video_vae(kind))

    def test_refuses_a_path(self):
        with pytest.raises(TypeError, match="found str"):
            cvvae.inflate("vae.safetensors")


class TestPosterior:
    def test_sampling_is_repeatable_and_spread_as_said(self):
        moments = torch.cat([torch.full((1, 4, 8, 16, 16), 3.0), torch.full((1, 4, 8, 16, 16), 2.0)], dim=1)
        posterior = cvvae.Posterior(moments)
        draw = posterior.sample(torch.Generator().manual_seed(1))
        assert torch.equal(draw, posterior.sample(torch.Generator().manual_seed(1)))
        assert not torch.equal(draw, posterior.sample(torch.Generator().manual_seed(2)))
        assert torch.equal(posterior.mode(), torch.full_like(draw, 3.0))
        assert abs(draw.mean() - 3) < 0.1
        assert abs(draw.std() - torch.tensor(1.0).exp()) < 0.1

    def test_kl(self):
        mean, logvar = noise(1, 4, 2, 3, 3), noise(1, 4, 2, 3, 3, seed=1)
        normal = torch.distributions.Normal
        expected = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0)).mean()
        assert torch.allclose(cvvae.Posterior(torch.cat([mean, logvar], dim=1)).kl(), expected)

    def test_half_precision_draws_the_same_noise(self):
        mean, logvar = noise(1, 4, 2, 3, 3), noise(1, 4, 2, 3, 3, seed=1)
        moments = torch.cat([mean, logvar], dim=1)
        full = cvvae.Posterior(moments).sample(torch.Generator().manual_seed(1))
        half = cvvae.Posterior(moments.half()).sample(torch.Generator().manual_seed(1))
        assert half.dtype == torch.float16
        assert F.l1_loss(half.float(), full) < 1e-2
