"""The one place that decides the compute type: autocast, and the loss scale of fp16.

Weights, gradients and optimizer states stay fp32; autocast runs matrix products and
convolutions in fp16 or bf16.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from diff_dalle.errors import UsageError
from diff_dalle.knobs import AUTO, knob, require, require_choice

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """The numbers that a network computes in."""

    precision: str = knob(AUTO, "fp32, fp16, bf16, or auto: bf16 on a GPU that has it, else fp32")
    use_fp16: bool = knob(False, "the same as --precision fp16")
    fp16_scale_growth: float = knob(1e-3, "growth of log2 of the fp16 loss scale, a step")

    def __post_init__(self) -> None:
        """Refuse values that contradict one another."""
        require_choice("precision", self.precision, (AUTO, *_DTYPES))
        if self.use_fp16 and self.precision not in (AUTO, "fp16"):
            raise UsageError(
                f"--use_fp16 True contradicts --precision {self.precision}: give one of the two"
            )
        require(
            self.fp16_scale_growth >= 0, "fp16_scale_growth", self.fp16_scale_growth, "be 0 or more"
        )

    def resolved_precision(self, device: torch.device) -> str:
        """``fp32``, ``fp16`` or ``bf16``: what ``auto`` means on this device."""
        if self.use_fp16:
            return "fp16"
        if self.precision != AUTO:
            return self.precision
        has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return "bf16" if has_bf16 else "fp32"


class Precision:
    """The compute type on one device, and the loss scale that fp16 needs.

    Gradients below 2^-24 vanish in fp16, so the loss is multiplied by a large scale first.
    As in guided-diffusion, log2 of the scale grows by ``fp16_scale_growth`` a step and falls
    by 1 at an overflow (Micikevicius et al. 2018, section 3.2, with additive growth).
    """

    start_lg = 20.0
    floor_lg = 0.0
    patience = 20  # overflows in a row at the floor

    def __init__(self, cfg: PrecisionConfig, device: torch.device) -> None:
        """Settle the type; on a CPU, fp16 is warned about, since it is emulated."""
        self.name = cfg.resolved_precision(device)
        self.device = device
        self.growth = cfg.fp16_scale_growth
        self.lg_loss_scale = self.start_lg if self.name == "fp16" else 0.0
        self.overflows_at_floor = 0
        if self.name == "fp16" and device.type == "cpu":
            warnings.warn(
                "fp16 on a CPU is emulated and up to 50 times slower than --precision fp32",
                stacklevel=2,
            )

    @property
    def uses_loss_scale(self) -> bool:
        """True for fp16 alone: bf16 has fp32's range."""
        return self.name == "fp16"

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before backward; 1 unless fp16."""
        return 2.0**self.lg_loss_scale

    def autocast(self) -> AbstractContextManager[object]:
        """The context to run a network in; a no-op for fp32."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.name])

    @torch.no_grad()
    def unscale_(self, parameters: Iterable[Tensor]) -> None:
        """Divide the gradient of every parameter by the loss scale, in place."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.uses_loss_scale and grads:
            torch._foreach_mul_(grads, 1.0 / self.loss_scale)

    def update(self, overflow: bool) -> None:
        """Adapt the loss scale after a step, or after a step skipped for an overflow.

        Raises:
            UsageError: the scale is at its floor and overflows go on.
        """
        if not self.uses_loss_scale:
            return
        if not overflow:
            self.lg_loss_scale += self.growth
            self.overflows_at_floor = 0
            return
        if self.lg_loss_scale <= self.floor_lg:
            self.overflows_at_floor += 1
        self.lg_loss_scale = max(self.floor_lg, self.lg_loss_scale - 1.0)
        if self.overflows_at_floor >= self.patience:
            raise UsageError(
                f"fp16 overflowed {self.patience} times in a row at loss scale "
                f"{self.loss_scale:g}: use --precision bf16 or fp32, or a lower --lr"
            )

    def state_dict(self) -> dict[str, float]:
        """The loss scale, for a checkpoint; empty for a precision that has none."""
        if not self.uses_loss_scale:
            return {}
        return {
            "lg_loss_scale": self.lg_loss_scale,
            "overflows_at_floor": self.overflows_at_floor,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the loss scale; a run that changed its precision starts anew."""
        if self.uses_loss_scale and state:
            self.lg_loss_scale = state["lg_loss_scale"]
            self.overflows_at_floor = int(state["overflows_at_floor"])
