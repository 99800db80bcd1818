"""The knobs of `sample.py`, and how a list of values is spread over the stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from diff_dalle.errors import UsageError
from diff_dalle.knobs import AUTO, knob, require, require_choice

Value = TypeVar("Value")

# Few steps are enough where a small picture already fixes the composition; the numbers are
# those of GLIDE (Nichol et al. 2021): 100 steps for the base model and 27 for the upsampler.
BASE_STEPS, UPSAMPLER_STEPS = 100, 27


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What to sample, how, and where to write it.

    Lists take one entry a stage, separated by spaces, or one entry for all stages.
    """

    model_path: list[str] = knob(
        [], "checkpoints from the smallest picture to the largest, or a folder that holds them"
    )
    classifier_path: list[str] = knob(
        [], "noised CLIPs that guide, one a stage ('none': no guidance), or one for its own size"
    )
    classifier_scale: list[str] = knob(["1.0"], "strength of the CLIP's gradient, one a stage")
    classifier_interval: list[str] = knob(
        ["all"], "noise levels LOW,HIGH at which the CLIP guides, one a stage"
    )
    classifier_schedule: list[str] = knob(
        ["constant"], "how its strength goes over the steps: constant, linear or cosine"
    )
    contrast: str = knob(
        "none", "captions it tells a prompt from: none, prompts (all of them) or a .txt file"
    )
    guidance_scale: list[str] = knob(
        ["1.0"], "strength of classifier-free guidance, one a stage; 1 is none"
    )
    guidance_interval: list[str] = knob(
        ["all"], "noise levels LOW,HIGH at which there is such guidance, one a stage"
    )
    guidance_schedule: list[str] = knob(
        ["constant"], "how its strength goes over the steps: constant, linear or cosine"
    )
    guidance_rescale: list[str] = knob(
        ["0.0"], "give guided predictions their size back, from 0 (no) to 1, one a stage"
    )
    negative_prompts: list[str] = knob(
        [], "captions it leads away from, one for all pictures or one a prompt ('': none)"
    )
    prompts: list[str] = knob([], "captions to draw, each in quotes")
    data_dir: list[str] = knob(
        [],
        "captions to draw: .txt files (one a line), folders of .txt files, or shards",
        aliases=["index_dir"],
    )
    num_samples: int = knob(
        0, "number of images; the prompts repeat in order (0: one image a prompt)"
    )
    batch_size: int = knob(4, "images sampled at once on each rank; changes memory and speed only")
    timestep_respacing: list[str] = knob(
        [AUTO], "steps to visit, one a stage: 250, ddim25, 10,15,20 or auto (100, then 27)"
    )
    steps: list[str] = knob([], "another spelling of --timestep_respacing")
    use_ddim: bool = knob(False, "DDIM instead of DDPM")
    ddim_eta: float = knob(0.0, "randomness of DDIM, from 0 (none) to 1")
    clip_denoised: bool = knob(True, "keep each estimate of the picture within [-1, 1]")
    aug_level: list[str] = knob(
        ["0.0"], "noise put on each upsampler's small picture, from 0 to 1, one a stage"
    )
    low_res: str | None = knob(
        None, "small pictures for an upsampler alone: samples.npz, or shards to scale down"
    )
    rerank: int = knob(1, "draw this many candidates a prompt and keep the noised CLIP's best")
    seed: int = knob(0, "an image is a function of the seed, its index and its prompt")
    grid_size: int = knob(512, "side of grid.jpg in pixels; it shows at least one whole image")
    save_png: bool = knob(False, "also write every image as a PNG file")
    log_dir: str | None = knob(
        None, "folder for the results (default: $OPENAI_LOGDIR, else a new temporary folder)"
    )
    device: str = knob(AUTO, "auto, cpu or cuda")
    precision: str = knob(AUTO, "fp32, fp16, bf16 or auto; a CPU samples in fp32")
    use_fp16: bool = knob(False, "the same as --precision fp16")

    def __post_init__(self) -> None:
        require(self.num_samples >= 0, "num_samples", self.num_samples, "be 0 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "be 1 or more")
        require(self.rerank >= 1, "rerank", self.rerank, "be 1 (no reranking) or more")
        # 65,500 px is the longest side that a JPEG file can have.
        fits = 1 <= self.grid_size <= 65_500
        require(fits, "grid_size", self.grid_size, "lie between 1 and 65500")
        require(0 <= self.ddim_eta <= 1, "ddim_eta", self.ddim_eta, "lie between 0 and 1")
        require_choice("precision", self.precision, (AUTO, "fp32", "fp16", "bf16"))
        clash = self.use_fp16 and self.precision not in (AUTO, "fp16")
        require(not clash, "precision", self.precision, "be fp16 or auto beside --use_fp16")
        require(
            not (self.prompts and self.data_dir),
            "prompts",
            self.prompts,
            "stand without --data_dir",
        )
        twice = bool(self.steps) and self.timestep_respacing != [AUTO]
        require(not twice, "steps", self.steps, "stand without --timestep_respacing")
        numbers(self.classifier_scale, "classifier_scale")
        numbers(self.guidance_scale, "guidance_scale")
        phis = numbers(self.guidance_rescale, "guidance_rescale")
        require(all(0 <= phi <= 1 for phi in phis), "guidance_rescale", phis, "lie between 0 and 1")
        levels = numbers(self.aug_level, "aug_level")
        require(
            all(0 <= level <= 1 for level in levels), "aug_level", levels, "lie between 0 and 1"
        )

    @property
    def resolved_respacing(self) -> list[str]:
        """The steps to visit, whichever of the two flags named them."""
        return self.steps or self.timestep_respacing

    @property
    def resolved_precision(self) -> str:
        """The precision asked for, whichever of the two flags asked for it."""
        return "fp16" if self.use_fp16 else self.precision


def numbers(texts: Sequence[str | float], name: str) -> list[float]:
    """The finite numbers of a flag that takes one entry a stage.

    Raises:
        UsageError: there is none, or an entry is no finite number.
    """
    require(len(texts) > 0, name, list(texts), "have one number a stage, or one for all")
    values = []
    for text in texts:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        require(math.isfinite(value), name, text, "be a number (lists are separated by spaces)")
        values.append(value)
    return values


def per_stage(values: Sequence[Value], stages: int, name: str) -> list[Value]:
    """One value a stage.

    >>> per_stage([3.0], 3, "guidance_scale")
    [3.0, 3.0, 3.0]

    Raises:
        UsageError: neither one value nor one a stage.
    """
    if len(values) not in (1, stages):
        raise UsageError(
            f"--{name} has {len(values)} entries for {stages} "
            f"{'stage' if stages == 1 else 'stages'}: give one a stage, or one for all"
        )
    return list(values) * (stages if len(values) == 1 else 1)


def resolve_respacing(text: str, *, upsampler: bool, diffusion_steps: int) -> str:
    """The steps to visit, with ``auto`` replaced by the default for the kind of stage.

    >>> resolve_respacing("auto", upsampler=True, diffusion_steps=1000)
    '27'
    """
    if text != AUTO:
        return text
    return str(min(UPSAMPLER_STEPS if upsampler else BASE_STEPS, diffusion_steps))


def split_paths(paths: Sequence[str], exists: Callable[[str], bool]) -> list[str]:
    """Paths as typed, where one entry may also be a comma list.

    >>> split_paths(["a.pt,b.pt"], exists=lambda path: path != "a.pt,b.pt")
    ['a.pt', 'b.pt']
    """
    split: list[str] = []
    for path in paths:
        whole = exists(path) or "," not in path
        split += [path] if whole else [part.strip() for part in path.split(",") if part.strip()]
    return split
