"""What the loop needs from something that can be trained.

A task is a model plus its loss. It owns forward and backward, because a generator's batch
splits into independent microbatches and a contrastive loss does not; the loop owns everything
else and stays unaware of what it trains.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from diff_dalle.data.batch import Batch
from diff_dalle.training.metrics import Meter
from diff_dalle.training.precision import Precision

PreviewFrom = Literal["prompts", "data"]


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What a task is told about the step it is part of.

    Attributes:
        valid_total: float64 scalar, the valid samples of the global batch, at least 1.
        loss_scale: what the loss is multiplied by before the backward pass (fp16).
        meter: where the task counts what it measured.
    """

    valid_total: Tensor
    loss_scale: float
    meter: Meter


class Task(Protocol):
    """A model plus its loss.

    Attributes:
        kind: "generator" or "classifier"; checkpoints and run folders carry it.
        model: the bare model, without wrappers; its parameters are what is optimised.
        precision: the compute type, with the loss scale of fp16.
        keeps_best: whether the weights of the lowest ``val_loss`` are kept as ``best.pt``.
        preview_from: what decides a preview beside the noise: "prompts" alone, "data" (a picture
            and its caption), or None where there is nothing to preview.
        stop_early: evaluations without a new lowest ``val_loss`` that end the run; 0 is never.
    """

    kind: str
    precision: Precision
    keeps_best: bool
    stop_early: int

    # Properties: a task may promise more than these, and none is set from outside.
    @property
    def model(self) -> nn.Module:
        """The bare model."""
        ...

    @property
    def preview_from(self) -> PreviewFrom | None:
        """What decides a preview."""
        ...

    def forward_backward(self, batch: Batch, step: StepContext) -> Tensor:
        """Add the gradients of ``loss_scale`` times the global batch's mean loss.

        A collective: afterwards every rank holds the same gradients.

        Args:
            batch: this rank's part of the global batch, on the device.
            step: see `StepContext`.
        Returns:
            A scalar on the device that is finite if and only if this rank's losses are.
        """
        ...

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Held-out measurements over the batches of all ranks, at fixed noise (a collective)."""
        ...

    def preview(self, batch: Batch, keys: Tensor, name: str) -> dict[str, Tensor]:
        """A few samples with the model's weights as they are.

        Args:
            batch: captions and, for an upsampler, the pictures to shrink, on the device.
            keys: int64 [n] of the noise.
            name: what to call the weights.
        Returns:
            Rows of pictures by name, uint8 [n,3,H,W] each: ``name``'s samples and what they
            were made from; empty where there is nothing to show.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside model and optimizer; empty for most tasks."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        ...
