"""The objective: each term against its definition, and what has a gradient for what."""

import drawn
import pytest
import torch
import torch.nn.functional as F
from kornia.metrics import ssim

import cvvae
from cvvae.posterior import Posterior
from cvvae.training import perceptual
from cvvae.training.adversarial import PatchDiscriminator
from cvvae.training.config import ConfigError, LossConfig
from cvvae.training.objective import Objective, outliers, statistics_gap

GAN = {"gan_channels": 8, "gan_layers": 3}


def make(train="all", student=None, **loss):
    teacher = drawn.small_image_vae()
    return Objective(student or cvvae.inflate(teacher), teacher, LossConfig(**loss), train)


def clip(batch=1, frames=5, seed=0):
    return torch.rand(batch, 3, frames, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def gradients(objective, loss, prefix):
    named = [(name, parameter) for name, parameter in objective.named_parameters()
             if name.startswith(prefix) and parameter.requires_grad]
    found = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True, retain_graph=True)
    return {name: gradient for (name, _), gradient in zip(named, found, strict=True)}


def largest(found):
    return max((gradient.abs().max().item() for gradient in found.values() if gradient is not None), default=0.0)


class TestTerms:
    def test_the_total_is_the_weighted_sum(self):
        losses = make(kl=0.1, decoder_weight=2.0, encoder_weight=3.0, regularizer="both")(clip(), [0], 0)
        expected = (losses["reconstruction"] + 0.1 * losses["kl"] + 2 * losses["decoder_regularizer"]
                    + 3 * losses["encoder_regularizer"])
        assert torch.allclose(losses["total"], expected)

    def test_weights_follow_their_schedule(self):
        objective = make(kl=[[0.0, 0.0], [10.0, 1.0]], regularizer="none")
        for step, weight in ((0, 0.0), (5, 0.5), (20, 1.0)):
            losses = objective(clip(), [0], step)
            assert torch.allclose(losses["total"], losses["reconstruction"] + weight * losses["kl"])

    def test_no_term_depends_on_how_large_a_clip_is(self):
        """A clip laid twice beside itself: sums would double."""
        objective = make(regularizer="both")
        still = clip(frames=1).mean((3, 4), keepdim=True).expand(-1, -1, 5, 64, 64)
        small, large = (objective(x, [0], 0) for x in (still, torch.cat([still, still], dim=4)))
        for name in ("reconstruction", "kl", "decoder_regularizer", "encoder_regularizer"):
            assert large[name].item() == pytest.approx(small[name].item(), rel=0.3), name

    @pytest.mark.parametrize("kind, distance", [("l1", F.l1_loss), ("l2", F.mse_loss)])
    def test_distances(self, kind, distance):
        objective = make(reconstruction=kind, regularizer="none", kl=0.0)
        x = clip()
        latents = Posterior(objective.student.encoder(x)).sample([torch.Generator().manual_seed(7)])
        assert torch.allclose(objective(x, [7], 0)["reconstruction"], distance(objective.student.decoder(latents), x))

    def test_learned_variances_make_a_likelihood(self):
        objective = make(learn_logvar=True, kl=0.0)
        assert set(objective.logvars) == {"reconstruction", "decoder"}
        with torch.no_grad():
            objective.logvars["reconstruction"].fill_(0.3)
            objective.logvars["decoder"].fill_(-0.2)
        losses = objective(clip(), [0], 0)
        expected = (losses["reconstruction"] / torch.tensor(0.3).exp() + 0.3
                    + losses["decoder_regularizer"] / torch.tensor(-0.2).exp() - 0.2)
        assert torch.allclose(losses["total"], expected)
        losses["total"].backward()
        # The best log-variance is the logarithm of the loss itself.
        expected = 1 - losses["reconstruction"] / torch.tensor(0.3).exp()
        assert torch.allclose(objective.logvars["reconstruction"].grad, expected)

    def test_names_are_what_comes_out(self):
        for loss in ({}, {"regularizer": "both", "learn_logvar": True, "outliers": 1.0, "statistics": 1.0},
                     {"gan": "hinge", "perceptual": "ms-ssim"} | GAN):
            objective = make(**loss)
            assert set(objective(clip(), [0], 0)) == set(objective.names)

    def test_batching_changes_no_clips_losses(self):
        objective = make(regularizer="both", outliers=1.0, statistics=1.0, gan="hinge", **GAN)
        x = clip(batch=2)
        together = objective(x, [3, 4], 0)
        alone = [objective(x[i:i + 1], [3 + i], 0) for i in range(2)]
        for name in ("reconstruction", "kl", "decoder_regularizer", "encoder_regularizer", "outliers", "statistics",
                     "generator", "discriminator"):
            assert torch.allclose(together[name], (alone[0][name] + alone[1][name]) / 2, atol=1e-5), name


