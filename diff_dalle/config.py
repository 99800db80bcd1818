"""Run configurations: what a command was asked to do, as one object.

A knob is a field of the dataclass above the class that reads it. This module composes those
dataclasses into runs, and turns a run into the flat dictionary that checkpoints and
``config.json`` carry and back.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from diff_dalle.data.dataset import DataConfig
from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.losses import UNIFORM, LossConfig
from diff_dalle.diffusion.schedule import NoiseConfig, ProcessConfig, Schedule
from diff_dalle.diffusion.timesteps import UNIFORM_SHARES, TimestepConfig
from diff_dalle.errors import UsageError
from diff_dalle.flags import Parser, parse_with_sources
from diff_dalle.knobs import COMMA_LISTS, require
from diff_dalle.models.clip import CLIPConfig, NoisyCLIP
from diff_dalle.models.generator import Generator, GeneratorConfig, check_sizes
from diff_dalle.models.text import TextEncoderConfig
from diff_dalle.models.unet_config import UNetConfig
from diff_dalle.sampling_io.config import SampleConfig
from diff_dalle.training.classifier_task import ClassifierTaskConfig
from diff_dalle.training.generator_task import GeneratorTaskConfig
from diff_dalle.training.optim import OptimConfig
from diff_dalle.training.precision import PrecisionConfig
from diff_dalle.training.previews import PreviewConfig
from diff_dalle.training.resume import RunRecord
from diff_dalle.training.run_data import RunData
from diff_dalle.training.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class GeneratorRun:
    """Everything that training a generator was asked for."""

    unet: UNetConfig
    text: TextEncoderConfig
    generator: GeneratorConfig
    process: ProcessConfig
    loss: LossConfig
    timesteps: TimestepConfig
    data: DataConfig
    task: GeneratorTaskConfig
    optim: OptimConfig
    precision: PrecisionConfig
    train: TrainConfig
    previews: PreviewConfig

    kind = "generator"

    def __post_init__(self) -> None:
        check_sizes(self.generator, self.unet)
        residual, upsampler = self.generator.low_res_residual, self.generator.small_size > 0
        sensible = not residual or (upsampler and self.process.resolved_prediction == "x0")
        must = "go with an upsampler (--small_size) and --prediction x0"
        require(sensible, "low_res_residual", residual, must)
        _check_objective(self.process, self.loss, self.timesteps, self.task)
        _check_rate(self.optim, self.train)

    @property
    def image_size(self) -> int:
        """Height and width in pixels of what the generator makes."""
        return self.unet.image_size

    @property
    def captions(self) -> TextEncoderConfig | None:
        """What reads the captions; None for a run without them."""
        return self.text if self.generator.cond_text else None


@dataclass(frozen=True, kw_only=True)
class ClassifierRun:
    """Everything that training a noised CLIP was asked for."""

    clip: CLIPConfig
    process: NoiseConfig
    timesteps: TimestepConfig
    data: DataConfig
    task: ClassifierTaskConfig
    optim: OptimConfig
    precision: PrecisionConfig
    train: TrainConfig

    kind = "classifier"

    def __post_init__(self) -> None:
        stop = self.task.stop_early
        must = "go with --val_data_dir: it counts evaluations of held-out data"
        require(stop == 0 or bool(self.data.val_data_dir), "stop_early", stop, must)
        _check_rate(self.optim, self.train)

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the images that the CLIP sees."""
        return self.clip.image_size

    @property
    def captions(self) -> TextEncoderConfig:
        """What reads the captions."""
        return self.clip.text_half()


def _check_objective(
    process: ProcessConfig,
    loss: LossConfig,
    timesteps: TimestepConfig,
    task: GeneratorTaskConfig,
) -> None:
    """Refuse parts of an objective that undo each other."""
    untrained = process.zero_terminal_snr and loss.loss_weighting != UNIFORM
    must = "be uniform with --zero_terminal_snr: others give the last step, noise alone, weight 0"
    require(not untrained, "loss_weighting", loss.loss_weighting, must)
    share = UNIFORM_SHARES.get(timesteps.schedule_sampler)
    if process.zero_terminal_snr and share:
        must = "be above 0 with --zero_terminal_snr: else the last step is never drawn"
        require(getattr(timesteps, share) > 0, share, getattr(timesteps, share), must)
    aimless = loss.use_kl and task.input_perturbation > 0
    must = "be 0 with --use_kl: the bound of a noisier x_t asks for all of its noise"
    require(not aimless, "input_perturbation", task.input_perturbation, must)


