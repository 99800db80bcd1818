import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from diff_dalle.cascade.inputs import shrunk_to
from diff_dalle.data.scenes import sample_scene
from diff_dalle.evaluation.features import ANY_PICTURE, FEATURES, extract
from diff_dalle.evaluation.frechet import frechet_between
from diff_dalle.evaluation.upsampling import enlarge_lanczos

SIZE = 128
SMALLEST = {"bands": 48, "random": 48, "shapes": 64}  # pixels
TRUE = np.stack([sample_scene(0, index, "val").draw(SIZE) for index in range(96)])


def features(name: str, pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
    return extract(name, torch.from_numpy(pictures).permute(0, 3, 1, 2))


@pytest.fixture(scope="module", params=ANY_PICTURE)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def true(name: str) -> NDArray[np.float64]:
    return features(name, TRUE)


def blurred(radius: float) -> NDArray[np.uint8]:
    kernel = ImageFilter.GaussianBlur(radius)
    return np.stack([np.asarray(Image.fromarray(picture).filter(kernel)) for picture in TRUE])


def test_a_picture_alone_has_the_features_it_has_in_company(
    name: str, true: NDArray[np.float64]
) -> None:
    assert true.shape == (96, {"bands": 56, "random": 64}[name])
    assert true.dtype == np.float64 and np.isfinite(true).all()
    np.testing.assert_allclose(features(name, TRUE[17:18])[0], true[17], atol=1e-5)


def test_distance_grows_with_blur_and_vanishes_on_itself(
    name: str, true: NDArray[np.float64]
) -> None:
    distances = [frechet_between(true, features(name, blurred(r))) for r in (0.5, 1.0, 2.0)]
    assert frechet_between(true, true) == pytest.approx(0, abs=1e-6)
    assert 1e-6 < distances[0] < distances[1] < distances[2]


def test_lanczos_is_far_from_the_truth_and_two_halves_are_near(
    name: str, true: NDArray[np.float64]
) -> None:
    small = shrunk_to(TRUE, (SIZE // 4, SIZE // 4), torch.device("cpu"))
    lanczos = features(name, enlarge_lanczos(small, SIZE))
    halves = frechet_between(true[::2], true[1::2])
    assert frechet_between(true, lanczos) > 2.5 * halves


def test_noise_is_far_from_the_truth(name: str, true: NDArray[np.float64]) -> None:
    """An upsampler that leaves noise must not look better than one that blurs."""
    rng = np.random.default_rng(0)
    noisy = (TRUE + rng.normal(0, 8, TRUE.shape)).round().clip(0, 255).astype(np.uint8)
    blurry = frechet_between(true, features(name, blurred(1.0)))
    assert frechet_between(true, features(name, noisy)) > blurry


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("name", FEATURES)
def test_flat_pictures_have_finite_features(name: str, value: int) -> None:
    flat = np.full((2, SMALLEST[name], SMALLEST[name], 3), value, np.uint8)
    assert np.isfinite(features(name, flat)).all()


def test_band_features_notice_direction_and_scale() -> None:
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255  # vertical stripes of one pixel
    lying = stripes.transpose(0, 2, 1, 3).copy()
    upright, flat = features("bands", stripes)[0], features("bands", lying)[0]
    across, along = 6, 7  # the first octave's first two directions, behind six colour values
    assert upright[across] - upright[along] > 5
    assert flat[along] - flat[across] > 5
    assert upright[across] - upright[across + 10] > 5  # one octave down they have averaged out


@pytest.mark.parametrize("name", ["bands", "shapes"])
def test_pictures_too_small_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="too small"):
        features(name, np.zeros((1, 32, 64, 3), np.uint8))
