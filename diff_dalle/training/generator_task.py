"""Training a generator: noise a picture, ask for the noise, compare.

Symbols: docs/notation.md. B batch, H W pixels, h w of the low-resolution input, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diff_dalle.data.batch import Batch
from diff_dalle.diffusion.defaults import BEST_SPACING, FAST_SAMPLER, default_steps
from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.losses import LossConfig, LossTerms, image_error, training_losses
from diff_dalle.diffusion.timesteps import (
    LossSecondMomentSampler,
    TimestepConfig,
    make_timestep_sampler,
)
from diff_dalle.distributed import World, all_gather
from diff_dalle.knobs import Floats, knob, require
from diff_dalle.models.generator import Cond, Generator
from diff_dalle.models.low_res import augment, downsample, gaussian_blur
from diff_dalle.training import draws
from diff_dalle.training.metrics import QUARTILES, Meter
from diff_dalle.training.precision import Precision
from diff_dalle.training.stage import StageSettings, from_uint8, sample_stage, to_uint8
from diff_dalle.training.tasks import PreviewFrom, StepContext


@dataclass(frozen=True, kw_only=True)
class GeneratorTaskConfig:
    """How a generator's training samples are conditioned and noised."""

    cond_drop_prob: float = knob(0.1, "share of captions replaced by the null embedding")
    gaussian_blur: bool = knob(False, "blur the low-resolution input of an upsampler at times")
    blur_prob: float = knob(0.5, "share of low-resolution inputs that gaussian_blur blurs")
    blur_sigma: Floats = knob((0.4, 0.6), "range of the blur's width in low-resolution pixels")
    # A fifth covers the errors of a trained smaller stage (25 of 255 grey levels and less), and
    # still leaves most of the small picture to be relied on.
    aug_level_max: float = knob(
        0.2, "the low-resolution input is noised to a level between 0 and this; 0: never"
    )
    crop_size: int = knob(0, "pixels of the random crops an upsampler trains on; 0: whole images")
    # Guttenberg 2023: with 0.1 very dark and very bright pictures come within reach.
    noise_offset: float = knob(
        0.0, "size of a normal number added to the noise of each whole channel of a sample"
    )
    # Ning et al. 2023: 0.1. Sampling feeds the network its own errors; this is practice for it.
    input_perturbation: float = knob(
        0.0, "size, beside 1, of further noise in x_t that the network is not asked for"
    )

    def __post_init__(self) -> None:
        for name in ("cond_drop_prob", "blur_prob", "aug_level_max"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, value, "lie in [0, 1]")
        low_high = len(self.blur_sigma) == 2 and 0 <= self.blur_sigma[0] <= self.blur_sigma[1] <= 5
        require(low_high, "blur_sigma", self.blur_sigma, "be two numbers, low,high, from 0 to 5")
        require(self.crop_size >= 0, "crop_size", self.crop_size, "be 0 or a size in pixels")
        for name in ("noise_offset", "input_perturbation"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "not be negative")


