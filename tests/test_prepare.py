"""The manifest that ``prepare`` writes: what it measures, flags and leaves out."""

import csv

import av
import drawn
import numpy as np
import pytest

from cvvae.cli import main
from cvvae.training import prepare as module
from cvvae.training.config import Bucket, DataConfig
from cvvae.training.data import ClipData
from cvvae.training.prepare import find_files, prepare, summary


def texture(seed, height=96, width=160, cells=6):
    """A smooth colour pattern that is unlike those of other seeds."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (cells, cells, 3))
    y, x = np.linspace(0, cells - 1.001, height), np.linspace(0, cells - 1.001, width)
    (i, v), (j, u) = ((p.astype(int), (p % 1)) for p in (y, x))
    v, u = v[:, None, None], u[None, :, None]
    def at(a, b):
        return coarse[i + a][:, j + b]
    return ((at(0, 0) * (1 - v) + at(1, 0) * v) * (1 - u) + (at(0, 1) * (1 - v) + at(1, 1) * v) * u).astype(np.uint8)


def drifting(seed, count, speed=2, width=160):
    """A pattern that moves ``speed`` pixels a frame."""
    wide = texture(seed, width=width + speed * count)
    return [wide[:, k * speed:k * speed + width] for k in range(count)]


def write(path, frames, rate=25, crf=10, size=None):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = size or frames[0].shape[:2]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": str(crf), "preset": "veryfast"}
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
                stream.width, stream.height)))
        container.mux(stream.encode(None))
    return path


def save_picture(path, pixels):
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png" if path.suffix == ".png" else "mjpeg", rate=1)
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = "rgb24" if path.suffix == ".png" else "yuvj420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    (folder / "sub").mkdir()
    moving = drifting(1, 30)
    write(folder / "moving.mp4", moving)
    write(folder / "sub" / "another.mp4", drifting(2, 30))
    write(folder / "copy.mp4", [moving[min(29, round(k * 25 / 30))] for k in range(36)], rate=30, crf=32, size=(64, 112))
    rng = np.random.default_rng(0)
    still = texture(3).astype(int)
    write(folder / "still.mp4", [(still + rng.normal(0, 1.5, still.shape)).clip(0, 255).astype(np.uint8) for _ in range(20)],
          crf=23)
    write(folder / "scenes.mp4", drifting(4, 14) + drifting(5, 20) + drifting(6, 16))
    fast = drifting(7, 30, speed=40)
    write(folder / "fast.mp4", fast)
    whole = write(folder / "truncated.mp4", drifting(8, 30)).read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[:len(whole) // 2])
    with av.open(str(folder / "cut_off.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.options = 96, 160, "yuv420p", {"crf": "4", "g": "4"}
        for pixels in drifting(9, 30):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode(None))
    whole = (folder / "cut_off.mkv").read_bytes()
    (folder / "cut_off.mkv").write_bytes(whole[:len(whole) // 2])
    save_picture(folder / "p.png", texture(10))
    save_picture(folder / "q.jpg", texture(10)[::2, ::2].copy())
    save_picture(folder / "r.png", texture(11))
    (folder / "notes.txt").touch()
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    """The manifest, by path, written by the command."""
    target = folder / "manifest.csv"
    assert main(["prepare", str(folder), str(target)]) == 0
    with open(target, newline="", encoding="utf-8") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


class TestManifest:
    def test_lists_every_file_with_its_measures(self, folder, rows):
        assert set(rows) == {"moving.mp4", "sub/another.mp4", "copy.mp4", "still.mp4", "scenes.mp4", "fast.mp4",
                             "truncated.mp4", "cut_off.mkv", "p.png", "q.jpg", "r.png"}
        moving = rows["moving.mp4"]
        found = [moving[name] for name in ("weight", "kind", "width", "height", "frames", "fps", "seconds", "flags")]
        assert found == ["1", "video", "160", "96", "30", "25.0", "1.2", ""]
        assert (rows["p.png"]["kind"], rows["p.png"]["width"], rows["p.png"]["height"]) == ("picture", "160", "96")

    def test_motion_is_the_mean_change_of_brightness(self, rows):
        grey = [frame.astype(float).mean(-1) for frame in drifting(1, 30)]
        expected = np.mean([np.abs(a - b).mean() for a, b in zip(grey, grey[1:], strict=False)])
        assert abs(float(rows["moving.mp4"]["motion"]) - expected) < 0.15 * expected
        assert float(rows["fast.mp4"]["motion"]) > 3 * expected

    def test_still_clips_are_flagged_in_spite_of_noise(self, rows):
        assert (rows["still.mp4"]["flags"], rows["still.mp4"]["weight"]) == ("static", "0")

    def test_a_slide_show_is_static(self, tmp_path):
        write(tmp_path / "slides.mp4", [texture(20)] * 10 + [texture(21)] * 10)
        row, = prepare(find_files(tmp_path), tmp_path / "m.csv")
        assert (row.cuts, row.flags, row.weight) == (1, "cuts;static", 0)

    def test_cuts_are_found_where_they_are_and_nowhere_else(self, rows):
        scenes = rows["scenes.mp4"]
        assert (scenes["cuts"], scenes["flags"], scenes["weight"]) == ("2", "cuts", "1")
        assert [float(time) for time in scenes["cut_times"].split(";")] == pytest.approx([14 / 25, 34 / 25])
        assert rows["moving.mp4"]["cuts"] == rows["fast.mp4"]["cuts"] == rows["still.mp4"]["cuts"] == "0"

    @pytest.mark.parametrize("frames", [
        [texture(30 + k % 2) for k in range(30)],  # a strobe: every change is large
        drifting(32, 15) + [np.roll(frame, 70, axis=1) for frame in drifting(32, 30)[15:]],  # a jolt: the colours stay
    ], ids=["strobe", "jolt"])
    def test_large_changes_are_not_always_cuts(self, tmp_path, frames):
        row = module.Row("a.mp4")
        module._measure(write(tmp_path / "a.mp4", frames), row)
        assert row.cuts == 0

    def test_copies_name_the_larger_original(self, rows):
        assert (rows["copy.mp4"]["duplicate_of"], rows["copy.mp4"]["flags"], rows["copy.mp4"]["weight"]) \
            == ("moving.mp4", "duplicate", "0")
        assert (rows["q.jpg"]["duplicate_of"], rows["q.jpg"]["weight"]) == ("p.png", "0")
        assert [path for path, row in rows.items() if row["duplicate_of"]] == ["copy.mp4", "q.jpg"]

    def test_files_that_cannot_be_decoded_whole_say_why(self, rows):
        for path, reason in (("truncated.mp4", "cannot be read"), ("cut_off.mkv", "ends early")):
            assert (rows[path]["flags"], rows[path]["weight"]) == ("unreadable", "0")
            assert reason in rows[path]["error"]

    def test_training_draws_what_has_weight(self, folder, rows):
        source = ClipData(DataConfig(sources=[str(folder / "manifest.csv")], buckets=[Bucket(5, 32, 32, 1)]), 0)
        assert {media.name for media in source.files} == {"moving", "another", "scenes", "fast", "p", "r"}
        assert source.batch(0).clips.shape == (1, 3, 5, 32, 32)

    def test_says_what_it_found(self):
        rows = [module.Row("a.mp4"), module.Row("b.mp4", weight=0, flags="cuts;static"), module.Row("c", kind="picture")]
        assert summary(rows).splitlines() == ["2 videos and 1 pictures, 1 of them with weight 0 (never drawn)",
                                              "  static              1", "  cuts (weight 1)     1"]


class TestCommand:
    def test_paths_count_from_the_manifest(self, folder, tmp_path):
        (tmp_path / "lists").mkdir()
        (tmp_path / "media").mkdir()
        drawn.write_video(tmp_path / "media" / "a.mp4", 5)
        row, = prepare(find_files(tmp_path / "media"), tmp_path / "lists" / "m.csv")
        assert row.path == "../media/a.mp4"
        assert len(ClipData(DataConfig(sources=[str(tmp_path / "lists" / "m.csv")]), 0).files) == 1

    def test_stopping_leaves_the_manifest_that_was_there(self, folder, tmp_path, monkeypatch, capsys):
        (tmp_path / "m.csv").write_text("path\nmine\n")
        seen = []

        def stop(path, row):
            if seen:
                raise KeyboardInterrupt
            seen.append(path)
            raise module.VideoError("no")

        monkeypatch.setattr(module, "_measure", stop)
        assert main(["prepare", str(folder), str(tmp_path / "m.csv")]) == 130
        assert [path.name for path in tmp_path.iterdir()] == ["m.csv"]
        assert (tmp_path / "m.csv").read_text() == "path\nmine\n"

    @pytest.mark.parametrize(("source", "target", "message"), [
        ("none", "m.csv", "No such folder"),
        (".", "m.txt", "a manifest is a .csv file"),
        (".", "no/m.csv", "does not exist"),
        ("empty", "m.csv", "holds no file that ends in .mp4"),
    ])
    def test_says_what_is_wrong(self, folder, tmp_path, capsys, source, target, message):
        (tmp_path / "empty").mkdir()
        where = tmp_path / "empty" if source == "empty" else folder / source
        assert main(["prepare", str(where), str(tmp_path / target)]) == 2
        assert message in capsys.readouterr().err
