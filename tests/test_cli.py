"""The command line: what it prints, what it leaves behind, and how it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import drawn
import pytest

import cvvae
from cvvae import checkpoint
from cvvae.cli import main

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A clip, an image VAE and the video VAE inflated from it."""
    folder = tmp_path_factory.mktemp("cli")
    drawn.write_video(folder / "in.mp4", 18, 34, 40)
    image_vae = drawn.small_image_vae()
    checkpoint.save(image_vae, folder / "image.safetensors")
    checkpoint.save(cvvae.inflate(image_vae), folder / "video.safetensors")
    return folder


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def test_quality_takes_the_place_of_the_sizes(files, tmp_path, capsys):
    arguments = ("reconstruct", files / "in.mp4", tmp_path / "out.mp4", "--model", files / "video.safetensors", "--quality")
    assert run(*arguments, "--window", "16") == 0  # 16 would be refused
    assert run(*arguments, "--memory", "1 B") == 2
    assert "Tiling.memory" in capsys.readouterr().err


def test_reconstruct_says_how_good_and_how_big(files, tmp_path, capsys):
    assert run("reconstruct", files / "in.mp4", tmp_path / "out.mp4", "--model", files / "video.safetensors") == 0
    printed = capsys.readouterr().out
    assert "18 frames of 40x34" in printed and "4x6x5x5: one value for 122.4 pixel values" in printed
    assert all(word in printed for word in ("PSNR", "SSIM", "frames/s", "MB of the process"))
    assert (tmp_path / "out.mp4").exists()


def test_encode_then_decode(files, tmp_path):
    model = ("--model", files / "video.safetensors")
    assert run("encode", files / "in.mp4", tmp_path / "z.safetensors", *model) == 0
    assert run("decode", tmp_path / "z.safetensors", tmp_path / "out.mp4", *model) == 0
    from cvvae.video import read_frames

    frames = [frame.pixels for frame in read_frames(tmp_path / "out.mp4")]
    assert len(frames) == 18 and frames[0].shape == (34, 40, 3)


def test_inflate_and_info(files, tmp_path, capsys):
    assert run("inflate", files / "image.safetensors", tmp_path / "v.safetensors") == 0
    capsys.readouterr()
    assert run("info", tmp_path / "v.safetensors") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "video VAE" and facts["config"]["conventions"]["space_padding"] == "zeros"
    assert run("info", files / "image.safetensors") == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "image VAE"


class TestEvaluate:
    """What it scores is tested in test_evaluation.py; here, how it is called and what it prints and writes."""

    def evaluate(self, files, *arguments) -> int:
        return run("evaluate", files / "video.safetensors", *arguments, "--frames", 5, "--size", 32)

    def test_prints_each_clip_and_the_mean_within_80_columns(self, files, tmp_path, capsys):
        long = drawn.write_video(tmp_path / f"{'long' * 10}.mp4", 5, 32, 32)
        assert self.evaluate(files, files / "in.mp4", long, "--image-vae", files / "image.safetensors") == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == ["clip", "in.mp4", "longlonglon..onglong.mp4", "mean"]
        assert all(heading in lines[0] for heading in ("PSNR dB", "SSIM", "image VAE", "compatible"))
        assert {len(line) for line in lines} == {len(lines[0])} and len(lines[0]) <= 80
        first, second, mean = (list(map(float, line.split()[1:])) for line in lines[1:])
        assert mean == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)], abs=0.01)

    def test_writes_numbers_tables_and_pictures(self, files, tmp_path, capsys):
        import av

        from cvvae.training.data import load_clip
        from cvvae.training.evaluation import evaluate_clip

        assert self.evaluate(files, files / "in.mp4", "--image-vae", files / "image.safetensors",
                             "--out", tmp_path / "new" / "folder") == 0
        out = tmp_path / "new" / "folder"
        assert sorted(path.name for path in out.iterdir()) == ["contact_sheet.png", "evaluation.json", "evaluation.md"]
        written = json.loads((out / "evaluation.json").read_text())
        expected = evaluate_clip(cvvae.load(files / "video.safetensors"), cvvae.load_image_vae(files / "image.safetensors"),
                                 load_clip(files / "in.mp4", 5, 32))
        assert written["clips"] == [{"clip": "in.mp4", "scores": expected.scores, "channels": expected.channels}]
        assert written["mean"] == expected.scores and written["versions"]["cvvae"] == cvvae.__version__
        assert written["config"]["latent_channels"] == 4 and written["tiling"]["window_frames"] == 17
        table = (out / "evaluation.md").read_text()
        assert f"| in.mp4 | {expected.scores['psnr']:.2f} |" in table and "| stills_psnr |" in table
        with av.open(str(out / "contact_sheet.png")) as sheet:
            assert min(sheet.streams.video[0].width, sheet.streams.video[0].height) > 200

    def test_an_image_vae_is_a_model_too(self, files, tmp_path, capsys):
        image_vae = files / "image.safetensors"
        assert run("evaluate", image_vae, files / "in.mp4", "--frames", 2, "--size", 32, "--out", tmp_path) == 0
        assert capsys.readouterr().out.split()[:4] == ["clip", "PSNR", "dB", "SSIM"]
        assert json.loads((tmp_path / "evaluation.json").read_text())["kind"] == "image VAE"
        assert run("evaluate", image_vae, files / "in.mp4", "--image-vae", image_vae) == 2
        assert "Leave --image-vae out" in capsys.readouterr().err

    def test_clips_of_one_name_are_told_apart(self, files, tmp_path, capsys):
        other = drawn.write_video(tmp_path / "in.mp4", 5, 32, 32, seed=3)
        assert self.evaluate(files, files / "in.mp4", other, "--out", tmp_path / "out") == 0
        clips = json.loads((tmp_path / "out" / "evaluation.json").read_text())["clips"]
        assert [clip["clip"] for clip in clips] == [str(files / "in.mp4"), str(other)]

    @pytest.mark.parametrize("arguments, message", [
        (("{clip}", "--frames", "33"), "18 frames, fewer than the 33 read of each clip; leave it out or add --frames 18"),
        (("{model}",), "cannot be read as a video or picture"),
        (("gone.mp4",), "No such file: gone.mp4"),
        (("{clip}", "--image-vae", "{model}"), "is a video VAE"),
    ])
    def test_what_cannot_be_scored_is_one_clear_line(self, files, capsys, arguments, message):
        names = {"clip": files / "in.mp4", "model": files / "video.safetensors"}
        assert run("evaluate", files / "video.safetensors", *(argument.format(**names) for argument in arguments)) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1

    def test_sizes_are_checked_before_anything_is_loaded(self, capsys):
        with pytest.raises(SystemExit):
            run("evaluate", "gone", "gone.mp4", "--frames", 0)
        assert "'0' is not a whole number of at least 1" in capsys.readouterr().err


