import numpy as np
import pytest
import torch
from PIL import Image

from diff_dalle.cascade.consistency import measure
from diff_dalle.cascade.inputs import shrunk_to
from diff_dalle.data.scenes import sample_scene
from diff_dalle.evaluation.upsampling import compare_with_lanczos, enlarge_lanczos

TRUE = np.stack([sample_scene(0, index, "val").draw(128) for index in range(64)])
SMALL = shrunk_to(TRUE, (32, 32), torch.device("cpu"))


def test_shrinking_is_the_mean_of_each_block() -> None:
    expected = TRUE.reshape(64, 32, 4, 32, 4, 3).astype(float).mean(axis=(2, 4)).round()
    assert SMALL.dtype == np.uint8
    assert np.abs(SMALL - expected).max() <= 1  # halves may round either way
    assert (SMALL == expected).mean() > 0.99


def test_lanczos_is_pillows() -> None:
    expected = Image.fromarray(SMALL[3]).resize((128, 128), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(enlarge_lanczos(SMALL, 128)[3], np.asarray(expected))


def test_a_perfect_upsampler() -> None:
    report = compare_with_lanczos(TRUE, SMALL, TRUE)
    assert report.consistency.mean > 50  # only the small picture was rounded
    assert report.consistent == 1
    assert report.psnr_model.mean == 100 > report.psnr_lanczos.mean > 20
    for distances in report.distances.values():
        assert distances.model == pytest.approx(0, abs=1e-6)
        assert distances.lanczos > distances.floor > 0


def test_an_upsampler_that_draws_another_picture() -> None:
    """Looks like the data, so its distance is 0; only the consistency gives it away."""
    report = compare_with_lanczos(TRUE, SMALL, np.roll(TRUE, 1, axis=0))
    assert report.distances["bands"].model == pytest.approx(0, abs=1e-6)
    assert report.consistency.mean < 20 and report.consistent < 0.1


def test_lanczos_gains_nothing_on_itself() -> None:
    lanczos = enlarge_lanczos(SMALL, 128)
    report = compare_with_lanczos(TRUE, SMALL, lanczos)
    for distances in report.distances.values():
        assert distances.model == pytest.approx(distances.lanczos)
    assert report.psnr_model == report.psnr_lanczos


def test_a_shift_of_colour_shows_in_the_consistency() -> None:
    shifted = (TRUE.astype(int) + 10).clip(0, 255).astype(np.uint8)
    ratios = measure(shifted, SMALL).psnr
    assert 28 < np.median(ratios) < 31  # 10 of 255 is 28.1 dB where nothing was clipped


def test_report_in_words_and_json() -> None:
    report = compare_with_lanczos(TRUE[:8], SMALL[:8], TRUE[:8])
    assert "| 8 pictures, 32 -> 128 px | model | Lanczos |" in report.table()
    assert report.to_json()["distances"]["random"]["model"] == pytest.approx(0, abs=1e-6)


def test_the_kinds_of_features_are_chosen() -> None:
    assert set(compare_with_lanczos(TRUE[:8], SMALL[:8], TRUE[:8]).distances) == {"bands", "random"}
    report = compare_with_lanczos(TRUE[:8], SMALL[:8], TRUE[:8], ["shapes"])
    assert set(report.distances) == {"shapes"}
    assert "| Fréchet distance, `shapes` |" in report.table()


def test_sets_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="true"):
        compare_with_lanczos(TRUE[:8], SMALL[:7], TRUE[:8])
