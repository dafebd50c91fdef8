"""Video files in and out: nothing is lost on the way, and no half file keeps a final name."""

from fractions import Fraction

import av
import drawn
import numpy as np
import pytest
import torch

import cvvae
import cvvae.metrics
from cvvae.stream import decode_file, encode_file, load_latents, reconstruct, save_latents
from cvvae.video import VideoError, VideoWriter, probe, read_frames, to_clip, to_frames


@pytest.fixture(scope="module")
def vae():
    return cvvae.inflate(drawn.small_image_vae())


def facts(path):
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        sound = [bytes(packet) for packet in container.demux(*container.streams.audio)] if container.streams.audio else []
        return Fraction(video.average_rate), (video.height, video.width), sound


class TestReading:
    def test_every_frame_comes_with_its_time(self, tmp_path):
        path = drawn.write_video(tmp_path / "a.mp4", 11, fps=Fraction(30000, 1001))
        read = list(read_frames(path))
        assert len(read) == 11
        assert [round(float(f.time) * 30000 / 1001) for f in read] == list(range(11))
        worst = max(np.abs(a.pixels.astype(int) - b.astype(int)).mean()
                    for a, b in zip(read, drawn.frames(11), strict=True))
        assert worst < 4

    def test_starts_in_the_middle(self, tmp_path):
        path = drawn.write_video(tmp_path / "a.mp4", 20)
        assert [round(float(f.time) * 25) for f in read_frames(path, start=0.4)] == list(range(10, 20))

    def test_levels_survive_the_clip_form(self):
        frames = drawn.frames(3)
        assert np.array_equal(to_frames(to_clip(frames)), np.stack(frames))

    def test_says_what_is_wrong(self, tmp_path):
        (tmp_path / "page.mp4").write_text("<html>")
        with pytest.raises(VideoError, match=r"page\.mp4 cannot be read"):
            list(read_frames(tmp_path / "page.mp4"))
        with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
            list(read_frames(tmp_path / "none.mp4"))


class TestWriting:
    def test_an_error_leaves_nothing(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4", Fraction(25)) as writer:
            writer.write(drawn.frames(1)[0])
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == []

    def test_refuses_other_containers_and_missing_folders(self, tmp_path):
        with pytest.raises(VideoError, match=r"\.gif"):
            VideoWriter(tmp_path / "a.gif", Fraction(25))
        with pytest.raises(VideoError, match="does not exist"):
            VideoWriter(tmp_path / "no" / "a.mp4", Fraction(25))


class TestReconstruct:
    @pytest.mark.parametrize("count", [1, 2, 17, 18, 36])
    def test_keeps_frames_size_rate_and_sound(self, vae, tmp_path, count):
        source = drawn.write_video(tmp_path / "in.mp4", count, 50, 46, Fraction(24000, 1001), sound=True)
        report = reconstruct(vae, source, tmp_path / "out.mp4")
        assert (report.frames, report.height, report.width) == (count, 50, 46)
        assert len(list(read_frames(tmp_path / "out.mp4"))) == count
        rate, size, sound = facts(tmp_path / "out.mp4")
        assert size == (50, 46)
        assert sound == facts(source)[2] and sound
        if count > 1:
            assert rate == Fraction(24000, 1001)

    def test_keeps_odd_sizes_and_uneven_times(self, vae, tmp_path):
        times = [Fraction(k * k + 10 * k, 1000) for k in range(9)]
        source = drawn.write_video(tmp_path / "in.mp4", 9, 33, 41, times=times)
        reconstruct(vae, source, tmp_path / "out.mkv")
        read = list(read_frames(tmp_path / "out.mkv"))
        assert read[0].pixels.shape == (33, 41, 3)
        assert [float(f.time) for f in read] == pytest.approx([float(t) for t in times], abs=2e-3)

    def test_equals_the_library_call(self, vae, tmp_path):
        source = drawn.write_video(tmp_path / "in.mp4", 21)
        report = reconstruct(vae, source, tmp_path / "out.mp4")
        clip = to_clip([frame.pixels for frame in read_frames(source)])
        whole = to_clip(list(to_frames(vae.reconstruct(clip))))
        assert report.psnr == pytest.approx(cvvae.metrics.psnr(whole, clip), abs=1e-6)
        assert report.latent_shape == tuple(vae.encode(clip).mean.shape[1:])

    def test_scores_identity_as_perfect(self):
        clip = to_clip(drawn.frames(2))
        assert cvvae.metrics.psnr(clip, clip) == float("inf")
        assert cvvae.metrics.ssim(clip, clip) == pytest.approx(1)
        assert cvvae.metrics.psnr(clip, clip.clamp(max=0.9) - 0.1) == pytest.approx(26.02, abs=0.3)

    def test_stopping_leaves_no_file(self, vae, tmp_path):
        source = drawn.write_video(tmp_path / "in.mp4", 40)

        def stop():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            reconstruct(vae, source, tmp_path / "out.mp4", stop)
        assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]

    def test_holds_one_window_at_a_time(self, vae, tmp_path):
        source = drawn.write_video(tmp_path / "in.mp4", 80)
        seen = []
        handle = vae.encoder.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[0].shape[2]))
        reconstruct(vae, source, tmp_path / "out.mp4")
        handle.remove()
        assert seen == [17, 17, 17, 17, 17]


class TestLatentFiles:
    def test_encode_and_decode_give_the_clip_back(self, vae, tmp_path):
        source = drawn.write_video(tmp_path / "in.mp4", 19, 50, 46, sound=True)
        save_latents(encode_file(vae, source), tmp_path / "z.safetensors")
        clip = load_latents(tmp_path / "z.safetensors")
        assert clip.latents.shape == (1, 4, 6, 7, 6)
        decode_file(vae, clip, tmp_path / "out.mp4", audio_from=source)
        read = list(read_frames(tmp_path / "out.mp4"))
        assert len(read) == 19 and read[0].pixels.shape == (50, 46, 3)
        assert facts(tmp_path / "out.mp4")[2] == facts(source)[2]
        assert probe(tmp_path / "out.mp4").fps == 25

    def test_refuses_other_files(self, tmp_path):
        from safetensors.torch import save_file

        save_file({"weights": torch.zeros(1)}, tmp_path / "z.safetensors")
        with pytest.raises(VideoError, match="does not hold latents"):
            load_latents(tmp_path / "z.safetensors")
