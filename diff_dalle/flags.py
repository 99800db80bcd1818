"""Command lines and tables to values: flags made from the knobs of dataclasses.

It is the only place that makes flags. ``--preset``, ``--config`` and flags override in that order.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from diff_dalle.errors import UsageError
from diff_dalle.knobs import COMMA_LISTS, Table, knob, nearest
from diff_dalle.presets import PRESETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where values come from before flags override them."""

    preset: str | None = knob(None, "a named recipe; see models_hparams.md")
    config: str | None = knob(None, "YAML table of flags and values, over those of the preset")


class Parser:
    """argparse flags from dataclass fields, through transformers' `HfArgumentParser`."""

    def __init__(
        self,
        sections: Iterable[type],
        *,
        optional: Iterable[type] = (),
        show_help: bool = True,
    ) -> None:
        """Flags for the fields of ``sections``; those of ``optional`` count only where given."""
        from transformers import HfArgumentParser  # 1 s to import, needed by commands only

        class OneLine(HfArgumentParser):
            def error(self, message: str) -> NoReturn:
                raise UsageError(message)

        sections = list(sections)
        taken = {field.name for section in sections for field in dataclasses.fields(section)}
        stated = _merged(optional, without=taken)
        types: list[Any] = [*sections, stated]
        self._parser = OneLine(types, allow_abbrev=False, add_help=show_help)
        # By flag and alias. --help and the --no_flag of a boolean take no value: no keys of a file.
        self._actions = {
            text.removeprefix("--"): action
            for action in self._parser._actions
            if action.nargs != 0
            for text in action.option_strings
        }
        names = {field.name for field in dataclasses.fields(stated)}
        for action in self._parser._actions:  # a boolean has two: --flag and --no_flag
            if action.dest in names:
                action.default = argparse.SUPPRESS

    @property
    def names(self) -> list[str]:
        """The names of all flags, without the dashes."""
        return list(self._actions)

    def set_defaults(self, values: Mapping[str, Any], source: str) -> None:
        """Replace defaults by ``values`` of a preset or a file, refusing unknown keys."""
        for name, value in values.items():
            if name not in self._actions:
                raise UsageError(f"{source} has no such key: {name}{nearest(name, self.names)}")
            action = self._actions[name]
            try:
                default = _as_flag(action, value)
            except (TypeError, ValueError, argparse.ArgumentTypeError) as problem:
                raise UsageError(f"{source}: {name} cannot be {value!r}") from problem
            self._parser.set_defaults(**{action.dest: default})

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """The values of all flags.

        Raises:
            UsageError: an unknown flag (naming the nearest known one) or a wrong value.
        """
        values, unknown = self.parse_known(argv)
        if unknown:
            flag = unknown[0].split("=")[0]
            hint = nearest(flag, [f"--{name}" for name in self.names]) or "; see --help"
            raise UsageError(f"unknown argument {unknown[0]}{hint}")
        return values

    def parse_known(self, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """The values of all flags, and the arguments that are none of them."""
        namespace, unknown = self._parser.parse_known_args(list(argv))
        return vars(namespace), unknown


def parse_with_sources(sections: Sequence[type], argv: Sequence[str], kind: str) -> dict[str, Any]:
    """The values of all flags of ``sections``: defaults, ``--preset``, ``--config``, flags.

    Args:
        sections: dataclasses whose fields are the flags.
        argv: the command line.
        kind: of run that a preset must be for.
    """
    values, _ = Parser([SourceConfig], show_help=False).parse_known(argv)
    source = SourceConfig(**values)
    table = read_config_file(source.config) if source.config else {}
    named = table.pop("preset", None)
    preset = source.preset or named
    parser = Parser([*sections, SourceConfig])
    if preset is not None:
        parser.set_defaults(preset_values(str(preset), kind), str(preset))
    if "config" in table:
        raise UsageError(f"{source.config} names another file under config: put all into one")
    parser.set_defaults(table, str(source.config))
    values = parser.parse(argv)
    return {name: value for name, value in values.items() if name not in ("preset", "config")}


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


def _as_flag(action: argparse.Action, value: Any) -> Any:
    """A file's value as the flag's text would give it: one value alone is a list of one."""
    if value is None and action.default is None:
        return None
    if action.type is Table and callable(action.type):
        return action.type(json.dumps(value))
    several = value if isinstance(value, list | tuple) else [value]
    if any(part is None or isinstance(part, list | tuple | dict) for part in several):
        raise TypeError
    texts = [str(part) for part in several]
    if action.nargs in ("*", "+"):
        return texts
    if action.type not in COMMA_LISTS and several is value:
        raise TypeError
    return action.type(",".join(texts)) if callable(action.type) else value


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
