"""What a cascade is asked to do, one entry a stage, checked before any work starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from diff_dalle.cascade.contrast import ContrastSet
from diff_dalle.cascade.edits import NO_EDITS, Edits, Seeds, choose_editing
from diff_dalle.cascade.guiding import (
    ClassifierGuidance,
    choose_classifier_guidance,
    choose_free_guidance,
)
from diff_dalle.cascade.sizing import check_guides, choose_sizes, small_size
from diff_dalle.cascade.stages import Stage
from diff_dalle.cascade.steps import Steps, choose_steps_of
from diff_dalle.cascade.tiling import Tiling, choose_tiles, describe_tiles
from diff_dalle.diffusion.samplers import asked_steps, inversion_steps
from diff_dalle.errors import UsageError
from diff_dalle.sampling_io.config import SampleConfig, numbers, per_stage
from diff_dalle.sampling_io.sizes import Size, spell
from diff_dalle.training.stage import StageSettings


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """How one stage is sampled.

    Attributes:
        settings: for `sample_stage`.
        size: (H, W) of its pictures in pixels.
        tiles: how many of them make a picture.
        steps: the number of steps that the settings amount to.
        classifier: the noised CLIP's guidance.
        evaluations: of the network for one picture; one with classifier-free guidance counts 2.
        guided_evaluations: how many have classifier-free guidance.
        classifier_evaluations: of the noised CLIP for one picture.
    """

    settings: StageSettings
    size: Size
    tiles: int
    steps: int
    classifier: ClassifierGuidance
    evaluations: int
    guided_evaluations: int
    classifier_evaluations: int

    @classmethod
    def make(
        cls, settings: StageSettings, stage: Stage, size: Size, classifier: ClassifierGuidance
    ) -> StagePlan:
        """The plan with its counts."""
        process = settings.respace(stage.loaded.diffusion)
        tiling = Tiling(tile_size=settings.tile_size, tile_overlap=settings.tile_overlap)
        sampled = asked_steps(settings.sampler, process)
        inverted = [] if settings.variation is None else inversion_steps(process)
        asked = [*inverted, *sampled]
        guided = int((settings.guidance_scales(process)[asked] != 1).sum())
        return cls(
            settings=settings,
            size=size,
            tiles=tiling.count(stage, size),
            steps=process.num_steps,
            classifier=classifier,
            evaluations=len(asked) + guided,
            guided_evaluations=guided,
            classifier_evaluations=int((classifier.scales(process)[sampled] != 0).sum()),
        )

    @property
    def classifier_scale(self) -> float:
        """Strength of the noised CLIP's gradient; 0 is none."""
        return self.classifier.classifier_scale


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a cascade is sampled.

    Attributes:
        seeds: of all noise.
        stages: one plan a stage.
        rerank: candidates drawn for each prompt, 1 or more.
        small: (h, w) of what the first stage enlarges; None for a base model.
        tile_batch: tiles that a network is asked about at once.
        rerank_stage: number of the stage whose noised CLIP chooses among them.
        contrast: the captions that noised CLIPs tell a prompt from.
        edits: what pictures start from, keep and go to.
    """

    seeds: Seeds
    stages: tuple[StagePlan, ...]
    rerank: int
    rerank_stage: int
    small: Size | None
    tile_batch: int
    contrast: ContrastSet
    edits: Edits = NO_EDITS

    @property
    def steps(self) -> int:
        """Network steps that one picture takes, over all stages and candidates."""
        return sum(self.candidates(n) * part.steps for n, part in enumerate(self.stages))

    @property
    def evaluations(self) -> list[int]:
        """Of each stage's network for one picture, over all candidates."""
        return [self.candidates(n) * part.evaluations for n, part in enumerate(self.stages)]

    def candidates(self, number: int) -> int:
        """How often a stage is drawn for one picture."""
        return self.rerank if number <= self.rerank_stage else 1

    @property
    def sizes(self) -> list[Size]:
        """(H, W) of the stages' pictures in pixels."""
        return [part.size for part in self.stages]

    @property
    def names(self) -> list[str]:
        """The same, as users read them."""
        return [spell(size) for size in self.sizes]

    def describe_cost(self) -> str:
        """A line that says what a picture costs, over all candidates."""
        costs = []
        for number, (name, part) in enumerate(zip(self.names, self.stages, strict=True)):
            drawn = self.candidates(number)
            cost = f"{name} px {drawn * part.evaluations} ({drawn * part.steps} steps)"
            if part.settings.tile_size:
                cost += f", each of {part.tiles} tiles"
            if part.classifier_evaluations:
                cost += f" and {drawn * part.classifier_evaluations} of the CLIP"
            costs.append(cost)
        return f"network evaluations a picture: {', '.join(costs)}"

    def notes(self) -> list[str]:
        """What the user should know of these settings."""
        return [line for n, part in enumerate(self.stages, start=1) for line in _notes(n, part)]


