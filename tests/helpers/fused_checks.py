"""The fused kernels give what torch's own operations give.  Run by test_fused.py in a process of its own, where a GPU or,
step by step and slowly, Triton's interpreter runs them."""

import os

import pytest
import torch
from compare import distance
from random_weights import VARIANTS, noise, video_clip, video_vae
from torch import nn

import cvvae
from cvvae import engine
from cvvae.engine import fused, kernels, passes
from cvvae.engine.passes import Border

STEP_BY_STEP = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if STEP_BY_STEP else "cuda"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    """Several programs in each direction, for small tensors."""
    monkeypatch.setattr(fused, "COLUMNS", 8)
    monkeypatch.setattr(fused, "CHANNELS", 16)
    monkeypatch.setattr(fused, "PIXELS", 16)
    monkeypatch.setattr(fused, "MEASURED", 32)
    monkeypatch.setattr(fused, "AT_A_TIME", 8)
    monkeypatch.setattr(fused, "PARTS", 2)
    monkeypatch.setattr(fused, "KEYS", 16)


def laid_out(*shape: int, seed: int = 0) -> torch.Tensor:
    return noise(*shape, seed=seed).to(DEVICE).contiguous(memory_format=torch.channels_last)


def empty(*shape: int) -> torch.Tensor:
    """Not what a kernel may leave."""
    return torch.full(shape, float("nan"), device=DEVICE).contiguous(memory_format=torch.channels_last)


def in_strips(x: torch.Tensor, start: int, stop: int):
    """Rows as an activation hands them out."""
    start, stop = max(start, 0), min(stop, x.shape[2])
    return [(row, x[:, :, row:end]) for row, end in ((start, min(4, stop)), (max(start, 4), stop)) if row < end]


@pytest.mark.parametrize("time, space, norms, start, stop", [
    ("zeros", "replicate", 1, -1, 10), ("replicate", "zeros", 3, -1, 4), ("replicate", "replicate", 0, 3, 6),
    ("zeros", "zeros", 3, 5, 10), ("replicate", "zeros", 1, 3, 6), ("zeros", "zeros", 0, -1, 10)])
def test_bordered(time, space, norms, start, stop):
    x = laid_out(3, 20, 9, 9)
    affine = (noise(norms, 20, 1, 1, seed=1).to(DEVICE), noise(norms, 20, 1, 1, seed=2).to(DEVICE)) if norms else None
    border = Border((1, 2), space, (2, 1), time)
    found, expected = empty(6, 20, stop - start, 12), empty(6, 20, stop - start, 12)
    for made, out in ((fused.FUSED, found), (passes.EAGER, expected)):
        made.bordered(iter(in_strips(x, start, stop)), start, stop, 9, border, affine, out)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("by_frame", [False, True])
def test_added_and_measured(by_frame, biased, added):
    x = laid_out(3, 24, 9, 7) + 10 * noise(24, 1, 1, seed=1).to(DEVICE)  # far from zero, as some channels are
    y, bias = (laid_out(3, 24, 9, 7, seed=2) if added else None), (noise(24, seed=3).to(DEVICE) if biased else None)
    weight, shift = noise(24, seed=4).to(DEVICE), noise(24, seed=5).to(DEVICE)
    results = []
    for made in (fused.FUSED, passes.EAGER):
        out, moments = x.clone(), made.moments(by_frame)
        for rows in (slice(0, 4), slice(4, 9)):
            made.add(out[:, :, rows], None if y is None else y[:, :, rows], bias, moments)
        results.append((out, *moments.mean_and_square(), *moments.affine(weight, shift, 4, 1e-5), moments.count))
    *found, count = results[0]
    *expected, expected_count = results[1]
    assert count == expected_count
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_frame", [False, True])
def test_a_norm_s_factors_bring_a_bias_that_the_values_lack(by_frame):
    x, missing = laid_out(3, 24, 9, 7), 10 * noise(24, seed=1).to(DEVICE)
    weight, bias = noise(24, seed=2).to(DEVICE), noise(24, seed=3).to(DEVICE)
    lacking, whole = fused.FusedMoments(by_frame), passes.EAGER.moments(by_frame)
    lacking.add(x)
    lacking.missing = missing
    there = x + missing[:, None, None]
    whole.add(there)
    scale, shift = lacking.affine(weight, bias, 4, 1e-5)
    expected_scale, expected_shift = whole.affine(weight, bias, 4, 1e-5)
    assert torch.allclose(scale, expected_scale, rtol=1e-5)
    assert torch.allclose(x * scale + shift, there * expected_scale + expected_shift, atol=1e-5)


