"""Runs that survive: kill -9, gradients that are not finite, full disks and memories, several processes, other settings."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import small_run
import torch
from safetensors.torch import load_file
from small_run import config, equal, final_state, kill_when_saved, write_config

import cvvae
from cvvae import checkpoint
from cvvae.training import TrainingError
from cvvae.training.config import ConfigError
from cvvae.training.trainer import Trainer

ALL_TERMS = ("loss.gan=hinge", "loss.gan_channels=8", "loss.gan_layers=2", "loss.gan_start=2", "loss.learn_logvar=true",
             "loss.regularizer=both", "loss.perceptual=ms-ssim", "loss.outliers=0.1", "loss.statistics=0.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_run.make_folder(tmp_path_factory.mktemp("survival"))


@pytest.fixture(autouse=True)
def one_thread():
    """As :func:`command` has it: sums over several threads are taken in another order, and round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def command(path, *arguments, processes=0):
    """Run ``train`` in a Python of its own; one thread each, so that sums are taken in one order."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0",
                "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"] if processes else []
    return subprocess.Popen([sys.executable, *launcher, "-m", "cvvae", "train", str(path), *arguments],
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, cwd=os.path.dirname(os.path.dirname(cvvae.__file__)))


def assert_close(one, other, tolerance):
    """The weights of two runs."""
    expected, found = final_state(one)["model"], final_state(other)["model"]
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            assert (found[name] - tensor).abs().max() < tolerance, name


def assert_rows_close(folder, log, tolerance):
    """The numbers two runs wrote, the runs being called one and two."""
    with (folder / "one" / log).open() as one, (folder / "two" / log).open() as two:
        for expected, found in zip(csv.DictReader(one), csv.DictReader(two), strict=True):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert float(found[name] or 0) == pytest.approx(float(value or 0), rel=tolerance, abs=1e-3), name


@pytest.mark.slow
class TestKill:
    def test_kill_9_loses_the_steps_since_the_last_save_and_nothing_else(self, folder):
        overrides = ["optim.steps=400", "run.save_every=2", "run.validate_every=1000", *ALL_TERMS]
        process = command(write_config(folder, "killed"), *overrides)
        killed_at = kill_when_saved(process, folder / "killed" / "checkpoints")
        whole = Trainer(config(folder, "not_killed", *overrides))
        whole.run(lambda step, _: whole.stop() if step == killed_at + 4 else None)
        resumed = Trainer(config(folder, "killed", *overrides), resume=True)
        assert resumed.step == killed_at
        resumed.run(lambda step, _: resumed.stop() if step == killed_at + 4 else None)
        expected, found = final_state(whole), final_state(resumed)
        for key in expected.keys() - {"config"}:
            assert equal(found[key], expected[key]), key
        assert (resumed.out / "losses.csv").read_text() == (whole.out / "losses.csv").read_text()

    def test_sigterm_saves_and_stops(self, folder):
        process = command(write_config(folder, "terminated"), "optim.steps=100000", "run.validate_every=100000",
                          "run.save_every=100000")
        losses = folder / "terminated" / "losses.csv"
        deadline = time.monotonic() + 120
        while not losses.exists() or len(losses.read_text().splitlines()) < 3:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "go on with --resume" in output
        saved = sorted((folder / "terminated" / "checkpoints").glob("step_*.pt"))[-1]
        assert torch.load(saved, weights_only=True)["step"] == len(losses.read_text().splitlines()) - 1
        cvvae.load(folder / "terminated" / "model.safetensors")

    def test_a_damaged_checkpoint_is_left_out(self, folder, capsys):
        trainer = Trainer(config(folder, "damaged", "run.keep=3"))
        trainer.run()
        older, newest = trainer.checkpoints.files()[-2:]
        newest.write_bytes(newest.read_bytes()[:1000])
        resumed = Trainer(config(folder, "damaged", "run.keep=3"), resume=True)
        assert f"step_{resumed.step:08d}.pt" == older.name
        assert newest.name in capsys.readouterr().out

    def test_the_newest_are_kept(self, folder):
        trainer = Trainer(config(folder, "kept", "run.save_every=1", "run.keep=2"))
        trainer.run()
        assert [file.name for file in trainer.checkpoints.files()] == ["step_00000005.pt", "step_00000006.pt"]


class TestProcesses:
    @pytest.mark.slow
    def test_two_processes_take_the_steps_of_one_with_twice_the_batch(self, folder):
        buckets = "data.buckets=[{{frames=1,height=16,width=16,batch={0}}},{{frames=5,height=16,width=16,batch={0}}}]"
        settings = ("optim.steps=5", *ALL_TERMS)
        process = command(write_config(folder, "two"), buckets.format(1), *settings, processes=2)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        one = Trainer(config(folder, "one", buckets.format(2), *settings))
        one.run()
        two = torch.load(sorted((folder / "two" / "checkpoints").glob("*.pt"))[-1], weights_only=True)
        expected = final_state(one)
        assert two["step"] == expected["step"] == 5
        for part in ("model", "ema", "discriminator", "logvars"):
            for name, tensor in expected[part].items():
                if tensor.is_floating_point():
                    # AdamW divides tiny gradients by their own size, which turns rounding into a part of a step.
                    assert (two[part][name] - tensor).abs().max() < 2e-4, (part, name)
        assert_rows_close(folder, "losses.csv", 1e-2)
        assert_rows_close(folder, "validation.csv", 1e-3)  # split among them, and comes out as one

    def test_accumulating_takes_the_steps_of_a_larger_batch(self, folder):
        buckets = "data.buckets=[{{frames=5,height=16,width=16,batch={0}}}]"
        settings = ("optim.steps=3", "loss.regularizer=both")
        large = Trainer(config(folder, "large", buckets.format(2), *settings))
        small = Trainer(config(folder, "small", buckets.format(1), "optim.accumulate=2", *settings))
        large.run(), small.run()
        assert_close(large, small, 2e-4)

    def test_workers_change_nothing(self, folder):
        runs = [Trainer(config(folder, f"workers{n}", f"data.workers={n}")) for n in (0, 2)]
        for run in runs:
            run.run()
        assert equal(final_state(runs[0])["model"], final_state(runs[1])["model"])


class TestInjected:
    def test_a_gradient_that_is_not_finite_is_skipped_and_counted(self, folder, monkeypatch):
        trainer = Trainer(config(folder, "nan"))
        objective = trainer.objective.forward

        def poisoned(clip, seeds, step):
            losses = objective(clip, seeds, step)
            return losses | {"total": losses["total"] * float("nan")} if step == 2 else losses

        monkeypatch.setattr(trainer.objective, "forward", poisoned)
        before = {}

        def report(step, losses):
            if step == 2:
                before.update({name: tensor.clone() for name, tensor in trainer.student.state_dict().items()})
            if step == 3:
                assert equal(trainer.student.state_dict(), before) and losses["skipped"] == 1

        trainer.run(report)
        assert trainer.step == 6 and final_state(trainer)["skipped"] == 1 and final_state(trainer)["skipped_in_a_row"] == 0
        assert all(tensor.isfinite().all() for tensor in trainer.student.state_dict().values())

    def test_too_many_in_a_row_stop_the_run_and_keep_the_batch(self, folder, monkeypatch):
        trainer = Trainer(config(folder, "exploding", "optim.skip_norm=1e-9", "optim.stop_after_skips=3"))
        before = {name: tensor.clone() for name, tensor in trainer.student.state_dict().items()}
        with pytest.raises(TrainingError, match=r"Step 2: .*optim.skip_norm.*3th time.*learning_rate"):
            trainer.run()
        assert equal(trainer.student.state_dict(), before)
        kept = torch.load(trainer.out / "bad_batch_rank0.pt", weights_only=True)
        assert kept["step"] == 2 and torch.equal(kept["clips"][0], trainer.data.batch(2).clips)
        assert final_state(trainer)["skipped_in_a_row"] == 3

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"),
                                       RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")])
    def test_out_of_memory_says_what_to_change(self, folder, monkeypatch, error):
        name = f"memory_{type(error).__name__}"
        trainer = Trainer(config(folder, name))
        objective = trainer.objective.forward

        def full(clip, seeds, step):
            if step == 3:
                raise error
            return objective(clip, seeds, step)

        monkeypatch.setattr(trainer.objective, "forward", full)
        with pytest.raises(TrainingError, match=r"Step 3: out of memory .*run.checkpointing.*optim.accumulate.*--resume"):
            trainer.run()
        assert Trainer(config(folder, name), resume=True).step == 3

    def test_other_errors_are_not_taken_for_it(self, folder, monkeypatch):
        trainer = Trainer(config(folder, "other_error"))


        def broken(*_):
            raise RuntimeError("shapes do not fit")

        monkeypatch.setattr(trainer.objective, "forward", broken)
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            trainer.run()

    def test_weights_half_stepped_are_not_saved(self, folder, monkeypatch):
        trainer = Trainer(config(folder, "half"))
        step = trainer.optimizer.step

        def breaks():
            if trainer.step == 3:
                raise torch.OutOfMemoryError("in the middle of a step")
            step()

        monkeypatch.setattr(trainer.optimizer, "step", breaks)
        with pytest.raises(TrainingError):
            trainer.run()
        assert trainer.checkpoints.files()[-1].name == "step_00000002.pt"


class TestSettings:
    @pytest.mark.parametrize("train, moved", [("decoder", {"decoder"}), ("encoder", {"encoder"}),
                                              ("temporal", {"encoder", "decoder"}), ("all", {"encoder", "decoder"})])
    def test_only_what_is_trained_moves(self, folder, train, moved):
        trainer = Trainer(config(folder, f"train_{train}", f"model.train={train}", "optim.steps=2"))
        before = {name: tensor.clone() for name, tensor in trainer.student.state_dict().items()}
        trainer.run()
        changed = {name for name, tensor in trainer.student.state_dict().items() if not torch.equal(tensor, before[name])}
        assert {name.partition(".")[0] for name in changed} == moved
        if train == "temporal":
            assert all(before[name].ndim == 5 or "_t" in name or name.endswith("bias") for name in changed)
            assert not any("conv2" in name or "norm1" in name for name in changed)

    def test_recomputed_activations_change_nothing(self, folder):
        runs = [Trainer(config(folder, f"recompute_{flag}", f"run.checkpointing={flag}", *ALL_TERMS))
                for flag in ("false", "true")]
        for run in runs:
            run.run()
        assert equal(final_state(runs[0])["model"], final_state(runs[1])["model"])

    def test_channels_last_trains_the_same_model(self, folder):
        runs = [Trainer(config(folder, f"format_{flag}", f"run.channels_last={flag}", "optim.steps=2"))
                for flag in ("false", "true")]
        for run in runs:
            run.run()
        assert_close(runs[0], runs[1], 2e-3)
        cvvae.load(runs[1].out / "model.safetensors")

    def test_a_run_goes_on_with_its_own_settings_only(self, folder):
        Trainer(config(folder, "settings", "optim.steps=1")).run()
        with pytest.raises(ConfigError, match=r"loss.gan was 'none' and is 'hinge'.*run.out"):
            Trainer(config(folder, "settings", "loss.gan=hinge"), resume=True)
        assert Trainer(config(folder, "settings", "optim.steps=9", "optim.learning_rate=1e-5"), resume=True).step == 1

    def test_resuming_nothing_says_so(self, folder):
        with pytest.raises(FileNotFoundError, match="no checkpoint in"):
            Trainer(config(folder, "never_begun"), resume=True)

    def test_finetunes_a_cv_vae_that_exists(self, folder):
        checkpoint.save(cvvae.inflate(cvvae.load_image_vae(folder / "teacher.safetensors")), folder / "student.safetensors")
        student = (folder / "student.safetensors").as_posix()
        trainer = Trainer(config(folder, "finetuned", f"model.student='{student}'", "optim.steps=1"))
        trainer.run()
        assert trainer.student.config.variant == "inflated"

    def test_8_bit_says_what_is_missing(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
        with pytest.raises(ConfigError, match="pip install bitsandbytes"):
            Trainer(config(folder, "eight", "optim.optimizer=adamw8bit"))

    def test_tensorboard_says_what_is_missing(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(ConfigError, match="pip install tensorboard"):
            Trainer(config(folder, "board", "run.tensorboard=true"))


class TestRunFolder:
    def test_says_what_the_run_was(self, folder):
        trainer = Trainer(config(folder, "facts", "run.validate_every=3", "run.name=a test"))
        trainer.run()
        facts = json.loads((trainer.out / "config.json").read_text())
        assert facts["config"]["optim"]["steps"] == 6 and facts["versions"]["torch"] == torch.__version__
        header = checkpoint.read_metadata(trainer.out / "model.safetensors")
        assert header["description"] == "a test"
        assert header["versions"] == facts["versions"] and header["git"] == facts["git"]
        assert str(folder) not in json.dumps(header)
        pictures = sorted(file.name for file in (trainer.out / "reconstructions").iterdir())
        assert pictures == [f"step_{step:08d}_held_out.mp4" for step in (0, 3, 6)]
        assert (trainer.out / "losses.png").stat().st_size > 1000

    def test_keeps_the_best(self, folder, monkeypatch):
        trainer = Trainer(config(folder, "best", "run.validate_every=2"))
        found = iter([1.0, 5.0, 3.0, 2.0])
        monkeypatch.setattr("cvvae.training.trainer.goodness", lambda scores: next(found))
        seen = {}
        trainer.run(lambda step, _: seen.update({step: {k: v.clone() for k, v in trainer.ema.state.items()}}))
        best = load_file(trainer.out / "best.safetensors")
        assert all(torch.equal(best[name], tensor.half()) for name, tensor in seen[2].items() if tensor.is_floating_point())
        assert final_state(trainer)["best"] == 5.0
