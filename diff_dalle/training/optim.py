"""Which optimizer moves which parameter, at which rate, and when a step is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from diff_dalle.distributed import World, all_reduce_sum_
from diff_dalle.errors import UsageError
from diff_dalle.knobs import AUTO, AutoInt, knob, require, require_choice
from diff_dalle.training.muon import Muon
from diff_dalle.training.precision import Precision

_SCHEDULES = ("constant", "cosine", "linear")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    optimizer: str = knob("adamw", "adamw, or muon (on matrices and convolutions, else AdamW)")
    lr: float = knob(3e-4, "peak learning rate")
    weight_decay: float = knob(0.0, "decoupled decay of matrices and convolutions")
    adam_beta1: float = knob(0.9, "decay of AdamW's mean of gradients")
    adam_beta2: float = knob(0.999, "decay of AdamW's mean of squared gradients")
    adam_eps: float = knob(1e-8, "added to AdamW's denominator")
    max_grad_norm: float = knob(1.0, "clip the gradient's global norm to this, 0 for never")
    lr_schedule: str = knob(AUTO, "constant, cosine, linear, or auto: cosine for the classifier")
    warmup_steps: AutoInt = knob(
        AUTO, "steps of linear warm-up, or auto: a twentieth for cosine, at most 2000, else 0"
    )
    lr_end: float = knob(0.1, "share of the peak rate left at the end of a cosine")
    lr_anneal_steps: int = knob(0, "bring the rate linearly to 0 over so many steps, 0 for never")
    anneal_lr: bool = knob(False, "bring the rate linearly to 0 over all iterations")

    def __post_init__(self) -> None:
        """Refuse values out of range and schedules that contradict one another."""
        require_choice("optimizer", self.optimizer, ("adamw", "muon"))
        require_choice("lr_schedule", self.lr_schedule, (AUTO, *_SCHEDULES))
        require(self.lr > 0 and math.isfinite(self.lr), "lr", self.lr, "be positive")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "be in [0, 1)")
        for name in ("weight_decay", "adam_eps", "max_grad_norm", "lr_anneal_steps"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "not be negative")
        require(0 <= self.lr_end <= 1, "lr_end", self.lr_end, "be in [0, 1]")
        if self.warmup_steps != AUTO:
            require(int(self.warmup_steps) >= 0, "warmup_steps", self.warmup_steps, "not be < 0")
        linear = self.lr_anneal_steps > 0 or self.anneal_lr
        if linear and self.lr_schedule not in (AUTO, "linear"):
            raise UsageError(
                f"--lr_schedule {self.lr_schedule} contradicts --lr_anneal_steps or --anneal_lr, "
                "which make it linear: give one of them"
            )

    def resolved_schedule(self, kind: str) -> str:
        """``constant``, ``cosine`` or ``linear`` for a ``generator`` or a ``classifier``."""
        if self.lr_anneal_steps > 0 or self.anneal_lr:
            return "linear"
        if self.lr_schedule != AUTO:
            return self.lr_schedule
        return "cosine" if kind == "classifier" else "constant"

    def resolved_warmup(self, kind: str, iterations: int) -> int:
        """Steps of linear warm-up."""
        if self.warmup_steps != AUTO:
            return int(self.warmup_steps)
        return min(2000, iterations // 20) if self.resolved_schedule(kind) == "cosine" else 0


def learning_rate(cfg: OptimConfig, step: int, iterations: int, kind: str) -> float:
    """The rate of one update.

    Args:
        step: updates made before this one; 0 for the first.
        iterations: updates of the whole run.
        kind: ``generator`` or ``classifier``.
    """
    schedule = cfg.resolved_schedule(kind)
    warmup = cfg.resolved_warmup(kind, iterations)
    warm = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if schedule == "linear":
        done = step / (cfg.lr_anneal_steps or max(1, iterations))
        return cfg.lr * warm * max(0.0, 1.0 - done)
    if schedule == "cosine" and step >= warmup:
        done = min(1.0, (step - warmup) / max(1, iterations - warmup))
        return cfg.lr * (cfg.lr_end + (1 - cfg.lr_end) * 0.5 * (1 + math.cos(math.pi * done)))
    return cfg.lr * warm


class Optimizers:
    """One or two torch optimizers that step as one."""

    def __init__(self, parts: Mapping[str, torch.optim.Optimizer]) -> None:
        """Name the parts; the names stand in the state dict."""
        self.parts = dict(parts)

    @property
    def parameters(self) -> list[Tensor]:
        """Every parameter of every part."""
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts."""
        return [group for part in self.parts.values() for group in part.param_groups]

    def set_rate(self, lr: float) -> None:
        """Give every group this learning rate."""
        for group in self.param_groups:
            group["lr"] = lr

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for part in self.parts.values():
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The state dict of every part, by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; rate, decay and betas stay as configured now.

        Raises:
            UsageError: the state belongs to other optimizers or another model.
        """
        if state.keys() != self.parts.keys():
            raise UsageError(
                f"the checkpoint's optimizer is {'+'.join(state)}, this run's is "
                f"{'+'.join(self.parts)}: give the same --optimizer"
            )
        for name, part in self.parts.items():
            now = [{k: v for k, v in group.items() if k != "params"} for group in part.param_groups]
            try:
                part.load_state_dict(state[name])
            except ValueError as error:
                raise UsageError(
                    f"the checkpoint's optimizer fits another model ({error}): resume with the "
                    "architecture that it was trained with"
                ) from error
            for group, knobs in zip(part.param_groups, now, strict=True):
                group.update(knobs)


def make_optimizer(module: nn.Module, cfg: OptimConfig, world: World | None = None) -> Optimizers:
    """The optimizer of a model; ``world`` shares Muon's work among ranks of equal gradients.

    The weights of linear layers and convolutions are matrices: they decay, and ``muon``
    moves them. Everything else (biases, norms, embeddings, lone parameters) neither decays
    nor meets Muon; nor do the first and the last spatial convolution: in a U-Net they map pixels.
    """
    matrices = matrix_parameters(module)
    known = {id(p) for p in matrices}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in known]
    parts: dict[str, torch.optim.Optimizer] = {}
    by_adam = matrices
    if cfg.optimizer == "muon":
        edges = {id(p) for p in _pixel_convolutions(module)}
        by_muon = [p for p in matrices if id(p) not in edges]
        by_adam = [p for p in matrices if id(p) in edges]
        if by_muon:
            parts["muon"] = Muon(by_muon, lr=cfg.lr, weight_decay=cfg.weight_decay, world=world)
    groups = [
        {"params": by_adam, "weight_decay": cfg.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    parts["adamw"] = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=cfg.lr,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        eps=cfg.adam_eps,
        fused=True,
    )
    return Optimizers(parts)


def matrix_parameters(module: nn.Module) -> list[Tensor]:
    """The trainable weights of linear layers and convolutions, each once."""
    found = {
        id(part.weight): part.weight
        for part in module.modules()
        if isinstance(part, (nn.Linear, _ConvNd)) and part.weight.requires_grad
    }
    return list(found.values())


def _pixel_convolutions(module: nn.Module) -> list[Tensor]:
    """The weights of the first and the last convolution whose kernel is above 1 pixel."""
    spatial = [
        part.weight
        for part in module.modules()
        if isinstance(part, _ConvNd) and max(part.kernel_size) > 1
    ]
    return [spatial[0], spatial[-1]] if spatial else []


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What became of one step."""

    grad_norm: float  # global norm before clipping, after unscaling; not finite if skipped
    skipped: bool


