"""The measurement of a generator's bits per dimension on held-out pictures, from flags to files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diff_dalle.cascade.stages import Stage, load_stages
from diff_dalle.data.batch import Batch
from diff_dalle.data.loader import DataConfig, eval_batches, open_data
from diff_dalle.diffusion.likelihood import Bound, variational_bound
from diff_dalle.errors import UsageError
from diff_dalle.evaluation.nll import LEAST, NllReport, Part, Tally
from diff_dalle.evaluation.report import write_report
from diff_dalle.knobs import AUTO, knob, require
from diff_dalle.models.generator import Cond
from diff_dalle.models.low_res import augment, downsample
from diff_dalle.sampling_io.find import expand_paths
from diff_dalle.training import draws
from diff_dalle.training.checkpoint_file import read_kind
from diff_dalle.training.precision import Precision, PrecisionConfig
from diff_dalle.training.report import Report
from diff_dalle.training.stage import from_uint8, to_uint8

Gather = Callable[[Part], list[Part]]
"""One rank's part of a step -> the parts of all ranks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NllConfig:
    """Whose likelihood to measure, on which pictures, and how."""

    model_path: list[str] = knob([], "checkpoint of one generator, or the folder of its run")
    data_dir: list[str] = knob(
        [], "held-out shards: folders, tar files or patterns", aliases=["index_dir"]
    )
    num_samples: int = knob(1000, "pictures to measure, evenly spread over the shards; 0: all")
    batch_size: int = knob(16, "pictures at once on each rank; changes memory and speed only")
    timestep_respacing: str = knob(
        "", "measure the process of these steps instead of all: 250, ddim25, 10,15,20"
    )
    clip_denoised: bool = knob(True, "keep each estimate of the picture within [-1, 1]")
    aug_level: float = knob(0.0, "noise put on an upsampler's small picture, from 0 to 1")
    caption_key: str | None = knob(
        None, "field of the .json that holds captions (default: that of the training)"
    )
    num_workers: int = knob(2, "processes that decode, for each rank; 0: in the main process")
    seed: int = knob(0, "a picture's noise is a function of the seed, its shard and its key")
    log_dir: str | None = knob(
        None, "folder for the report (default: $OPENAI_LOGDIR, else a new temporary folder)"
    )
    device: str = knob(AUTO, "auto, cpu or cuda")
    # bf16 rounds an x_0 near 1 by up to a quarter of a grey level: it costs bits at low noise.
    precision: str = knob("fp32", "fp32, fp16, bf16 or auto; less than fp32 costs bits")
    use_fp16: bool = knob(False, "the same as --precision fp16")

    def __post_init__(self) -> None:
        require(bool(self.data_dir), "data_dir", self.data_dir, "name held-out shards")
        enough = self.num_samples == 0 or self.num_samples >= LEAST
        require(enough, "num_samples", self.num_samples, f"be {LEAST} or more, or 0 for all")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "be 1 or more")
        require(0 <= self.aug_level <= 1, "aug_level", self.aug_level, "lie between 0 and 1")
        # fp32 is the default, so it cannot be told from nothing said.
        clash = self.use_fp16 and self.precision not in (AUTO, "fp32", "fp16")
        require(not clash, "precision", self.precision, "be fp16 or left out beside --use_fp16")

    @property
    def compute(self) -> PrecisionConfig:
        """The compute type, whichever of the two flags asked for it."""
        return PrecisionConfig(precision="fp16" if self.use_fp16 else self.precision)


