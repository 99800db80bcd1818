"""The pictures of a cascade on their way, one preview a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor

from diff_dalle.cascade.drawing import OnStep
from diff_dalle.cascade.plan import Plan
from diff_dalle.cascade.result import Preview, to_pictures
from diff_dalle.sampling_io.previews import iterate
from diff_dalle.training.stage import to_uint8


def previews(draw: Callable[[OnStep], object], plan: Plan) -> Iterator[Preview]:
    """Every step of one batch, while it is drawn.

    Args:
        draw: draws it, and tells its argument of every step.
        plan: how.
    """
    threads = torch.get_num_threads()

    def work(emit: Callable[[Preview], None]) -> None:
        torch.set_num_threads(threads)  # a new thread would take every core

        def on_step(stage: int, step: int, x_0: Tensor) -> None:
            images = [Image.fromarray(picture) for picture in to_pictures(to_uint8(x_0))]
            total = plan.stages[stage].steps
            emit(Preview(stage=stage, step=step, steps=total, images=images))

        draw(on_step)

    return iterate(work)