def test_adding_without_measuring():
    x, y, bias = laid_out(3, 24, 9, 7), laid_out(3, 24, 9, 7, seed=1), noise(24, seed=2).to(DEVICE)
    out = x.clone()
    fused.add(out[:, :, 2:], y[:, :, :7], bias)
    assert torch.equal(out[:, :, :2], x[:, :, :2])
    assert torch.allclose(out[:, :, 2:], x[:, :, 2:] + y[:, :, :7] + bias[:, None, None], atol=1e-6)


@pytest.mark.parametrize("made", [passes.interleaved, fused.interleaved], ids=["torch", "fused"])
def test_phases_are_nearest_then_convolution(made):
    x, weight, bias = laid_out(2, 6, 5, 4), noise(17, 6, 1, 3, 3).to(DEVICE), noise(17, seed=1).to(DEVICE)
    large = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
    expected = nn.functional.conv2d(nn.functional.pad(large, (1, 1, 1, 1)), weight[:, :, 0], bias)
    phases = nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1)), kernels.phases(weight)[:, :, 0])
    out = empty(2, 17, 10, 8)
    made(phases, bias, out)
    assert torch.allclose(out, expected, atol=1e-5)


class TestLaunches:
    """What Triton compiled is launched again only for values that it would compile no other kernel for."""

    @pytest.fixture
    def kernel(self, monkeypatch):
        """Gives out its launches by Triton as names, and takes those that go past it."""
        class Kernel:
            asked, short = 0, []

            def __getitem__(self, grid):
                def compiled(*values, **constants):
                    self.asked += 1
                    return {grid: lambda *values: self.short.append(values)}

                return compiled

        monkeypatch.setattr(fused, "_compiled", {})
        monkeypatch.setattr(fused, "_short", True)
        return Kernel()

    def launch(self, kernel, *values, size=1):
        fused._launch(kernel, (1, 1, 1), *values, SIZE=size, num_warps=4)

    def test_again(self, kernel):
        x = torch.zeros(8)
        self.launch(kernel, x, 3, 32, 0.5)
        self.launch(kernel, torch.ones(8), 5, 48, 0.25)
        (again,) = kernel.short
        assert kernel.asked == 1 and again[1:] == (5, 48, 0.25, 1) and torch.equal(again[0], torch.ones(8))

    @pytest.mark.parametrize("values", [
        (torch.zeros(8), 1), (torch.zeros(8), 5), (torch.zeros(8), -5), (torch.zeros(8), 2 ** 31), (torch.zeros(8)[1:], 32),
        (torch.zeros(8, dtype=torch.float16), 32), (torch.zeros(8, device="meta"), 32)])
    def test_other_kinds(self, kernel, values):
        self.launch(kernel, torch.zeros(8), 32)
        self.launch(kernel, *values)
        assert kernel.asked == 2 and not kernel.short

    def test_other_constants(self, kernel):
        self.launch(kernel, torch.zeros(8), 32)
        self.launch(kernel, torch.zeros(8), 32, size=2)
        assert kernel.asked == 2

    @pytest.mark.parametrize("error", [TypeError("function takes exactly 9 arguments (10 given)"), AttributeError("run")])
    def test_where_triton_takes_other_values(self, error, kernel, monkeypatch):
        """Its older launchers do; then every launch goes through Triton."""
        def run_all(device):
            if fused._compiled:
                raise error
            self.launch(kernel, torch.zeros(8), 32)

        monkeypatch.setattr(fused, "_run_all", run_all)
        fused.try_out(torch.device("cpu"))
        assert not fused._short
        self.launch(kernel, torch.zeros(8), 32)
        assert kernel.asked == 2 and not kernel.short


