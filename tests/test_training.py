"""The trainer: its objective, its data, and runs that go on exactly where they stopped."""

import csv
import json

import drawn
import pytest
import torch
from safetensors.torch import load_file

import cvvae
from cvvae import checkpoint
from cvvae.training.config import Bucket, ConfigError, DataConfig, LossConfig, OptimConfig, read_config
from cvvae.training.data import ClipData
from cvvae.training.objective import Objective, map_frames
from cvvae.training.trainer import Trainer, learning_rate

CONFIG = """
[model]
teacher = "{teacher}"
[data]
sources = ["clips"]
validation = ["held_out"]
buckets = [{{ frames = 1, size = 16, batch = 2 }}, {{ frames = 5, size = 16, batch = 1 }}]
validation_frames = 5
validation_size = 16
[optim]
steps = 6
learning_rate = 1e-3
warmup = 2
[run]
out = "{out}"
save_every = 2
validate_every = 100
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher and three clips, one of them held out."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "clips").mkdir()
    for seed, name in enumerate(("a", "b", "held_out")):
        drawn.write_video(folder / "clips" / f"{name}.mp4", 9, 32, 40, seed=seed)
    checkpoint.save(drawn.small_image_vae(), folder / "teacher.safetensors")
    return folder


def config(folder, name, *overrides):
    path = folder / f"{name}.toml"
    path.write_text(CONFIG.format(teacher=(folder / "teacher.safetensors").as_posix(), out=(folder / name).as_posix()))
    return read_config(path, list(overrides))


class TestConfig:
    def test_unknown_keys_are_refused_with_the_nearest_name(self, folder):
        with pytest.raises(ConfigError, match=r"optim\.learning_rat; did you mean optim\.learning_rate"):
            config(folder, "typo", "optim.learning_rat=1")
        with pytest.raises(ConfigError, match=r"Unknown setting optimizer; did you mean optim"):
            config(folder, "typo", "optimizer.steps=1")

    @pytest.mark.parametrize("override, message", [
        ("optim.steps=many", "optim.steps is 'many'; expected int"),
        ("optim.steps=true", "optim.steps is True; expected int"),
        ("loss.mapping=middle", "loss.mapping is 'middle'; expected one of first, slice, average, random"),
        ("data.buckets=[{frames = 4}]", r"data.buckets\[0\].frames is 4; expected 1 \+ 4n"),
        ("data.buckets=[{size = 20}]", r"data.buckets\[0\].size is 20"),
        ("model.kind=image", "an image VAE trains on single frames"),
        ("data.sources=[]", "data.sources is empty"),
        ("run.save_every=0", "run.save_every is 0; expected 1 or more"),
        ("data.max_stride=0", "data.max_stride is 0; expected 1 or more"),
        ("nonsense", "expected key=value"),
    ])
    def test_values_that_cannot_work_are_named(self, folder, override, message):
        with pytest.raises(ConfigError, match=message):
            config(folder, "wrong", override)

    def test_overrides_reach_their_key(self, folder):
        read = config(folder, "override", "optim.learning_rate=2", "run.name=a b")
        assert read.optim.learning_rate == 2.0 and read.run.name == "a b"


class TestSchedule:
    def test_warms_up_falls_and_stays_down(self):
        optim = OptimConfig(steps=100, warmup=10, learning_rate=1.0, final_ratio=0.1)
        rates = [learning_rate(optim, step) for step in range(400)]
        assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0)
        assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
        assert rates[100:] == [pytest.approx(0.1)] * 300


class TestMapFrames:
    clip = torch.arange(9.0)[None, None, :, None, None].expand(3, 3, 9, 2, 2)

    @pytest.mark.parametrize("mapping, expected", [("first", [0]), ("slice", [0, 4, 8]), ("average", [0, 2.5, 6.5])])
    def test_fixed_choices(self, mapping, expected):
        assert map_frames(self.clip, mapping)[0, 0, :, 0, 0].tolist() == expected

    def test_random_takes_one_of_each_group_for_every_clip(self):
        seen = [set(), set()]
        differ = False
        for seed in range(40):
            chosen = map_frames(self.clip, "random", torch.Generator().manual_seed(seed))
            assert chosen.shape == (3, 3, 3, 2, 2)
            picks = chosen[:, 0, :, 0, 0]
            assert (picks[:, 0] == 0).all() and torch.equal(chosen, picks[:, None, :, None, None].expand_as(chosen))
            seen[0] |= set(picks[:, 1].tolist())
            seen[1] |= set(picks[:, 2].tolist())
            differ |= len(set(picks[:, 1].tolist())) > 1
        assert seen == [{1, 2, 3, 4}, {5, 6, 7, 8}] and differ

    def test_a_picture_is_itself(self):
        assert torch.equal(map_frames(self.clip[:, :, :1], "random"), self.clip[:, :, :1])


class TestObjective:
    def make(self, **loss):
        teacher = drawn.small_image_vae()
        return Objective(cvvae.inflate(teacher), teacher, LossConfig(**loss))

    def test_total_is_the_weighted_sum_of_means(self):
        objective = self.make(kl=0.5, regularizer=2.0)
        losses = objective(torch.rand(2, 3, 5, 16, 16) * 2 - 1, torch.Generator().manual_seed(0))
        parts = losses["reconstruction"] + 0.5 * losses["kl"] + 2 * losses["regularizer"]
        assert torch.allclose(losses["total"], parts)

    def test_means_do_not_depend_on_how_much_there_is(self):
        objective = self.make()
        clip = torch.rand(1, 3, 1, 16, 16) * 2 - 1
        once, thrice = (objective(clip.expand(n, -1, -1, -1, -1), torch.Generator().manual_seed(0)) for n in (1, 3))
        assert once["kl"].item() == pytest.approx(thrice["kl"].item(), rel=1e-5)

    def test_the_teacher_stays_frozen_and_the_encoder_hears_it(self):
        objective = self.make(kl=0.0)
        losses = objective(torch.rand(1, 3, 5, 16, 16) * 2 - 1, torch.Generator().manual_seed(0))
        losses["regularizer"].backward()
        assert all(p.grad is None for p in objective.teacher.parameters())
        assert objective.student.encoder.conv_in.weight.grad.abs().max() > 0
        assert objective.student.decoder.conv_in.weight.grad is None

    def test_at_the_start_a_still_clip_regularizes_like_the_image_vae_reconstructs(self):
        objective = self.make()
        frame = torch.rand(1, 3, 1, 16, 16) * 2 - 1
        teacher = objective.teacher
        latents = objective.student.encode(frame.expand(-1, -1, 9, -1, -1)).mode()
        decoded = objective._teacher_decode(latents)
        expected = teacher.decode(teacher.encode(frame[:, :, 0]).mode())
        assert torch.allclose(decoded, expected[:, :, None].expand_as(decoded), atol=1e-4)


class TestData:
    def data(self, folder, seed=0, **settings):
        return ClipData(DataConfig(sources=[str(folder / "clips")], validation=["held_out"],
                                   buckets=[Bucket(1, 16, 2, 1.0), Bucket(5, 16, 1, 1.0)], **settings), seed)

    def test_a_batch_depends_on_seed_and_step_only(self, folder):
        one, two = self.data(folder), self.data(folder)
        later = two.batch(7)
        two.batch(0)
        for step in range(7):
            one.batch(step)
        assert torch.equal(one.batch(7), later)
        assert not torch.equal(one.batch(8), later) or one.batch(9).shape != later.shape
        assert not all(torch.equal(one.batch(s), self.data(folder, seed=1).batch(s)) for s in range(3))

    def test_shapes_and_range(self, folder):
        data = self.data(folder)
        shapes = set()
        for step in range(12):
            clip = data.batch(step)
            shapes.add(tuple(clip.shape))
            assert clip.min() >= -1 and clip.max() <= 1
        assert shapes == {(2, 3, 1, 16, 16), (1, 3, 5, 16, 16)}

    def test_held_out_files_never_train(self, folder):
        data = self.data(folder)
        assert [file.stem for file in data.files] == ["a", "b"]
        data.config.validation_frames, data.config.validation_size = 5, 16
        assert [(name, tuple(clip.shape)) for name, clip in data.validation()] == [("held_out", (1, 3, 5, 16, 16))]

    def test_long_files_are_reached_beyond_the_cached_stretch(self, folder, monkeypatch):
        data = self.data(folder)
        monkeypatch.setattr(type(data), "CACHED_FRAMES", 4)
        assert data.batch(0).shape[-1] == 16
        assert not data._cache.held

    def test_names_what_is_missing(self, folder):
        with pytest.raises(ValueError, match="names gone"):
            ClipData(DataConfig(sources=[str(folder / "clips")], validation=["gone"]), 0)
        with pytest.raises(FileNotFoundError, match="nowhere"):
            ClipData(DataConfig(sources=[str(folder / "nowhere")]), 0)


def final_state(trainer):
    return torch.load(trainer.out / "checkpoint.pt", weights_only=True)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def whole(folder):
    """A run from the first step to the last."""
    trainer = Trainer(config(folder, "whole"))
    trainer.run()
    return trainer


class TestRuns:
    def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(self, folder, whole):
        stopped = Trainer(config(folder, "stopped"))
        stopped.run(lambda step, _: stopped.stop() if step == 3 else None)
        assert stopped.step == 3
        resumed = Trainer(config(folder, "stopped"), resume=True)
        resumed.run()
        expected, found = final_state(whole), final_state(resumed)
        for key in ("step", "model", "ema", "optimizer", "torch_rng"):
            assert equal(found[key], expected[key]), key
        for log in ("losses.csv", "validation.csv"):
            assert (resumed.out / log).read_text() == (whole.out / log).read_text()

    def test_a_crash_between_saves_repeats_the_lost_steps_exactly(self, folder, whole, monkeypatch):
        crashed = Trainer(config(folder, "crashed"))

        def crash(step, _):
            if step == 5:
                monkeypatch.setattr(crashed, "_save", lambda: None)  # as kill -9: no last save
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            crashed.run(crash)
        resumed = Trainer(config(folder, "crashed"), resume=True)
        assert resumed.step == 4
        resumed.run()
        assert equal(final_state(resumed)["model"], final_state(whole)["model"])
        assert (resumed.out / "losses.csv").read_text() == (whole.out / "losses.csv").read_text()

    def test_cancelling_at_a_validation_step_keeps_its_scores(self, folder):
        trainer = Trainer(config(folder, "scored", "run.validate_every=2"))

        def cancel(step, _):
            if step == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            trainer.run(cancel)
        resumed = Trainer(config(folder, "scored", "run.validate_every=2"), resume=True)
        assert resumed.scores == trainer.scores and resumed.scores
        resumed.run()
        rows = list(csv.DictReader(open(resumed.out / "validation.csv", encoding="utf-8")))
        assert [int(row["step"]) for row in rows] == [0, 2, 4, 6]

    def test_cancelling_saves_first(self, folder):
        trainer = Trainer(config(folder, "cancelled"))

        def cancel(step, _):
            if step == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            trainer.run(cancel)
        assert final_state(trainer)["step"] == 3

    def test_writes_logs_and_a_model_that_loads(self, folder, whole):
        rows = list(csv.DictReader(open(whole.out / "losses.csv", encoding="utf-8")))
        assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
        assert [int(row["step"]) for row in csv.DictReader(open(whole.out / "validation.csv"))] == [0, 6]
        vae = cvvae.load(whole.out / "model.safetensors")
        assert vae.config.variant == "inflated" and vae.config.norm_groups == 4
        facts = checkpoint.read_metadata(whole.out / "model.safetensors")
        assert facts["steps"] == 6 and set(facts["validation"]) == {"psnr", "image_vae_psnr", "compatibility_psnr"}
        assert facts["training"]["data"]["sources"] == ["clips"]
        assert str(folder) not in json.dumps(facts["training"]["data"])

    def test_the_result_is_the_moving_average(self, whole):
        ema = final_state(whole)["ema"]
        saved = load_file(whole.out / "model.safetensors")
        assert all(torch.equal(saved[name], tensor.half()) for name, tensor in ema.items() if tensor.is_floating_point())
        assert any(not torch.equal(ema[name], tensor) for name, tensor in final_state(whole)["model"].items())

    def test_a_finished_run_is_not_overwritten(self, folder, whole):
        with pytest.raises(ConfigError, match="--resume"):
            Trainer(config(folder, "whole"))

    def test_a_failed_save_leaves_the_last_one(self, folder, whole, monkeypatch):
        before = (whole.out / "checkpoint.pt").read_bytes()

        def full(state, path):
            with open(path, "wb") as file:
                file.write(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space"):
            whole._save()
        assert (whole.out / "checkpoint.pt").read_bytes() == before
        assert not list(whole.out.glob(".*"))

    def test_training_lowers_the_loss(self, folder):
        trainer = Trainer(config(folder, "longer", "optim.steps=40", "optim.learning_rate=0.005", "run.validate_every=40"))
        before = []
        trainer.run(lambda step, losses: before.append(trainer.scores["psnr"]) if step == 1 else None)
        assert trainer.scores["psnr"] > before[0] + 1

    def test_bf16_trains(self, folder):
        trainer = Trainer(config(folder, "bf16", "run.precision=bf16", "optim.steps=2"))
        trainer.run()
        assert trainer.student.dtype == torch.float32

    def test_an_image_vae_trains_from_scratch(self, folder):
        trainer = Trainer(config(folder, "image", "model.kind=image", "model.widths=[8, 8, 8, 8]", "model.norm_groups=4",
                                 "data.buckets=[{frames = 1, size = 16, batch = 2}]", "optim.steps=2"))
        trainer.run()
        assert cvvae.load_image_vae(trainer.out / "model.safetensors").config.widths == (8, 8, 8, 8)
        assert set(trainer.scores) == {"psnr"}

    def test_a_gradient_that_is_not_finite_is_not_applied(self, folder, monkeypatch):
        trainer = Trainer(config(folder, "nan"))
        monkeypatch.setattr(trainer.data, "batch", lambda step: torch.full((1, 3, 1, 16, 16), float("nan")))
        before = {name: tensor.clone() for name, tensor in trainer.student.state_dict().items()}
        with pytest.raises(FloatingPointError, match=r"Step 0.*learning_rate"):
            trainer.run()
        assert equal(trainer.student.state_dict(), before)
