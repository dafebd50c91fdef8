"""The trainer: its objective, its data, and runs that go on exactly where they stopped."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import drawn
import pytest
import random_weights
import small_run
import torch
from safetensors.torch import load_file
from small_run import config, equal, final_state

import cvvae
from cvvae import checkpoint
from cvvae.training.config import Bucket, ConfigError, OptimConfig, TrainConfig, at_step, read_config, tomllib
from cvvae.training.objective import map_frames
from cvvae.training.trainer import Trainer, learning_rate

ROOT = Path(__file__).parents[1]


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
        ("data.buckets=[{frames=4}]", r"data.buckets\[0\].frames is 4; expected 1 \+ 4n"),
        ("data.buckets=[{width=20}]", r"data.buckets\[0\].width is 20"),
        ("loss.kl=[[5,1],[2,1]]", r"expected a number or \[\[step, value\], ...\] with rising steps"),
        ("loss.kl=often", "loss.kl is 'often'; expected float"),
        ("loss.gan=wasserstein", "loss.gan is 'wasserstein'; expected one of none, hinge, non-saturating"),
        ("loss.gan_channels=10", "loss.gan_channels is 10; expected a multiple of 4"),
        ("model.train=encoder loss.regularizer=encoder", "trains the video decoder only"),
        ("model.train=encoder loss.gan=hinge", "Set loss.gan_adaptive to false"),
        ("loss.gan=non-saturating loss.gan_passes=1", "Set loss.gan_passes to 2"),
        ("model.kind=image", "an image VAE trains on single frames"),
        ("data.sources=[]", "data.sources is empty"),
        ("run.save_every=0", "run.save_every is 0; expected 1 or more"),
        ("data.max_stride=0", "data.max_stride is 0; expected 1 or more"),
        ("nonsense", "expected key=value"),
    ])
    def test_values_that_cannot_work_are_named(self, folder, override, message):
        with pytest.raises(ConfigError, match=message):
            config(folder, "wrong", *override.split(" "))

    def test_overrides_reach_their_key(self, folder):
        read = config(folder, "override", "optim.learning_rate=2", "run.name=a b")
        assert read.optim.learning_rate == 2.0 and read.run.name == "a b"


    @pytest.mark.parametrize("path", sorted(set(ROOT.glob("configs/*.toml")) - set(ROOT.glob("configs/adapt*"))),
                             ids=lambda path: path.stem)
    def test_the_shipped_ones_can_be_read(self, path):
        assert read_config(path).optim.steps >= 1000

    def test_the_page_of_settings_has_each_with_its_default(self):
        page = (ROOT / "docs" / "training_settings.md").read_text()
        written = dict(re.findall(r"^\| `(\w+\.\w+)` \| `(.+?)` \|", page, re.MULTILINE))
        written = {key: tomllib.loads(f"x = {value}")["x"] for key, value in written.items()}
        defaults = {f"{section}.{key}": value for section, values in dataclasses.asdict(TrainConfig()).items()
                    for key, value in values.items() if key != "buckets"}
        assert written == defaults
        assert all(f"`{field.name}`" in page or f" {field.name}" in page for field in dataclasses.fields(Bucket))


class TestSchedule:
    def test_warms_up_falls_and_stays_down(self):
        optim = OptimConfig(steps=100, warmup=10, learning_rate=1.0, final_ratio=0.1)
        rates = [learning_rate(optim, step) for step in range(400)]
        assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0)
        assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
        assert rates[100:] == [pytest.approx(0.1)] * 300


    def test_a_weight_moves_between_its_points(self):
        weight = [[10.0, 0.0], [20.0, 1.0], [30.0, 1.0], [31.0, 0.5]]
        assert [at_step(weight, step) for step in (0, 10, 15, 20, 25, 30, 31, 99)] == [0, 0, 0.5, 1, 1, 1, 0.5, 0.5]
        assert at_step(0.3, 7) == 0.3


class TestMapFrames:
    clip = torch.arange(9.0)[None, None, :, None, None].expand(3, 3, 9, 2, 2)

    @pytest.mark.parametrize("mapping, expected", [("first", [0]), ("slice", [0, 4, 8]), ("average", [0, 2.5, 6.5])])
    def test_fixed_choices(self, mapping, expected):
        assert map_frames(self.clip, mapping)[0, 0, :, 0, 0].tolist() == expected

    def test_random_takes_one_of_each_group_for_every_clip(self):
        seen = [set(), set()]
        differ = False
        for seed in range(40):
            chosen = map_frames(self.clip, "random", draws(seed, seed + 100, seed + 200))
            assert chosen.shape == (3, 3, 3, 2, 2)
            picks = chosen[:, 0, :, 0, 0]
            assert (picks[:, 0] == 0).all() and torch.equal(chosen, picks[:, None, :, None, None].expand_as(chosen))
            seen[0] |= set(picks[:, 1].tolist())
            seen[1] |= set(picks[:, 2].tolist())
            differ |= len(set(picks[:, 1].tolist())) > 1
        assert seen == [{1, 2, 3, 4}, {5, 6, 7, 8}] and differ

    def test_a_clips_choice_does_not_depend_on_its_batch(self):
        together = map_frames(self.clip, "random", draws(1, 2, 3))
        assert torch.equal(together[1:2], map_frames(self.clip[1:2], "random", draws(2)))

    def test_a_picture_is_itself(self):
        assert torch.equal(map_frames(self.clip[:, :, :1], "random"), self.clip[:, :, :1])


def draws(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_run.make_folder(tmp_path_factory.mktemp("training"))


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
        assert equal({k: v for k, v in found.items() if k != "config"},
                     {k: v for k, v in expected.items() if k != "config"})
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
        assert facts["steps"] == 6 and {"psnr", "image_vae_psnr", "compatibility_psnr"} <= set(facts["validation"])
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
        newest = whole.checkpoints.files()[-1]
        before = newest.read_bytes()

        def full(state, path):
            with open(path, "wb") as file:
                file.write(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space"):
            whole._save()
        assert newest.read_bytes() == before
        assert [file.name for file in whole.checkpoints.folder.iterdir() if file.name.startswith(".")] == []

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
                                 "data.buckets=[{frames = 1, height = 16, width = 16, batch = 2}]", "optim.steps=2"))
        trainer.run()
        assert cvvae.load_image_vae(trainer.out / "model.safetensors").config.widths == (8, 8, 8, 8)
        assert "psnr" in trainer.scores and "compatibility_psnr" not in trainer.scores

    @pytest.mark.parametrize("variant", ["v1", "sd3", "inflated"])
    def test_goes_on_from_a_cv_vae(self, folder, variant):
        """The published layouts, with their temporal attention, and our own."""
        start = folder / f"{variant}.safetensors"
        video_vae = random_weights.video_vae(variant)
        checkpoint.save(video_vae, start)
        channels = video_vae.config.latent_channels
        teacher = folder / f"teacher_{channels}.safetensors"
        checkpoint.save(drawn.small_image_vae(latent_channels=channels), teacher)
        trainer = Trainer(config(folder, f"from_{variant}", f"model.teacher={teacher}", f"model.student={start}",
                                 "optim.steps=2", "loss.regularizer=both", "run.checkpointing=true"))
        assert equal(trainer.student.state_dict(), video_vae.state_dict())
        trainer.run()
        result = cvvae.load(trainer.out / "model.safetensors")
        assert result.config == video_vae.config
        moved = [name for name, tensor in trainer.student.named_parameters()
                 if not torch.equal(tensor, video_vae.get_parameter(name))]
        assert len(moved) > 0.9 * len(list(video_vae.parameters()))

    def test_a_cv_vae_of_another_latent_space_is_refused(self, folder):
        checkpoint.save(random_weights.video_vae("sd3"), folder / "wide.safetensors")
        with pytest.raises(ConfigError, match="model.student has 16 latent channels, model.teacher has 4"):
            Trainer(config(folder, "refused", f"model.student={folder / 'wide.safetensors'}"))
