"""Pictures to be measured, drawn by a cascade in one process.

For hours of drawing on several ranks use `scripts/sample.py` and score its npz files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diff_dalle.cascade import Cascade, CascadeResult
from diff_dalle.cascade.contrast import read_contrast
from diff_dalle.cascade.cut import describe_cut
from diff_dalle.config import SampleConfig
from diff_dalle.knobs import AUTO, knob, require
from diff_dalle.sampling_io.outputs import make_output_folder
from diff_dalle.sampling_io.prompts import Prompt
from diff_dalle.sampling_io.store import Pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawingConfig:
    """Which models draw, how, and where the report goes."""

    model_path: list[str] = knob(
        [], "checkpoints from the smallest picture to the largest, or a folder that holds them"
    )
    classifier_path: list[str] = knob([], "noised CLIPs that guide, as for sample.py")
    classifier_interval: list[str] = knob(["all"], "noise levels at which they do, likewise")
    classifier_schedule: list[str] = knob(["constant"], "how it goes over the steps, likewise")
    contrast: str = knob("none", "captions they tell a prompt from, likewise")
    guidance_scale: list[str] = knob(
        ["1.0"], "strength of classifier-free guidance, one a stage; 1 is none"
    )
    guidance_interval: list[str] = knob(["all"], "its noise levels, as for sample.py")
    guidance_schedule: list[str] = knob(["constant"], "how it goes over the steps, likewise")
    guidance_rescale: list[str] = knob(["0.0"], "rescaling of its predictions, likewise")
    sampler: list[str] = knob([AUTO], "the sampler, one a stage, as for sample.py")
    steps: list[str] = knob([], "how many steps, or which, one a stage, as for sample.py")
    step_spacing: list[str] = knob([AUTO], "how steps are spread, one a stage, as for sample.py")
    timestep_respacing: list[str] = knob([AUTO], "steps to visit, one a stage, as for sample.py")
    use_ddim: bool = knob(False, "DDIM, evenly spaced: as for sample.py")
    aug_level: list[str] = knob(["0.0"], "noise put on each upsampler's small picture, 0 to 1")
    num_samples: int = knob(256, "pictures to measure")
    batch_size: int = knob(16, "pictures drawn at once; changes memory and speed only")
    log_dir: str | None = knob(
        None, "folder for the report (default: $OPENAI_LOGDIR, else a new temporary folder)"
    )
    device: str = knob(AUTO, "auto, cpu or cuda")
    precision: str = knob(AUTO, "fp32, fp16, bf16 or auto; a CPU samples in fp32")

    def __post_init__(self) -> None:
        require(self.num_samples >= 4, "num_samples", self.num_samples, "be 4 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "be 1 or more")

    def folder(self) -> Path:
        """The folder for the report, made if missing."""
        return make_output_folder(self.log_dir)


class Drawer:
    """A cascade that draws all prompts of a measurement.

    Attributes:
        cascade: the loaded stages.
    """

    def __init__(self, cfg: DrawingConfig) -> None:
        """Load the models; raises `UsageError` where sample.py would."""
        self._cfg = cfg
        self._told: set[str] = set()
        self.cascade = Cascade.load(
            cfg.model_path, cfg.classifier_path, cfg.device, cfg.precision, warn=False
        )

    def draw(
        self,
        prompts: Sequence[str],
        *,
        seed: int,
        classifier_scale: float,
        low_res: Pictures | None = None,
    ) -> list[Pictures]:
        """The pictures of each stage, uint8 [N,H,W,3], smallest stage first.

        Args:
            prompts: N captions; picture n is a function of (seed, n, its caption).
            seed: of all noise.
            classifier_scale: strength of the noised CLIPs, in every stage that has one.
            low_res: uint8 [N,h,w,3] where the first stage is an upsampler.
        """
        from tqdm import tqdm

        cfg = self._settings(seed, classifier_scale)
        named = [Prompt(text, f"prompt {n}") for n, text in enumerate(prompts)]
        contrast = read_contrast(cfg.contrast, named)
        plan = self.cascade.plan(cfg, low_res, [caption.text for caption in contrast])
        cut = describe_cut(self.cascade.stages, named, contrast=contrast)
        cost = plan.describe_cost()
        self._tell([*self.cascade.notes, *plan.notes(), *cut, cost])
        results = []
        name = f"drawing, seed {seed}, classifier scale {classifier_scale:g}"
        with tqdm(total=len(prompts), desc=name, unit="img") as bar:
            for indices, result in self.cascade.batches(
                plan, range(len(prompts)), prompts, batch_size=cfg.batch_size, low_res=low_res
            ):
                results.append(result)
                bar.update(len(indices))
        return CascadeResult.join(results).stages

    def _settings(self, seed: int, classifier_scale: float) -> SampleConfig:
        """The flags of sample.py; a sweep's strength 0 leaves what else is said of CLIPs unread."""
        cfg = self._cfg
        unguided = SampleConfig(
            seed=seed,
            classifier_scale=[str(classifier_scale)],
            guidance_scale=cfg.guidance_scale,
            guidance_interval=cfg.guidance_interval,
            guidance_schedule=cfg.guidance_schedule,
            guidance_rescale=cfg.guidance_rescale,
            sampler=cfg.sampler,
            steps=cfg.steps,
            step_spacing=cfg.step_spacing,
            timestep_respacing=cfg.timestep_respacing,
            use_ddim=cfg.use_ddim,
            aug_level=cfg.aug_level,
            batch_size=cfg.batch_size,
        )
        if classifier_scale == 0:
            return unguided
        return dataclasses.replace(
            unguided,
            classifier_interval=cfg.classifier_interval,
            classifier_schedule=cfg.classifier_schedule,
            contrast=cfg.contrast,
        )

    def _tell(self, notes: Sequence[str]) -> None:
        """Print notes, each once however often is drawn."""
        for note in notes:
            if note not in self._told:
                print(note)
        self._told.update(notes)

    def facts(self) -> dict[str, Any]:
        """What a report says of models and settings; ``step`` is the first stage's."""
        settings = dataclasses.asdict(self._cfg)
        stages = [stage.describe() for stage in self.cascade.stages]
        step = self.cascade.stages[0].loaded.checkpoint.step
        return {"step": step, "stages": stages, "settings": settings}