def test_shares():
    scores = 5 * noise(2, 3, 40).to(DEVICE)
    shares, sums = fused.shares(scores, 37, 0.5, torch.float32)
    assert shares.shape == scores.shape and not shares[..., 37:].any()
    assert torch.allclose(shares[..., :37] / sums, (0.5 * scores[..., :37]).softmax(-1), atol=1e-6)
    assert torch.equal(shares.amax(-1), torch.ones(2, 3, device=DEVICE))


@pytest.mark.parametrize("dtype, most", [(torch.float32, 5e-6)] + [(torch.float16, 5e-3)] * (not STEP_BY_STEP))
@pytest.mark.parametrize("kept", [100, 40 * 35, 2 ** 25])
def test_attention_by_products(kept, dtype, most, monkeypatch):
    """A few queries, one frame and all frames at a time; 35 keys."""
    monkeypatch.setattr(kernels, "WIDE_PRODUCTS", True)
    monkeypatch.setattr(kernels, "SCORES_KEPT", kept)
    q, k, v = (2 * laid_out(3, 16, 5, 7, seed=seed) for seed in range(3))
    flat = [x.double().flatten(2).transpose(1, 2) for x in (q, k, v)]
    expected = nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2).unflatten(2, (5, 7))
    found = kernels.attend(q.to(dtype), k.to(dtype), v.to(dtype), fused.shares)
    assert found.dtype == dtype and distance(found, expected) < most


SIZES = [("v1", 5, 16), ("sd3", 1, 16)] if STEP_BY_STEP else [(variant, t, 40) for variant in VARIANTS for t in (1, 5, 13)]


@pytest.mark.parametrize("memory", [None] if STEP_BY_STEP else [None, "70 MB"])
@pytest.mark.parametrize("variant, frames, side", SIZES)
def test_engine(variant, frames, side, memory, monkeypatch):
    monkeypatch.undo()  # programs as large as they are
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    vae = video_vae(variant, tiling=cvvae.Tiling(None, None, memory=memory)).to(DEVICE)
    clip = video_clip(frames, side, side - 8)
    vae.executor = "plain"
    latents = vae.encode(clip).mean
    decoded = vae.decode(latents)
    vae.executor = "fast"
    monkeypatch.setattr(engine, "passes_for", lambda x, compiled: fused.FUSED)
    # Norms over the few values of small pictures make much of roundings, the definition's as well as these.
    if frames == 1 or not STEP_BY_STEP:
        assert distance(vae.encode(clip).mean, latents) < 1e-4
    if frames > 1 or not STEP_BY_STEP:
        assert distance(vae.decode(latents), decoded) < 1e-4


def test_engine_with_statistics_of_all_tiles(monkeypatch):
    """Then a norm's factors do not come from its own moments, nor a bias with them."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    vae, picture = video_vae("sd3", tiling=cvvae.Tiling(None, 16, 8, statistics="window")).to(DEVICE), video_clip(1, 16, 24)
    monkeypatch.setattr(engine, "passes_for", lambda x, compiled: passes.ELSEWHERE if x.is_cuda else passes.EAGER)
    latents = vae.encode(picture).mean
    decoded = vae.decode(latents)
    monkeypatch.setattr(engine, "passes_for", lambda x, compiled: fused.FUSED)
    assert distance(vae.encode(picture).mean, latents) < 1e-4
    assert distance(vae.decode(latents), decoded) < 1e-4