def _check_rate(optim: OptimConfig, train: TrainConfig) -> None:
    """Refuse to train on at a rate of 0."""
    last = optim.lr_anneal_steps
    must = f"reach --iterations: the rate would be 0 from there on (or give --iterations {last})"
    require(last == 0 or last >= train.iterations, "lr_anneal_steps", last, must)


Run = TypeVar("Run", GeneratorRun, ClassifierRun)
Section = TypeVar("Section")

# What shapes weights or the noise process: it must agree wherever it is stated twice.
_RUN_TIME = {"dropout", "dropout_text", "use_checkpoint", "vocab_size"}
_SHAPING = (UNetConfig, TextEncoderConfig, GeneratorConfig, ProcessConfig, CLIPConfig)

# By kind of run: flags that nothing read; checkpoints from when they were taken still carry them.
_RETIRED: dict[str, tuple[str, ...]] = {
    "classifier": (
        "prediction",
        "predict_xstart",
        "sigma_small",
        "use_kl",
        "rescale_learned_sigmas",
        "sample_interval",
        "num_preview",
        "validation_prompts",
    )
}


def shaping_fields() -> set[str]:
    """The flags that shape weights or the noise process."""
    names = {field.name for section in _SHAPING for field in dataclasses.fields(section)}
    return names - _RUN_TIME


def parse_run(run_class: type[Run], argv: Sequence[str]) -> Run:
    """The run that a command line asks for: defaults, ``--preset``, ``--config``, flags."""
    sections = list(_sections(run_class).values())
    return from_flat(run_class, parse_with_sources(sections, argv, run_class.kind))


def parse_section_and_run(
    section: type[Section], run_class: type[Run], argv: Sequence[str]
) -> tuple[Section, Run]:
    """A configuration class of a command's own, and the run that the other flags describe."""
    values, rest = Parser([section]).parse_known(argv)
    return section(**values), parse_run(run_class, rest)


def to_flat(run: GeneratorRun | ClassifierRun) -> dict[str, Any]:
    """Flag names and values of a run, ready for JSON."""
    flat: dict[str, Any] = {"kind": run.kind}
    for section in dataclasses.fields(run):
        for field in dataclasses.fields(getattr(run, section.name)):
            value = getattr(getattr(run, section.name), field.name)
            flat[field.name] = list(value) if isinstance(value, tuple) else value
    return flat


def from_flat(run_class: type[Run], flat: Mapping[str, Any]) -> Run:
    """The run of a flat dictionary, in its `canonical` spelling; defaults for what is not named.

    Raises:
        UsageError: a key that no section knows, or a value that a section refuses.
    """
    past = ("kind",) + _RETIRED.get(run_class.kind, ())
    left = {name: value for name, value in flat.items() if name not in past}
    sections = {}
    for name, section in _sections(run_class).items():
        own = [field.name for field in dataclasses.fields(section)]
        values = {key: left.pop(key) for key in own if key in left}
        tuples = _tuple_fields(section)
        for key, value in values.items():
            listed = key in tuples and isinstance(value, list)
            values[key] = tuple(value) if listed else value
        sections[name] = section(**values)
    if left:
        raise UsageError(
            f"the configuration has keys unknown to this version: {', '.join(sorted(left)[:5])}"
        )
    return canonical(run_class(**sections))


def canonical(run: Run) -> Run:
    """The same run with one spelling for what can be asked for in several ways."""
    schedule = run.process.resolve(run.image_size)
    if isinstance(run, GeneratorRun):
        process = dataclasses.replace(
            run.process,
            noise_schedule=schedule,
            prediction=run.process.resolved_prediction,
            predict_xstart=False,
        )
        unet = run.unet.canonical(upsampler=run.generator.small_size > 0)
        return dataclasses.replace(run, process=process, unet=unet)
    mult = run.clip.image_half().resolved_channel_mult
    clip = dataclasses.replace(run.clip, classifier_channel_mult=mult)
    noise = dataclasses.replace(run.process, noise_schedule=schedule)
    return dataclasses.replace(run, process=noise, clip=clip)


