"""Training data: what is found, what is drawn, and what happens to files that are not what they seem."""

import csv
import re
import tarfile
import threading
from fractions import Fraction
from itertools import islice

import av
import drawn
import numpy as np
import pytest
import torch

import cvvae.video
from cvvae.training.config import Bucket, DataConfig
from cvvae.training.data import AHEAD, ClipData, DataError, SkipReport, load_clip, loader
from cvvae.video import VideoError, VideoWriter, read_frames

PICTURE, CLIP = Bucket(1, 16, 16, 2), Bucket(5, 16, 16, 1)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three videos of 9 frames, 40 x 32 pixels, one of them held out, in two folders."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "more").mkdir()
    for seed, name in enumerate(("a", "more/b", "held_out")):
        drawn.write_video(folder / f"{name}.mp4", 9, 32, 40, seed=seed)
    return folder


def data(*sources, seed=0, buckets=(PICTURE, CLIP), **settings):
    return ClipData(DataConfig(sources=[str(source) for source in sources], buckets=list(buckets), **settings), seed)


def count_up(path, count, keyframes=12):
    """Frame k is flat, of brightness 2 k: what was taken can be read off the pixels."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 40, "yuv420p"
        stream.options = {"qp": "0", "g": str(keyframes)}
        for k in range(count):
            planes = np.full((48, 40), 128, np.uint8)
            planes[:32] = min(16 + 2 * k, 235)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode(None))
    return path


def numbers(clip):
    """Which frames of such a file a clip shows."""
    return ((clip[0].mean((0, 2, 3)) + 1) / 2 * 219 / 2).round().int().tolist()


def workers_alive():
    return [thread for thread in threading.enumerate() if thread.name.startswith("clips")]


def cut_short(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[:int(len(whole) * share)])
    return path


class TestDrawing:
    def test_a_batch_depends_on_seed_and_step_only(self, clips):
        one, two = data(clips), data(clips)
        later = two.batch(7).clips
        two.batch(0)
        for step in range(7):
            one.batch(step)
        assert torch.equal(one.batch(7).clips, later)
        assert not all(torch.equal(one.batch(s).clips, data(clips, seed=1).batch(s).clips) for s in range(3))
        assert len({tuple(one.batch(s).clips.flatten()[:50].tolist()) for s in range(4)}) == 4

    def test_two_parts_are_one_batch_of_twice_the_size(self, clips):
        halves, whole = data(clips, buckets=[Bucket(5, 16, 16, 1)]), data(clips, buckets=[Bucket(5, 16, 16, 2)])
        for step in range(4):
            first, second = halves.batch(step, 0).clips, halves.batch(step, 1).clips
            assert torch.equal(torch.cat([first, second]), whole.batch(step).clips)
            assert not torch.equal(first, second)

    def test_shapes_shares_and_range(self, clips):
        buckets = [Bucket(1, 16, 24, 2, share=1.0), Bucket(5, 32, 16, 1, share=3.0), Bucket(9, 16, 16, 1, share=0.0)]
        drawn_from = data(clips, buckets=buckets)
        for step in range(6):
            bucket, clip = drawn_from.bucket(step), drawn_from.batch(step).clips
            assert clip.shape == (bucket.batch, 3, bucket.frames, bucket.height, bucket.width)
            assert clip.dtype == torch.float32 and -1 <= clip.min() < clip.max() <= 1
        found = [drawn_from.bucket(step).frames for step in range(400)]
        assert 250 < found.count(5) < 350 and found.count(9) == 0

    def test_strides_go_up_to_the_largest_and_starts_all_over(self, tmp_path):
        source = data(count_up(tmp_path / "long.mp4", 100), buckets=[Bucket(5, 16, 16, 1)], max_stride=4)
        taken = [numbers(source.batch(step).clips) for step in range(40)]
        strides = {after - before for clip in taken for before, after in zip(clip, clip[1:], strict=False)}
        assert strides == {1, 2, 3, 4}
        assert all(len(set(np.diff(clip))) == 1 for clip in taken)
        assert min(clip[0] for clip in taken) < 20 and max(clip[-1] for clip in taken) > 80

    def test_stride_is_lowered_to_fit(self, tmp_path):
        source = data(count_up(tmp_path / "short.mp4", 11), buckets=[Bucket(5, 16, 16, 1)], max_stride=8)
        taken = [numbers(source.batch(step).clips) for step in range(12)]
        assert {clip[1] - clip[0] for clip in taken} == {1, 2}

    @pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
    def test_every_frame_can_be_drawn(self, tmp_path, suffix):
        source = data(count_up(tmp_path / f"video{suffix}", 7, keyframes=3), buckets=[Bucket(1, 16, 16, 8)])
        assert {numbers(clip[None])[0] for step in range(8) for clip in source.batch(step).clips} == set(range(7))

    @pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
    def test_uneven_frame_times_fail_no_clip(self, tmp_path, suffix):
        # 25 frames a second, then 8: the rate of the whole puts the last frames where there are fewer.
        times = [Fraction(k, 25) for k in range(50)] + [2 + Fraction(k, 8) for k in range(10)]
        source = data(drawn.write_video(tmp_path / f"uneven{suffix}", 60, 32, 40, times=times), buckets=[CLIP])
        assert [source.batch(step).failures for step in range(30)] == [{}] * 30

    def test_crops_have_the_buckets_shape_and_many_sizes(self, tmp_path):
        """Columns of the picture count up, so a crop's slope says how much of the width it holds."""
        with VideoWriter(tmp_path / "ramp.mp4", Fraction(25)) as writer:
            for _ in range(2):
                writer.write(np.tile(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], (48, 1, 3)))
        source = data(tmp_path / "ramp.mp4", buckets=[Bucket(1, 16, 32, 40)])
        rows = (source.batch(0).clips[:, :, 0].mean((1, 2)) + 1) * 127.5  # [B, W]
        widths = (rows[:, -2] - rows[:, 1]) / 29 * 32 / 2
        assert (widths > 0).sum() in range(8, 33), "half of them are mirrored"
        widths = widths.abs()
        assert widths.min() > 30 and widths.max() < 98 and widths.max() - widths.min() > 40
        unmirrored = data(tmp_path / "ramp.mp4", buckets=[Bucket(1, 16, 32, 40)], flip=False).batch(0).clips
        assert (unmirrored[..., -2] > unmirrored[..., 1]).all()

    def test_a_seek_decodes_the_neighbourhood_only(self, tmp_path, monkeypatch):
        source = data(count_up(tmp_path / "long.mp4", 120), buckets=[Bucket(5, 16, 16, 1)], max_stride=1)
        decoded = []

        class Counted:
            def __init__(self, container):
                self.container = container

            def __getattr__(self, name):
                return getattr(self.container, name)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.container.close()

            def decode(self, stream):
                for frame in self.container.decode(stream):
                    decoded.append(frame.pts)
                    yield frame

        opened = av.open
        monkeypatch.setattr(cvvae.video.av, "open", lambda *a, **k: Counted(opened(*a, **k)))
        for step in range(10):
            decoded.clear()
            source.batch(step)
            assert 5 <= len(decoded) <= 5 + 12, "the stretch and what lies between it and the key frame before"