def test_train_and_resume(files, capsys, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    (files / "clips").mkdir()
    drawn.write_video(files / "clips" / "a.mp4", 9, 32, 32)
    (files / "train.toml").write_text(f"""
[model]
teacher = "{(files / 'image.safetensors').as_posix()}"
[data]
sources = ["clips"]
buckets = [{{ frames = 5, height = 16, width = 16, batch = 1 }}]
[optim]
steps = 2
[run]
out = "{(files / 'run').as_posix()}"
""")
    assert run("train", files / "train.toml") == 0
    assert run("train", files / "train.toml") == 2
    assert "--resume" in capsys.readouterr().err
    assert run("train", files / "train.toml", "optim.steps=3", "--resume") == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert checkpoint.read_metadata(files / "run" / "model.safetensors")["steps"] == 3


@pytest.mark.parametrize("arguments, message", [
    (("reconstruct", "gone.mp4", "out.mp4"), "No such file: gone.mp4"),
    (("reconstruct", "{clip}", "out.mp4", "--model", "gone.safetensors"), "No such file: gone.safetensors"),
    (("reconstruct", "{clip}", "out.gif"), "cannot write a .gif"),
    (("reconstruct", "{clip}", "out.mp4", "--window", "16"), "Tiling.window_frames is 16"),
    (("reconstruct", "{model}", "out.mp4"), "cannot be read as a video"),
    (("decode", "{model}", "out.mp4"), "does not hold latents"),
    (("info", "{image}.gone"), "No such file"),
    (("inflate", "{video}", "out.safetensors"), "is a video VAE"),
    (("train", "{model}"), "is not a TOML file"),
])
def test_bad_input_is_one_clear_line(files, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    names = {"clip": files / "in.mp4", "model": files / "video.safetensors", "video": files / "video.safetensors",
             "image": files / "image.safetensors"}
    if arguments[0] in ("reconstruct", "decode") and "--model" not in arguments:
        arguments = (*arguments, "--model", str(files / "video.safetensors"))
    assert run(*(str(argument).format(**names) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and message in error
    assert "Traceback" not in error and list(tmp_path.iterdir()) == []


def test_stopping_says_so(files, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cvvae.cli._load_vae", interrupt)
    assert run("reconstruct", files / "in.mp4", tmp_path / "out.mp4") == 130
    assert "Stopped" in capsys.readouterr().err


def test_the_library_needs_no_comfyui_and_starts_lean():
    code = ("import sys, cvvae; print([name for name in ('comfy', 'kornia', 'av', 'cvvae.training', 'huggingface_hub') "
            "if name in sys.modules])")
    assert subprocess.check_output([sys.executable, "-c", code], cwd=REPOSITORY, text=True).strip() == "[]"


class TestBuiltInModels:
    """The shipped pair is what the documentation says."""

    weights = checkpoint.BUILT_IN

    def test_together_small_enough_to_ship(self):
        files = list(self.weights.glob("*.safetensors"))
        assert sorted(file.name for file in files) == ["tiny.safetensors", "tiny_image.safetensors"]
        assert sum(file.stat().st_size for file in files) <= 8_000_000

    @pytest.mark.parametrize("name", ["tiny", "tiny_image"])
    def test_headers_say_what_they_are_and_how_they_were_made(self, name):
        facts = checkpoint.read_metadata(self.weights / f"{name}.safetensors")
        assert "demonstration" in facts["description"]
        from cvvae.training.config import read_config

        made_with = read_config(REPOSITORY / "configs" / f"{name}.toml")
        assert facts["steps"] == made_with.optim.steps == facts["training"]["optim"]["steps"]
        assert facts["validation"]["psnr"] > 24

    @pytest.mark.slow
    def test_the_video_model_keeps_what_the_image_model_can(self):
        """On a clip kept out of training: within 1.5 dB of the image VAE, latents within 2 dB compatible."""
        from cvvae.training.data import load_clip
        from cvvae.training.evaluation import evaluate_clip

        clip = load_clip(REPOSITORY / "workflows" / "media" / "flower.mp4", 17, 128)
        scores = evaluate_clip(cvvae.load("tiny"), cvvae.load_image_vae("tiny"), clip).scores
        assert scores["psnr"] > scores["image_vae_psnr"] - 1.5
        assert scores["compatibility_psnr"] > scores["image_vae_psnr"] - 2
