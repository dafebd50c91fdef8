"""The benchmarks measure what they say: order, medians, memory, tables; and one of each kind runs to its end."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ablation
import cases
import fresh
import growth
import interpolation
import long_clips
import machine
import memory
import precision
import pytest
import reference
import speed
import torch
import train_step

import cvvae
from cvvae.training.config import Bucket

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = ["--widths", "32", "32", "32", "32", "--device", "cpu"]
MEDIA = Path(__file__).parents[1] / "workflows" / "media"
MB = 10**6


class TestTiming:
    def test_contenders_take_turns_after_one_call_of_each(self):
        order = []
        calls = {name: lambda name=name: order.append(name) for name in "ab"}
        seconds = machine.interleave(calls, 3)
        assert order == list("ab" "ababab")
        assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3}

    def test_the_first_results_are_checked_before_anything_is_timed(self):
        order = []
        machine.interleave({"a": lambda: order.append("a") or 7}, 1, check=order.append)
        assert order == ["a", {"a": 7}, "a"]

    def test_seconds_are_those_of_the_call(self):
        seconds = machine.interleave({"slow": lambda: time.sleep(0.02), "quick": lambda: None}, 2)
        assert min(seconds["slow"]) >= 0.02 > max(seconds["quick"])

    @pytest.mark.parametrize("seconds, text", [([3.0, 1.0, 1.5], "1.5 s (1 to 3)"), ([0.12345], "0.123 s"),
                                               ([1234.4], "1234 s")])
    def test_the_median_is_shown_with_its_range(self, seconds, text):
        assert machine.seconds_text(seconds) == text


class TestPeakMemory:
    def test_what_the_block_allocates_is_seen_even_when_it_is_freed(self):
        with machine.PeakMemory() as taken:
            torch.ones(50 * MB)
        assert 190 * MB < taken.extra < 230 * MB

    def test_what_was_there_before_is_not(self):
        held = torch.ones(50 * MB)
        with machine.PeakMemory() as taken:
            held.sum()
        assert taken.extra < 20 * MB

    def test_what_was_freed_before_does_not_hide_what_comes(self):
        freed = [torch.ones(MB // 40) for _ in range(2000)]  # 200 MB in pieces that malloc keeps for itself
        del freed
        with machine.PeakMemory() as taken:
            held = [torch.ones(MB // 40) for _ in range(2000)]
        assert len(held) and taken.extra > 180 * MB

    def test_other_devices_are_refused(self):
        with pytest.raises(ValueError, match="'mps' cannot be measured"):
            machine.PeakMemory("mps")


class TestReports:
    def test_a_table_has_every_column_and_leaves_gaps(self):
        assert machine.table([{"a": 1, "b": 2}, {"a": 3, "c": 4}]).splitlines() == [
            "| a | b | c |", "| --- | --- | --- |", "| 1 | 2 |  |", "| 3 |  | 4 |"]

    def test_numbers_and_machine_are_written_but_no_folder(self, tmp_path):
        options = argparse.Namespace(out=tmp_path / "new", rounds=2, reference=tmp_path / "checkout")
        machine.publish("name", "Title", options, [{"a": 1}], [{"seconds": [0.5]}])
        written = (tmp_path / "new" / "name.json").read_text()
        report = json.loads(written)
        assert report["measurements"] == [{"seconds": [0.5]}] and report["options"]["rounds"] == 2
        assert report["machine"]["torch"] == torch.__version__ and report["machine"]["cores"] >= 1
        assert str(tmp_path) not in written
        assert "| 1 |" in (tmp_path / "new" / "name.md").read_text()

    def test_a_distance_is_in_standard_deviations(self):
        expected = torch.tensor([0.0, 2.0, 4.0])  # of standard deviation 2
        assert reference.distance(expected + torch.tensor([0.0, 1.0, 0.0]), expected) == pytest.approx(0.5)
        assert reference.distance(expected * float("nan"), expected) == float("inf")


class TestCases:
    @pytest.mark.parametrize("text", ["17x256", "16x256x256", "17x250x256", "0x8x8", "17x256xa", "17x-8x8"])
    def test_sizes_that_cannot_be_compared_are_refused(self, text):
        with pytest.raises(argparse.ArgumentTypeError):
            cases.parse_size(text)

    def test_a_clip_and_its_latents_fit_each_other(self):
        decode = cases.Case("decode", "sd3", 17, 64, 48, batch=2)
        assert decode.input().shape == (2, 16, 5, 8, 6) and decode.size == "2 x 17x64x48"
        clip = cases.Case("encode", "v1", 5, 16, 24).input()
        assert clip.shape == (1, 3, 5, 16, 24) and clip.abs().max() <= 1

    def test_operations_are_counted_for_every_window_and_clip(self):
        widths, tiling = (32, 32, 32, 32), cvvae.Tiling()
        one = cases.Case("encode", "v1", 17, 16, 16).flop(widths, tiling)
        assert one > 10**8
        assert cases.Case("encode", "v1", 33, 16, 16).flop(widths, tiling) == 2 * one
        assert cases.Case("encode", "v1", 17, 16, 16, batch=3).flop(widths, tiling) == 3 * one

    def test_every_axis_starts_from_the_same_clip(self):
        options = argparse.Namespace(variants=["v1"], operations=["decode"], base=cases.Size(5, 64, 64), frames=[1, 5],
                                     sides=[64, 128], batches=[1, 2])
        base = cases.Case("decode", "v1", 5, 64, 64)
        points = list(growth.points(options))
        assert [(axis, value) for axis, value, case in points if case == base] == [("frames", 5), ("side", 64), ("batch", 1)]
        assert {case.size for _, _, case in points} == {"1x64x64", "5x64x64", "5x128x128", "2 x 5x64x64"}


class TestCommands:
    def test_speed_measures_ours_and_the_definition(self, tmp_path):
        speed.main([*SMALL, "--cases", "1x16x16", "5x16x16", "--variant", "v1", "--rounds", "2", "--plain",
                    "--out", str(tmp_path)])
        found = json.loads((tmp_path / "speed.json").read_text())["measurements"]
        assert [(one["operation"], one["frames"]) for one in found] == [("encode", 1), ("decode", 1), ("encode", 5),
                                                                        ("decode", 5)]
        assert all(len(one["seconds"][name]) == 2 for one in found for name in ("ours", "plain"))
        assert all(one["differences"]["ours"] < 1e-3 for one in found)
        assert "plain / ours" in (tmp_path / "speed.md").read_text()

    def test_speed_refuses_to_time_models_that_differ(self):
        case = cases.Case("decode", "v1", 1, 16, 16)
        models = {name: reference.Contender(None, lambda z, scale=scale: z * scale) for name, scale in
                  (("ours", 1.0), ("other", 1.1))}
        options = argparse.Namespace(device="cpu", dtype="float32", rounds=1, widths=(32, 32, 32, 32))
        with pytest.raises(SystemExit, match="ours and other differ"):
            speed.measure(case, models, options)

    def test_memory_measures_in_another_process(self, tmp_path):
        memory.main([*SMALL, "--cases", "5x16x16", "--variant", "sd3", "--operations", "decode", "--memory", "none",
                     "--out", str(tmp_path)])
        (found,) = json.loads((tmp_path / "memory.json").read_text())["measurements"]
        assert found["peak_bytes"] >= 0 and found["result_bytes"] == 4 * 3 * 5 * 16 * 16 and len(found["seconds"]) == 1

    @pytest.mark.slow
    def test_what_comfyui_is_told_is_what_is_taken(self, tmp_path):
        memory.main(["--widths", "32", "32", "64", "64", "--cases", "17x128x128", "--variant", "v1", "--memory", "none",
                     "--device", "cpu", "--out", str(tmp_path)])
        for found in json.loads((tmp_path / "memory.json").read_text())["measurements"]:
            assert 0.75 <= found["estimated_bytes"] / found["peak_bytes"] <= 1.25, found

    def test_a_process_that_is_ended_gives_nothing(self):
        assert fresh.call(os._exit, 1) == {}

    def test_long_clips_come_back_whole(self, tmp_path):
        streamed = long_clips.through_streams("tiny", "cpu", 18, 16)
        source = tmp_path / "source.mp4"
        long_clips.write_clip(source, 18, 16)
        reconstructed = long_clips.through_files("tiny", "cpu", 18, source)
        for found in (streamed, reconstructed):
            assert found["seconds"] > 0 and set(found["peak_bytes"]) == {"cpu"}

    def test_precision_compares_with_float32(self, tmp_path):
        long_clips.write_clip(tmp_path / "waves.mp4", 5, 32)
        precision.main(["--clips", str(tmp_path / "waves.mp4"), "--dtypes", "bfloat16", "--devices", "cpu",
                        "--out", str(tmp_path)])
        (found,) = json.loads((tmp_path / "precision.json").read_text())["measurements"]
        assert found["finite"] and 30 < found["decoded_psnr_db"] < 100 and 0 < found["latents_max_error_sd"] < 1

    def test_growth_is_drawn(self, tmp_path):
        pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
        points = [{"axis": axis, "value": value, "contender": "ours", "operation": "encode", "seconds": [value / 10],
                   "peak_bytes": value * MB} for axis in ("frames", "batch") for value in (1, 2)]
        growth.plot(growth.load_pyplot(), points, tmp_path / "growth.png")
        assert (tmp_path / "growth.png").stat().st_size > 10_000

    def test_a_script_finds_the_others_beside_it_and_shows_defaults(self, tmp_path):
        shown = subprocess.run([sys.executable, BENCHMARKS / "speed.py", "--help"], cwd=tmp_path, text=True,
                               env=os.environ | {"COLUMNS": "200"}, capture_output=True, check=True).stdout
        assert "--reference PATH" in shown and "(default: 1x512x512 17x256x256)" in shown


@pytest.fixture
def one_thread(monkeypatch):
    """Here and in processes started from here: such small steps have nothing for more threads to do."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
