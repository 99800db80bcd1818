"""The cascade as a program meets it: load, sample, stream.

B batch, N pictures, H W pixels, h w pixels of the stage before.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diff_dalle.cascade.drawing import Drawing, OnStep
from diff_dalle.cascade.plan import Plan, make_plan
from diff_dalle.cascade.result import CascadeResult
from diff_dalle.cascade.stages import Stage, load_stages
from diff_dalle.data.tokenizer import Tokenizer
from diff_dalle.errors import UsageError
from diff_dalle.knobs import AUTO
from diff_dalle.loading import LoadedClassifier, LoadedGenerator
from diff_dalle.models.low_res import downsample
from diff_dalle.sampling_io.config import SampleConfig
from diff_dalle.sampling_io.previews import iterate
from diff_dalle.sampling_io.prompts import Prompt, describe_cut
from diff_dalle.sampling_io.store import Pictures
from diff_dalle.training.precision import Precision, PrecisionConfig
from diff_dalle.training.stage import from_uint8, to_uint8

PerStage = str | float | Sequence[str | float]
"""One value for all stages, or one a stage."""
StrPath = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What the pictures look like on the way.

    Attributes:
        stage: number of the stage, from 0.
        step: steps done in it, from 1; after the last one the images are the stage's result.
        steps: steps that the stage takes.
        images: one picture a prompt, the current estimate of x_0.
    """

    stage: int
    step: int
    steps: int
    images: list[Image.Image]