class TestRegularizer:
    @pytest.mark.parametrize("kind, trains_encoder, trains_decoder", [("decoder", True, False), ("encoder", False, True)])
    def test_gradients_go_to_one_half_and_never_to_the_teacher(self, kind, trains_encoder, trains_decoder):
        objective = make(regularizer=kind)
        losses = objective(clip(), [0], 0)
        loss = losses[f"{kind}_regularizer"]
        assert (largest(gradients(objective, loss, "student.encoder")) > 0) == trains_encoder
        assert (largest(gradients(objective, loss, "student.decoder")) > 0) == trains_decoder
        losses["total"].backward()
        assert all(parameter.grad is None for parameter in objective.teacher.parameters())

    def test_at_the_start_a_still_clip_regularizes_like_the_image_vae_reconstructs(self):
        objective = make()
        frame = clip(frames=1)
        latents = objective.student.encode(frame.expand(-1, -1, 9, -1, -1)).mode()
        decoded = objective._teacher_decode(latents)
        expected = objective.teacher.decode(objective.teacher.encode(frame[:, :, 0]).mode())
        assert torch.allclose(decoded, expected[:, :, None].expand_as(decoded), atol=1e-4)

    def test_first_compares_one_frame(self):
        losses = make(regularizer="both", mapping="first")(clip(), [0], 0)
        assert losses["decoder_regularizer"].isfinite() and losses["encoder_regularizer"].isfinite()

    def test_frozen_latents_leave_out_what_would_move_them(self):
        objective = make("decoder", regularizer="both", outliers=1.0)
        assert set(objective.names) == {"total", "reconstruction", "encoder_regularizer"}
        losses = objective(clip(), [0], 0)
        assert set(losses) == set(objective.names)
        assert largest(gradients(objective, losses["total"], "student.encoder")) == 0