class TestTrainStep:
    @staticmethod
    def options(**changed):
        return argparse.Namespace(**{"widths": (32, 32, 32, 32), "device": "cpu", "reference": None, "settings": ["plain"],
                                     "precisions": ["fp32"], "gans": ["none"], "keep_activations": False, "rounds": 1,
                                     "measure": ["time"]} | changed)

    @pytest.mark.slow
    def test_time_and_memory_of_ours(self, tmp_path):
        train_step.main([*SMALL, "--cases", "5x16x16", "--precision", "fp32", "--gan", "none", "--settings", "plain",
                         "one_pass", "--rounds", "2", "--out", str(tmp_path)])
        (found,) = json.loads((tmp_path / "train_step.json").read_text())["measurements"]  # one_pass concerns the GAN only
        assert found["contender"] == "ours, plain" and len(found["seconds"]) == 2 and found["difference"] is None
        weights = sum(parameter.numel() for parameter in train_step.models((32, 32, 32, 32))[0].parameters())
        assert found["peak_bytes"] > found["kept_bytes"] > 4 * 5 * weights  # gradient, two moments, moving average
        assert "| 5x16x16 | fp32 | no | ours, plain |" in (tmp_path / "train_step.md").read_text()

    def test_every_setting_reaches_the_trainer(self, tmp_path):
        task = train_step.Task(cases.Size(5, 16, 16), "bf16", "hinge")
        config = train_step.training_config(task, "checkpointing+channels_last+one_pass+adamw8bit", self.options(), tmp_path)
        assert config.run.checkpointing and config.run.channels_last and config.run.precision == "bf16"
        assert config.loss.gan == "hinge" and config.loss.gan_passes == 1 and config.optim.optimizer == "adamw8bit"
        assert config.loss.kl == pytest.approx(16 * 2 / 192)

    @pytest.mark.parametrize("arguments, message", [
        (["--settings", "plain+fast"], "fast, plain: expected plain, or some of checkpointing, "),
        (["--settings", "official_discriminator"], "official_discriminator needs --reference"),
        (["--fit", "--device", "cpu"], "there is no CUDA here")])
    def test_what_cannot_be_measured_is_said(self, arguments, message, capsys):
        with pytest.raises(SystemExit):
            train_step.main(arguments)
        assert message in capsys.readouterr().err

    def test_steps_that_differ_are_not_compared(self):
        task = train_step.Task(cases.Size(5, 16, 16), "fp32", "none")
        losses = dict.fromkeys(("reconstruction", "decoder_regularizer", "kl", "total", "gradient_norm"), 0.5)
        assert train_step.difference(losses | {"kl": 0.5001}, losses, task, "ours, plain") == pytest.approx(2e-4)
        for wrong in (0.501, float("nan")):
            with pytest.raises(SystemExit, match="kl is .* by ours, plain and 0.5 by the official code"):
                train_step.difference(losses | {"kl": wrong}, losses, task, "ours, plain")

    def test_what_fits_is_tried_from_the_best_down(self, monkeypatch):
        monkeypatch.setattr(fresh, "call", lambda function, *arguments: function(*arguments))
        found = train_step.fit([Bucket(5, 16, 16, 1)], self.options())
        assert [one["setting"] for one in found] == ["plain", "checkpointing"]
        assert all(one["peak_bytes"] > one["kept_bytes"] > 0 for one in found)

    def test_a_budget_gets_the_first_that_fits(self):
        first = {"clip": "17x256x256", "precision": "bf16", "GAN": "yes", "setting": "plain", "peak_bytes": 20 * 2**30,
                 "second_step_seconds": 1.0}
        measurements = [first, first | {"setting": "checkpointing", "peak_bytes": 10 * 2**30}]
        assert [train_step.fit_row(first)[f"{budget} GB"] for budget in train_step.BUDGETS] == ["no", "no", "no", "yes"]
        lines = train_step.best_fits(measurements).splitlines()[-4:]
        assert [line.rpartition(" ")[2] for line in lines] == ["these", "checkpointing", "checkpointing", "plain"]
        assert "more than there is here" in train_step.fit_row({key: first[key] for key in list(first)[:4]}).values()

    @pytest.mark.parametrize("gan, setting", [("none", "checkpointing"), ("hinge", "official_discriminator")])
    def test_the_official_step_has_the_same_losses_and_gradient(self, gan, setting):
        path = os.environ.get("CVVAE_REFERENCE")
        if not path:
            pytest.skip("set CVVAE_REFERENCE to a checkout of github.com/AILab-CVC/CV-VAE to compare with it")
        pytest.importorskip("diffusers", reason="the official code needs diffusers")
        options = self.options(reference=Path(path), settings=[setting])
        task = train_step.Task(cases.Size(9, 32, 32), "fp32", gan)
        seconds, differences = train_step.time_steps(task, options)
        assert differences[f"ours, {setting}"] < 1e-4 and set(seconds) == {f"ours, {setting}", "reference"}


