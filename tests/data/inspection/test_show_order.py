"""The order that is shown is the one that is read, however many ranks and workers read it."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from diff_dalle.data.inspection.run import InspectConfig
from diff_dalle.data.inspection.show_order import OrderConfig, order_lines
from diff_dalle.data.order import Order
from diff_dalle.errors import UsageError

ROOT = Path(__file__).parents[3]


def lines(folder: Path, *, num_workers: int = 0, **order: Any) -> list[str]:
    cfg = InspectConfig(data_dir=[str(folder)], image_size=16, num_workers=num_workers)
    settings = {"show_order": "1:4", "global_batch_size": 4, "seed": 5, **order}
    return list(order_lines(cfg, OrderConfig(**settings)))


def expected(keys: list[str], counts: list[int], seed: int = 5) -> list[str]:
    """Global batches 1 to 3 of 4 samples, across the edges of epochs."""
    order = Order(counts, seed)
    batches = [[keys[order.slot(4 * n + i).sample] for i in range(4)] for n in (1, 2, 3)]
    return [" ".join([str(number), *batch]) for number, batch in enumerate(batches, start=1)]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (4, 0), (1, 1), (2, 1)])
def test_keys_are_those_of_the_order(tmp_path: Path, pack_many, ranks, workers) -> None:
    keys = pack_many(tmp_path, [4, 3])
    shown = lines(tmp_path, ranks=ranks, num_workers=workers)
    assert shown == expected(keys, [4, 3])
    assert shown != expected(keys, [4, 3], seed=6)


def test_broken_samples_keep_their_place(tmp_path: Path, pack, picture) -> None:
    members = [(f"{n}.png", b"" if n in (0, 3) else picture(n)) for n in range(6)]
    pack(tmp_path / "0.tar", members)
    shown = lines(tmp_path, ranks=2)
    assert shown == expected([str(n) for n in range(6)], [6])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"show_order": "3"}, "--show_order is '3': it must be A:B, say 0:10"),
        ({"show_order": "-1:3"}, "--show_order is '-1:3'"),
        ({"show_order": "3:3"}, "A below B"),
        ({"ranks": 0}, "--ranks is 0"),
        ({"global_batch_size": 0}, "--global_batch_size is 0: it must be a positive multiple"),
        ({"ranks": 3}, "--global_batch_size is 4: it must be a positive multiple of --ranks 3"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        OrderConfig(**{"show_order": "0:1", "global_batch_size": 4, **changes})


@pytest.mark.parametrize("changes", [{"max_samples": 3}, {"out_dir": "out"}])
def test_settings_of_a_report_are_refused(changes: dict[str, Any]) -> None:
    cfg = InspectConfig(data_dir=["nowhere"], **changes)
    order = OrderConfig(show_order="0:1", global_batch_size=1)
    with pytest.raises(UsageError, match=f"--{next(iter(changes))} is .*be left out"):
        next(order_lines(cfg, order))


def test_the_command(tmp_path: Path, pack_many, capsys) -> None:
    keys = pack_many(tmp_path, [4, 3])
    script = runpy.run_path(str(ROOT / "scripts" / "inspect_data.py"))
    flags = "--show_order 1:4 --global_batch_size 4 --ranks 2 --workers 0 --seed 5 --image_size 16"
    script["inspect"]([str(tmp_path), *flags.split()])
    assert capsys.readouterr().out.splitlines() == expected(keys, [4, 3])