def _notes(number: int, part: StagePlan) -> Iterator[str]:
    """Lines about tiles, and about guidance whose interval no step of a stage lies in."""
    settings, classifier = part.settings, part.classifier
    if settings.tile_size:
        yield describe_tiles(number, settings.tile_size, settings.tile_overlap)
    if settings.guidance_scale != 1 and not part.guided_evaluations:
        yield (
            f"--guidance_interval {settings.guidance_interval} holds no step of stage {number}: "
            "it is drawn without classifier-free guidance"
        )
    if classifier.classifier_scale and not part.classifier_evaluations:
        yield (
            f"--classifier_interval {classifier.classifier_interval} holds no step of stage "
            f"{number}: no CLIP guides it"
        )


def make_plan(
    stages: Sequence[Stage],
    cfg: SampleConfig,
    *,
    low_res: bool,
    contrast: Sequence[str] = (),
    edits: Edits = NO_EDITS,
) -> Plan:
    """The plan that flags amount to on these stages.

    Args:
        stages: the cascade.
        cfg: the flags; paths, prompts and outputs are not read here.
        low_res: whether small pictures are given.
        contrast: the captions that `read_contrast` made of ``cfg.contrast``.
        edits: what `make_edits` made of the flags.
    Raises:
        UsageError: a setting that these stages cannot follow.
    """
    check_start(stages[0], low_res)
    count, steps = len(stages), choose_steps_of(stages, cfg)
    free = choose_free_guidance(stages, cfg)
    classifiers = choose_classifier_guidance(stages, cfg)
    sizes = choose_sizes(stages, cfg.size)
    tiles = choose_tiles(stages, cfg, sizes)
    editing = choose_editing(stages, cfg, sizes, edits)
    check_guides(stages, sizes, [part.classifier_scale for part in classifiers])
    levels = per_stage(numbers(cfg.aug_level, "aug_level"), count, "aug_level")
    _check_unread(stages, levels, steps, cfg)
    plans = []
    for number, stage in enumerate(stages):
        settings = StageSettings(
            **asdict(steps[number]),
            ddim_eta=cfg.ddim_eta if steps[number].sampler == "ddim" else 0.0,
            threshold=cfg.resolved_threshold,
            threshold_percentile=cfg.threshold_percentile,
            threshold_max=cfg.threshold_max,
            **asdict(free[number]),
            aug_level=levels[number] if stage.small_size else 0.0,
            **asdict(editing[number]),
            **asdict(tiles[number]),
        )
        _check_stage(stage, settings)
        plans.append(StagePlan.make(settings, stage, sizes[number], classifiers[number]))
    return Plan(
        seeds=Seeds(cfg.seed, tuple(cfg.seeds)),
        stages=tuple(plans),
        rerank=cfg.rerank,
        rerank_stage=_rerank_stage(stages, cfg.rerank),
        small=small_size(stages, sizes),
        tile_batch=cfg.tile_batch,
        contrast=ContrastSet(contrast),
        edits=edits,
    )


def _check_unread(
    stages: Sequence[Stage], levels: Sequence[float], steps: Sequence[Steps], cfg: SampleConfig
) -> None:
    """Refuse settings that nothing would read: a value for all stages needs one that reads it."""
    one_for_all = len(cfg.aug_level) == 1 and any(stage.small_size for stage in stages)
    for level, stage in zip(levels, stages, strict=True):
        if level and not stage.small_size and not one_for_all:
            raise UsageError(
                f"--aug_level is {level:g}, but {stage.path} is a base model, which has no small "
                "picture to put noise on: give 0"
            )
    if cfg.ddim_eta and not any(part.sampler == "ddim" for part in steps):
        raise UsageError(
            f"--ddim_eta is {cfg.ddim_eta:g}: it needs --use_ddim True, or --sampler ddim"
        )


def check_start(first: Stage, low_res: bool) -> None:
    """Raise a `UsageError` unless small pictures are given to an upsampler, and to nothing else."""
    if first.small_size and not low_res:
        raise UsageError(
            f"--model_path: {first.path} is an upsampler of {first.small_size} px pictures: put a "
            "base model before it, or give the pictures with --low_res"
        )
    if low_res and not first.small_size:
        raise UsageError(
            f"--low_res is for an upsampler, but {first.path} is a base model: leave it out"
        )


def _check_stage(stage: Stage, settings: StageSettings) -> None:
    if settings.guidance_scale != 1 and not stage.reads_text:
        raise UsageError(
            f"--guidance_scale is {settings.guidance_scale:g}, but {stage.path} was trained "
            "without captions: give 1 for its stage"
        )
    if settings.aug_level and not stage.loaded.run.generator.aug_level_cond:
        raise UsageError(
            f"--aug_level is {settings.aug_level:g}, but {stage.path} cannot be told a noise "
            "level: give 0 for its stage"
        )


def _rerank_stage(stages: Sequence[Stage], rerank: int) -> int:
    """The first stage with a CLIP: choosing early is cheapest."""
    for number, stage in enumerate(stages):
        if stage.guide is not None:
            return number
    if rerank > 1:
        raise UsageError(f"--rerank is {rerank}: name the CLIP that chooses, --classifier_path")
    return 0
