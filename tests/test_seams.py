"""The measures of the seam benchmark find planted seams, and none where there is none."""

import pytest
import torch
from random_weights import noise
from seams import colour_shift, judge, main, ratio_at, tile_borders


def test_ratio_is_one_without_a_seam_and_large_with_one():
    values = torch.ones(40)
    assert ratio_at(values, [16, 32]) == 1
    values[[16, 32]] = 5
    assert ratio_at(values, [16, 32]) == 5


def test_a_step_of_brightness_at_a_window_border_is_found():
    source = noise(1, 3, 33, 24, 24) * 0.1
    found = source + 0.01 * noise(1, 3, 33, 24, 24, seed=1)
    without = judge("windows", found, source, found, 16)
    found = found.clone()
    found[:, :, 17:] += 0.2
    planted = judge("windows", found, source, found, 16)
    assert 0.8 < without["seam"] < 1.2 and planted["seam"] > 5


def test_colour_shift_is_the_planted_one():
    error = torch.zeros(1, 3, 48, 4, 4)
    error[:, 1, 16:32] = 0.125
    assert colour_shift(error, 16) == 0.125
    assert colour_shift(error[:, :, :17], 16) == 0


def test_tile_borders_lie_inside():
    assert tile_borders(168, 80, 64) == [63, 79, 127, 143]


def test_runs_end_to_end(tmp_path):
    pytest.importorskip("matplotlib")
    main(["--frames", "21", "--size", "40", "--tile", "32", "--out", str(tmp_path), "--device", "cpu"])
    table = (tmp_path / "seams.md").read_text()
    assert "17, 9 cross-faded" in table and "even, statistics of the window" in table
    assert (tmp_path / "seams.png").stat().st_size > 10_000