class GuardedStep:
    """An optimizer step that never lets a number that is not finite into the weights.

    A step whose gradient has one, on any rank, is skipped on every rank and counted.
    """

    patience = 10  # skips in a row, when no loss scale can explain them

    def __init__(
        self, optimizer: Optimizers, precision: Precision, cfg: OptimConfig, world: World
    ) -> None:
        """Work on the optimizer's parameters; nothing is copied."""
        self.optimizer = optimizer
        self.precision = precision
        self.max_grad_norm = cfg.max_grad_norm
        self.world = world
        self.skipped = 0
        self.skipped_in_row = 0

    def step(self) -> StepOutcome:
        """Unscale, measure, clip, update (or skip), and adapt the loss scale.

        The gradients must be this run's already averaged ones. They are kept; call
        ``optimizer.zero_grad()`` before the next backward.

        Raises:
            UsageError: too many steps in a row were not finite.
        """
        parameters = self.optimizer.parameters
        self.precision.unscale_(parameters)
        # Every rank must decide and scale alike, or the weights drift apart: equal gradients
        # summed by another number of threads differ in the norm's last bit.
        norm = all_ranks_mean(gradient_norm(parameters), self.world)
        skip = not math.isfinite(norm)
        if skip:
            self.skipped += 1
            self.skipped_in_row += 1
        else:
            self.skipped_in_row = 0
            clip_gradients(parameters, norm, self.max_grad_norm)
            self.optimizer.step()
        self.precision.update(overflow=skip)
        if self.skipped_in_row >= self.patience and not self.precision.uses_loss_scale:
            raise UsageError(
                f"the gradient was not finite for {self.skipped_in_row} steps in a row: resume "
                "from the last checkpoint with a lower --lr, or look at the data"
            )
        return StepOutcome(grad_norm=norm, skipped=skip)

    def state_dict(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {"skipped": self.skipped, "skipped_in_row": self.skipped_in_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the counts."""
        self.skipped = state["skipped"]
        self.skipped_in_row = state["skipped_in_row"]


def gradient_norm(parameters: Iterable[Tensor]) -> float:
    """The global 2-norm of all gradients; not finite if one of them is not."""
    return float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def all_ranks_mean(value: float, world: World) -> float:
    """The mean of a number over the ranks (a collective); not finite if one rank's is not."""
    total = torch.tensor(value, dtype=torch.float64, device=world.device)
    return float(all_reduce_sum_(total, world)) / world.size


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], norm: float, max_norm: float) -> None:
    """Scale gradients of global 2-norm ``norm`` so that it is at most ``max_norm``; 0: never."""
    if 0 < max_norm < norm:
        with_grad = [p for p in parameters if p.grad is not None]
        nn.utils.clip_grads_with_norm_(with_grad, max_norm, torch.tensor(norm))