class Cascade:
    """Generators that enlarge each other's pictures, each perhaps guided by a noised CLIP.

    Attributes:
        stages: from the smallest picture to the largest.
        device: where they are.
        precision: what the generators compute in, after ``auto``; CLIPs compute in fp32.
        notes: lines to tell the user about what was decided for them.
    """

    def __init__(self, stages: Sequence[Stage], device: torch.device, precision: str) -> None:
        self.stages = list(stages)
        self.device = device
        # fp16 is emulated on a CPU, and few CPUs are faster in bf16.
        on_cpu = device.type == "cpu"
        self._precision = Precision(
            PrecisionConfig(precision="fp32" if on_cpu else precision), device
        )
        self.precision = self._precision.name
        self.notes: list[str] = []
        if on_cpu and precision not in (AUTO, "fp32"):
            self.notes.append(f"sampling in fp32: a CPU is slower in {precision}")
        self.notes += [note for stage in self.stages for note in stage.notes()]

    @classmethod
    def load(
        cls,
        paths: StrPath | Sequence[StrPath],
        classifier: StrPath | Sequence[StrPath] | None = None,
        device: str | torch.device = AUTO,
        precision: str = AUTO,
        *,
        warn: bool = True,
    ) -> Cascade:
        """A cascade from checkpoints; no argument repeats what they were trained with.

        Args:
            paths: checkpoints from the smallest picture to the largest, or a folder of them.
            classifier: noised CLIPs, one a stage (``"none"`` for no CLIP), or one for the stage
                of its own size, or a folder of them.
            device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``.
            precision: ``fp32``, ``fp16``, ``bf16`` or ``auto``; a CPU samples in fp32.
            warn: of every note; False leaves it to the caller to tell them.
        Raises:
            UsageError: a path that is no checkpoint or of the wrong kind, stages out of order,
                or sizes that do not fit.
        """
        if device == AUTO:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(device)
        except RuntimeError as problem:
            raise UsageError(f"--device is {device!r}: give auto, cpu or cuda") from problem
        stages = load_stages(_paths(paths), _paths(classifier or []), device)
        cascade = cls(stages, device, precision)
        for note in cascade.notes if warn else ():
            warnings.warn(note, stacklevel=2)
        return cascade

    @property
    def sizes(self) -> list[int]:
        """Picture sizes of the stages in pixels."""
        return [stage.image_size for stage in self.stages]

    @property
    def models(self) -> list[LoadedGenerator | LoadedClassifier]:
        """All generators, then all CLIPs."""
        guides = [stage.guide.loaded for stage in self.stages if stage.guide is not None]
        return [*(stage.loaded for stage in self.stages), *guides]

    @property
    def reads_text(self) -> bool:
        """Whether any generator or CLIP reads the prompt."""
        return any(stage.reads_text or stage.guide for stage in self.stages)

    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        guidance_scale: PerStage = 1.0,
        classifier_scale: PerStage = 1.0,
        steps: PerStage = AUTO,
        use_ddim: bool = False,
        ddim_eta: float = 0.0,
        clip_denoised: bool = True,
        aug_level: PerStage = 0.0,
        rerank: int = 1,
        batch_size: int = 4,
        low_res: Pictures | None = None,
    ) -> CascadeResult:
        """Pictures for prompts.

        Args:
            prompts: N captions; picture n is a function of (seed, n, its caption). A warning
                names those of which only the beginning is read.
            seed: of all noise.
            guidance_scale: of classifier-free guidance; 1 is none.
            classifier_scale: of the noised CLIP's gradient; 0 is none.
            steps: as the flag ``--timestep_respacing``: 250, "ddim25", "auto", ...
            use_ddim: DDIM instead of DDPM.
            ddim_eta: DDIM's randomness, 0 to 1.
            clip_denoised: keep estimates of x_0 within [-1, 1].
            aug_level: noise on each upsampler's small picture, 0 to 1.
            rerank: candidates a prompt, of which the first stage's noised CLIP chooses.
            batch_size: pictures drawn at once.
            low_res: uint8 [N,h,w,3], the pictures to enlarge where the first stage is an
                upsampler.
        Raises:
            UsageError: a setting that the stages cannot follow.
        """
        cfg = SampleConfig(
            seed=seed,
            guidance_scale=_texts(guidance_scale),
            classifier_scale=_texts(classifier_scale),
            timestep_respacing=_texts(steps),
            use_ddim=use_ddim,
            ddim_eta=ddim_eta,
            clip_denoised=clip_denoised,
            aug_level=_texts(aug_level),
            rerank=rerank,
            batch_size=batch_size,
        )
        prompts, plan = self._ready(prompts, cfg, low_res)
        indices = range(len(prompts))
        batches = self.batches(plan, indices, prompts, batch_size=batch_size, low_res=low_res)
        return CascadeResult.join([result for _, result in batches])

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        guidance_scale: PerStage = 1.0,
        classifier_scale: PerStage = 1.0,
        steps: PerStage = AUTO,
        use_ddim: bool = False,
        low_res: Pictures | None = None,
    ) -> Iterator[Preview]:
        """The pictures of `sample` on their way, step by step and stage by stage, as one batch.

        Arguments are those of `sample`. Stop reading, and the sampling stops at its next step.
        """
        cfg = SampleConfig(
            seed=seed,
            guidance_scale=_texts(guidance_scale),
            classifier_scale=_texts(classifier_scale),
            timestep_respacing=_texts(steps),
            use_ddim=use_ddim,
        )
        prompts, plan = self._ready(prompts, cfg, low_res)
        threads = torch.get_num_threads()

        def work(emit: Callable[[Preview], None]) -> None:
            torch.set_num_threads(threads)  # a new thread would take every core

            def on_step(stage: int, step: int, x_0: Tensor) -> None:
                images = [Image.fromarray(picture) for picture in _to_numpy(to_uint8(x_0))]
                total = plan.stages[stage].steps
                emit(Preview(stage=stage, step=step, steps=total, images=images))

            self.draw(plan, range(len(prompts)), prompts, low_res=low_res, on_step=on_step)

        return iterate(work)

    def plan(self, cfg: SampleConfig, low_res: Pictures | None = None) -> Plan:
        """What the flags amount to on these stages.

        Raises:
            UsageError: a setting that the stages cannot follow, or pictures in ``low_res`` that
                are no uint8 [N,h,w,3] as large as the first stage enlarges, or larger.
        """
        plan = make_plan(self.stages, cfg, low_res=low_res is not None)
        if low_res is not None:
            small = self.stages[0].small_size
            square = low_res.ndim == 4 and low_res.shape[1] == low_res.shape[2]
            fits = square and low_res.shape[3] == 3 and low_res.shape[1] >= small
            if not fits or low_res.dtype != np.uint8:
                raise UsageError(
                    f"--low_res holds {low_res.dtype} {low_res.shape}, but {self.stages[0].path} "
                    f"enlarges uint8 pictures (N, {small}, {small}, 3): give such, or larger ones"
                )
        return plan

    def batches(
        self,
        plan: Plan,
        indices: Sequence[int],
        prompts: Sequence[str],
        *,
        batch_size: int,
        low_res: Pictures | None = None,
        on_step: OnStep | None = None,
    ) -> Iterator[tuple[Sequence[int], CascadeResult]]:
        """Some of N pictures, batch by batch: the indices of each batch, and what was drawn.

        Args:
            plan: from `plan`.
            indices: which of the N pictures, in the order in which they are drawn.
            prompts: N captions.
            batch_size: pictures drawn at once.
            low_res: uint8 [M,h,w,3] where the first stage is an upsampler; picture i is drawn
                from ``low_res[i % M]``.
            on_step: as in `draw`.
        """
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            small = None
            if low_res is not None:
                small = low_res[[index % len(low_res) for index in batch]]
            texts = [prompts[index] for index in batch]
            yield batch, self.draw(plan, batch, texts, low_res=small, on_step=on_step)

    def draw(
        self,
        plan: Plan,
        indices: Sequence[int],
        prompts: Sequence[str],
        *,
        low_res: Pictures | None = None,
        on_step: OnStep | None = None,
    ) -> CascadeResult:
        """One batch, through all stages.

        Args:
            plan: from `plan`.
            indices: the number of each picture; with the seed it decides the noise.
            prompts: B captions.
            low_res: uint8 [B,h,w,3] where the first stage is an upsampler.
            on_step: told of every step, of rejected candidates too.
        """
        drawing = Drawing(
            stages=self.stages,
            plan=plan,
            precision=self._precision,
            indices=indices,
            prompts=prompts,
            on_step=on_step,
        )
        start = None if low_res is None else self._start(low_res)
        pictures, candidates = drawing.draw(start)
        stages = [_to_numpy(picture) for picture in pictures]
        small = None if start is None else _to_numpy(start)
        return CascadeResult(stages=stages, candidates=candidates.tolist(), low_res=small)

    def enlarged(self, low_res: Pictures) -> Pictures:
        """What the first stage enlarges of uint8 [N,h,w,3]: larger pictures are scaled down."""
        return _to_numpy(self._start(low_res))

    def _start(self, low_res: Pictures) -> Tensor:
        """`enlarged` as uint8 [N,3,h,w] on the device."""
        small = torch.from_numpy(low_res).to(self.device).permute(0, 3, 1, 2)  # [N,3,h,w]
        size = self.stages[0].small_size
        if small.shape[-1] == size:
            return small
        return to_uint8(downsample(from_uint8(small), size))

    def describe_cut(self, prompts: Sequence[Prompt]) -> list[str]:
        """Lines that name the prompts of which a generator or a CLIP reads only the beginning."""
        lines: dict[str, None] = {}  # in order, each once: stages often share a tokenizer
        for tokenizer, text_length in self._text_readers():
            lengths = tokenizer.lengths([prompt.text for prompt in prompts])
            lines |= dict.fromkeys(describe_cut(prompts, lengths, text_length))
        return list(lines)

    def _text_readers(self) -> list[tuple[Tokenizer, int]]:
        """Every different tokenizer with the number of tokens that are read of a caption."""
        pairs = [
            *((s.tokenizer, s.text_length) for s in self.stages if s.tokenizer is not None),
            *((s.guide.loaded.tokenizer, s.guide.text_length) for s in self.stages if s.guide),
        ]
        return list({(tokenizer.sha256, n): (tokenizer, n) for tokenizer, n in pairs}.values())

    def _ready(
        self, prompts: str | Sequence[str], cfg: SampleConfig, low_res: Pictures | None
    ) -> tuple[list[str], Plan]:
        """The prompts as a list and the plan; the caller's caller is warned of what they hold."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise UsageError("there is no prompt to draw: give at least one")
        if low_res is not None and len(low_res) != len(texts):
            raise UsageError(
                f"--low_res holds {len(low_res)} pictures for {len(texts)} prompts: give one each"
            )
        plan = self.plan(cfg, low_res)
        cut = self.describe_cut([Prompt(text, f"prompt {n}") for n, text in enumerate(texts)])
        for line in [*cut, *plan.notes()]:
            warnings.warn(line, stacklevel=3)
        return texts, plan


def _paths(value: StrPath | Sequence[StrPath]) -> list[str]:
    values = [value] if isinstance(value, str | os.PathLike) else value
    return [os.fspath(path) for path in values]


def _texts(value: PerStage) -> list[str]:
    """Values as a command line would spell them."""
    values = [value] if isinstance(value, str | float | int) else value
    return [str(entry) for entry in values]


def _to_numpy(pictures: Tensor) -> Pictures:
    """[B,3,H,W] on any device -> [B,H,W,3]."""
    return pictures.permute(0, 2, 3, 1).contiguous().cpu().numpy()
