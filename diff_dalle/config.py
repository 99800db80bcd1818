"""Run configurations: what a command was asked to do, as one object.

A knob is a field of the dataclass above the class that reads it. This module composes those
dataclasses into runs, makes their flags, and turns a run into the flat dictionary that
checkpoints and ``config.json`` carry and back. ``--preset``, ``--config`` and flags override
in that order. It is the only place that makes flags.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from diff_dalle.data.dataset import DataConfig
from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.losses import LossConfig
from diff_dalle.diffusion.schedule import ProcessConfig, Schedule
from diff_dalle.errors import UsageError
from diff_dalle.knobs import Floats, Ints, nearest, require
from diff_dalle.models.clip import CLIPConfig, NoisyCLIP
from diff_dalle.models.generator import Generator, GeneratorConfig
from diff_dalle.models.text import TextEncoderConfig
from diff_dalle.models.unet import UNetConfig
from diff_dalle.presets import PRESETS
from diff_dalle.sampling_io.config import SampleConfig
from diff_dalle.training.classifier_task import ClassifierTaskConfig
from diff_dalle.training.generator_task import GeneratorTaskConfig
from diff_dalle.training.optim import OptimConfig
from diff_dalle.training.precision import PrecisionConfig
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
    data: DataConfig
    task: GeneratorTaskConfig
    optim: OptimConfig
    precision: PrecisionConfig
    train: TrainConfig

    kind = "generator"

    def __post_init__(self) -> None:
        small, large = self.generator.small_size, self.unet.image_size
        fits = small == 0 or (0 < small < large and large % small == 0)
        require(fits, "small_size", small, f"divide --image_size {large} and be smaller")
        residual = self.generator.low_res_residual
        sensible = not residual or (small > 0 and self.process.resolved_prediction == "x0")
        must = "go with an upsampler (--small_size) and --prediction x0"
        require(sensible, "low_res_residual", residual, must)

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
    process: ProcessConfig
    loss: LossConfig
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

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the images that the CLIP sees."""
        return self.clip.image_size

    @property
    def captions(self) -> TextEncoderConfig:
        """What reads the captions."""
        return self.clip.text_half()


Run = TypeVar("Run", GeneratorRun, ClassifierRun)
Section = TypeVar("Section")

# What shapes weights or the noise process: it must agree wherever it is stated twice.
_RUN_TIME = {"dropout", "dropout_text", "use_checkpoint", "vocab_size", "sigma_small"}
_SHAPING = (UNetConfig, TextEncoderConfig, GeneratorConfig, ProcessConfig, CLIPConfig)


def shaping_fields() -> set[str]:
    """The flags that shape weights or the noise process."""
    names = {field.name for section in _SHAPING for field in dataclasses.fields(section)}
    return names - _RUN_TIME


