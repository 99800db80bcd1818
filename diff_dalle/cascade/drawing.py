"""One batch of prompts drawn through the stages.

A stage hands on its uint8 picture, so a chained run and a stage-by-stage run agree. All noise of
a picture is a function of (seed, index, candidate, trained size of the stage), so neither the
batch size nor the number of ranks decides what is drawn.

B batch, L tokens, E embedding, H W pixels, h w pixels of the stage before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diff_dalle.cascade.plan import Plan, StagePlan
from diff_dalle.cascade.stages import Guide, Stage
from diff_dalle.cascade.turns import Turns
from diff_dalle.diffusion import guidance
from diff_dalle.diffusion.clip_guidance import (
    LogProbability,
    clip_gradient,
    log_softmax_in_set,
    similarity,
    time_of_other_process,
)
from diff_dalle.diffusion.strength import scale_at_step
from diff_dalle.models.generator import Cond
from diff_dalle.models.low_res import downsample, enlarge
from diff_dalle.training.precision import Precision
from diff_dalle.training.stage import from_uint8, sample_stage

OnStep = Callable[[int, int, Tensor], None]
"""(number of the stage, steps done in it, estimate of x_0 [B,3,H,W]) -> nothing."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What is drawn together, and with what.

    Attributes:
        turns: the stages, and the seconds that they take.
        plan: how they are sampled.
        precisions: what the generators compute in, one a stage.
        indices: the numbers of the B pictures; with the seed they decide the noise.
        prompts: B captions.
        negative_prompts: B captions to lead away from, blank for none; or no entry at all.
        on_step: told of every step, of rejected candidates too.
    """

    turns: Turns
    plan: Plan
    precisions: Sequence[Precision]
    indices: Sequence[int]
    prompts: Sequence[str]
    negative_prompts: Sequence[str] = ()
    on_step: OnStep | None = None

    def draw(self, low_res: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """The pictures of every stage.

        Args:
            low_res: uint8 [B,3,h,w] where the first stage is an upsampler, of the size that it
                enlarges.
        Returns:
            uint8 [B,3,H,W] for each stage, on its device, and the candidates that were kept,
            int64 [B].
        """
        first = 0 if self.plan.rerank == 1 else self.plan.rerank_stage + 1
        pictures: list[Tensor] = []
        kept = torch.zeros(len(self.prompts), dtype=torch.int64)
        if first:
            pictures, kept = self._best_of(range(first), low_res)
            low_res = pictures[-1]
        for number in range(first, len(self.turns.stages)):
            with self.turns.of(number):
                low_res = self._stage(number, low_res, candidate=0)
            self._tell_result(number, low_res)
            pictures.append(low_res)
        return pictures, kept

    def _best_of(self, numbers: range, low_res: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Pictures of the first stages that the CLIP of the last of them likes best.

        A stage draws all candidates in one turn, so that off-loading moves it once. What is told
        last of it are the pictures that were chosen, in place of the last candidate's.
        """
        small = [low_res] * self.plan.rerank
        drawn: list[Tensor] = []  # [R,B,3,H,W] a stage, R candidates
        for number in numbers:
            made: list[Tensor] = []
            with self.turns.of(number):
                for candidate, one in enumerate(small):
                    made.append(self._stage(number, one, candidate))
                    if candidate < self.plan.rerank - 1:
                        self._tell_result(number, made[-1])
            small = [*made]
            drawn.append(torch.stack(made))
        with self.turns.of(numbers[-1]):
            likings = [self._similarity(numbers[-1], pictures) for pictures in drawn[-1]]
            kept = torch.stack(likings).argmax(dim=0).cpu()  # [B]; the first of equals
        best = [stage[kept, torch.arange(len(kept))] for stage in drawn]
        for number, picture in zip(numbers, best, strict=True):
            self._tell_result(number, picture)
        return best, kept

    def _tell_result(self, number: int, picture: Tensor) -> None:
        """The finished pictures of a stage, uint8 [B,3,H,W], as its last step."""
        if self.on_step is not None:
            self.on_step(number, self.plan.stages[number].steps, from_uint8(picture))

    def _stage(self, number: int, small: Tensor | None, candidate: int) -> Tensor:
        """One stage: uint8 [B,3,h,w] or nothing in, uint8 [B,3,H,W] out, which is not told."""
        stage, plan = self.turns.stages[number], self.plan.stages[number]
        device, edits = stage.device, self.plan.edits
        # The stage's trained size names its noise, whatever size is drawn.
        keys = edits.keys(self.plan.seeds, self.indices, candidate, stage.image_size)
        done = 0

        def callback(_: int, x_0: Tensor) -> None:
            nonlocal done
            done += 1
            if self.on_step is not None and done < plan.steps:
                self.on_step(number, done, x_0)

        with self.precisions[number].autocast():
            picture = sample_stage(
                stage.loaded.generator,
                stage.loaded.diffusion,
                self._condition(stage, small),
                keys.to(device),
                image_size=plan.size,
                settings=plan.settings,
                negative=self._negative(stage),
                guide=self._guide(stage, plan),
                tile_batch=self.plan.tile_batch,
                callback=callback,
                edit=edits.of_stage(stage, plan.size, self.indices, candidate),
            )
        return picture

    def _condition(self, stage: Stage, small: Tensor | None) -> Cond:
        """Tokens of the stage's own tokenizer, and the picture of the stage before."""
        told = stage.read(self.prompts)
        if small is None:
            return told
        # A byte a value crosses to the device, not four.
        return replace(told, low_res=from_uint8(small.to(stage.device)))

    def _negative(self, stage: Stage) -> Cond | None:
        """What takes the null caption's place; it stays where the negative prompt is blank."""
        if not stage.reads_text or not any(self.negative_prompts):
            return None
        blank = [not text.strip() for text in self.negative_prompts]
        drop = torch.tensor(blank, device=stage.device)
        return replace(stage.read(self.negative_prompts), drop=drop)

    def _guide(self, stage: Stage, plan: StagePlan) -> guidance.Guide | None:
        """The gradient of classifier_scale * log p(text | x_t) by x_t, as the CLIP sees it.

        Without a contrast set log p is logit_scale * cos(image, text), its normaliser left out;
        with one it is the log-softmax of that over the own prompt and the set (captions of the
        set that read as the own prompt do not count twice). The logit scale is the CLIP's own,
        so a scale of 1 means as much for any CLIP.
        """
        if stage.guide is None or plan.classifier_scale == 0:
            return None
        clip, clip_process = stage.guide.loaded.clip, stage.guide.loaded.diffusion
        process = plan.settings.respace(stage.loaded.diffusion)
        to_model_time = time_of_other_process(process, clip_process)

        def encode_image(x_t: Tensor, time: Tensor) -> Tensor:
            with torch.autocast(x_t.device.type, enabled=False):  # fp16 gradients would vanish
                return clip.encode_image(x_t.float(), time)

        scale = scale_at_step(plan.classifier.scales(process))
        return clip_gradient(encode_image, self._log_probability(stage.guide), scale, to_model_time)

    def _log_probability(self, guide: Guide) -> LogProbability:
        """Of the B captions, perhaps among those of the contrast set."""
        features, logit_scale = self._text_features(guide), float(guide.loaded.clip.scale())
        bank = self.plan.contrast.bank(guide)
        if bank is None:
            return similarity(features, logit_scale)
        own = self.plan.edits.around(self.prompts, self.indices)
        others = [bank.others(guide.read(captions)[0]) for captions in own]
        used = torch.stack(others).all(dim=0)  # [B,K]
        return log_softmax_in_set(features, logit_scale, bank.features, used)

    @torch.no_grad()
    def _similarity(self, number: int, picture: Tensor) -> Tensor:
        """Cosine [B] between prompts and uint8 pictures [B,3,H,W], at the CLIP's step 0."""
        guide = self.turns.stages[number].guide
        assert guide is not None
        start = torch.zeros(len(picture), dtype=torch.int64, device=picture.device)
        time = guide.loaded.diffusion.model_time(start)
        seen = _as_square(from_uint8(picture), guide.image_size)  # [B,3,S,S]
        features = guide.loaded.clip.encode_image(seen, time)  # [B,E]
        return (features * self._text_features(guide)).sum(dim=1)

    @torch.no_grad()
    def _text_features(self, guide: Guide) -> Tensor:
        """[B,E], of the CLIP's own tokenizer."""

        def encode(texts: Sequence[str]) -> Tensor:
            with torch.autocast(guide.device.type, enabled=False):
                return guide.loaded.clip.encode_text(*guide.read(texts))

        return self.plan.edits.features(encode, self.prompts, self.indices)


def _as_square(picture: Tensor, size: int) -> Tensor:
    """The middle of [B,3,H,W] as [B,3,size,size], as training cuts and scales its pictures."""
    height, width = picture.shape[2:]
    if height == width == size:
        return picture
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = picture[:, :, top : top + side, left : left + side]
    return downsample(square, size) if side >= size else enlarge(square, (size, size))
