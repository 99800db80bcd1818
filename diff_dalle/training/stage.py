"""One stage of the cascade, sampled: condition and keys in, a uint8 picture out.

Training previews and the cascade both sample through `sample_stage`, so a preview shows what
a user would get. B batch, C channels, H W pixels, L tokens, D width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diff_dalle.diffusion.editing import first_steps, on_sphere
from diff_dalle.diffusion.gaussian import Clip, GaussianDiffusion
from diff_dalle.diffusion.guidance import Guide, Model
from diff_dalle.diffusion.samplers import SAMPLERS, invert_ddim
from diff_dalle.diffusion.strength import EVERYWHERE, step_scales
from diff_dalle.diffusion.thresholding import make_clip
from diff_dalle.errors import UsageError
from diff_dalle.models.generator import Cond, Generator
from diff_dalle.models.low_res import augment, downsample
from diff_dalle.models.tiles import TiledGenerator
from diff_dalle.training.editing import StageEdit
from diff_dalle.training.guided import guided_model

NO_EDIT = StageEdit()
_START, _AUGMENT, _STEP_0 = 0, 1, 2  # noise streams; a step has one of its own


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """How one stage is sampled; the fields carry the names of the flags.

    Attributes:
        sampler: a name of `SAMPLERS`.
        timestep_respacing: which steps of the process to visit; see `space_timesteps`.
        step_spacing: how a number of steps is spread, a name of `SPACINGS`.
        ddim_eta: DDIM's stochasticity, 0 (deterministic) to 1.
        threshold: what keeps each estimate of x_0 in range, a name of `THRESHOLDS`.
        threshold_percentile: see `dynamic_threshold`.
        threshold_max: see `dynamic_threshold`; 0 is no bound.
        guidance_scale: classifier-free guidance (Ho and Salimans 2022); 1 is none.
        guidance_interval: noise levels at which there is guidance, see `parse_interval`.
        guidance_schedule: how its scale varies over the steps, a name of `SCHEDULES`.
        guidance_rescale: how far its predictions get their size back, 0 to 1; see `rescaled`.
        aug_level: noise level in [0, 1] put on the low-resolution input.
        strength: share in (0, 1] of the steps that are taken, see `first_steps`; below 1 they
            start from a given picture, noised.
        variation: share in [0, 1] of fresh noise beside that of a given picture, found by
            inverting DDIM; None starts as ``strength`` says.
        tile_size: pixels a side of the tiles in which an upsampler is asked; 0: the whole picture.
        tile_overlap: pixels that neighbouring tiles share at least; see `TiledGenerator`.
    """

    sampler: str = "ddpm"
    timestep_respacing: str = ""
    step_spacing: str = "uniform"
    ddim_eta: float = 0.0
    threshold: str = "static"
    threshold_percentile: float = 0.995
    threshold_max: float = 0.0
    guidance_scale: float = 1.0
    guidance_interval: str = EVERYWHERE
    guidance_schedule: str = "constant"
    guidance_rescale: float = 0.0
    aug_level: float = 0.0
    strength: float = 1.0
    variation: float | None = None
    tile_size: int = 0
    tile_overlap: int = 0

    def respace(self, diffusion: GaussianDiffusion) -> GaussianDiffusion:
        """The process over the steps that are visited."""
        whole = diffusion.respace(self.timestep_respacing, self.step_spacing)
        return first_steps(whole, self.strength)

    def clip(self) -> Clip:
        """What happens to each estimate of x_0."""
        return make_clip(self.threshold, self.threshold_percentile, self.threshold_max or math.inf)

    def guidance_scales(self, diffusion: GaussianDiffusion) -> Tensor:
        """The scale of classifier-free guidance at each step of the respaced process, [T]."""
        return step_scales(
            diffusion,
            self.guidance_scale,
            unguided=1.0,
            interval=self.guidance_interval,
            schedule=self.guidance_schedule,
        )


def sample_stage(
    generator: Generator,
    diffusion: GaussianDiffusion,
    cond: Cond,
    keys: Tensor,
    *,
    image_size: int | tuple[int, int],
    settings: StageSettings,
    negative: Cond | None = None,
    guide: Guide | None = None,
    tile_batch: int = 1,
    callback: Callable[[int, Tensor], None] | None = None,
    edit: StageEdit = NO_EDIT,
) -> Tensor:
    """Samples one picture a key.

    Args:
        generator: the stage's model; its mode (train or eval) is put back afterwards.
        diffusion: the full process that the generator was trained on; respaced here.
        cond: tokens or encoded text and, for an upsampler, the *clean* small picture in
            ``low_res`` [B,3,h,w] in [-1, 1]; ``aug_level`` is filled in from the settings.
        keys: int64 [B]; all noise of a sample is a function of its key.
        image_size: (H, W) of the picture in pixels; one number for both.
        settings: how to sample.
        negative: what classifier-free guidance leads away from; see `guided_model`.
        guide: (x_t, t [B]) -> gradient of log p(condition | x_t), already scaled. t counts
            the steps of the *respaced* process (`StageSettings.respace`).
        tile_batch: tiles that the model is asked about at once; memory and speed only.
        callback: called after every step as (steps done, estimate of x_0 [B,3,H,W]).
        edit: what to start from and keep. ``strength`` below 1 and ``variation`` need its
            picture.
    Returns:
        uint8 [B,3,H,W].
    Raises:
        UsageError: guidance without captions to drop.
    """
    if settings.guidance_scale != 1 and not generator.cfg.cond_text:
        raise UsageError(
            f"--guidance_scale is {settings.guidance_scale}: this generator was trained without "
            "captions, use 1"
        )
    diffusion = settings.respace(diffusion)
    dtype = next(generator.parameters()).dtype
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    asked: Generator | TiledGenerator = generator
    if settings.tile_size:
        asked = TiledGenerator(
            generator, size, settings.tile_size, settings.tile_overlap, tile_batch
        )

    def noise(stream: int, shape: tuple[int, ...]) -> Tensor:
        return edit.noise(keys, shape, stream).to(dtype)

    with _evaluating(generator), torch.no_grad():
        cond = _augmented(edit.encode(generator, cond), settings.aug_level, noise)
        model = guided_model(
            asked,
            cond,
            negative,
            diffusion,
            settings.guidance_scales(diffusion),
            settings.guidance_rescale,
        )
        fresh = noise(_START, (3, *size))  # [B,3,H,W]
        step_noise = lambda step, x: noise(_STEP_0 + step, tuple(x.shape[1:]))  # noqa: E731
        x_0 = SAMPLERS[settings.sampler](
            model,
            _start(model, fresh, diffusion, settings, edit),
            diffusion,
            noise=step_noise,
            guide=guide,
            clip=edit.clip(settings.clip()),
            callback=callback,
            eta=settings.ddim_eta,
        )
    return to_uint8(x_0)


def _start(
    model: Model,
    fresh: Tensor,
    diffusion: GaussianDiffusion,
    settings: StageSettings,
    edit: StageEdit,
) -> Tensor:
    """Where sampling starts, [B,3,H,W]: from fresh noise, or from a picture with some of it."""
    if settings.variation is None and settings.strength == 1:
        return fresh
    assert edit.picture is not None
    if settings.variation is None:
        last = torch.full((len(fresh),), diffusion.num_steps - 1, device=fresh.device)
        return diffusion.add_noise(edit.picture, last, fresh)
    # Without what is known: its projection would leave no noise to find there.
    inverted = invert_ddim(model, edit.picture, diffusion, clip=settings.clip())
    return on_sphere(inverted, fresh, settings.variation)


def shrink(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [B,3,H,W] -> uint8 [B,3,h,w] as training shrinks; (h, w) at most H and W."""
    if tuple(pictures.shape[2:]) == size:
        return pictures
    return to_uint8(downsample(from_uint8(pictures), size))


def to_uint8(image: Tensor) -> Tensor:
    """[-1, 1] -> uint8 of the same shape, rounded to the nearest and clipped."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(image: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 -> [-1, 1] of the same shape; `to_uint8` undoes it exactly."""
    return image.to(dtype) / 127.5 - 1


def _augmented(cond: Cond, level: float, noise: Callable[[int, tuple[int, ...]], Tensor]) -> Cond:
    """The low-resolution input noised to ``level``, which the model is told (Ho et al. 2022)."""
    if cond.low_res is None:
        return cond
    low_res = cond.low_res  # [B,3,h,w]
    levels = torch.full((len(low_res),), level, dtype=low_res.dtype, device=low_res.device)  # [B]
    low_res = augment(low_res, levels, noise(_AUGMENT, tuple(low_res.shape[1:])))
    return dataclasses.replace(cond, low_res=low_res, aug_level=levels)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside; the module's mode is put back afterwards."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