class TestSources:
    def test_held_out_files_never_train(self, clips):
        source = data(clips, validation=["held_out"], validation_frames=5, validation_size=16)
        assert [media.name for media in source.files] == ["a", "b"]
        assert [(name, tuple(clip.shape)) for name, clip in source.validation()] == [("held_out", (1, 3, 5, 16, 16))]

    def test_scores_as_many_held_out_clips_as_asked(self, clips):
        settings = dict(validation=["held_out", "b"], validation_frames=5, validation_size=16)
        assert [name for name, _ in data(clips, **settings).validation()] == ["held_out", "b"]
        assert [name for name, _ in data(clips, **settings, validation_clips=1).validation()] == ["held_out"]

    def test_a_held_out_file_that_cannot_be_decoded_is_named(self, clips, tmp_path):
        (tmp_path / "broken.mp4").write_bytes(b"nothing")
        with pytest.raises(VideoError, match=r"broken\.mp4"):
            data(clips, tmp_path, validation=["broken"]).validation()

    def test_names_what_is_missing(self, clips, tmp_path):
        with pytest.raises(ValueError, match="names gone"):
            data(clips, validation=["gone"])
        with pytest.raises(FileNotFoundError, match="nowhere"):
            data(clips / "nowhere")
        with pytest.raises(ValueError, match="No videos or pictures to train on"):
            data(tmp_path)
        (tmp_path / "notes.txt").touch()
        with pytest.raises(ValueError, match=r"notes\.txt is neither a video nor a picture; expected one of \.mp4"):
            data(tmp_path / "notes.txt")

    def test_pictures_serve_pictures_only(self, clips, tmp_path):
        picture = drawn.frames(1, 32, 40, seed=5)[0]
        with av.open(str(tmp_path / "p.png"), "w", format="image2") as container:
            stream = container.add_stream("png", rate=1)
            stream.height, stream.width, stream.pix_fmt = 32, 40, "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        exact = Bucket(1, 32, 40, 1)
        assert torch.equal(data(tmp_path, buckets=[exact], flip=False).batch(0).clips, cvvae.video.to_clip([picture]))
        with pytest.raises(ValueError, match="pictures only"):
            data(tmp_path)
        source = data(tmp_path, clips / "a.mp4", buckets=[CLIP])
        assert all(source.batch(step).failures == {} for step in range(6))

    def test_files_of_one_name_are_told_apart(self, tmp_path):
        for folder in ("one", "two"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "clip.mp4").write_bytes(b"nothing")
        drawn.write_video(tmp_path / "sound.mp4", 9, 32, 40)
        source = data(tmp_path)
        failures = {name: reason for step in range(20) for name, reason in source.batch(step).failures.items()}
        assert sorted(failures) == [str(tmp_path / folder / "clip.mp4") for folder in ("one", "two")]

    def test_hidden_files_are_left_out(self, tmp_path):
        drawn.write_video(tmp_path / "a.mp4", 9, 32, 40)
        (tmp_path / ".thumbnails").mkdir()
        for name in ("._a.mp4", ".thumbnails/a.mp4"):
            (tmp_path / name).write_bytes(b"nothing")
        assert [media.name for media in data(tmp_path).files] == ["a"]