def make_diffusion(run: GeneratorRun | ClassifierRun) -> GaussianDiffusion:
    """The noise process that a run trains on."""
    schedule = Schedule.make(
        run.process.noise_schedule,
        run.process.diffusion_steps,
        shift=run.process.schedule_shift,
        zero_terminal_snr=run.process.zero_terminal_snr,
    )
    rescale = run.process.rescale_timesteps
    if isinstance(run, ClassifierRun):  # it sees noise, and predicts nothing
        return GaussianDiffusion(schedule, prediction="x0", rescale_timesteps=rescale)
    fixed = "fixed_small" if run.process.sigma_small else "fixed_large"
    return GaussianDiffusion(
        schedule,
        prediction=run.process.prediction,
        variance="learned_range" if run.generator.learn_sigma else fixed,
        rescale_timesteps=rescale,
        sigma_data=run.process.sigma_data,
    )


def make_generator(run: GeneratorRun) -> Generator:
    """A generator with fresh weights, which follow from the run's seed."""
    torch.manual_seed(run.train.seed)
    return Generator(run.generator, run.unet, run.text)


def make_classifier(run: ClassifierRun) -> NoisyCLIP:
    """A noised CLIP with fresh weights, which follow from the run's seed."""
    torch.manual_seed(run.train.seed)
    return NoisyCLIP(run.clip)


def make_record(run: GeneratorRun | ClassifierRun, data: RunData) -> RunRecord:
    """What checkpoints and the run folder remember of a run."""
    return RunRecord(
        config=to_flat(run),
        defaults=_defaults(type(run)),
        shaping=frozenset(shaping_fields()),
        process=frozenset(field.name for field in dataclasses.fields(ProcessConfig)),
        tokenizer_json=data.tokenizer.to_json() if data.tokenizer else None,
        data=data.fingerprint,
    )


def with_vocabulary(run: Run, data: RunData) -> Run:
    """The same run with the text encoder's vocabulary set to the tokenizer's size."""
    vocab_size = data.tokenizer.vocab_size if data.tokenizer else 0
    if isinstance(run, GeneratorRun):
        text = dataclasses.replace(run.text, vocab_size=vocab_size)
        return dataclasses.replace(run, text=text)
    clip = dataclasses.replace(run.clip, vocab_size=vocab_size)
    return dataclasses.replace(run, clip=clip)


@dataclass(frozen=True, kw_only=True)
class SampleRun:
    """What sampling was asked for, and the architecture flags that were stated all the same."""

    sample: SampleConfig
    stated: dict[str, Any]


def parse_sample_run(argv: Sequence[str]) -> SampleRun:
    """The run that a command line of ``sample.py`` asks for."""
    sample, stated = parse_with_stated(SampleConfig, argv)
    return SampleRun(sample=sample, stated=stated)


def parse_with_stated(
    section: type[Section], argv: Sequence[str]
) -> tuple[Section, dict[str, Any]]:
    """A configuration class of a command's own, and the architecture flags stated all the same.

    They are for `loading.check_stated`.
    """
    own = {field.name for field in dataclasses.fields(section)}  # type: ignore[arg-type]
    # What the loss was is stated by habit, and changes nothing once the weights are there.
    values = Parser([section], optional=(*_SHAPING, LossConfig)).parse(argv)
    stated = {name: value for name, value in values.items() if name not in own}
    return section(**{name: value for name, value in values.items() if name in own}), stated


def _defaults(run_class: type) -> dict[str, Any]:
    """The default of every flag, as `to_flat` writes it."""
    return {
        field.name: list(field.default) if isinstance(field.default, tuple) else field.default
        for section in _sections(run_class).values()
        for field in dataclasses.fields(section)
        if field.default is not dataclasses.MISSING
    }


def _sections(run_class: type) -> dict[str, type]:
    hints = typing.get_type_hints(run_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(run_class)}


def _tuple_fields(section: type) -> set[str]:
    """The fields whose tuples JSON and YAML turn into lists."""
    hints = typing.get_type_hints(section)
    return {name for name, hint in hints.items() if hint in COMMA_LISTS}