class Parser:
    """argparse flags from dataclass fields, through transformers' `HfArgumentParser`."""

    def __init__(self, sections: Iterable[type], *, optional: Iterable[type] = ()):
        """Flags for the fields of ``sections``; those of ``optional`` count only where given."""
        from transformers import HfArgumentParser  # 1 s to import, needed by commands only

        class OneLine(HfArgumentParser):
            def error(self, message: str) -> NoReturn:
                raise UsageError(message)

        sections = list(sections)
        taken = {field.name for section in sections for field in dataclasses.fields(section)}
        stated = _merged(optional, without=taken)
        types: list[Any] = [*sections, stated]
        self._parser = OneLine(types, allow_abbrev=False)
        self._actions = {action.dest: action for action in self._parser._actions}
        names = {field.name for field in dataclasses.fields(stated)}
        for action in self._parser._actions:  # a boolean has two: --flag and --no_flag
            if action.dest in names:
                action.default = argparse.SUPPRESS

    @property
    def names(self) -> list[str]:
        """The names of all flags, without the dashes."""
        flags = [text for action in self._actions.values() for text in action.option_strings]
        return [text[2:] for text in flags if text.startswith("--")]

    def set_defaults(self, values: Mapping[str, Any], source: str) -> None:
        """Replace defaults by ``values`` of a preset or a file, refusing unknown keys."""
        for name, value in values.items():
            if name not in self._actions:
                raise UsageError(f"{source} has no such key: {name}{nearest(name, self.names)}")
            action = self._actions[name]
            if isinstance(value, str) and callable(action.type):
                value = action.type(value)
            self._parser.set_defaults(**{name: value})

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """The values of all flags.

        Raises:
            UsageError: an unknown flag (naming the nearest known one) or a wrong value.
        """
        values, unknown = self.parse_known(argv)
        if unknown:
            flag = unknown[0].split("=")[0]
            matches = difflib.get_close_matches(flag, [f"--{n}" for n in self.names], n=1)
            hint = f"; did you mean {matches[0]}?" if matches else "; see --help"
            raise UsageError(f"unknown argument {unknown[0]}{hint}")
        return values

    def parse_known(self, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """The values of all flags, and the arguments that are none of them."""
        namespace, unknown = self._parser.parse_known_args(list(argv))
        return vars(namespace), unknown


def parse_run(run_class: type[Run], argv: Sequence[str]) -> Run:
    """The run that a command line asks for: defaults, ``--preset``, ``--config``, flags."""
    source = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    source.add_argument("--preset")
    source.add_argument("--config")
    chosen, rest = source.parse_known_args(list(argv))
    parser = Parser(_sections(run_class).values())
    if chosen.preset is not None:
        parser.set_defaults(preset_values(chosen.preset, run_class.kind), chosen.preset)
    if chosen.config is not None:
        parser.set_defaults(read_config_file(chosen.config), chosen.config)
    return from_flat(run_class, parser.parse(rest))


def parse_section(section: type[Section], argv: Sequence[str]) -> Section:
    """One configuration class from a command line of its flags alone."""
    return section(**Parser([section]).parse(argv))


def parse_section_and_run(
    section: type[Section], run_class: type[Run], argv: Sequence[str]
) -> tuple[Section, Run]:
    """A configuration class of a command's own, and the run that the other flags describe."""
    values, rest = Parser([section]).parse_known(argv)
    return section(**values), parse_run(run_class, rest)


def preset_values(name: str, kind: str) -> dict[str, Any]:
    """The flags of a preset, which must be one for this kind of run."""
    names = [preset for preset, (owner, _) in PRESETS.items() if owner == kind]
    if name not in names:
        hint = nearest(name, names) or f"; there are {', '.join(names)}"
        raise UsageError(f"--preset {name} is no {kind} preset{hint}")
    return dict(PRESETS[name][1])


def read_config_file(path: str) -> dict[str, Any]:
    """The flat table of flag names and values in a YAML file."""
    import yaml

    try:
        table = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as problem:
        reason = str(problem).splitlines()[0]
        raise UsageError(f"--config {path} cannot be read: {reason}") from problem
    if not isinstance(table, dict):
        raise UsageError(f"--config {path} must be a table of flag names and values")
    return {str(name): value for name, value in table.items()}


def to_flat(run: GeneratorRun | ClassifierRun) -> dict[str, Any]:
    """Flag names and values of a run, ready for JSON."""
    flat: dict[str, Any] = {"kind": run.kind}
    for section in dataclasses.fields(run):
        for field in dataclasses.fields(getattr(run, section.name)):
            value = getattr(getattr(run, section.name), field.name)
            flat[field.name] = list(value) if isinstance(value, tuple) else value
    return flat


def from_flat(run_class: type[Run], flat: Mapping[str, Any]) -> Run:
    """The run of a flat dictionary; what it does not name has its default.

    Raises:
        UsageError: a key that no section knows, or a value that a section refuses.
    """
    left = {name: value for name, value in flat.items() if name not in ("kind", "help")}
    sections = {}
    for name, section in _sections(run_class).items():
        own = [field.name for field in dataclasses.fields(section)]
        values = {key: left.pop(key) for key in own if key in left}
        tuples = _tuple_fields(section)
        for key, value in values.items():
            values[key] = tuple(value) if key in tuples else value
        sections[name] = section(**values)
    if left:
        raise UsageError(
            f"the configuration has keys unknown to this version: {', '.join(sorted(left)[:5])}"
        )
    return run_class(**sections)


def make_diffusion(run: GeneratorRun | ClassifierRun) -> GaussianDiffusion:
    """The noise process that a run trains on."""
    if isinstance(run, GeneratorRun):
        learned = run.generator.learn_sigma
    else:
        learned = False
    fixed = "fixed_small" if run.process.sigma_small else "fixed_large"
    return GaussianDiffusion(
        Schedule.make(run.process.resolve(run.image_size), run.process.diffusion_steps),
        prediction=run.process.resolved_prediction,
        variance="learned_range" if learned else fixed,
        rescale_timesteps=run.process.rescale_timesteps,
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
    """What checkpoints and the run folder remember of a run.

    The noise schedule is remembered by name, so that ``auto`` and the name it stands for agree.
    """
    schedule = run.process.resolve(run.image_size)
    return RunRecord(
        config={**to_flat(run), "noise_schedule": schedule},
        shaping=frozenset(shaping_fields()),
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
    own = {field.name for field in dataclasses.fields(SampleConfig)}
    values = Parser([SampleConfig], optional=_SHAPING).parse(argv)
    sample = SampleConfig(**{name: value for name, value in values.items() if name in own})
    stated = {name: value for name, value in values.items() if name not in own}
    return SampleRun(sample=sample, stated=stated)


def _sections(run_class: type) -> dict[str, type]:
    hints = typing.get_type_hints(run_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(run_class)}


def _merged(sections: Iterable[type], without: set[str]) -> type:
    """One dataclass with the fields of several, each name once."""
    fields: dict[str, tuple[str, Any, Any]] = {}
    for section in sections:
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            if field.name not in without:
                copy = dataclasses.field(default=field.default, metadata=field.metadata)
                fields.setdefault(field.name, (field.name, hints[field.name], copy))
    return dataclasses.make_dataclass("Stated", list(fields.values()), kw_only=True)


def _tuple_fields(section: type) -> set[str]:
    """The fields that JSON and YAML turn into lists."""
    hints = typing.get_type_hints(section)
    return {name for name, hint in hints.items() if hint in (Floats, Ints)}