class TestManifest:
    def write(self, clips, text):
        path = clips / "manifest.csv"
        path.write_text(text, encoding="utf-8-sig")
        return path

    def test_weights(self, clips):
        path = self.write(clips, "weight,path,flags\n3,a.mp4,\n,more/b.mp4,\n0,held_out.mp4,static\n")
        source = data(path)
        assert [(media.name, media.weight) for media in source.files] == [("a", 3), ("b", 1)]
        shown = [[frame.pixels for frame in read_frames(media.path)] for media in source.files]
        whole = data(path, buckets=[Bucket(1, 32, 40, 60)], flip=False).batch(0).clips
        owners = self.owners(whole, shown)
        assert 36 <= owners.count(0) <= 54

    def owners(self, clips, shown):
        """Whose frame each clip is."""
        levels = ((clips[:, :, 0] + 1) * 127.5).round().permute(0, 2, 3, 1).int().numpy()
        return [next(i for i, frames in enumerate(shown) if any(np.array_equal(frame, one) for frame in frames))
                for one in levels]

    @pytest.mark.parametrize(("text", "message"), [
        ("file\na.mp4\n", "expected a column 'path'"),
        ("", "expected a column 'path'"),
        ("path,weight\na.mp4,1\nnone.mp4,1\n", r"manifest\.csv, line 3: no such file: 'none\.mp4'"),
        ("path,weight\na.mp4,much\n", "line 2: weight is 'much'"),
        ("path,weight\na.mp4,-1\n", "line 2: weight is '-1'"),
        ("path,weight\na.mp4,nan\n", "line 2: weight is 'nan'"),
        ("path\nmanifest.csv\n", "line 2: manifest.csv is neither a video nor a picture"),
        ("path,weight\na.mp4,0\n", "No videos or pictures to train on"),
    ])
    def test_says_what_is_wrong(self, clips, text, message):
        with pytest.raises(ValueError, match=message):
            data(self.write(clips, text))


class TestShards:
    def pack(self, clips, path):
        with tarfile.open(path, "w") as tar:
            for name in ("a", "more/b", "held_out"):
                tar.add(clips / f"{name}.mp4", f"{name}.mp4")
                (clips / "label.json").write_text("{}")
                tar.add(clips / "label.json", f"{name}.json")
        return path

    def test_a_shard_gives_what_its_folder_gives(self, clips, tmp_path):
        settings = dict(validation=["held_out"], validation_frames=5, validation_size=16)
        shard = data(self.pack(clips, tmp_path / "shard.tar"), **settings)
        folder = data(clips / "a.mp4", clips / "more", clips / "held_out.mp4", **settings)
        assert [media.name for media in shard.files] == ["a", "b"]
        for step in range(6):
            assert torch.equal(shard.batch(step).clips, folder.batch(step).clips)
        assert torch.equal(shard.validation()[0][1], folder.validation()[0][1])
        assert len(data(tmp_path).files) == 3, "a folder of shards is a source too"

    def test_a_member_ends_where_it_ends(self, clips, tmp_path):
        media = data(self.pack(clips, tmp_path / "shard.tar")).files[1]
        whole = (clips / "more" / "b.mp4").read_bytes()
        with media.open() as file:
            assert file.read() == whole
            file.seek(-20, 2)
            assert (file.tell(), file.read(100), file.read(1)) == (len(whole) - 20, whole[-20:], b"")

    def test_a_broken_member_is_named(self, clips, tmp_path):
        cut_short(count_up(tmp_path / "broken.mkv", 40), 0.2)
        with tarfile.open(tmp_path / "shard.tar", "w") as tar:
            tar.add(tmp_path / "broken.mkv", "x/broken.mkv")
            tar.add(clips / "a.mp4", "a.mp4")
        source = data(tmp_path / "shard.tar", buckets=[Bucket(9, 16, 16, 2)])
        failures = {name: reason for step in range(8) for name, reason in source.batch(step).failures.items()}
        assert failures.keys() == {"broken"} and "shard.tar/x/broken.mkv" in failures["broken"]

    def test_refuses_what_cannot_be_sought(self, clips, tmp_path):
        with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
            tar.add(clips / "a.mp4", "a.mp4")
        with pytest.raises(ValueError, match=r"packed\.tar is not a whole uncompressed tar"):
            data(tmp_path / "packed.tar")
        with pytest.raises(ValueError, match=r"shard\.tar is not a whole uncompressed tar"):
            data(cut_short(self.pack(clips, tmp_path / "shard.tar"), 0.4))


