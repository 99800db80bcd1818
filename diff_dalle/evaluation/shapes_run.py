"""The measurement of alignment on one-object scenes, from flags to files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diff_dalle.data.captions import one_object_captions
from diff_dalle.errors import UsageError
from diff_dalle.evaluation.alignment import agreement, score_detections, shapes_detector, truth_of
from diff_dalle.evaluation.detector import LEAST_SIDE
from diff_dalle.evaluation.detector_check import check_detector
from diff_dalle.evaluation.drawing import Drawer, DrawingConfig
from diff_dalle.evaluation.report import verdict_grid, verdict_rows, write_report
from diff_dalle.evaluation.sweep import sweep
from diff_dalle.knobs import knob, require
from diff_dalle.sampling_io.outputs import manifest_beside
from diff_dalle.sampling_io.store import Pictures, read_pictures

_GRID = 64  # pictures that the grid shows


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapesConfig(DrawingConfig):
    """What to measure alignment on.

    Several strengths or seeds make a sweep: a table of alignment, and no grid.
    """

    classifier_scale: list[float] = knob([1.0], "strengths of the noised CLIPs' gradient to try")
    seeds: list[int] = knob([0], "seeds of the noise to draw every caption with")
    caption_seed: int = knob(0, "which captions")
    held_out: bool = knob(True, "combinations that training never shows; False: others only")
    images: list[str] = knob(
        [], "score these npz files of sample.py instead, smallest pictures first; needs --captions"
    )
    captions: str | None = knob(None, "the .txt beside --images, one caption a line")
    write_captions: str | None = knob(
        None, "only write the captions to this .txt, for sample.py --data_dir"
    )
    check_detector: bool = knob(
        False, "only show the detector's scores on --num_samples scenes of known content, and noise"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        writes = self.write_captions is not None
        ways = [bool(self.model_path), bool(self.images), writes, self.check_detector]
        must = "be given, or else --images, --write_captions or --check_detector, one of the four"
        require(sum(ways) == 1, "model_path", self.model_path, must)
        together = bool(self.images) == (self.captions is not None)
        require(together, "captions", self.captions, "stand together with --images")
        require(bool(self.seeds), "seeds", self.seeds, "hold at least one number")
        require(bool(self.classifier_scale), "classifier_scale", [], "hold at least one number")

    def prompts(self) -> list[str]:
        """The captions to draw."""
        chosen = one_object_captions(self.num_samples, self.caption_seed, held_out=self.held_out)
        return [caption for caption, _ in chosen]

    @property
    def is_sweep(self) -> bool:
        """Whether several strengths or seeds are compared."""
        return len(self.seeds) * len(self.classifier_scale) > 1


def evaluate_shapes(cfg: ShapesConfig) -> tuple[list[Path], str]:
    """Measure what the flags ask for.

    Returns:
        The files written, and the table to show.
    Raises:
        UsageError: models, pictures or captions that cannot be measured.
    """
    if cfg.check_detector:
        return [], check_detector(cfg.num_samples)
    if cfg.write_captions is not None:
        return [write_captions(Path(cfg.write_captions), cfg.prompts())], (
            f"{cfg.num_samples} captions"
        )
    if cfg.images:
        stages, captions = read_outputs(cfg.images, cfg.captions or "")
        return report_pictures(stages, captions, cfg.folder(), _facts_of(cfg, len(captions)))
    drawer, prompts = Drawer(cfg), cfg.prompts()
    if cfg.is_sweep:
        return _report_sweep(drawer, prompts, cfg)
    folder = cfg.folder()  # before hours of drawing, not after them
    stages = drawer.draw(prompts, seed=cfg.seeds[0], classifier_scale=cfg.classifier_scale[0])
    return report_pictures(stages, prompts, folder, drawer.facts())


def write_captions(path: Path, captions: Sequence[str]) -> Path:
    """One caption a line, into a file that does not exist yet.

    Raises:
        UsageError: it exists, or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", encoding="utf-8") as file:
            file.writelines(f"{caption}\n" for caption in captions)
    except OSError as problem:
        raise UsageError(
            f"--write_captions {path} cannot be written ({problem.strerror}): name a new file"
        ) from problem
    return path


