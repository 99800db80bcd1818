import numpy as np
import pytest

from diff_dalle.data.captions import one_object_captions
from diff_dalle.evaluation.alignment import truth_of
from diff_dalle.evaluation.sweep import SweepReport, sweep

CHOSEN = one_object_captions(96, 0)
TRUTHS = [truth_of(caption) for caption, _ in CHOSEN]
OTHERS = [scene for _, scene in one_object_captions(96, 1, held_out=False)]
ACCURACY = {0.0: 0.5, 1.0: 0.7, 4.0: 0.95, 8.0: 0.8, -4.0: 0.2}


def drawn(scale: float, seed: int) -> np.ndarray:
    """A model whose pictures are right more often at some strengths, from the same luck."""
    luck = np.random.default_rng(seed).random(len(CHOSEN))
    return np.stack(
        [
            (scene if chance < ACCURACY[scale] else other).draw(64)
            for chance, (_, scene), other in zip(luck, CHOSEN, OTHERS, strict=True)
        ]
    )


@pytest.fixture(scope="module")
def report() -> SweepReport:
    return sweep(drawn, TRUTHS, [0.0, 1.0, 4.0, 8.0], seeds=[0, 1])


def test_the_best_strength_is_found_and_its_negation_tried(report: SweepReport) -> None:
    assert report.best is not None and report.best.scale == 4
    assert [row.scale for row in report.rows] == [-4, 0, 1, 4, 8]
    assert report.to_json()["best_scale"] == 4


def test_gains_are_paired_with_strength_0(report: SweepReport) -> None:
    rows = {row.scale: row for row in report.rows}
    best, none, negated = rows[4], rows[0], rows[-4]
    assert best.gain is not None and best.gain_all is not None and negated.gain is not None
    assert best.gain.mean == pytest.approx(best.alignment.mean - none.alignment.mean)
    assert best.gain.low > 0 > negated.gain.high
    assert best.gain_all.mean == pytest.approx(0.45, abs=0.1)
    assert none.gain is not None and (none.gain.low, none.gain.high) == (0, 0)


def test_alignment_is_the_mean_of_three_shares(report: SweepReport) -> None:
    for row in report.rows:
        shares = [row.shares[name].mean for name in ("background", "colour", "shape")]
        assert row.alignment.mean == pytest.approx(np.mean(shares))


def test_the_table_has_a_row_a_strength(report: SweepReport) -> None:
    lines = report.table().splitlines()
    assert lines[0].startswith("96 captions, seeds 0 1")
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| -4", "| 0", "| 1", "| 4", "| 8"]


def test_without_strength_0_there_is_no_gain() -> None:
    report = sweep(drawn, TRUTHS, [1.0], seeds=[0])
    assert [row.scale for row in report.rows] == [1]
    assert report.rows[0].gain is None