class TestFailures:
    @pytest.fixture
    def mixed(self, tmp_path):
        """Two sound files among those that cannot be used."""
        for name in ("sound_0", "sound_1"):
            count_up(tmp_path / f"{name}.mp4", 30)
        cut_short(count_up(tmp_path / "truncated.mp4", 60), 0.3)
        cut_short(count_up(tmp_path / "no_index.mkv", 60), 0.3)
        (tmp_path / "page.mp4").write_text("<html>")
        drawn.write_video(tmp_path / "short.mp4", 3, 32, 40)
        drawn.write_video(tmp_path / "small.mp4", 9, 16, 16)
        return tmp_path

    def test_unusable_files_are_passed_over_and_named(self, mixed):
        source = data(mixed, buckets=[Bucket(5, 32, 32, 2)], max_stride=8)
        failures = {}
        for step in range(25):
            batch = source.batch(step)
            failures |= batch.failures
            for clip in batch.clips:
                taken = numbers(clip[None])
                assert len(set(np.diff(taken))) == 1 and taken[1] > taken[0], "frames of the file, none made up"
        assert failures.keys() == {"truncated", "no_index", "page", "short", "small"}
        assert "page.mp4 cannot be read" in failures["page"]
        assert "short.mp4 has 3 frames; 5 are needed" in failures["short"]
        assert "small.mp4 has 16 x 16 pixels; 32 x 32 are needed" in failures["small"]
        assert re.search("ends early|breaks off", failures["truncated"])

    def test_passing_over_is_repeatable(self, mixed):
        one, two = (data(mixed, buckets=[Bucket(5, 32, 32, 2)]) for _ in range(2))
        for step in reversed(range(4)):
            two.batch(step)
        for step in range(4):
            first, again = one.batch(step), two.batch(step)
            assert torch.equal(first.clips, again.clips) and first.failures == again.failures

    def test_frames_that_the_decoder_made_up_are_not_used(self, tmp_path):
        path = drawn.write_video(tmp_path / "damaged.mp4", 60)
        whole = path.read_bytes()
        start, end = whole.index(b"mdat"), len(whole)
        for place in range(start + (end - start) // 4, end - (end - start) // 4, 50):
            path.write_bytes(whole[:place] + bytes(byte ^ 90 for byte in whole[place:place + 40]) + whole[place + 40:])
            try:
                made_up = [frame.damaged for frame in read_frames(path, threads=1)]
            except VideoError:
                continue  # found out by the decoder
            if any(made_up[3:57]):  # in every stretch of 57 frames
                break
        assert len(made_up) == 60 and any(made_up[3:57]), "no place found where damage does not stop the decoder"
        with pytest.raises(DataError, match=r"damaged\.mp4 is damaged near frame"):
            data(path, buckets=[Bucket(57, 16, 16, 1)]).batch(0)
        with pytest.raises(VideoError, match=r"damaged\.mp4 has \d+ frames that can be decoded"):
            load_clip(path, 57, 16)

    def test_a_run_whose_files_all_fail_stops_with_the_reasons(self, tmp_path):
        for k in range(8):
            (tmp_path / f"broken_{k}.mp4").write_bytes(b"nothing")
        drawn.write_video(tmp_path / "short.mp4", 3, 32, 40)
        with pytest.raises(DataError) as stopped:
            data(tmp_path, buckets=[CLIP]).batch(0)
        message = str(stopped.value)
        assert "No clip of 5 frames of 16 x 16 pixels in 20 files" in message
        assert message.count("cannot be read") in (4, 5) and "more" in message


class TestLoader:
    def test_workers_give_the_same_in_order(self, clips, tmp_path):
        (tmp_path / "broken.mp4").write_bytes(b"nothing")
        source = data(clips, tmp_path)
        before = torch.get_rng_state()
        alone, helped = (list(loader(source, 3, 9, [0, 2], workers)) for workers in (0, 2))
        assert torch.equal(torch.get_rng_state(), before), "the trainer's own numbers are not touched"
        assert [step for step, _ in alone] == [step for step, _ in helped] == list(range(3, 9))
        for (step, one), (_, two) in zip(alone, helped, strict=True):
            for part, a, b in zip((0, 2), one, two, strict=True):
                assert torch.equal(a.clips, b.clips) and a.failures == b.failures
                assert torch.equal(a.clips, source.batch(step, part).clips)
        assert any(batch.failures for _, batches in helped for batch in batches)
        assert list(loader(source, 5, 5, [0], 2)) == []

    def test_closing_early_ends_the_workers(self, clips):
        batches = loader(data(clips), 0, 1000, [0], workers=2)
        next(batches)
        assert len(workers_alive()) == 2
        batches.close()
        assert workers_alive() == []

    def test_reasons_come_out_of_the_worker(self, tmp_path):
        (tmp_path / "broken.mp4").write_bytes(b"nothing")
        with pytest.raises(DataError, match=r"^No clip of 5 frames(.|\n)*broken\.mp4 cannot be read[^\n]*$"):
            list(loader(data(tmp_path, buckets=[CLIP]), 0, 4, [0], workers=1))
        assert workers_alive() == []

    def test_decodes_no_further_ahead_than_it_may(self, clips, monkeypatch):
        """A clip of a large bucket is tens of megabytes."""
        asked_for = []
        monkeypatch.setattr(ClipData, "batch", lambda self, step, part: asked_for.append(step))
        batches = loader(data(clips), 0, 1000, [0], workers=2)
        for _ in range(3):
            next(batches)
        batches.close()
        assert max(asked_for) <= 2 + 2 * AHEAD


class TestSkipReport:
    def test_each_name_once_also_after_resuming(self, tmp_path):
        report = SkipReport(tmp_path / "skipped.csv")
        report.add({})
        assert not report.path.exists() and report.count == 0
        report.add({"a": "breaks off, at 3 s", "b": "too\nshort"})
        report.add({"a": "another reason"})
        resumed = SkipReport(tmp_path / "skipped.csv")
        assert resumed.count == 2
        resumed.add({"b": "again", "c": "gone"})
        with open(resumed.path, newline="", encoding="utf-8") as file:
            rows = [(row["name"], row["reason"]) for row in csv.DictReader(file)]
        assert rows == [("a", "breaks off, at 3 s"), ("b", "too\nshort"), ("c", "gone")]


class TestLoadClip:
    def test_first_frames_from_the_centre(self, tmp_path):
        clip = load_clip(count_up(tmp_path / "a.mp4", 12), 9, 16)
        assert clip.shape == (1, 3, 9, 16, 16) and numbers(clip) == list(range(9))
        with pytest.raises(VideoError, match=r"a\.mp4 has 12 frames that can be decoded; 17 are needed"):
            load_clip(tmp_path / "a.mp4", 17, 16)


class TestReadFrames:
    def test_steps_and_sizes(self, tmp_path):
        path = drawn.write_video(tmp_path / "a.mp4", 20)
        whole = list(read_frames(path))
        some = list(read_frames(path, start=0.2, step=4))
        assert [round(float(frame.time) * 25) for frame in some] == [5, 9, 13, 17]
        assert all(np.array_equal(a.pixels, whole[k].pixels) for a, k in zip(some, (5, 9, 13, 17), strict=True))
        small = next(islice(read_frames(path, size=(16, 32)), 1))
        assert small.pixels.shape == (16, 32, 3)
        means = whole[0].pixels.reshape(16, 4, 32, 2, 3).mean((1, 3))
        assert np.abs(small.pixels - means).mean() < 2

    def test_reads_file_objects(self, tmp_path):
        path = drawn.write_video(tmp_path / "a.mp4", 20)
        with open(path, "rb") as file:
            assert len(list(read_frames(file, start=0.4))) == 10
        with open(path, "rb") as file:
            assert cvvae.video.probe(file) == cvvae.video.probe(path)
        with open(path, "rb") as file:
            assert cvvae.video.count_packets(file) == 20
