"""Too many unusable samples, counted over the last thousand of all ranks."""

import pytest

from diff_dalle.training.bad_share import WINDOW, BadShare


def test_nothing_is_judged_before_a_whole_window() -> None:
    watch = BadShare(0.1)
    for _ in range(9):
        watch.add(100, 100)
        assert not watch.exceeded
    watch.add(100, 0)
    assert watch.exceeded


@pytest.mark.parametrize(("bad", "exceeded"), [(100, False), (101, True)])
def test_the_limit_itself_is_borne(bad: int, exceeded: bool) -> None:
    watch = BadShare(0.1)
    watch.add(WINDOW, bad)
    assert watch.exceeded == exceeded


def test_what_is_long_past_is_forgotten() -> None:
    watch = BadShare(0.1)
    watch.add(10, 10)
    for _ in range(WINDOW // 10 - 1):
        watch.add(10, 0)
    for _ in range(WINDOW // 10):
        watch.add(10, 1)
        assert not watch.exceeded
    watch.add(10, 2)
    assert watch.exceeded and "101 of the last 1000 samples" in str(watch.error())


def test_a_step_larger_than_the_window_is_judged_alone() -> None:
    watch = BadShare(0.1)
    watch.add(4096, 4096)
    assert watch.exceeded
    watch.add(4096, 0)
    assert not watch.exceeded