def report_pictures(
    stages: Sequence[Pictures], captions: Sequence[str], folder: Path, facts: dict[str, Any]
) -> tuple[list[Path], str]:
    """Scores of finished pictures: ``alignment.json``, ``.md`` and ``.png`` in a folder.

    Args:
        stages: uint8 [N,H,W,3] for each stage, smallest first; the last one is scored, and its
            verdicts are compared with those on the first.
        captions: N full captions of one-object scenes.
        folder: where the files go; those of an earlier report stay.
        facts: what else the JSON says.
    """
    detector, truths = shapes_detector(), [truth_of(caption) for caption in captions]
    verdicts = [detector.detect_all(pictures) for pictures in stages]
    scores = score_detections(verdicts[-1], truths)
    content = {**facts, "scores": dataclasses.asdict(scores)["shares"], "count": scores.count}
    content["confidence"] = scores.confidence
    table = scores.table()
    if len(stages) > 1:
        kept = agreement(verdicts[0], verdicts[-1])
        sizes = f"{stages[0].shape[1]} px and {stages[-1].shape[1]} px"
        content["agreement"] = {name: dataclasses.asdict(share) for name, share in kept.items()}
        table += f"\n\nthe same verdict on {sizes}: {kept['verdict']}"
    content["pictures"] = verdict_rows(captions, truths, verdicts[-1])
    shown = slice(0, _GRID)
    grid = verdict_grid(stages[-1][shown], truths[shown], verdicts[-1][shown])
    return write_report(folder, "alignment", content, table, grid), table


def read_outputs(images: Sequence[str], captions: str) -> tuple[list[Pictures], list[str]]:
    """The pictures of each npz file, and the captions that belong to them.

    Raises:
        UsageError: a file that cannot be read, numbers that differ, or pictures that the detector
            cannot judge.
    """
    try:
        lines = Path(captions).read_text(encoding="utf-8").splitlines()
        stages = [read_pictures(path) for path in images]
    except (OSError, ValueError) as problem:
        reason = str(problem).splitlines()[0]
        raise UsageError(f"--images, --captions: {reason}; give files of sample.py") from problem
    for path, stage in zip(images, stages, strict=True):
        if len(stage) != len(lines):
            raise UsageError(
                f"--images {path} holds {len(stage)} pictures, but {captions} has {len(lines)} "
                "lines: give one caption a picture"
            )
        height, width = stage.shape[1:3]
        if height != width or height < LEAST_SIDE:
            raise UsageError(
                f"--images {path} holds pictures of {width} x {height} px: only squares of "
                f"{LEAST_SIDE} px or more can be scored"
            )
    return stages, lines


def _facts_of(cfg: ShapesConfig, count: int) -> dict[str, Any]:
    """What a report says of finished pictures: as `Drawer.facts`, if their manifest is there."""
    settings = {**dataclasses.asdict(cfg), "num_samples": count}
    manifest = manifest_beside(Path(cfg.images[-1]))
    if manifest is None:
        return {"settings": settings}
    stages = manifest["stages"]
    return {"step": stages[0]["checkpoint"]["step"], "stages": stages, "settings": settings}


def _report_sweep(
    drawer: Drawer, prompts: Sequence[str], cfg: ShapesConfig
) -> tuple[list[Path], str]:
    """``guidance.json`` and ``guidance.md``: alignment for each strength."""
    if len(cfg.classifier_scale) > 1 and not cfg.classifier_path:
        raise UsageError("--classifier_scale lists strengths, but of what: give --classifier_path")
    truths, folder = [truth_of(prompt) for prompt in prompts], cfg.folder()

    def last_stage(scale: float, seed: int) -> Pictures:
        return drawer.draw(prompts, seed=seed, classifier_scale=scale)[-1]

    report = sweep(last_stage, truths, cfg.classifier_scale, cfg.seeds)
    content = {**drawer.facts(), **report.to_json()}
    table = report.table()
    return write_report(folder, "guidance", content, table), table