class TestExtras:
    def test_outliers_count_only_beyond_their_bound(self):
        latents = torch.randn(1, 4, 5, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
        assert outliers(latents, 3.0) == 0
        latents[0, 0, 0, 0, 0] = 30.0
        deviation, mean = torch.std_mean(latents[0, 0])
        assert outliers(latents, 3.0) == pytest.approx(((30 - mean - 3 * deviation) / latents.numel()).item(), rel=1e-4)

    def test_statistics_compare_channels_in_the_teachers_deviations(self):
        expected = torch.randn(1, 4, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 3
        assert statistics_gap(expected, expected) == 0
        shifted = expected + expected.std(dim=(2, 3, 4), keepdim=True) * 0.5
        assert statistics_gap(shifted, expected).item() == pytest.approx(0.25, rel=1e-3)


class TestAdversary:
    @pytest.mark.parametrize("kind, passes", [("hinge", 2), ("hinge", 1), ("non-saturating", 2)])
    def test_neither_side_has_a_gradient_for_the_other(self, kind, passes):
        objective = make(gan=kind, gan_passes=passes, kl=0.0, regularizer="none", **GAN)
        losses = objective(clip(), [0], 0)
        assert largest(gradients(objective, losses["total"], "adversary")) == 0
        assert largest(gradients(objective, losses["discriminator"], "adversary")) > 0
        if passes == 2:
            assert largest(gradients(objective, losses["discriminator"], "student")) == 0

    def test_one_pass_gives_the_student_the_gradient_of_its_own_loss(self):
        """Against the same game written down in two passes."""
        objective = make(gan="hinge", gan_passes=1, gan_adaptive=False, gan_weight=0.7, kl=0.0, regularizer="none", **GAN)
        x = clip()
        losses = objective(x, [0], 0)
        (losses["total"] + losses["discriminator"]).backward()
        latents = Posterior(objective.student.encoder(x)).sample([torch.Generator().manual_seed(0)])
        decoded = objective.student.decoder(latents)
        judge = objective.adversary.discriminator
        student = F.l1_loss(decoded, x) - 0.7 * F.relu(1 + judge(decoded)).mean()
        other = 0.5 * (F.relu(1 - judge(x)).mean() + F.relu(1 + judge(decoded.detach())).mean())
        for loss, module in ((student, objective.student), (other, judge)):
            parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
            expected = torch.autograd.grad(loss, parameters, retain_graph=True)
            for parameter, gradient in zip(parameters, expected, strict=True):
                assert torch.allclose(parameter.grad, gradient, atol=1e-6 + 1e-4 * gradient.abs().max().item())

    @pytest.mark.parametrize("passes", [1, 2])
    def test_the_adaptive_weight_makes_both_gradients_as_large(self, passes):
        objective = make(gan="hinge", gan_weight=1.0, gan_passes=passes, kl=0.0, regularizer="none", **GAN)
        losses = objective(clip(), [0], 0)
        last = objective.student.decoder.conv_out.weight
        pixels, = torch.autograd.grad(losses["reconstruction"], last, retain_graph=True)
        both, = torch.autograd.grad(losses["total"] + losses["discriminator"], last)
        assert (both - pixels).norm().item() == pytest.approx(pixels.norm().item(), rel=0.02)

    def test_before_its_start_it_is_silent_and_takes_part(self):
        objective = make(gan="hinge", gan_start=5, **GAN)
        early, later = objective(clip(), [0], 4), objective(clip(), [0], 5)
        assert "generator" not in early and early["discriminator"] == 0 and "generator" in later
        found = gradients(objective, early["discriminator"], "adversary")
        assert largest(found) == 0 and all(gradient is not None for gradient in found.values())

    def test_it_learns_to_tell_real_from_decoded(self):
        torch.manual_seed(0)
        objective = make(gan="hinge", gan_adaptive=False, gan_weight=0.0, **GAN)
        optimizer = torch.optim.AdamW(objective.adversary.parameters(), 2e-3)
        for step in range(30):
            loss = objective(clip(2, seed=step), [0, 1], 0)["discriminator"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.7  # 1 where it cannot tell

    @pytest.mark.parametrize("frames", [1, 5, 17])
    def test_judges_pictures_and_clips(self, frames):
        scores = PatchDiscriminator(8, 3)(torch.rand(2, 3, frames, 64, 48))
        assert scores.shape == (2, 1, 1 + (frames - 1) // 4, 8, 6)


class TestPerceptual:
    def test_ms_ssim_is_zero_for_equals_and_has_a_gradient(self):
        distance = perceptual.MSSSIM()
        x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
        assert distance(x, x).abs() < 1e-5
        worse = [(x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1).requires_grad_()
                 for sigma in (0.1, 0.4)]
        losses = [distance(y, x) for y in worse]
        assert 0 < losses[0] < losses[1] < 1
        losses[1].backward()
        assert worse[1].grad.abs().max() > 0
        assert ssim((worse[1] + 1) / 2, (x + 1) / 2, 11).mean() < 0.9

    def test_lpips_without_weights_says_what_to_do(self, tmp_path, monkeypatch):
        pytest.importorskip("lpips", reason="the optional package lpips is not installed")
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        with pytest.raises(ConfigError, match=r"download-lpips --net vgg.*'ms-ssim'"):
            make(perceptual="lpips")

    def test_without_the_package_it_says_so(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "lpips", None)
        with pytest.raises(ConfigError, match=r"pip install lpips torchvision.*'ms-ssim'"):
            make(perceptual="lpips")

    def test_lpips_reads_the_backbone_stays_in_eval_mode_and_carries_gradients(self, tmp_path):
        pytest.importorskip("lpips", reason="the optional package lpips is not installed")
        from torchvision.models import alexnet

        torch.manual_seed(0)
        backbone = alexnet()
        torch.save(backbone.state_dict(), tmp_path / "alexnet.pth")
        objective = make(perceptual="lpips", lpips_net="alex", lpips_weights=str(tmp_path / "alexnet.pth")).train()
        lpips = objective.perceptual
        assert not any(module.training for module in lpips.modules())
        assert torch.equal(next(lpips.distance.net.slice2.parameters()), backbone.features[3].weight)
        x, y = clip(frames=1, seed=1)[:, :, 0], clip(frames=1, seed=2)[:, :, 0].requires_grad_()
        x, y = F.interpolate(x, size=64), F.interpolate(y, size=64)
        assert lpips(x, x) == 0 and torch.equal(lpips(y, x), lpips(y, x))
        assert torch.autograd.grad(lpips(y, x), y)[0].abs().max() > 0
        assert all(not parameter.requires_grad for parameter in lpips.parameters())