class GeneratorTask:
    """A generator and its diffusion loss.

    Args:
        model: the generator, on the rank's device; float32, or float64 for exact comparisons.
        diffusion: the whole process, not respaced.
        cfg: how samples are conditioned.
        loss: which loss.
        timesteps: how often each noise level is visited.
        world: the ranks.
        precision: the compute type.
        microbatch: samples of one forward pass on one rank; less than 1 is the whole batch.
    """

    kind = "generator"
    keeps_best = False
    stop_early = 0

    def __init__(
        self,
        model: Generator,
        diffusion: GaussianDiffusion,
        cfg: GeneratorTaskConfig,
        loss: LossConfig,
        timesteps: TimestepConfig,
        *,
        world: World,
        precision: Precision,
        microbatch: int = -1,
    ) -> None:
        _check_crop(cfg.crop_size, model)
        self.model = model
        self._diffusion = diffusion
        self._cfg = cfg
        self._loss = loss
        self._world = world
        self.precision = precision
        self._microbatch = microbatch
        self._timesteps = make_timestep_sampler(timesteps, diffusion)
        captions_decide = model.cfg.cond_text and not model.cfg.small_size
        self.preview_from: PreviewFrom | None = "prompts" if captions_decide else "data"
        self._image_size = model.unet.cfg.image_size
        self._dtype = next(model.parameters()).dtype
        self._synchronised: nn.Module = model
        if world.size > 1:
            self._synchronised = DistributedDataParallel(model)

    def forward_backward(self, batch: Batch, step: StepContext) -> Tensor:
        """The gradients of the mean loss over the valid samples of the global batch.

        See `Task.forward_backward`. DDP averages over the ranks, hence the factor
        ``world.size``.
        """
        chunks = batch.chunk(self._microbatch)
        seen: list[Tensor] = []
        total = torch.zeros((), device=batch.valid.device, dtype=torch.float64)
        for number, chunk in enumerate(chunks):
            with self._synchronising(last=number == len(chunks) - 1):
                t, weight = self._timesteps.sample(draws.timestep(chunk.seed))  # [B], [B]
                terms = self._losses(self._synchronised, chunk, t)
                weighted = _valid_or_zero(terms.loss * weight, chunk.valid)  # [B]
                mean = (weighted / step.valid_total.to(weighted)).sum()
                (mean * (self._world.size * step.loss_scale)).backward()
            total = total + mean.detach()
            self._measure(step.meter, terms, t, weight, chunk.valid)
            seen.append(torch.stack([t.double(), terms.loss.detach().double(), chunk.valid], 1))
        self._remember(torch.cat(seen))
        return total

    def _losses(self, model: nn.Module, batch: Batch, t: Tensor) -> LossTerms:
        """The loss of each sample [B] at steps ``t``: Ho et al. 2020, algorithm 1."""
        x_0, cond = self._condition(batch, training=True)
        eps, in_x_t = self._noise(batch.seed, x_0)
        return self._answer(model, x_0, cond, t, in_x_t).losses(eps, self._loss)

    def _noise(self, seed: Tensor, x_0: Tensor) -> tuple[Tensor, Tensor]:
        """The noise that the network is asked for, and the noise in x_t, each [B,3,H,W]."""
        shape = tuple(x_0.shape[1:])
        eps = draws.noise(seed, shape).to(x_0)
        if self._cfg.noise_offset:
            eps = eps + self._cfg.noise_offset * draws.noise_offset(seed, shape[0]).to(x_0)
        if not self._cfg.input_perturbation:
            return eps, eps
        return eps, eps + self._cfg.input_perturbation * draws.perturbation(seed, shape).to(x_0)

    def _answer(
        self, model: nn.Module, x_0: Tensor, cond: Cond, t: Tensor, in_x_t: Tensor
    ) -> _Answer:
        x_t = self._diffusion.add_noise(x_0, t, in_x_t)  # [B,3,H,W]
        shown, time = self._diffusion.model_input(x_t, t), self._diffusion.model_time(t)
        with self.precision.autocast():
            output = model(shown, time, cond)  # [B,3 or 6,H,W]
        return _Answer(self._diffusion, output, x_0, x_t, t)

    def _condition(self, batch: Batch, *, training: bool) -> tuple[Tensor, Cond]:
        """x_0 [B,3,H,W] and what the model is told, both cropped alike where asked.

        Captions are dropped and small pictures blurred in training alone.
        """
        x_0 = from_uint8(batch.image, self._dtype)
        cond = Cond()
        if self.model.cfg.cond_text:
            drop = draws.caption_drop(batch.seed, self._cfg.cond_drop_prob if training else 0.0)
            cond = Cond(tokens=batch.tokens, mask=batch.mask, drop=drop)
        if not self.model.cfg.small_size:
            return x_0, cond
        low_res, level = self._low_res(x_0, batch.seed, blur=self._cfg.gaussian_blur and training)
        if self._cfg.crop_size:
            x_0, low_res = random_crop(x_0, low_res, batch.seed, self._cfg.crop_size)
        return x_0, replace(cond, low_res=low_res, aug_level=level)

    def _low_res(self, x_0: Tensor, seed: Tensor, *, blur: bool) -> tuple[Tensor, Tensor]:
        """The small picture [B,3,h,w], noised and perhaps blurred, and its noise level [B]."""
        low_res = downsample(x_0, self.model.cfg.small_size)
        if blur:
            low, high = self._cfg.blur_sigma
            sigma = draws.blur_sigma(seed, self._cfg.blur_prob, (low, high))
            low_res = gaussian_blur(low_res, sigma, radius=max(1, math.ceil(high)))
        level = draws.aug_level(seed, self._cfg.aug_level_max).to(x_0)  # [B]
        eps = draws.aug_noise(seed, tuple(low_res.shape[1:])).to(x_0)
        return augment(low_res, level, eps), level

    def _synchronising(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients cross the ranks with the last microbatch only."""
        if last or not isinstance(self._synchronised, DistributedDataParallel):
            return nullcontext()
        return self._synchronised.no_sync()

    def _measure(
        self, meter: Meter, terms: LossTerms, t: Tensor, weight: Tensor, valid: Tensor
    ) -> None:
        weights, steps = valid.double(), self._diffusion.num_steps
        meter.add_by_quartile("loss", terms.loss * weight, t, steps, weights)
        for name, values in (("mse", terms.mse), ("vb", terms.vb)):
            if values is not None:
                meter.add(name, values * weight, weights)

    def _remember(self, seen: Tensor) -> None:
        """Tell a loss-aware sampler every rank's valid (t, loss), in the global batch's order."""
        if isinstance(self._timesteps, LossSecondMomentSampler):
            t, loss, valid = all_gather(seen, self._world).unbind(1)  # [N·B] each
            self._timesteps.update(t[valid > 0].long(), loss[valid > 0])

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Held-out losses at a fixed (t, noise) of each sample in each timestep quartile.

        Returns:
            ``val_loss`` and ``val_loss_q0`` …, of what training minimises; ``val_x_0_mse`` and
            its quartiles, which compare between predictions and weightings (not between
            schedules); and, with captions, over samples whose neighbour's caption differs:
            ``val_loss_shuffled`` (told that caption), ``val_caption_gain`` (shuffled minus
            matched, above 0 when captions help) and ``val_caption_wins`` (share of samples that
            their own caption explains better).
        """
        meter = Meter(self._world.device)
        steps = self._diffusion.num_steps
        self.model.eval()
        for cpu_batch in batches:
            batch = cpu_batch.to(self._world.device)
            x_0, cond = self._condition(batch, training=False)
            weights = batch.valid.double()
            for quartile in range(QUARTILES):
                t, eps = draws.held_out(batch.seed, tuple(x_0.shape[1:]), quartile, steps)
                eps = eps.to(x_0)
                answer = self._answer(self.model, x_0, cond, t, eps)
                loss = answer.losses(eps, self._loss).loss  # [B]
                meter.add_by_quartile("val_loss", loss, t, steps, weights)
                meter.add_by_quartile("val_x_0_mse", answer.image_error(), t, steps, weights)
                if cond.tokens is not None:
                    self._measure_captions(meter, x_0, cond, t, eps, loss, batch.valid)
        self.model.train()
        return meter.means(self._world)

    def _measure_captions(
        self,
        meter: Meter,
        x_0: Tensor,
        cond: Cond,
        t: Tensor,
        eps: Tensor,
        matched: Tensor,
        valid: Tensor,
    ) -> None:
        """How much better a sample's own caption explains it than its neighbour's does."""
        assert cond.tokens is not None and cond.mask is not None
        order = torch.arange(len(valid), device=valid.device)
        order[valid] = order[valid].roll(1)
        other = replace(cond, tokens=cond.tokens[order], mask=cond.mask[order])
        loss = self._answer(self.model, x_0, other, t, eps).losses(eps, self._loss).loss  # [B]
        comparable = (valid & (cond.tokens != cond.tokens[order]).any(1)).double()  # [B]
        gain = loss - matched
        meter.add("val_loss_shuffled", loss, comparable)
        meter.add("val_caption_gain", gain, comparable)
        meter.add("val_caption_wins", (gain > 0).double(), comparable)

    def preview(self, batch: Batch, keys: Tensor, name: str) -> dict[str, Tensor]:
        """Samples by the default sampler, below the small pictures of an upsampler; see `Task`."""
        cond, size, rows = Cond(), self._image_size, {}
        if self.model.cfg.cond_text:
            cond = Cond(tokens=batch.tokens, mask=batch.mask)
        if self.model.cfg.small_size:
            low_res = downsample(from_uint8(batch.image, self._dtype), self.model.cfg.small_size)
            cond = replace(cond, low_res=low_res)
            rows["input"] = to_uint8(F.interpolate(low_res, (size, size), mode="nearest"))
        steps = default_steps(
            FAST_SAMPLER,
            image_size=size,
            upsampler=self.model.cfg.small_size > 0,
            num_steps=self._diffusion.num_steps,
        )
        settings = StageSettings(
            sampler=FAST_SAMPLER,
            timestep_respacing=str(steps),
            step_spacing=BEST_SPACING[FAST_SAMPLER],
        )
        with self.precision.autocast():
            rows[name] = sample_stage(
                self.model, self._diffusion, cond, keys, image_size=size, settings=settings
            )
        return rows

    def state_dict(self) -> dict[str, Any]:
        """The memory of a loss-aware timestep sampler."""
        if isinstance(self._timesteps, LossSecondMomentSampler):
            return {"timestep_sampler": self._timesteps.state_dict()}
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; a sampler that is new to the run starts afresh."""
        if isinstance(self._timesteps, LossSecondMomentSampler) and "timestep_sampler" in state:
            self._timesteps.load_state_dict(state["timestep_sampler"])


@dataclass(frozen=True)
class _Answer:
    """What a network answered about x_t, [B,C,H,W] each but t [B]."""

    diffusion: GaussianDiffusion
    output: Tensor
    x_0: Tensor
    x_t: Tensor
    t: Tensor

    def losses(self, eps: Tensor, cfg: LossConfig) -> LossTerms:
        """The loss of each sample that was to find ``eps``."""
        return training_losses(self.diffusion, self.output, self.x_0, self.x_t, self.t, eps, cfg)

    def image_error(self) -> Tensor:
        """[B]."""
        return image_error(self.diffusion, self.output, self.x_0, self.x_t, self.t)


def random_crop(x_0: Tensor, low_res: Tensor, seed: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The same random part of a picture and of its low-resolution input.

    Args:
        x_0: [B,3,H,W].
        low_res: [B,3,h,w], where h divides H.
        seed: int64 [B].
        size: pixels of the crop of ``x_0``, a multiple of H / h.
    Returns:
        [B,3,size,size] and [B,3,size·h/H,size·h/H].
    """
    factor = x_0.shape[2] // low_res.shape[2]
    small = size // factor
    rows, columns = draws.crop_corner(seed, low_res.shape[2] - small + 1)
    low, high = [], []
    corners = torch.stack([rows, columns], dim=1).tolist()  # the device is waited for once
    for number, (row, column) in enumerate(corners):
        low.append(low_res[number, :, row : row + small, column : column + small])
        top, left = row * factor, column * factor
        high.append(x_0[number, :, top : top + size, left : left + size])
    return torch.stack(high), torch.stack(low)


def _check_crop(size: int, model: Generator) -> None:
    """A crop fits an upsampler's picture, its scale factor and its U-Net; others ignore it."""
    if size and model.cfg.small_size:
        image_size = model.unet.cfg.image_size
        unit = math.lcm(image_size // model.cfg.small_size, model.unet.cfg.downsampling)
        must = f"be a multiple of {unit} and at most --image_size {image_size}"
        require(size <= image_size and size % unit == 0, "crop_size", size, must)
        # The places of a whole picture would be squeezed onto every crop, wherever it lies.
        places = model.unet.cfg.attention_positions and size < image_size
        require(not places, "crop_size", size, "be left out with --attention_positions")


def _valid_or_zero(values: Tensor, valid: Tensor) -> Tensor:
    """``values`` [B] where valid; 0, not 0 times whatever, elsewhere."""
    return torch.where(valid, values, torch.zeros_like(values))
