"""Latents of video sets: what is stored, and that processes, kills and repeats lose and double nothing."""

import csv
import errno
import os
import shutil
import subprocess
import sys
import time

import drawn
import pytest
import torch

import cvvae
from cvvae import checkpoint, dataset, dataset_clips
from cvvae.cli import main
from cvvae.dataset import DatasetError, LatentDataset, Settings, encode_dataset
from cvvae.video import read_frames, to_clip

VIDEOS = {"a": (30, 40, 48), "b": (9, 32, 32), "c": (4, 32, 32), "d": (18, 32, 40), "e": (11, 32, 32)}
FIVE = Settings(frames=5, files_per_shard=2)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for seed, (name, (frames, height, width)) in enumerate(VIDEOS.items()):
        drawn.write_video(folder / f"{name}.mp4", frames, height, width, seed=seed)
    (folder / "a.txt").write_text("a disc that drifts\n")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "video.safetensors"
    checkpoint.save(cvvae.inflate(drawn.small_image_vae()), path)
    return path


@pytest.fixture(scope="module")
def whole(model, videos, tmp_path_factory):
    """What one process makes, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    encode_dataset(cvvae.load(model), [str(videos)], folder, FIVE)
    return bytes_of(folder)


@pytest.fixture
def vae(model):
    return cvvae.load(model)


def clip_of(path, start=0, frames=None, stride=1):
    pixels = [frame.pixels for frame in read_frames(path)][start::stride][:frames]
    return to_clip(pixels)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class TestContent:
    def test_clips_are_what_encode_gives(self, vae, videos, tmp_path):
        done = encode_dataset(vae, [str(videos)], tmp_path, FIVE)
        data = LatentDataset(tmp_path)
        counts = {name: frames // 5 for name, (frames, *_) in VIDEOS.items()}
        assert len(data) == sum(counts.values()) == done.clips
        assert done.frames == 5 * len(data)
        assert done.left_over == sum(frames % 5 for frames, *_ in VIDEOS.values())
        for i, sample in enumerate(data.samples):
            clip = clip_of(sample.source, sample.start, 5)
            assert torch.equal(data[i], vae.encode(clip).mode()[0].half().float())
            assert (sample.frames, sample.height, sample.width) == (5, *clip.shape[-2:])
            assert sample.caption == ("a disc that drifts" if sample.source.endswith("a.mp4") else "")

    def test_whole_videos_in_windows(self, vae, videos, tmp_path):
        encode_dataset(vae, [str(videos / "a.mp4"), str(videos / "d.mp4")], tmp_path, Settings(dtype="float32"))
        data = LatentDataset(tmp_path)
        assert [sample.frames for sample in data.samples] == [30, 18]
        for i, sample in enumerate(data.samples):
            assert torch.equal(data[i], vae.encode(clip_of(sample.source)).mode()[0])

    def test_stride_and_size(self, vae, videos, tmp_path):
        settings = Settings(frames=5, stride=3, height=24, width=16, dtype="float32")
        encode_dataset(vae, [str(videos / "a.mp4")], tmp_path, settings)
        data = LatentDataset(tmp_path)
        assert [(sample.start, sample.fps) for sample in data.samples] == [(0, "25/3"), (15, "25/3")]
        assert data[0].shape == (4, 2, 3, 2)

    def test_the_middle_is_kept(self):
        pixels = torch.zeros(20, 60, 3, dtype=torch.uint8).numpy()
        pixels[:, 20:40] = 200
        middle = dataset_clips._resized(pixels, Settings(height=16, width=16))
        assert middle.shape == (16, 16, 3) and (middle[:, 1:-1] == 200).all()

    def test_manifest(self, vae, videos, tmp_path):
        encode_dataset(vae, [str(videos)], tmp_path, FIVE)
        with open(tmp_path / "manifest.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["key"] for row in rows] == [sample.key for sample in LatentDataset(tmp_path).samples]

    def test_a_picture_is_one_latent(self, vae, videos, tmp_path):
        from PIL import Image

        Image.fromarray(drawn.frames(1, 32, 32)[0]).save(tmp_path / "still.png")
        encode_dataset(vae, [str(tmp_path / "still.png")], tmp_path / "latents", FIVE)
        assert LatentDataset(tmp_path / "latents")[0].shape == (4, 1, 4, 4)


class TestFilesThatCannotBeUsed:
    def test_are_passed_over_and_named(self, vae, videos, tmp_path):
        shutil.copy(videos / "b.mp4", tmp_path / "b.mp4")
        (tmp_path / "broken.mp4").write_bytes(b"no video")
        cut = (videos / "a.mp4").read_bytes()
        (tmp_path / "cut.mp4").write_bytes(cut[:len(cut) // 2])
        shutil.copy(videos / "c.mp4", tmp_path / "short.mp4")
        drawn.write_video(tmp_path / "flat.mp4", 6, 4, 64)
        done = encode_dataset(vae, [str(tmp_path)], tmp_path / "latents", FIVE)
        sources = {sample.source for sample in LatentDataset(tmp_path / "latents").samples}
        assert sources == {str(tmp_path / "b.mp4")}
        names = {os.path.basename(source) for source in done.skipped}
        assert names == {"broken.mp4", "cut.mp4", "flat.mp4", "short.mp4"}
        assert "4 frames" in done.skipped[str(tmp_path / "short.mp4")]
        with open(tmp_path / "latents" / "skipped.csv", newline="") as file:
            assert {row["source"]: row["reason"] for row in csv.DictReader(file)} == done.skipped

    def test_a_video_that_breaks_off_is_left_out_whole(self, vae, tmp_path, videos, monkeypatch):
        def frames(media, start=0.0, step=1):
            for k, frame in enumerate(read_frames(media.path)):
                if k == 20:
                    raise cvvae.video.VideoError("breaks off")
                yield frame

        monkeypatch.setattr(dataset_clips.Media, "frames", frames)
        done = encode_dataset(vae, [str(videos / "a.mp4"), str(videos / "b.mp4")], tmp_path, Settings())
        assert done.skipped == {str(videos / "a.mp4"): "breaks off"}
        assert [sample.source for sample in LatentDataset(tmp_path).samples] == [str(videos / "b.mp4")]

    def test_nothing_of_use(self, vae, videos, tmp_path):
        encode_dataset(vae, [str(videos / "c.mp4")], tmp_path, FIVE)
        with pytest.raises(DatasetError, match="skipped.csv"):
            LatentDataset(tmp_path)


class TestNothingIsLostOrDoubled:
    def test_two_parts_make_what_one_makes(self, vae, videos, tmp_path, whole):
        first = encode_dataset(vae, [str(videos)], tmp_path, FIVE, part=1, parts=2)
        assert not (tmp_path / "manifest.csv").exists()
        with pytest.raises(DatasetError, match="2 of 3 shards are missing"):
            LatentDataset(tmp_path)
        second = encode_dataset(vae, [str(videos)], tmp_path, FIVE, part=0, parts=2)
        assert (first.shards, second.shards) == (1, 2)
        assert bytes_of(tmp_path) == whole

    def test_a_second_run_encodes_nothing(self, vae, videos, tmp_path, whole):
        encode_dataset(vae, [str(videos)], tmp_path, FIVE)
        assert encode_dataset(vae, [str(videos)], tmp_path, FIVE).clips == 0
        assert bytes_of(tmp_path) == whole

    def test_a_lost_shard_is_made_again_by_other_parts(self, vae, videos, tmp_path, whole):
        encode_dataset(vae, [str(videos)], tmp_path, FIVE)
        (tmp_path / "shard-000001.safetensors").unlink()
        for part in range(3):
            encode_dataset(vae, [str(videos)], tmp_path, FIVE, part, 3)
        assert bytes_of(tmp_path) == whole

    def test_killed_and_started_again(self, model, videos, tmp_path, whole):
        """Killed while the second shard is being made, once under its temporary name, and begun again."""
        process = subprocess.Popen(command(model, videos, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (tmp_path / "shard-000000.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        process.wait()
        (tmp_path / ".shard-000002.safetensors.partial4242").write_bytes(b"half")
        (tmp_path / "shard-000002.safetensors").unlink(missing_ok=True)
        assert main(command(model, videos, tmp_path)[3:]) == 0
        assert bytes_of(tmp_path) == whole

    def test_torchrun_shares_the_work(self, model, videos, tmp_path, whole):
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0",
                               "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", *command(model, videos, tmp_path)[1:]],
                              capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert "2 shards" in done.stdout and "1 shards" in done.stdout
        assert bytes_of(tmp_path) == whole

    def test_a_full_disk_leaves_no_half_shard(self, vae, videos, tmp_path, whole, monkeypatch):
        def save_file(tensors, path, facts):
            with open(path, "wb") as file:
                file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(dataset, "save_file", save_file)
            with pytest.raises(OSError, match="No space left"):
                encode_dataset(vae, [str(videos)], tmp_path, FIVE)
        assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
        encode_dataset(vae, [str(videos)], tmp_path, FIVE)
        assert bytes_of(tmp_path) == whole

    def test_cancel_stops_within_a_clip(self, vae, videos, tmp_path):
        class Cancelled(Exception):
            pass

        def check():
            raise Cancelled

        with pytest.raises(Cancelled):
            encode_dataset(vae, [str(videos)], tmp_path, FIVE, check=check)
        assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def command(model, videos, folder):
    return [sys.executable, "-m", "cvvae", "encode-dataset", str(videos), "--to", str(folder), "--model", str(model),
            "--frames", "5", "--files-per-shard", "2", "--device", "cpu"]


class TestOtherPlans:
    @pytest.fixture
    def begun(self, vae, videos, tmp_path):
        encode_dataset(vae, [str(videos / "b.mp4")], tmp_path, FIVE)
        return tmp_path

    def test_other_settings(self, vae, videos, begun):
        with pytest.raises(DatasetError, match="begun with other settings"):
            encode_dataset(vae, [str(videos / "b.mp4")], begun, Settings(frames=9, files_per_shard=2))

    def test_other_files(self, vae, videos, begun):
        with pytest.raises(DatasetError, match=r"other files \(1, now 5; .*a.mp4"):
            encode_dataset(vae, [str(videos)], begun, FIVE)

    def test_other_weights(self, vae, videos, begun):
        with torch.no_grad():
            vae.encoder.conv_in.bias[0] += 1
        with pytest.raises(DatasetError, match="begun with other weights"):
            encode_dataset(vae, [str(videos / "b.mp4")], begun, FIVE)

    def test_memory_may_change(self, vae, videos, begun):
        vae.tiling = cvvae.Tiling(memory="1 GB")
        assert encode_dataset(vae, [str(videos / "b.mp4")], begun, FIVE).clips == 0

    def test_a_damaged_shard(self, begun):
        path = begun / "shard-000000.safetensors"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(DatasetError, match="not a whole shard.*Delete it"):
            LatentDataset(begun)

    def test_a_folder_of_something_else(self, tmp_path):
        with pytest.raises(DatasetError, match="plan.json cannot be read"):
            LatentDataset(tmp_path)


@pytest.mark.parametrize(("settings", "message"), [
    ({"frames": 4}, "1 [+] 4n"), ({"stride": 0}, "stride is 0"), ({"height": 20, "width": 16}, "multiples of 8"),
    ({"height": 16}, "multiples of 8"), ({"dtype": "int8"}, "int8"), ({"files_per_shard": 0}, "files_per_shard 0")])
def test_settings_are_checked(settings, message):
    with pytest.raises(DatasetError, match=message):
        Settings(**settings)


@pytest.mark.parametrize("part", ["2/2", "1", "a/b", "-1/2"])
def test_parts_are_checked(part, capsys):
    with pytest.raises(SystemExit):
        main(["encode-dataset", "x", "--to", "y", f"--part={part}"])
    assert "PART/PARTS" in capsys.readouterr().err


def test_no_videos(vae, tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file or folder"):
        encode_dataset(vae, [str(tmp_path / "none")], tmp_path / "latents", FIVE)
    with pytest.raises(DatasetError, match="No videos or pictures"):
        encode_dataset(vae, [str(tmp_path)], tmp_path / "latents", FIVE)
