"""Adapting a sampler, as far as it needs no ComfyUI: settings, what is trained, what is drawn.

The rest is checked in a host, by tests/host/contract_adaptation.py.
"""

import dataclasses
import math
import re
from pathlib import Path
from random import Random

import pytest
import torch
from random_weights import motion_state, noise
from torch import nn
from torch.nn import Conv2d, GroupNorm, Linear

import cvvae
from cvvae.adaptation.adapter import Adapter
from cvvae.adaptation.conditions import Conditions, encode_conditions
from cvvae.adaptation.config import AdaptConfig, DataConfig, read_config
from cvvae.adaptation.data import LatentClips, collate
from cvvae.adaptation.motion import load_motion
from cvvae.dataset import LatentDataset, Settings, encode_dataset
from cvvae.training.config import ConfigError, tomllib
from cvvae.training.distributed import Group

ROOT = Path(__file__).parents[1]
PLACE = "down_blocks.0.motion_modules.0"


class TestConfig:
    def test_the_shipped_ones_can_be_read(self):
        config = read_config(ROOT / "configs" / "adapt_svd.toml")
        assert config.model.train == "output" and config.data.frames == 25 and config.optim.final_ratio == 1
        config = read_config(ROOT / "configs" / "adapt_animatediff.toml")
        assert config.model.motion == str(ROOT / "v3_sd15_mm.ckpt") and config.data.frames == 16

    @pytest.mark.parametrize("override, message", [
        ("model.train=all", "model.train is 'all'; expected one of output"),
        ("model.trian=output", "did you mean model.train?"),
        ("model.train=layers", "model.layers is empty"),
        ('model.layers=["out.*"]', "has no part in model.train = 'output'"),
        ("data.latents=''", "data.latents is empty"),
        ("model.checkpoint=''", "model.checkpoint is empty"),
        ("conditioning.dropout=1.5", "conditioning.dropout is 1.5"),
        ("noise.std=-1", "noise.std is -1.0; expected 0 or more"),
        ("optim.discriminator_rate=1e-4", "Unknown setting optim.discriminator_rate"),
    ])
    def test_values_that_cannot_work_are_named(self, override, message):
        with pytest.raises(ConfigError, match=re.escape(message)):
            read_config(ROOT / "configs" / "adapt_svd.toml", [override])

    def test_the_page_has_each_setting_with_its_default(self):
        page = (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8")
        written = dict(re.findall(r"^\| `(\w+\.\w+)` \| `(.+?)` \|", page, re.MULTILINE))
        written = {key: tomllib.loads(f"x = {value}")["x"] for key, value in written.items()}
        sections = dataclasses.asdict(AdaptConfig())
        defaults = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
        assert written.items() <= defaults.items()
        own = [key for key in defaults if key.split(".")[0] not in ("optim", "run")]  # those are explained for every run
        assert not [key for key in own if key not in written]


class Tiny(nn.Module):
    """A UNet as far as names go."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.input_blocks = nn.ModuleList([nn.ModuleList([Conv2d(4, 8, 3, padding=1)])])
        self.time_stack = nn.ModuleDict({"q": Linear(8, 8)})
        self.out = nn.Sequential(GroupNorm(4, 8), nn.SiLU(), Conv2d(8, 4, 3, padding=1))

    def forward(self, x):
        x = self.input_blocks[0][0](x)
        return self.out(x + self.time_stack["q"](x.movedim(1, -1)).movedim(-1, 1))


class TestAdapter:
    def test_begins_as_the_original(self):
        x = noise(2, 4, 8, 8)
        expected = Tiny()(x)
        for train, layers in (("output", ()), ("output+input", ()), ("layers", ["*"]), ("lora", ["*"])):
            unet = Tiny()
            adapter = Adapter(unet, train, layers, rank=2)
            assert torch.equal(unet(x), expected)
            unet(x).square().mean().backward()
            assert all(parameter.grad is not None for parameter in adapter.parameters())
            frozen = set(unet.parameters()) - set(adapter.parameters())
            assert frozen and all(parameter.grad is None for parameter in frozen)

    def test_16_bit_weights_are_trained_in_32(self):
        adapter = Adapter(Tiny().half(), "output")
        assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}

    def test_the_files_keys_and_shapes(self):
        assert {name: tuple(tensor.shape) for name, tensor in Adapter(Tiny(), "output").tensors().items()} == {
            "diffusion_model.out.2.diff": (4, 8, 3, 3), "diffusion_model.out.2.diff_b": (4,)}
        assert {name: tuple(tensor.shape) for name, tensor in Adapter(Tiny(), "lora", ["out.2.*", "*time_stack*"], 2)
                .tensors().items()} == {
            "diffusion_model.out.2.lora_up.weight": (4, 2, 1, 1), "diffusion_model.out.2.lora_down.weight": (2, 8, 3, 3),
            "diffusion_model.time_stack.q.lora_up.weight": (8, 2), "diffusion_model.time_stack.q.lora_down.weight": (2, 8)}

    def test_the_fingerprint_is_of_what_the_differences_are_to(self):
        unet = Tiny()
        with torch.no_grad():
            unet.out[2].bias[0] += 1
        adapter = Adapter(Tiny(), "output")
        assert adapter.fingerprint() == Adapter(Tiny(), "output").fingerprint()
        assert adapter.fingerprint() != Adapter(unet, "output").fingerprint()
        before = adapter.fingerprint()
        with torch.no_grad():
            next(adapter.parameters()).add_(1)
        assert adapter.fingerprint() == before


def oracle(state, x, frames):
    """What a motion module makes of ``x``, in float64: position by position of clip by clip, one head after the other."""
    w = {name.removeprefix(f"{PLACE}.temporal_transformer."): tensor.double() for name, tensor in state.items()}

    def linear(x, layer):
        return x @ w[f"{layer}.weight"].T + w.get(f"{layer}.bias", 0)

    def normed(x, layer):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * w[f"{layer}.weight"] + w[f"{layer}.bias"]

    x = x.double()
    channels = x.shape[1]
    groups = x.reshape(len(x), 32, -1)
    groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, keepdim=True, correction=0) + 1e-6).sqrt()
    h = groups.reshape(x.shape) * w["norm.weight"][:, None, None] + w["norm.bias"][:, None, None]
    out = x.clone()
    for clip in range(len(x) // frames):
        at = slice(clip * frames, (clip + 1) * frames)
        for row in range(x.shape[2]):
            for column in range(x.shape[3]):
                y = linear(h[at, :, row, column], "proj_in")
                for k in range(2):
                    attention = f"transformer_blocks.0.attention_blocks.{k}"
                    z = normed(y, f"transformer_blocks.0.norms.{k}") + w[f"{attention}.pos_encoder.pe"][0, :frames]
                    q, key, v = (linear(z, f"{attention}.{layer}") for layer in ("to_q", "to_k", "to_v"))
                    size = channels // 8
                    heads = [slice(head * size, (head + 1) * size) for head in range(8)]
                    mixed = [(q[:, head] @ key[:, head].T / math.sqrt(size)).softmax(1) @ v[:, head] for head in heads]
                    y = y + linear(torch.cat(mixed, 1), f"{attention}.to_out.0")
                z = linear(normed(y, "transformer_blocks.0.ff_norm"), "transformer_blocks.0.ff.net.0.proj")
                value, gate = z.chunk(2, 1)
                y = y + linear(value * 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2))), "transformer_blocks.0.ff.net.2")
                out[at, :, row, column] += linear(y, "proj_out")
    return out


class TestMotion:
    def load(self, tmp_path, state, name="motion.ckpt"):
        torch.save(state, tmp_path / name)
        return load_motion(tmp_path / name)

    def test_equals_its_definition(self, tmp_path):
        state, x = motion_state(PLACE), noise(2 * 5, 64, 3, 4)
        with torch.no_grad():
            found = self.load(tmp_path, state).places[PLACE](x, 5)
        assert (found - oracle(state, x, 5)).abs().max() < 1e-5

    def test_equals_diffusers(self, tmp_path):
        module = pytest.importorskip("diffusers.models.unets.unet_motion_model", reason="diffusers is not installed")
        theirs = module.AnimateDiffTransformer3D(8, 8, 64, positional_embeddings="sinusoidal", num_positional_embeddings=32)
        # There it is across frames, unlike in the code that the published modules were trained with.
        theirs.norm = ByFrame(theirs.norm)
        state = {}
        for name, tensor in theirs.state_dict().items():
            if "pos_embed" not in name:
                tensor.copy_(noise(*tensor.shape, seed=len(state)) / tensor.shape[-1] ** 0.5)
            for found, named in ((".attn1.", ".attention_blocks.0."), (".attn2.", ".attention_blocks.1."),
                                 (".norm1.", ".norms.0."), (".norm2.", ".norms.1."), (".norm3.", ".ff_norm."),
                                 ("norm.own.", "norm.")):
                name = name.replace(found, named)
            names = [name] if "pos_embed" not in name else [name.replace("pos_embed", f"attention_blocks.{k}.pos_encoder")
                                                            for k in range(2)]
            state |= {f"{PLACE}.temporal_transformer.{name}": tensor.clone() for name in names}
        x = noise(2 * 5, 64, 3, 4)
        with torch.no_grad():
            assert (self.load(tmp_path, state).places[PLACE](x, 5) - theirs(x, num_frames=5)).abs().max() < 1e-5

    def test_reads_what_files_hold_beside_it(self, tmp_path):
        state = motion_state(PLACE) | motion_state("mid_block.motion_modules.0", 32)
        plain = self.load(tmp_path, state)
        wrapped = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()} |
                   {"conv_in.weight": noise(8, 4, 3, 3)}}
        assert plain.length == 32 and plain.names == [PLACE, "mid_block.motion_modules.0"]
        again = self.load(tmp_path, wrapped)
        assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), again.state_dict().values(), strict=True))
        assert not any(parameter.requires_grad for parameter in plain.parameters())

    @pytest.mark.parametrize("state, message", [
        ({"up.lora_up.weight": torch.ones(1)}, "is no motion module of AnimateDiff"),
        ({name: tensor for name, tensor in motion_state(PLACE).items() if "pos_" not in name}, "as those of AnimateLCM"),
        (motion_state(PLACE, length=24), "AnimateDiff v1 (24 positions"),
        (motion_state(PLACE) | {"conv_in.weight": torch.ones(8, 9, 3, 3)}, "as PIA does"),
        (motion_state(PLACE) | {f"{PLACE}.temporal_transformer.proj_in.weight": torch.ones(3, 3)}, f"{PLACE} is not as"),
        ({name: tensor for name, tensor in motion_state(PLACE).items() if "proj_in" not in name}, f"{PLACE} is not as"),
    ])
    def test_other_files_are_told_apart(self, state, message, tmp_path):
        with pytest.raises(ConfigError, match=re.escape(message)):
            self.load(tmp_path, state)

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="motion module is"):
            load_motion(tmp_path / "none.ckpt")


class ByFrame(nn.Module):
    """A norm of [B, C, t, h, w], each frame by itself."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, x):
        return torch.stack([self.own(frame) for frame in x.unbind(2)], 2)


class Numbered:
    """A conditioner that tells the latents' mean, one number for each of three draws."""

    facts = {"kind": "numbered"}

    def __init__(self):
        self.asked = 0

    def empty(self):
        return {"context": torch.zeros(2, 3)}

    def __call__(self, sample, latents):
        self.asked += 1
        draws = torch.arange(3.0)[:, None]
        return {"context": latents.mean().expand(2, 3), "concat": latents[:, 0].expand(3, -1, -1, -1), "y": draws}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Latents of four clips, one of them longer and one of another size, and what is told of them."""
    import drawn

    folder = tmp_path_factory.mktemp("latents")
    for seed, (name, frames, width) in enumerate((("a", 9, 64), ("b", 9, 64), ("c", 17, 64), ("d", 9, 48))):
        (folder / "videos").mkdir(exist_ok=True)
        drawn.write_video(folder / "videos" / f"{name}.mp4", frames, 64, width, seed=seed)
    encode_dataset(cvvae.load("tiny"), [str(folder / "videos")], folder, Settings(files_per_shard=2))
    encode_conditions(LatentDataset(folder), Numbered(), folder / "told")
    return folder


def clips(folder, dropout=0.0, **settings):
    config = DataConfig(latents=str(folder), **settings)
    conditions = Conditions(folder / "told")
    return LatentClips(config, LatentDataset(folder), conditions, 4, lambda latents: 0.5 * latents, 0, dropout)


class TestData:
    def test_parts_of_one_are_the_clips_of_a_larger_batch(self, folder):
        one, two = clips(folder, dropout=0.5, batch=1), clips(folder, dropout=0.5, batch=2)
        for step in range(12):
            whole, parts = two.batch(step, 0), [one.batch(step, part) for part in range(2)]
            assert torch.equal(whole.latents, torch.cat([part.latents for part in parts]))
            assert all(torch.equal(tensor, torch.cat([part.conditions[name] for part in parts]))
                       for name, tensor in whole.conditions.items())

    def test_a_step_has_clips_of_one_shape_and_every_clip_comes(self, folder):
        data = clips(folder, validation=["b"], batch=2)
        shapes = {tuple(data.batch(step, 0).latents.shape[1:]) for step in range(60)}
        assert shapes == {(4, 3, 8, 8), (4, 5, 8, 8), (4, 3, 8, 6)}
        (held_out,) = data.validation()
        assert held_out.latents.shape == (1, 4, 3, 8, 8)
        assert torch.equal(held_out.latents[0], 0.5 * LatentDataset(folder)[1])

    def test_clips_are_cut_at_their_end(self, folder):
        data = clips(folder, frames=3, batch=2)
        longest = LatentDataset(folder)[2]
        found = [clip for step in range(60) for clip in data.batch(step, 0).latents if clip.shape[-1] == 8]
        assert any(torch.equal(clip, 0.5 * longest[:, :3]) for clip in found)
        assert len(clips(folder, frames=5).shapes) == 1

    @pytest.mark.parametrize("settings, message", [
        ({"frames": 9}, "of 4 clips 4 are shorter than data.frames = 9"),
        ({"validation": ["e"]}, "'e' is none of the 4 videos"),
        ({"validation": ["a", "b", "c", "d"]}, "4 are held out")])
    def test_nothing_to_train_on_is_said(self, folder, settings, message):
        with pytest.raises(ConfigError, match=re.escape(message)):
            clips(folder, **settings)

    def test_texts_of_unequal_length_share_a_batch(self):
        items = [(torch.zeros(4, 1, 2, 2), {"context": torch.arange(n, dtype=torch.float)[:, None]}) for n in (2, 3)]
        context = collate(items).conditions["context"]
        assert context.squeeze(-1).tolist() == [[0, 1, 0, 1, 0, 1], [0, 1, 2, 0, 1, 2]]


class TestConditions:
    def test_are_encoded_once_and_again_when_something_else_is_asked_for(self, folder, tmp_path):
        data, told, conditioner = LatentDataset(folder), tmp_path / "told", Numbered()
        seen = []
        encode_conditions(data, conditioner, told, report=lambda done, total: seen.append((done, total)))
        assert conditioner.asked == 4 and seen == [(k, 4) for k in range(1, 5)]
        encode_conditions(data, conditioner, told)
        assert conditioner.asked == 4
        (told / "shard-000001.safetensors").unlink()  # as after kill -9
        encode_conditions(data, conditioner, told)
        assert conditioner.asked == 6
        conditioner.facts = {"kind": "other"}
        encode_conditions(data, conditioner, told)
        assert conditioner.asked == 10

    def test_processes_share_the_shards(self, folder, tmp_path, monkeypatch):
        data, first, second = LatentDataset(folder), Numbered(), Numbered()
        for rank, conditioner in enumerate((first, second)):
            group = Group(rank, 2)
            monkeypatch.setattr(Group, "wait", lambda self: None)  # the other one is not there at the same time
            encode_conditions(data, conditioner, tmp_path, group)
        assert first.asked == second.asked == 2
        assert Conditions(tmp_path).of(data.samples[3])["context"].shape == (2, 3)

    def test_one_draw_is_shown_and_some_are_dropped(self, folder):
        told, sample = Conditions(folder / "told"), LatentDataset(folder).samples[0]
        assert {told.of(sample, Random(seed))["y"].item() for seed in range(20)} == {0.0, 1.0, 2.0}
        dropped = told.of(sample, Random(0), 1.0)
        assert not dropped["context"].any() and not dropped["concat"].any() and dropped["concat"].shape == (4, 8, 8)
        assert told.of(sample)["y"].item() == 0.0 and told.of(sample)["context"].any()
