"""What a program may set where it samples: every entry is optional and means what its flag does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict, get_type_hints

from diff_dalle.knobs import nearest
from diff_dalle.sampling_io.config import PerStage, SampleConfig, as_texts


class SampleSettings(TypedDict, total=False):
    """How `Cascade.sample` and `Cascade.stream` sample; what is left out is as the flags' default.

    Attributes:
        seed: of all noise; 0 if left out.
        seeds: of single pictures, one each: every one is the first picture of that ``seed``.
        guidance_scale: of classifier-free guidance; 1 is none.
        guidance_interval: noise levels at which there is such guidance, "0.3,5" or "all".
        guidance_schedule: how it goes over the steps: "constant", "linear" or "cosine".
        guidance_rescale: give guided predictions their size back, 0 (no) to 1.
        negative_prompts: captions that it leads away from, one for all or one a prompt; a blank
            one is none.
        classifier_scale: of the noised CLIP's gradient, 1 if left out; 0 is none.
        classifier_interval: as ``guidance_interval``, of the CLIP.
        classifier_schedule: as ``guidance_schedule``, of the CLIP.
        contrast: captions that the CLIP tells a prompt from: "none", "prompts" (all of these) or
            a text file with one a line.
        sampler: a name of `SAMPLERS`, or "auto".
        steps: as the flag ``--steps``: 20, "ddim25", "smart50", "auto", ...
        step_spacing: how a number of steps is spread: a name of `SPACINGS`, or "auto".
        use_ddim: the older spelling of DDIM, with evenly spaced steps.
        ddim_eta: DDIM's randomness, 0 to 1.
        clip_denoised: keep estimates of x_0 within [-1, 1]; True if left out.
        threshold: how, a name of `THRESHOLDS`; "auto" is as ``clip_denoised`` says.
        threshold_percentile: of the dynamic threshold, in (0, 1].
        threshold_max: its bound, 1 or more; 0 is none.
        aug_level: noise on each upsampler's small picture, 0 to 1.
        rerank: candidates a prompt, of which the first stage's noised CLIP chooses.
        batch_size: pictures drawn at once by `Cascade.sample`; 4 if left out.
        size: of the last stage's pictures, "WIDTHxHEIGHT" or one side; "auto": as trained.
        tile_size: pixels of the tiles in which an upsampler is asked; 0: whole pictures.
        tile_overlap: pixels that tiles share at least; "auto": a quarter or more.
        tile_batch: tiles that an upsampler is asked about at once.
    """

    seed: int
    seeds: Sequence[int]
    guidance_scale: PerStage
    guidance_interval: PerStage
    guidance_schedule: PerStage
    guidance_rescale: PerStage
    negative_prompts: str | Sequence[str]
    classifier_scale: PerStage
    classifier_interval: PerStage
    classifier_schedule: PerStage
    contrast: str
    sampler: str | Sequence[str]
    steps: PerStage
    step_spacing: str | Sequence[str]
    use_ddim: bool
    ddim_eta: float
    clip_denoised: bool
    threshold: str
    threshold_percentile: float
    threshold_max: float
    aug_level: PerStage
    rerank: int
    batch_size: int
    size: str | int
    tile_size: PerStage
    tile_overlap: PerStage
    tile_batch: int


def as_flags(settings: SampleSettings) -> SampleConfig:
    """The flags that say the same.

    >>> as_flags({"steps": 20, "size": 96}).steps, as_flags({"size": 96}).size
    (['20'], '96')

    Raises:
        TypeError: an entry that is no setting.
        UsageError: a value that its flag would refuse.
    """
    known = SampleSettings.__annotations__
    for name in settings:
        if name not in known:
            raise TypeError(f"{name!r} is no setting of a cascade{nearest(name, known)}")
    hints = get_type_hints(SampleConfig)
    flags: dict[str, Any] = {}
    for name, value in settings.items():
        if hints[name] == list[str]:
            flags[name] = as_texts(value)  # type: ignore[arg-type]
        elif hints[name] == list[int]:
            flags[name] = list(value)  # type: ignore[call-overload]
        else:
            flags[name] = str(value) if hints[name] is str else value
    return SampleConfig(**flags)
