"""The knobs of the training loop, whatever it trains."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from diff_dalle.knobs import AUTO, Floats, knob, require
from diff_dalle.training.run_log import reporter_names


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, what to keep and where; intervals count steps."""

    batch_size: int = knob(16, "samples a step on each rank")
    microbatch: int = knob(-1, "samples at once on each rank, to save memory; -1: all of them")
    global_batch_size: int = knob(
        0, "samples a step on all ranks together, in place of --batch_size; 0: that of each rank"
    )
    iterations: int = knob(200_000, "steps to train")
    ema_rate: Floats = knob((0.9999,), "rates of the averaged copies of the weights")
    log_interval: int = knob(100, "steps between two lines of measurements")
    save_interval: int = knob(2500, "steps between two checkpoints")
    eval_interval: int = knob(
        1000, "steps between two held-out evaluations (and at the end); 0: none"
    )
    eval_samples: int = knob(
        256, "held-out samples of one evaluation, all ranks together; it keeps them in memory"
    )
    resume_checkpoint: str = knob(
        AUTO,
        "auto: go on from the newest checkpoint of the run folder; a file; or none",
        aliases=["resume_checkpoints", "clip_resume_checkpoint"],
    )
    max_bad_share: float = knob(
        0.1, "stop when more than this share of the last 1,000 samples could not be used"
    )
    init_checkpoint: str | None = knob(None, "start from the weights of this file, at step 0")
    seed: int = knob(0, "everything random follows from it")
    device: str = knob(AUTO, "auto, cpu, cuda or cuda:1")
    log_dir: str | None = knob(
        None, "run folder (default: $OPENAI_LOGDIR, else a new temporary folder)"
    )
    report_to: str = knob(
        AUTO, "tensorboard, wandb, both with a comma, none; auto: tensorboard where installed"
    )
    dry_run: int = knob(0, "try so many steps, a save and a sample, report, and keep nothing")

    def __post_init__(self) -> None:
        """Refuse values out of range and flags that contradict one another."""
        for name in ("batch_size", "iterations", "log_interval", "save_interval", "eval_samples"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "be 1 or more")
        for name in ("eval_interval", "dry_run", "global_batch_size"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "be 0 or more")
        require(
            self.microbatch == -1 or 1 <= self.microbatch,
            "microbatch",
            self.microbatch,
            "be -1 (the whole batch) or a number of samples",
        )
        share = self.max_bad_share
        require(0 <= share <= 1, "max_bad_share", share, "lie in [0, 1]")
        for rate in self.ema_rate:
            require(0 <= rate < 1, "ema_rate", rate, "be at least 0 and below 1")
        once = len(set(self.ema_rate)) == len(self.ema_rate)
        require(once, "ema_rate", self.ema_rate, "name each rate once")
        reporter_names(self.report_to)
        explicit = self.resume_checkpoint not in (AUTO, "none", "")
        require(
            not (explicit and self.init_checkpoint),
            "init_checkpoint",
            self.init_checkpoint,
            "stand without --resume_checkpoint: one continues a run, the other starts one",
        )

    def on_ranks(self, ranks: int) -> TrainConfig:
        """The same with ``batch_size`` as each of so many ranks takes it.

        Raises:
            UsageError: ``global_batch_size`` does not divide.
        """
        whole = self.global_batch_size
        require(whole % ranks == 0, "global_batch_size", whole, f"be a multiple of {ranks} ranks")
        return dataclasses.replace(self, batch_size=whole // ranks) if whole else self