@pytest.mark.usefixtures("one_thread")
class TestAblation:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(ablation, "LAST", 5)  # frames that are scored
        monkeypatch.setattr(ablation, "describe", lambda: {"cores": 1})

    def run(self, out, *more):
        clips = out / "source"
        if not clips.exists():
            clips.mkdir(parents=True)
            shutil.copy(MEDIA / "flower.mp4", clips)
        ablation.main(["--clips", str(clips), "--out", str(out / "table"), "--arms", "decoder", "--seeds", "0",
                       "--size", "16", "--frames", "5", "--score-size", "32", "--steps", "2", *more])

    def test_a_table_is_made_once_and_of_one_kind(self, tmp_path, monkeypatch):
        pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
        self.run(tmp_path)
        table = tmp_path / "table"
        (found,) = json.loads((table / "ablation.json").read_text())["measurements"]
        assert (found["arm"], found["seed"], found["resumed_at"]) == ("decoder", 0, 0)
        assert found["scores"]["psnr"] > 10 and found["untrained"]["psnr"] > 10
        written = (table / "ablation.md").read_text()
        assert "| decoder | random |" in written and "| before training | - |" in written
        assert (table / "ablation.png").stat().st_size > 10_000

        monkeypatch.setattr(ablation, "train", lambda *_: pytest.fail("a finished run was trained again"))
        self.run(tmp_path)
        with pytest.raises(SystemExit, match="runs with other settings: steps was 2 and is 3. Choose another --out"):
            self.run(tmp_path, "--steps", "3")

    def test_an_interrupted_run_goes_on(self, tmp_path):
        folder = tmp_path / "clips"
        folder.mkdir()
        held_out = ablation.split(MEDIA / "flower.mp4", folder, 32)
        options = argparse.Namespace(out=tmp_path, frames=[5], size=16, teacher="tiny", score_size=32, steps=2, rate=1e-3)
        config = ablation.run_config(ablation.ARMS["none"], 0, options, [held_out], tmp_path / "run")
        trainer = ablation.Trainer(config)
        with pytest.raises(KeyboardInterrupt):
            trainer.run(lambda step, losses: (_ for _ in ()).throw(KeyboardInterrupt))
        found = ablation.train(config, threads=1)
        assert found["resumed_at"] == 1 and found["scores"]["psnr"] > 10

    def test_held_out_clips_are_spread_and_whole(self):
        names = [f"clip{k}" for k in "abcdefghijkl"] + ["shoot_0", "shoot_1"]
        assert ablation.choose_held_out(names, None) == ["clipa", "clipe", "clipi"]
        assert ablation.choose_held_out(names, ["shoot_1", "clipb"]) == ["clipb", "shoot_1"]
        assert ablation.choose_held_out(["shoot_0", "shoot_1"], None) == ["shoot_1"]
        with pytest.raises(SystemExit, match="--held-out names other, found nowhere"):
            ablation.choose_held_out(names, ["other"])

    def test_arms_are_compared_seed_by_seed(self):
        scores = {"decoder": [26.0, 27.0], "both": [25.5, 27.25], "encoder": [20.0]}
        found = [{"arm": arm, "seed": seed, "scores": {"psnr": psnr, "image_vae_psnr": 30.0}}
                 for arm, values in scores.items() for seed, psnr in enumerate(values)]
        assert ablation.differences(found, "psnr", "decoder", "both") == [0.5, -0.25]
        assert ablation.differences(found, "psnr", "decoder", "encoder") == [6.0]
        assert ablation.mean_text([26.0, 27.0], 2) == "26.50 ± 0.71" and ablation.mean_text([], 2) == "-"
        written = ablation.notes(found)
        assert "PSNR: decoder - both = 0.12 ± 0.53 dB, above 0 in 1 of 2 seeds" in written
        assert "over 2 seeds" in written and "30.00 dB" in written and "slice" not in written
        assert ablation.row("decoder", found)["PSNR"] == "26.50 ± 0.71"


