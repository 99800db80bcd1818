"""Outputs held against what was enlarged: known answers, the cascade's, the manifest's line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diff_dalle import Cascade
from diff_dalle.cascade import CascadeResult
from diff_dalle.cascade.consistency import describe_consistency, measure, psnr

PROMPTS = ["a red circle", "a star", "x"]


def noise(count: int, height: int, width: int) -> np.ndarray:
    shape = (count, height, width, 3)
    return np.random.default_rng(0).integers(0, 190, shape, np.uint8)


def test_psnr_is_the_textbook_number() -> None:
    black = np.zeros((2, 8, 8, 3), np.uint8)
    other = black.copy()
    other[0] = 255
    other[1, :4] = 10  # mean square error 50
    assert psnr(black, other) == pytest.approx([0.0, 10 * np.log10(255**2 / 50)])
    assert psnr(black, black) == pytest.approx([100.0, 100.0])
    with pytest.raises(ValueError, match="differ"):
        psnr(black, black[:1])


@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 6)])
def test_a_picture_that_shrinks_to_its_input_is_perfect(height: int, width: int) -> None:
    """However its pixels differ inside each box; 17 pictures are more than one chunk."""
    small = noise(17, height, width) + 35
    output = small.repeat(2, axis=1).repeat(2, axis=2)
    output[:, ::2] += 20
    output[:, 1::2] -= 20
    perfect = measure(output, small)
    assert perfect.psnr.tolist() == [100.0] * 17 and perfect.mean_abs.tolist() == [0.0] * 17
    output[3] += 10  # a shift of one picture's colour
    shifted = measure(output, small)
    assert shifted.psnr[3] == pytest.approx(20 * np.log10(25.5), abs=1e-4)
    assert shifted.mean_abs[3] == pytest.approx(10, abs=1e-5)
    assert np.delete(shifted.psnr, 3).tolist() == [100.0] * 16
    output[3, :, ::4] -= 10  # a quarter of the columns: half of a box in every second one
    assert measure(output, small).mean_abs[3] == pytest.approx(7.5, abs=1e-5)
    output[4, :, :width] += 10
    output[4, :, width:] -= 10
    assert measure(output, small).mean_abs[4] == pytest.approx(10, abs=1e-5)  # not 0
    assert shifted.to_json(3) == {"psnr_db": 28.131, "mean_abs_levels": 10.0}


def test_a_result_measures_every_stage_against_the_one_before() -> None:
    stages = [noise(2, 4, 4), noise(2, 8, 8), noise(2, 16, 16)]
    whole = CascadeResult(stages=stages, candidates=[0, 0])
    base, middle, last = whole.consistency
    assert base is None and middle is not None and last is not None
    assert middle.psnr.tolist() == measure(stages[1], stages[0]).psnr.tolist()
    assert last.mean_abs.tolist() == measure(stages[2], stages[1]).mean_abs.tolist()
    alone = [
        CascadeResult(stages=[stages[1][n:][:1]], candidates=[0], low_res=stages[0][n:][:1])
        for n in range(2)
    ]
    (joined,) = CascadeResult.join(alone).consistency
    assert joined is not None and joined.psnr.tolist() == middle.psnr.tolist()


def test_an_upsampler_alone_is_held_against_what_it_was_given(folder: Path) -> None:
    """Pictures larger than it enlarges are scaled down first, and that is its input."""
    upsampler = Cascade.load(str(folder / "up32.pt"))
    large = noise(3, 64, 64)
    result = upsampler.sample(PROMPTS, steps=2, low_res=large)
    assert result.low_res is not None
    means = large.reshape(3, 16, 4, 16, 4, 3).mean((2, 4))
    assert np.abs(result.low_res - means).max() <= 0.5 + 1e-4
    (told,) = result.consistency
    assert told is not None
    assert told.psnr.tolist() == measure(result.stages[0], result.low_res).psnr.tolist()


def test_one_line_has_the_means_of_every_upsampler() -> None:
    def entry(psnr: float, levels: float) -> dict[str, float]:
        return {"psnr_db": psnr, "mean_abs_levels": levels}

    images = [
        {"consistency": [None, entry(30.0, 2.0), entry(40.0, 1.0)]},
        {"consistency": [None, entry(31.0, 4.0), entry(42.0, 1.5)]},
    ]
    assert describe_consistency(images, ["64", "256", "1024"]) == [
        "shrunk, against what was enlarged, on average: 256 px 30.5 dB (3.0 of 255 grey levels), "
        "1024 px 41.0 dB (1.2 of 255 grey levels)"
    ]
    assert describe_consistency([{"consistency": [None]}], ["64"]) == []
