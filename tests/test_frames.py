"""The frame map: latent 0 stands for frame 0, latent k for frames 4k-3 .. 4k."""

import pytest

from cvvae.frames import first_frame, frames_of, latents_of, padded_frames, padded_size

FRAMES = range(1, 200)
LATENTS = range(1, 60)


def stands_for(latent: int) -> list[int]:
    return [0] if latent == 0 else [4 * latent - 3, 4 * latent - 2, 4 * latent - 1, 4 * latent]


@pytest.mark.parametrize("frames, latents", [(1, 1), (2, 2), (4, 2), (5, 2), (6, 3), (9, 3), (16, 5), (17, 5), (33, 9)])
def test_known_lengths(frames, latents):
    assert latents_of(frames) == latents


def test_latents_of_is_the_latent_of_the_last_frame():
    for frames in FRAMES:
        assert frames - 1 in stands_for(latents_of(frames) - 1)


def test_frames_of_counts_what_the_latents_stand_for():
    for latents in LATENTS:
        assert frames_of(latents) == sum(len(stands_for(latent)) for latent in range(latents))


def test_first_frame_opens_the_group():
    for latent in LATENTS:
        assert first_frame(latent) == stands_for(latent)[0]
    assert first_frame(0) == 0


def test_a_full_clip_survives_the_round_trip():
    for latents in LATENTS:
        assert latents_of(frames_of(latents)) == latents


def test_padding_adds_the_fewest_frames():
    for frames in FRAMES:
        padded = padded_frames(frames)
        assert padded % 4 == 1
        assert 0 <= padded - frames < 4
        assert latents_of(padded) == latents_of(frames)


def test_sizes_are_padded_to_the_next_multiple_of_8():
    for pixels in range(1, 100):
        assert padded_size(pixels) % 8 == 0
        assert 0 <= padded_size(pixels) - pixels < 8
