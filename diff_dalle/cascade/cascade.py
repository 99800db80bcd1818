"""The cascade as a program meets it: load, sample, stream.

B batch, N pictures, H W pixels, h w pixels of the stage before.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Unpack

import torch

from diff_dalle.cascade.cut import cut_of
from diff_dalle.cascade.devices import Devices, choose_precisions, device_notes, find_devices
from diff_dalle.cascade.drawing import Drawing, OnStep
from diff_dalle.cascade.edits import NO_EDITS, Edit, Edits
from diff_dalle.cascade.inputs import Request, check_small_pictures, request_texts, shrunk_to
from diff_dalle.cascade.offload import Residence
from diff_dalle.cascade.plan import Plan, make_plan
from diff_dalle.cascade.result import CascadeResult, Preview, to_pictures
from diff_dalle.cascade.settings import SampleSettings, as_flags
from diff_dalle.cascade.sizing import choose_sizes
from diff_dalle.cascade.stages import Stage, StrPath, as_paths, load_stages
from diff_dalle.cascade.streaming import previews
from diff_dalle.cascade.turns import Turns
from diff_dalle.knobs import AUTO
from diff_dalle.loading import LoadedClassifier, LoadedGenerator
from diff_dalle.sampling_io.config import SampleConfig, in_short
from diff_dalle.sampling_io.store import Pictures


class Cascade:
    """Generators that enlarge each other's pictures, each perhaps guided by a noised CLIP.

    Attributes:
        stages: from the smallest picture to the largest.
        precision: what the generators compute in, or one entry a stage; CLIPs compute in fp32.
        notes: lines to tell the user about what was decided for them.
    """

    def __init__(self, stages: Sequence[Stage], precision: str, *, offload: bool = False) -> None:
        self.stages = list(stages)
        self._precisions = choose_precisions(self.devices, precision)
        self._residence = Residence(offload=offload)
        self.precision = in_short([one.name for one in self._precisions])
        self.notes = device_notes(self.devices, precision, offload=offload)
        self.notes += [note for stage in self.stages for note in stage.notes()]

    @classmethod
    def load(
        cls,
        paths: StrPath | Sequence[StrPath],
        classifier: StrPath | Sequence[StrPath] | None = None,
        device: Devices = AUTO,
        precision: str = AUTO,
        *,
        offload: bool = False,
        warn: bool = True,
    ) -> Cascade:
        """A cascade from checkpoints; no argument repeats what they were trained with.

        Args:
            paths: checkpoints from the smallest picture to the largest, or a folder of them.
            classifier: noised CLIPs, one a stage (``"none"`` for no CLIP), or one for the stage
                of its own size, or a folder of them.
            device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``; or one a
                stage, of which a CLIP shares its stage's.
            precision: ``fp32``, ``fp16``, ``bf16`` or ``auto``; a CPU samples in fp32.
            offload: weights wait on the CPU and come to their device for their stage's turn:
                a device holds one stage at a time, and none between calls.
            warn: of every note; False leaves it to the caller to tell them.
        Raises:
            UsageError: a path that is no checkpoint or of the wrong kind, stages out of order,
                sizes that do not fit, a device that is not there, or an unknown precision.
        """
        devices = find_devices(device)
        stages = load_stages(as_paths(paths), as_paths(classifier or []), devices, offload=offload)
        cascade = cls(stages, precision, offload=offload)
        for note in cascade.notes if warn else ():
            warnings.warn(note, stacklevel=2)
        return cascade

    @property
    def sizes(self) -> list[int]:
        """Picture sizes of the stages in pixels, as they were trained."""
        return [stage.image_size for stage in self.stages]

    @property
    def devices(self) -> list[torch.device]:
        """Where the stages sample."""
        return [stage.device for stage in self.stages]

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
        low_res: Pictures | None = None,
        edit: Edit | None = None,
        **settings: Unpack[SampleSettings],
    ) -> CascadeResult:
        """Pictures for prompts.

        Args:
            prompts: N captions; picture n is a function of (seed, n, its caption). A warning
                names those of which only the beginning is read.
            low_res: uint8 [N,h,w,3], the pictures to enlarge where the first stage is an
                upsampler.
            edit: pictures to start from and to keep parts of, frames to other prompts.
            settings: seed, guidance, sampler, steps, size and all else that `SampleSettings` lists.
        Raises:
            UsageError: a setting that the stages cannot follow.
        """
        cfg = as_flags(settings)
        request, plan = self._ready(prompts, cfg, low_res, edit)
        return self._draw_all(plan, request, cfg.batch_size)

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        low_res: Pictures | None = None,
        edit: Edit | None = None,
        **settings: Unpack[SampleSettings],
    ) -> Iterator[Preview]:
        """The pictures of `sample` on their way, step by step and stage by stage, as one batch.

        Arguments are those of `sample`. Stop reading, and the sampling stops at its next step.
        """
        request, plan = self._ready(prompts, as_flags(settings), low_res, edit)
        return previews(
            lambda on_step: self._draw_all(plan, request, len(request.prompts), on_step), plan
        )

    def plan(
        self,
        cfg: SampleConfig,
        low_res: Pictures | None = None,
        contrast: Sequence[str] = (),
        edits: Edits = NO_EDITS,
    ) -> Plan:
        """What the flags amount to on these stages.

        Args:
            cfg: the flags.
            low_res: the pictures to enlarge, if any.
            contrast: the captions that `read_contrast` made of ``cfg.contrast``.
            edits: what `make_edits` made of the flags.
        Raises:
            UsageError: a setting that the stages cannot follow, or pictures in ``low_res`` that
                are no uint8 [N,h,w,3] of the shape that the first stage enlarges, or too small.
        """
        small = low_res is not None
        plan = make_plan(self.stages, cfg, low_res=small, contrast=contrast, edits=edits)
        if low_res is not None and plan.small is not None:
            check_small_pictures(low_res, plan.small, self.stages[0].path)
        return plan

    def batches(
        self,
        plan: Plan,
        indices: Sequence[int],
        prompts: Sequence[str],
        *,
        negative_prompts: Sequence[str] = (),
        batch_size: int,
        low_res: Pictures | None = None,
        on_step: OnStep | None = None,
    ) -> Iterator[tuple[Sequence[int], CascadeResult]]:
        """Some of N pictures, batch by batch: the indices of each batch, and what was drawn.

        Args:
            plan: from `plan`.
            indices: which of the N pictures, in the order in which they are drawn.
            prompts: N captions.
            negative_prompts: N captions to lead away from, blank for none; or no entry at all.
            batch_size: pictures drawn at once.
            low_res: uint8 [M,h,w,3] where the first stage is an upsampler: one a prompt, which
                all of its frames are drawn from, repeated in order (`Edits.entries`).
            on_step: as in `draw`.
        """
        with self._residence:
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                small = None
                if low_res is not None:
                    small = low_res[plan.edits.entries(batch, len(low_res))]
                negative = [negative_prompts[index] for index in batch] if negative_prompts else ()
                result = self.draw(
                    plan,
                    batch,
                    [prompts[index] for index in batch],
                    negative_prompts=negative,
                    low_res=small,
                    on_step=on_step,
                )
                yield batch, result

    def draw(
        self,
        plan: Plan,
        indices: Sequence[int],
        prompts: Sequence[str],
        *,
        negative_prompts: Sequence[str] = (),
        low_res: Pictures | None = None,
        on_step: OnStep | None = None,
    ) -> CascadeResult:
        """One batch, through all stages.

        Args:
            plan: from `plan`.
            indices: the number of each picture; with the seed it decides the noise.
            prompts: B captions.
            negative_prompts: B captions to lead away from, blank for none; or no entry at all.
            low_res: uint8 [B,h,w,3] where the first stage is an upsampler.
            on_step: told of every step, of rejected candidates too.
        """
        drawing = Drawing(
            turns=Turns(self.stages, self._residence),
            plan=plan,
            precisions=self._precisions,
            indices=indices,
            prompts=prompts,
            negative_prompts=negative_prompts,
            on_step=on_step,
        )
        # A CLIP's gradient needs autograd, also where the caller has switched it off for good.
        with torch.inference_mode(False), self._residence:
            start = None
            if low_res is not None:
                assert plan.small is not None  # a plan with small pictures has their size
                low_res = shrunk_to(low_res, plan.small, self.devices[0])
                start = torch.from_numpy(low_res).permute(0, 3, 1, 2)  # [B,3,h,w]
            pictures, candidates = drawing.draw(start)
        return CascadeResult(
            stages=[to_pictures(picture) for picture in pictures],
            candidates=candidates.tolist(),
            low_res=low_res,
            seconds=drawing.turns.seconds,
            evaluations=plan.evaluations,
        )

    def _draw_all(
        self, plan: Plan, request: Request, batch_size: int, on_step: OnStep | None = None
    ) -> CascadeResult:
        """Every picture of a request."""
        batches = self.batches(
            plan,
            range(len(request.prompts)),
            request.texts,
            negative_prompts=request.negative_texts,
            batch_size=batch_size,
            low_res=request.low_res,
            on_step=on_step,
        )
        return CascadeResult.join([result for _, result in batches])

    def _ready(
        self,
        prompts: str | Sequence[str],
        cfg: SampleConfig,
        low_res: Pictures | None,
        edit: Edit | None,
    ) -> tuple[Request, Plan]:
        """What to draw and how; the caller's caller is warned of what the texts hold."""
        edit = edit or Edit()
        cfg = edit.configure(cfg)
        given = edit.read(choose_sizes(self.stages, cfg.size))
        request = request_texts(prompts, cfg, low_res, given)
        plan = self.plan(cfg, request.low_res, request.contrast_texts, request.edits)
        for line in [*cut_of(self.stages, request), *plan.notes(), *request.notes]:
            warnings.warn(line, stacklevel=3)
        return request, plan