class TestReference:
    def test_a_wrong_path_is_named(self, tmp_path, capsys):
        with pytest.raises(SystemExit, match="is not a checkout of github.com/AILab-CVC/CV-VAE"):
            reference.official(tmp_path)
        with pytest.raises(SystemExit):
            speed.main(["--reference", str(tmp_path)])
        assert "is not a checkout" in capsys.readouterr().err

    @pytest.mark.parametrize("variant", ["v1", "sd3"])
    @pytest.mark.parametrize("operation", cases.OPERATIONS)
    def test_the_official_code_gives_the_same_numbers(self, variant, operation):
        path = os.environ.get("CVVAE_REFERENCE")
        if not path:
            pytest.skip("set CVVAE_REFERENCE to a checkout of github.com/AILab-CVC/CV-VAE to compare with it")
        pytest.importorskip("diffusers", reason="the official code needs diffusers")
        widths = (32, 32, 64, 64)
        case = cases.Case(operation, variant, 21, 32, 48)
        x = case.input()
        official = case.run(reference.reference(path, variant, widths), x)
        assert reference.distance(case.run(reference.ours(variant, widths), x), official) < 1e-4


class TestInterpolation:
    def test_ways_without_a_model(self):
        keyframes = torch.tensor([0.0, 4.0, 8.0]).view(1, 1, 3, 1, 1)
        assert interpolation.repeated(keyframes).flatten().tolist() == [0, 0, 0, 4, 4, 4, 4, 8, 8]
        assert interpolation.blended(keyframes).flatten().tolist() == list(range(9))

    def test_only_held_out_frames_count(self):
        clip = torch.zeros(1, 3, 5, 8, 8)
        guess = clip.clone()
        guess[:, :, [0, 4]] = 1
        assert interpolation.held_out_psnr(guess, clip) > 90
        guess[:, :, 2] = 1
        assert interpolation.held_out_psnr(guess, clip) < 12

    def test_a_run(self, tmp_path):
        pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
        interpolation.main(["--clips", str(MEDIA), "--frames", "5", "--strides", "1", "--size", "32", "--device", "cpu",
                            "--out", str(tmp_path)])
        measurements = json.loads((tmp_path / "interpolation.json").read_text())["measurements"]
        assert {m["clip"] for m in measurements} == {path.stem for path in MEDIA.glob("*.mp4")}
        ways = [*interpolation.PIXELS, interpolation.BASE, "decoded in video mode, tiny", interpolation.BEST]
        assert all(list(m["psnr_db"]) == ways and 10 < min(m["psnr_db"].values()) for m in measurements)
        assert (tmp_path / "interpolation.png").stat().st_size