class Measurement:
    """One generator and held-out pictures, opened; each rank measures its share.

    Args:
        cfg: what the user asked for.
        device: of this rank.
        show: tell the user of what was found: what one rank does for all.

    Attributes:
        stage: the generator and its file.
        dataset: the held-out shards.
    """

    def __init__(self, cfg: NllConfig, device: torch.device, *, show: bool = True) -> None:
        """Load and open; a `UsageError` where that fails."""
        self._cfg = cfg
        self._device = device
        self._precision = Precision(cfg.compute, device)
        self.stage = _load(cfg, device)
        self._diffusion = self.stage.loaded.diffusion.respace(cfg.timestep_respacing)
        run = self.stage.loaded.run
        data = DataConfig(
            data_dir=cfg.data_dir,
            num_workers=cfg.num_workers,
            caption_key=cfg.caption_key or run.data.caption_key,
        )
        self.dataset = open_data(
            data,
            split="train",
            image_size=self.stage.image_size,
            with_text=self.stage.reads_text,
            seed=cfg.seed,
            show=show,
        )
        if show and self.stage.notes():
            print(*self.stage.notes(), sep="\n")

    def run(
        self, *, rank: int = 0, ranks: int = 1, gather: Gather = lambda part: [part]
    ) -> NllReport:
        """Measure this rank's share, and tell of all ranks' progress on rank 0 (a collective).

        Args:
            rank: 0 … ``ranks`` − 1.
            ranks: how many share the pictures.
            gather: collects the parts of all ranks, on each of them.
        Returns:
            The report on the pictures of all ranks, the same on every rank.
        Raises:
            UsageError: there is too little to measure, or a number that is none.
        """
        report, tally = Report(shown=rank == 0), Tally()
        steps = self._rounds(ranks) * self._diffusion.num_steps
        report.start(0, steps)
        try:
            for part in self._parts(rank, ranks, report.step):
                for each in gather(part):
                    tally.add(each)
                report.say(f"done {tally.count} samples: bpd={tally.mean:.5f}")
        finally:
            report.stop()
        return tally.report()

    def write(self, folder: Path, report: NllReport) -> list[Path]:
        """``nll.json``, ``nll.md`` and ``nll_terms.npz``; those of an earlier report stay."""
        content = {
            "step": self.stage.loaded.checkpoint.step,
            "stages": [self.stage.describe()],
            "settings": dataclasses.asdict(self._cfg),
            **report.to_json(),
        }
        terms = report.arrays(self._diffusion.schedule.timestep_map.numpy())
        return write_report(folder, "nll", content, report.table(), terms=terms)

    @property
    def _count(self) -> int:
        return min(self._cfg.num_samples or len(self.dataset), len(self.dataset))

    def _batch_size(self, ranks: int) -> int:
        """No larger than a rank's share: padding costs as much as pictures."""
        return min(self._cfg.batch_size, -(-self._count // ranks))

    def _rounds(self, ranks: int) -> int:
        return -(-self._count // (self._batch_size(ranks) * ranks))

    def _parts(self, rank: int, ranks: int, on_step: Callable[[], None]) -> Iterator[Part]:
        size = self._batch_size(ranks)
        batches = eval_batches(
            self.dataset,
            tokenizer=self.stage.tokenizer,
            text_length=self.stage.text_length,
            batch_size=size,
            rank=rank,
            world=ranks,
            max_samples=self._cfg.num_samples,
        )
        for number, batch in enumerate(batches):
            places = (number * ranks + rank) * size + np.arange(size)
            bound = self._bound(batch.to(self._device), on_step)
            yield Part.of(bound, batch.valid.numpy(), places, batch.bad)

    @torch.no_grad()
    def _bound(self, batch: Batch, on_step: Callable[[], None]) -> Bound:
        x_0 = from_uint8(batch.image)  # [B,3,H,W]
        generator = self.stage.loaded.generator
        with self._precision.autocast():
            cond = generator.remember(self._told(batch, x_0))
            return variational_bound(
                lambda x_t, time: generator(x_t, time, cond),
                x_0,
                self._diffusion,
                noise=lambda step, x: draws.likelihood(batch.seed, tuple(x.shape[1:]), step),
                clip=self._cfg.clip_denoised,
                callback=on_step,
            )

    def _told(self, batch: Batch, x_0: Tensor) -> Cond:
        """What the generator is told: captions, and the small picture as a stage would hand it on.

        That is 8-bit and not blurred.
        """
        cond = Cond(tokens=batch.tokens, mask=batch.mask)  # both None for a run without captions
        if not self.stage.small_size:
            return cond
        low_res = from_uint8(to_uint8(downsample(x_0, self.stage.small_size)))  # [B,3,h,w]
        level = torch.full_like(x_0[:, 0, 0, 0], self._cfg.aug_level)  # [B]
        low_res = augment(low_res, level, draws.aug_noise(batch.seed, tuple(low_res.shape[1:])))
        return dataclasses.replace(cond, low_res=low_res, aug_level=level)


def _load(cfg: NllConfig, device: torch.device) -> Stage:
    """The one generator that ``--model_path`` names."""
    files = expand_paths(cfg.model_path, "generator", read_kind, "model_path")
    must = "name one generator: each stage of a cascade has a likelihood of its own"
    require(len(files) == 1, "model_path", cfg.model_path, must)
    if read_kind(files[0]) != "generator":
        raise UsageError(
            f"--model_path {files[0]} holds a classifier, which gives pictures no likelihood: "
            "name a generator"
        )
    (stage,) = load_stages(files, [], [device])
    noised = cfg.aug_level > 0 and not stage.small_size
    require(not noised, "aug_level", cfg.aug_level, "be left out: this generator enlarges nothing")
    return stage
