"""One step of training and everything that a step changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diff_dalle.data.batch import Batch
from diff_dalle.data.tokenizer import Tokenizer
from diff_dalle.distributed import (
    World,
    all_gather_objects,
    all_reduce_sum_,
    synchronise_parameters,
)
from diff_dalle.errors import UsageError
from diff_dalle.keyed_noise import key_of
from diff_dalle.training.bad_share import BadShare
from diff_dalle.training.checkpoint_file import Checkpoint
from diff_dalle.training.checkpoints import save_checkpoint
from diff_dalle.training.digests import require_same_on_all_ranks
from diff_dalle.training.ema import EMA
from diff_dalle.training.held_out import HeldOut
from diff_dalle.training.metrics import Meter, Pace, norm
from diff_dalle.training.optim import GuardedStep, OptimConfig, learning_rate, make_optimizer
from diff_dalle.training.resume import RunRecord, Start
from diff_dalle.training.run_log import Bad
from diff_dalle.training.tasks import StepContext, Task
from diff_dalle.training.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where batches come from, for one rank.

    Attributes:
        train: global samples already visited -> this rank's endless batches from there on.
        val: opens this rank's held-out batches, the same ones each time; None: no evaluation.
        tokenizer: None for a run without captions.
        epochs: global samples visited -> how often the data, of each source, were visited.
        faults: (shard, "", reason) of shards that may lack samples, the same on all ranks.
    """

    train: Callable[[int], Iterator[Batch]]
    val: Callable[[], Iterable[Batch]] | None = None
    tokenizer: Tokenizer | None = None
    epochs: Callable[[int], dict[str, float]] = lambda samples: {}
    faults: Sequence[Bad] = ()


class Trainer:
    """A task in training: its weights, their averages, the optimizer, and how far they are."""

    def __init__(
        self,
        task: Task,
        data: Data,
        cfg: TrainConfig,
        optim: OptimConfig,
        record: RunRecord,
        world: World,
    ) -> None:
        self.task = task
        self.data = data
        self.cfg = cfg
        self.optim = optim
        self.record = record
        self.world = world
        self.ema = EMA(task.model, cfg.ema_rate)
        self.optimizer = make_optimizer(task.model, optim, world)
        self.guard = GuardedStep(self.optimizer, task.precision, optim, world)
        self.held_out = HeldOut(task, self.ema, data.val) if data.val else None
        self._held_out_state: dict[str, Any] | None = None  # of a run that had held-out data
        self.meter = Meter(world.device)
        self.bad_share = BadShare(cfg.max_bad_share)
        self.step = 0
        self.samples = 0  # of all ranks
        self.bad: list[Bad] = list(data.faults)  # this rank's, not yet logged

    def begin(self, start: Start) -> None:
        """Take over weights or a whole state, and make all ranks the same (a collective)."""
        model = self.task.model.train()
        self.step = start.step
        self.samples = start.step * self.cfg.batch_size * self.world.size
        if start.weights is not None:
            _load_weights(model, start.weights)
        if start.state is not None:
            model.load_state_dict(start.state.model)
        synchronise_parameters(model, self.world)
        self.ema.restart()
        if start.state is not None:
            self.ema.load_state_dicts(start.state.emas)
            self.optimizer.load_state_dict(start.state.optimizer_state)
            self._load_extra(start.state.extra)

    def train_step(self, batch: Batch) -> None:
        """One update from this rank's part of a global batch."""
        batch = batch.to(self.world.device)
        # Dropout depends on the step alone, so an interrupted run meets the same masks.
        torch.manual_seed(key_of(self.cfg.seed, "dropout", self.step, self.world.rank))
        lr = learning_rate(self.optim, self.step, self.cfg.iterations, self.task.kind)
        self.optimizer.set_rate(lr)
        self.optimizer.zero_grad()

        valid_total = all_reduce_sum_(batch.valid.sum().double(), self.world)
        context = StepContext(
            valid_total=valid_total.clamp(min=1),
            loss_scale=self.task.precision.loss_scale,
            meter=self.meter,
        )
        loss = self.task.forward_backward(batch, context)
        self._spoil_gradient_unless_finite(loss)
        outcome = self.guard.step()
        if not outcome.skipped:
            self.ema.update()
            self.meter.add("grad_norm", outcome.grad_norm)

        samples = len(batch) * self.world.size
        self.step += 1
        self.samples += samples
        self.bad_share.add(samples, samples - int(valid_total))
        self.bad += batch.bad
        self.meter.add("bad_share", (~batch.valid).double())

    def _spoil_gradient_unless_finite(self, loss: Tensor) -> None:
        """A loss that is not finite makes the gradient so, and the guard skips the step."""
        grads = (p.grad for p in self.optimizer.parameters if p.grad is not None)
        next(grads).add_(torch.where(loss.isfinite(), 0.0, torch.nan).to(self.world.device))

    def measure(self, pace: Pace) -> dict[str, float]:
        """What the steps since the last call measured, over all ranks (a collective)."""
        values = {"samples": float(self.samples), **self.data.epochs(self.samples)}
        values |= self.meter.means(self.world)
        values["param_norm"] = norm(self.task.model.parameters())
        values["lr"] = float(self.optimizer.param_groups[0]["lr"])
        values["skipped_steps"] = float(self.guard.skipped)
        if self.task.precision.uses_loss_scale:
            values["lg_loss_scale"] = self.task.precision.lg_loss_scale
        return values | pace.measure(self.cfg.iterations - self.step)

    def bad_samples(self) -> list[Bad]:
        """The unusable samples of all ranks since the last call (a collective)."""
        held_out = self.held_out.take_bad() if self.held_out else []
        everyone = all_gather_objects(self.bad + held_out, self.world)
        self.bad = []
        return [sample for part in everyone for sample in part]

    def save(self, folder: Path) -> None:
        """Write a checkpoint, after a check that all ranks hold the same (a collective)."""
        model = self.task.model.state_dict()
        emas = self.ema.state_dicts()
        averages = ((f"{r}/{n}", t) for r, state in emas.items() for n, t in state.items())
        require_same_on_all_ranks([*model.items(), *averages], self.world)
        if self.world.is_main:
            save_checkpoint(
                folder,
                self.step,
                kind=self.record.kind,
                config=self.record.config,
                tokenizer_json=self.record.tokenizer_json,
                model=model,
                emas=emas,
                optimizer_state=self.optimizer.state_dict(),
                extra=self._extra(),
            )

    def _extra(self) -> dict[str, Any]:
        return {
            "data": self.record.data,
            "samples": self.samples,
            "global_batch": self.cfg.batch_size * self.world.size,
            "precision": self.task.precision.state_dict(),
            "guard": self.guard.state_dict(),
            "task": self.task.state_dict(),
            "held_out": self.held_out.state_dict() if self.held_out else self._held_out_state,
        }

    def _load_extra(self, extra: dict[str, Any]) -> None:
        self.samples = extra["samples"]
        self.task.precision.load_state_dict(extra["precision"])
        self.guard.load_state_dict(extra["guard"])
        self.task.load_state_dict(extra["task"])
        self._held_out_state = extra["held_out"]
        if self.held_out and extra["held_out"]:
            self.held_out.load_state_dict(extra["held_out"])


def _load_weights(model: nn.Module, weights: Checkpoint) -> None:
    try:
        model.load_state_dict(weights.state_dict)
    except RuntimeError as problem:
        reason = str(problem).splitlines()[1].strip()
        raise UsageError(
            f"{weights.path} does not fit this run's model ({reason}): "
            "give the architecture flags that it was trained with"
        ) from problem
