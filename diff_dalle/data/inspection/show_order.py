"""Which samples a run will read, asked of the loader that it reads them with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from diff_dalle.data.inspection.run import InspectConfig
from diff_dalle.data.loader import DataConfig, open_data, train_batches
from diff_dalle.knobs import knob, require


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """Which batches of which run to show."""

    show_order: str | None = knob(
        None, "A:B prints the keys of global batches A to B - 1 (the first is 0), and no report"
    )
    global_batch_size: int = knob(0, "samples in a batch of all ranks together, for --show_order")
    ranks: int = knob(1, "how many ranks read, for --show_order; the keys stay the same")
    seed: int = knob(0, "of the run, for --show_order")

    def __post_init__(self) -> None:
        if self.show_order is None:
            return
        first, stop = self.batches
        require(first < stop, "show_order", self.show_order, "be A:B with A below B")
        require(self.ranks >= 1, "ranks", self.ranks, "be 1 or more")
        size, must = self.global_batch_size, f"be a positive multiple of --ranks {self.ranks}"
        require(size >= 1 and size % self.ranks == 0, "global_batch_size", size, must)

    @property
    def batches(self) -> tuple[int, int]:
        """A and B; ``show_order`` is not None."""
        parts = re.fullmatch(r"(\d+):(\d+)", self.show_order or "")
        require(parts is not None, "show_order", self.show_order, "be A:B, say 0:10")
        assert parts is not None
        return int(parts[1]), int(parts[2])


def order_lines(cfg: InspectConfig, order: OrderConfig) -> Iterator[str]:
    """A line for each global batch: its number, then the keys of all ranks, rank 0's first.

    The batches come from `train_batches`, once for each rank with its worker processes, so the
    images are decoded too; captions are not read. Batch A is found directly, as a resume does.

    Raises:
        UsageError: no usable samples, or a setting that is for inspections only.
    """
    for name in ("max_samples", "out_dir"):
        value = getattr(cfg, name)
        require(not value, name, value, "be left out with --show_order, which prints a run's order")
    data = DataConfig(data_dir=cfg.data_dir, num_workers=cfg.num_workers)
    dataset = open_data(
        data, split="train", image_size=cfg.image_size, with_text=False, seed=order.seed
    )
    first, stop = order.batches
    ranks = [
        train_batches(
            dataset,
            tokenizer=None,
            text_length=cfg.text_length,
            batch_size=order.global_batch_size // order.ranks,
            rank=rank,
            world=order.ranks,
            start_sample=first * order.global_batch_size,
        )
        for rank in range(order.ranks)
    ]
    for number in range(first, stop):
        yield " ".join([str(number), *(key for rank in ranks for key in next(rank).keys)])
