import dataclasses

import numpy as np
import pytest

from diff_dalle.data.captions import captions, one_object_captions
from diff_dalle.data.scenes import sample_scene
from diff_dalle.errors import UsageError
from diff_dalle.evaluation.alignment import (
    Truth,
    agreement,
    average_shares,
    position_of,
    right,
    score,
    score_detections,
    shapes_detector,
    size_of,
    truth_of,
    truth_of_scene,
)
from diff_dalle.evaluation.detector import Detection

SEEN = Detection("teal", "red", "star", 0.9, (0.5, 0.2), 0.25)
SAID = Truth("teal", "red", "star", "small", "top")


@pytest.mark.parametrize("held_out", [True, False])
def test_captions_are_read_back(held_out: bool) -> None:
    for caption, scene in one_object_captions(480, 3, held_out=held_out):
        read = truth_of(caption)
        assert dataclasses.replace(read, position=None) == truth_of_scene(scene)
        assert read.position is not None


def test_shorter_captions_and_words_of_two() -> None:
    assert truth_of("an orange ring on a sky blue background\n") == Truth(
        "sky blue", "orange", "ring"
    )
    read = truth_of("a large blue cross in the centre of a sky blue background")
    assert read == Truth("sky blue", "blue", "cross", "large", "centre")


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red star",
        "a red hexagon on a teal background",
        "빨간 별",
        "a small red star above a large blue ring on a teal background",
        "a small red star at the top of a teal background, and more",
    ],
)
def test_other_captions_are_refused(caption: str) -> None:
    with pytest.raises(UsageError, match="--write_captions"):
        truth_of(caption)


def test_captions_of_several_objects_are_refused() -> None:
    several = [s for s in (sample_scene(0, i) for i in range(40)) if len(s.objects) > 1]
    for scene in several:
        with pytest.raises(UsageError):
            truth_of(captions(scene)[0])


def test_scores_of_drawn_scenes() -> None:
    chosen = one_object_captions(48, 0)
    scores = score([scene.draw(64) for _, scene in chosen], [truth_of(c) for c, _ in chosen])
    assert scores.count == 48
    assert {share.mean for share in scores.shares.values()} == {1.0}
    assert set(scores.shares) == {
        "background", "colour", "shape", "size", "position", "both", "all",
    }  # fmt: skip
    assert scores.shares["all"].low == pytest.approx(0.926, abs=1e-3)
    assert "| shape | 1.000 |" in scores.table()


def test_groups_need_all_their_members() -> None:
    truths = [
        SAID,
        dataclasses.replace(SAID, shape="ring"),
        dataclasses.replace(SAID, colour="pink"),
    ]
    shares = score_detections([SEEN] * 3, truths).shares
    found = {name: round(share.mean * 3) for name, share in shares.items()}
    assert found == {
        "background": 3, "colour": 2, "shape": 2, "size": 3, "position": 3, "both": 2, "all": 1,
    }  # fmt: skip


def test_what_a_caption_leaves_out_is_not_scored() -> None:
    brief = dataclasses.replace(SAID, size=None, position=None)
    shares = score_detections([SEEN, SEEN], [brief, dataclasses.replace(SAID, size="large")]).shares
    assert (shares["size"].mean, shares["position"].mean) == (0.0, 1.0)
    assert "size" not in score_detections([SEEN], [brief]).shares


@pytest.mark.parametrize(
    ("centre", "word"),
    [
        ((0.5, 0.55), "centre"),
        ((0.2, 0.5), "left"),
        ((0.8, 0.55), "right"),
        ((0.45, 0.7), "bottom"),
    ],
)
def test_words_of_place(centre: tuple[float, float], word: str) -> None:
    assert position_of(dataclasses.replace(SEEN, centre=centre)) == word


def test_words_of_size() -> None:
    assert size_of(dataclasses.replace(SEEN, extent=0.27)) == "small"
    assert size_of(dataclasses.replace(SEEN, extent=0.41)) == "large"


def test_agreement_between_sizes_of_a_picture() -> None:
    detector = shapes_detector()
    scenes = [scene for _, scene in one_object_captions(24, 1)]
    small = detector.detect_all([scene.draw(64) for scene in scenes])
    large = detector.detect_all([scene.draw(256) for scene in scenes])
    large[0] = dataclasses.replace(large[0], colour="none")
    same = agreement(small, large)
    assert same["shape"].mean == 1
    assert same["colour"].mean == same["verdict"].mean == pytest.approx(23 / 24)


def test_averages_count_a_caption_once() -> None:
    first, second = right([SEEN] * 4, [SAID] * 4), right([SEEN] * 4, [SAID] * 4)
    second["shape"] = np.zeros(4)
    means = average_shares([first, second])
    assert (means["shape"].mean, means["colour"].mean) == (0.5, 1.0)
