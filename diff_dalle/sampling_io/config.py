"""The knobs of `sample.py`, and how a list of values is spread over the stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from diff_dalle.errors import UsageError
from diff_dalle.knobs import AUTO, knob, require, require_choice
from diff_dalle.sampling_io.edit_config import EditConfig
from diff_dalle.sampling_io.sizes import parse_size

Value = TypeVar("Value")

PerStage = str | float | Sequence[str | float]
"""One value for all stages, or one a stage."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(EditConfig):
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
        0, "number of images, --frames apart; prompts repeat in order (0: one image a prompt)"
    )
    batch_size: int = knob(4, "images sampled at once on each rank; changes memory and speed only")
    sampler: list[str] = knob(
        [AUTO], "ddpm, ddim, dpmpp_2m, dpmpp_2m_sde, unipc, heun or auto (unipc), one a stage"
    )
    steps: list[str] = knob(
        [], "steps to visit, one a stage: 20, ddim25, 10,15,20, smart50 or auto (20, 12, then 6)"
    )
    step_spacing: list[str] = knob(
        [AUTO], "how a number of steps is spread: uniform, quadratic, karras, logsnr or auto"
    )
    timestep_respacing: list[str] = knob(
        [AUTO], "--steps, but evenly spread and, without --sampler, by DDPM: 250, ddim25, 10,15,20"
    )
    use_ddim: bool = knob(False, "DDIM, evenly spread: the older spelling of --sampler ddim")
    ddim_eta: float = knob(0.0, "randomness of DDIM, from 0 (none) to 1")
    clip_denoised: bool = knob(True, "keep each estimate of the picture within [-1, 1]")
    threshold: str = knob(
        AUTO, "how: none, static, dynamic or auto (static, or none without --clip_denoised)"
    )
    threshold_percentile: float = knob(0.995, "share of values that --threshold dynamic keeps")
    threshold_max: float = knob(0.0, "largest value it scales down, 1 or more (0: any)")
    aug_level: list[str] = knob(
        ["0.0"], "noise put on each upsampler's small picture, from 0 to 1, one a stage"
    )
    size: str = knob(
        AUTO, "picture of the last stage in pixels, WIDTHxHEIGHT, or auto (as trained)"
    )
    tile_size: list[str] = knob(
        ["0"], "pixels of the tiles in which an upsampler is asked, one a stage (0: whole pictures)"
    )
    tile_overlap: list[str] = knob(
        [AUTO], "pixels that tiles share at least, one a stage, or auto (a quarter or more)"
    )
    tile_batch: int = knob(1, "tiles an upsampler is asked about at once; memory and speed only")
    low_res: str | None = knob(
        None, "small pictures for an upsampler alone: samples.npz, or shards to scale down"
    )
    rerank: int = knob(1, "draw this many candidates a prompt and keep the noised CLIP's best")
    seed: int = knob(0, "an image is a function of the seed, its index and its prompt")
    seeds: list[int] = knob(
        [], "seeds of single images, one each: every one is the first image of that --seed"
    )
    grid_size: int = knob(512, "side of grid.jpg in pixels; it shows at least one whole image")
    save_png: bool = knob(False, "also write every image as a PNG file")
    log_dir: str | None = knob(
        None, "folder for the results (default: $OPENAI_LOGDIR, else a new temporary folder)"
    )
    device: list[str] = knob([AUTO], "auto, cpu, cuda or cuda:1, one a stage or one for all")
    offload: bool = knob(
        False, "weights wait on the CPU, a device holds one stage at a time: less memory, slower"
    )
    precision: str = knob(AUTO, "fp32, fp16, bf16 or auto; a CPU samples in fp32")
    use_fp16: bool = knob(False, "the same as --precision fp16")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_samples >= 0, "num_samples", self.num_samples, "be 0 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "be 1 or more")
        require(self.tile_batch >= 1, "tile_batch", self.tile_batch, "be 1 or more")
        if self.size != AUTO:
            parse_size(self.size, "size")
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
        self._check_threshold()
        numbers(self.classifier_scale, "classifier_scale")
        numbers(self.guidance_scale, "guidance_scale")
        for phi in numbers(self.guidance_rescale, "guidance_rescale"):
            require(0 <= phi <= 1, "guidance_rescale", phi, "lie between 0 and 1")
        for level in numbers(self.aug_level, "aug_level"):
            require(0 <= level <= 1, "aug_level", level, "lie between 0 and 1")

    def _check_threshold(self) -> None:
        require_choice("threshold", self.threshold, (AUTO, "none", "static", "dynamic"))
        share, most = self.threshold_percentile, self.threshold_max
        require(0 < share <= 1, "threshold_percentile", share, "lie above 0, and be 1 or less")
        require(most == 0 or most >= 1, "threshold_max", most, "be 0 (no bound), or 1 or more")
        clips = self.clip_denoised or self.threshold in (AUTO, "none")
        require(clips, "threshold", self.threshold, "be left out beside --clip_denoised False")
        for name, value, default in (("percentile", share, 0.995), ("max", most, 0.0)):
            read = value == default or self.threshold == "dynamic"
            require(read, f"threshold_{name}", value, "stand beside --threshold dynamic")

    @property
    def resolved_threshold(self) -> str:
        """What keeps estimates in range, whichever of the two flags said so."""
        if self.threshold != AUTO:
            return self.threshold
        return "static" if self.clip_denoised else "none"

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


def as_texts(value: PerStage) -> list[str]:
    """Values as a command line would spell them.

    >>> as_texts(3.0), as_texts(["20", 12])
    (['3.0'], ['20', '12'])
    """
    # numpy's numbers are neither int nor float.
    values = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    return [str(entry) for entry in values]


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


def in_short(values: Sequence[str]) -> str:
    """One value where all stages have the same, else one a stage.

    >>> in_short(["cuda", "cuda"]), in_short(["bf16", "fp32"])
    ('cuda', 'bf16, fp32')
    """
    return values[0] if len(set(values)) == 1 else ", ".join(values)


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
