"""What happens between steps: measurements, evaluations, checkpoints and previews."""

from __future__ import annotations

from pathlib import Path

from diff_dalle.training.metrics import Pace
from diff_dalle.training.previews import PreviewConfig, Previews, plan_previews, read_prompts
from diff_dalle.training.report import Report
from diff_dalle.training.run_log import open_log
from diff_dalle.training.trainer import Trainer


class Session:
    """Keeps what is worth keeping of a run, while it lasts.

    Args:
        trainer: what trains.
        previews: what the run's grids show, see `choose_previews`; None for no grids.
        folder: the run folder.
        report: what the user sees.

    Attributes:
        log: where measurements go; to be closed at the end.
        stopped: whether the held-out loss asks for an early end.
    """

    def __init__(
        self, trainer: Trainer, previews: Previews | None, folder: Path, report: Report
    ) -> None:
        self._trainer = trainer
        self._folder = folder
        self._report = report
        self._previews = previews
        self.stopped = trainer.held_out is not None and trainer.held_out.finished
        self.log = open_log(
            folder if trainer.world.is_main else None,
            trainer.cfg.report_to,
            start_step=trainer.step,
            config=trainer.record.config,
        )

    def after_step(self, pace: Pace) -> None:
        """Do whatever is due; all ranks come here after the same step.

        Raises:
            UsageError: too many samples could not be used; the run is saved.
        """
        cfg, trainer = self._trainer.cfg, self._trainer
        spoilt = trainer.bad_share.exceeded
        last = trainer.step == cfg.iterations
        values = self._evaluate() if self._due(cfg.eval_interval, last) else {}
        last = last or self.stopped or spoilt
        saving = self._due(cfg.save_interval, last)
        # A row with every checkpoint, so that a resumed run's rows miss no sample.
        if values or saving or self._due(cfg.log_interval, last):
            values = trainer.measure(pace) | values
            self.log.write(trainer.step, values)
            self.log.bad(trainer.step, trainer.bad_samples())
            self._report.measured(trainer.step, values)
        if saving:
            trainer.save(self._folder)
        if spoilt:
            raise trainer.bad_share.error()
        if self._previews is not None and self._due(self._previews.interval, last):
            self._preview(self._previews)

    def _due(self, interval: int, last: bool) -> bool:
        return interval > 0 and (last or self._trainer.step % interval == 0)

    def _evaluate(self) -> dict[str, float]:
        trainer, held_out = self._trainer, self._trainer.held_out
        if held_out is None:
            return {}
        values = held_out.evaluate()
        held_out.keep_best(self._folder, trainer.step, trainer.record, trainer.world)
        if held_out.finished:
            self.stopped = True
            self._report.say(f"stops at step {trainer.step}: val_loss no longer improves")
        return values

    def _preview(self, previews: Previews) -> None:
        trainer = self._trainer
        grid = previews.write(trainer.step, trainer.ema, self._folder, trainer.world)
        if grid is not None:
            self.log.image(trainer.step, "samples", grid)


def choose_previews(trainer: Trainer, cfg: PreviewConfig | None) -> Previews | None:
    """What the run's grids show, from the held-out data or else from the training data.

    Raises:
        UsageError: the file of prompts cannot be read or is empty.
    """
    task, data = trainer.task, trainer.data
    if cfg is None or task.preview_from is None or cfg.num_preview == 0:
        return None
    prompts: list[str] = []
    if cfg.validation_prompts and task.preview_from == "prompts":
        prompts = read_prompts(cfg.validation_prompts)
    batch = next(iter(data.val() if data.val else data.train(0)))
    return plan_previews(
        task,
        batch,
        interval=cfg.sample_interval or trainer.cfg.save_interval,
        number=cfg.resolved_num_preview(batch.image.shape[-1]),
        prompts=prompts,
        tokenizer=data.tokenizer,
        seed=trainer.cfg.seed,
        world=trainer.world,
    )
