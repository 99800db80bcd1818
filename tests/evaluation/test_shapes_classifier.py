from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from diff_dalle.data.scenes import one_object_scenes
from diff_dalle.data.shapes import COLOURS, SHAPES, Scene
from diff_dalle.evaluation import shapes_classifier
from diff_dalle.evaluation.features import extract
from diff_dalle.evaluation.frechet import frechet_between
from diff_dalle.evaluation.shapes_classifier import (
    HEADS,
    ShapesClassifier,
    averaged,
    classes_of,
    read_weights,
    trained_classifier,
    with_coordinates,
)

CPU = torch.device("cpu")
Pictures = NDArray[np.uint8]


def fresh(n: int, seed: int = 7) -> list[Scene]:
    """Scenes at places that neither training nor its measurement has seen."""
    half = n // 2
    withheld = one_object_scenes(half, seed, held_out_only=True)
    return withheld + one_object_scenes(n - half, seed, held_out_only=False)


def drawn(scenes: list[Scene], size: int = 64) -> Pictures:
    return np.stack([scene.draw(size) for scene in scenes])


def tensor(pictures: Pictures) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def features(pictures: Pictures, batch_size: int = 64) -> NDArray[np.float64]:
    return extract("shapes", tensor(pictures), batch_size)


# Known answers


def test_averaging_is_the_mean_of_each_block() -> None:
    images = torch.rand(2, 3, 256, 128)
    assert averaged(images).shape == (2, 3, 128, 64)
    blocks = images.reshape(2, 3, 128, 2, 64, 2).mean(dim=(3, 5))
    torch.testing.assert_close(averaged(images), blocks)
    small = torch.rand(1, 3, 64, 80)
    assert averaged(small) is small
    assert averaged(torch.rand(1, 3, 100, 150)).shape == (1, 3, 64, 96)


def test_coordinates_run_from_edge_to_edge() -> None:
    x = with_coordinates(torch.zeros(2, 3, 5, 3))
    assert x.shape == (2, 5, 5, 3) and not x[:, :3].any()
    assert x[1, 3].tolist() == [[-1.0, 0.0, 1.0]] * 5
    assert x[1, 4, :, 2].tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]


def test_the_classes_of_a_scene() -> None:
    scene = fresh(1)[0]
    thing = replace(
        scene.objects[0], colour="orange", shape="ring", size="large", centre=(0.5, 0.2)
    )
    scene = replace(scene, objects=(thing,), background="teal")
    found = [words[k] for words, k in zip(HEADS.values(), classes_of(scene), strict=True)]
    assert found == ["teal", "orange", "ring", "large", "top"]


# The committed file


def test_the_committed_file_is_what_the_loader_reads() -> None:
    weights, metadata = read_weights()
    expected = {name: tuple(value.shape) for name, value in ShapesClassifier().state_dict().items()}
    assert {name: array.shape for name, array in weights.items()} == expected
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float16)}
    assert set(metadata) == {"steps", "batch_size", "turns", "seed", "accuracy"}
    for name, value in trained_classifier(CPU).state_dict().items():
        np.testing.assert_array_equal(value.numpy(), weights[name].astype(np.float32))


def test_the_committed_file_is_small() -> None:
    file = shapes_classifier.resources.files("diff_dalle.evaluation") / shapes_classifier.WEIGHTS
    assert len(file.read_bytes()) < 250_000


# What it sees


@pytest.mark.parametrize("size", [64, 256])
def test_it_says_what_a_fresh_scene_shows(size: int) -> None:
    scenes = fresh(256)
    logits = trained_classifier(CPU)(tensor(drawn(scenes, size)))
    wanted = torch.tensor([classes_of(scene) for scene in scenes]).T
    found = torch.stack([logits[name].argmax(dim=1) for name in HEADS])
    assert (found == wanted).double().mean(dim=1).min() > 0.97


def test_features_do_not_depend_on_the_batch() -> None:
    pictures = drawn(fresh(20))
    together = features(pictures, 20)
    assert together.shape == (20, 64) and together.dtype == np.float64
    np.testing.assert_allclose(features(pictures, 3), together, atol=1e-5)


def test_a_scene_has_nearly_the_same_features_at_any_size() -> None:
    scenes = fresh(20)
    near, far = features(drawn(scenes, 64)), features(drawn(scenes, 256))
    assert np.abs(near - far).max() < 0.05 * near.std()


# Distances: each set of N scenes against N others

N = 240
REAL, OTHERS = fresh(2 * N)[::2], fresh(2 * N)[1::2]


@pytest.fixture(scope="module")
def real() -> NDArray[np.float64]:
    return features(drawn(REAL))


@pytest.fixture(scope="module")
def floor(real: NDArray[np.float64]) -> float:
    """What so few scenes cannot tell apart."""
    return frechet_between(features(drawn(OTHERS)), real)


def repainted(scene: Scene) -> Scene:
    """Its object in a colour that does not belong to its caption: of three, not of eight."""
    colours = list(COLOURS)
    thing = scene.objects[0]
    colour = colours[colours.index(thing.colour) % 3]
    return replace(scene, objects=(replace(thing, colour=colour),))


def as_shape(scene: Scene, shape: str) -> Scene:
    return replace(scene, objects=(replace(scene.objects[0], shape=shape),))


def blurred(pictures: Pictures, radius: float) -> Pictures:
    kernel = ImageFilter.GaussianBlur(radius)
    return np.stack([np.asarray(Image.fromarray(p).filter(kernel)) for p in pictures])


def noised(pictures: Pictures, level: float) -> Pictures:
    noise = np.random.default_rng(0).normal(0, level, pictures.shape)
    return (pictures + noise).round().clip(0, 255).astype(np.uint8)


# What is wrong with a set, and how many times the floor its distance is at least.
WRONG = {
    "fewer colours": (2, lambda: drawn([repainted(scene) for scene in OTHERS])),
    "hues turned": (20, lambda: drawn(OTHERS)[..., [1, 2, 0]]),
    "one shape": (3.5, lambda: drawn([as_shape(scene, "circle") for scene in OTHERS])),
    "blurred": (3, lambda: blurred(drawn(OTHERS), 2)),
    "noised": (5, lambda: noised(drawn(OTHERS), 20)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_scenes_are_further_than_other_scenes(
    wrong: str, real: NDArray[np.float64], floor: float
) -> None:
    factor, pictures = WRONG[wrong]
    assert frechet_between(features(pictures()), real) > factor * floor


def test_the_more_is_wrong_the_larger_the_distance(real: NDArray[np.float64], floor: float) -> None:
    def distance(pictures: Pictures) -> float:
        return frechet_between(features(pictures), real)

    true = drawn(OTHERS)
    half = [as_shape(s, SHAPES[SHAPES.index(s.objects[0].shape) % 3]) for s in OTHERS]
    one = [as_shape(s, "circle") for s in OTHERS]
    assert floor < distance(drawn(half)) < distance(drawn(one))
    assert floor < distance(blurred(true, 1)) < distance(blurred(true, 2))
    assert floor < distance(noised(true, 4)) < distance(noised(true, 20))
