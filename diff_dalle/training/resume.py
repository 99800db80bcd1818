"""Where a run begins: fresh, from weights, or exactly where it was interrupted.

The run folder is guarded here too: one folder holds one run, and going on with it must not
silently change what is learned.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diff_dalle.distributed import World, barrier, broadcast_object
from diff_dalle.errors import UsageError
from diff_dalle.knobs import AUTO
from diff_dalle.training.checkpoint_file import Checkpoint, load_weights, parse_name
from diff_dalle.training.checkpoints import (
    TrainingState,
    complete_steps,
    differences,
    find_latest,
    load_latest,
    load_training_state,
    saved_steps,
)
from diff_dalle.training.files import write_whole
from diff_dalle.training.train_config import TrainConfig

CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer.json"
_SHOWN = 5
_RUN_FILES = ("progress.csv", "metrics.jsonl", "model*.pt", "ema_*.pt", "opt*.pt")
_TOKENIZER, _DATA = "tokenizer_sha256", "data"
_RESIZED = {  # what may differ where weights start a run of another size
    "image_size",
    "small_size",
    "attention_resolutions",
    "classifier_attention_resolutions",
}
_FIXED = ("seed", "ema_rate", "max_train_samples")  # beside what shapes weights and process


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run is, as its checkpoints and its folder remember it.

    Attributes:
        config: flag names and values, with ``kind``; plain values only.
        shaping: the flags that shape weights or the noise process.
        process: those of them that shape the noise process alone.
        tokenizer_json: the tokenizer's text; None for a run without captions.
        data: the training set's fingerprint.
        defaults: of all flags: what a run did whose version did not know a flag yet.
    """

    config: dict[str, Any]
    shaping: frozenset[str]
    process: frozenset[str]
    tokenizer_json: str | None
    data: str
    defaults: dict[str, Any]

    @property
    def kind(self) -> str:
        """``generator`` or ``classifier``."""
        return str(self.config["kind"])

    @property
    def fixed(self) -> list[str]:
        """What may not change when a run goes on; see `described`."""
        return [*sorted(self.shaping & self.config.keys()), *_FIXED, _TOKENIZER, _DATA]

    def described(self) -> dict[str, Any]:
        """The flags, the tokenizer's hash and the data: what ``config.json`` holds."""
        return _described(self.config, self.tokenizer_json, self.data)

    def changed(self, saved: Mapping[str, Any], fields: Collection[str]) -> list[str]:
        """One text for each of ``fields`` in which this run differs from a described one."""
        return differences({**self.defaults, **saved}, self.described(), fields)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins; at most one of ``state`` and ``weights`` is there.

    Attributes:
        step: updates already made.
        state: everything to go on from exactly.
        weights: weights to start from, with a fresh optimizer.
        notes: what the user should know, one line each.
    """

    step: int = 0
    state: TrainingState | None = None
    weights: Checkpoint | None = None
    notes: tuple[str, ...] = ()


def named_folder(cfg: TrainConfig) -> Path | None:
    """The run folder that was asked for: ``--log_dir``, else ``$OPENAI_LOGDIR``."""
    name = cfg.log_dir or os.environ.get("OPENAI_LOGDIR")
    return Path(name) if name else None


def choose_folder(cfg: TrainConfig, world: World) -> Path:
    """The run folder that was asked for, else a fresh temporary one, the same on all ranks."""
    named = named_folder(cfg)
    if named is not None:
        return named
    fresh = tempfile.mkdtemp(prefix="diff_dalle-") if world.is_main else ""
    return Path(broadcast_object(fresh, world))


def find_start(
    cfg: TrainConfig, record: RunRecord, folder: Path, warn: Callable[[str], None]
) -> Start:
    """Decide where the run in ``folder`` begins; nothing is written.

    Args:
        cfg: names the checkpoint to go on from, if any.
        record: the run that was asked for.
        folder: the run folder, which may not exist yet.
        warn: told in one line about a damaged checkpoint that was passed over.
    Raises:
        UsageError: the folder holds another run, or the checkpoint does not fit this one.
    """
    check_folder(folder, record)
    wanted = cfg.resume_checkpoint
    if wanted == AUTO or (saved_steps(folder) and wanted == _last_asked(folder)):
        state = load_latest(folder, warn)
        return _exact(state, record) if state else _fresh(cfg, record)
    if wanted in ("", "none"):
        start = _fresh(cfg, record)
    else:
        start = _explicit(Path(wanted), record, warn)
    latest = find_latest(folder)
    if latest is not None and latest > start.step:
        raise UsageError(
            f"{folder} already holds step {latest}, beyond step {start.step}: "
            f"give --resume_checkpoint auto to go on, or --log_dir {_subfolder(folder, 'again')}"
        )
    return start


def _last_asked(folder: Path) -> str | None:
    """The ``--resume_checkpoint`` with which the run in a folder was last started.

    Given once more, it is the same command after an interruption: the run goes on.
    """
    with contextlib.suppress(OSError, ValueError):
        asked = json.loads((folder / CONFIG_FILE).read_bytes()).get("resume_checkpoint")
        return str(asked) if asked not in ("", "none") else None
    return None


def holds_run(folder: Path) -> bool:
    """Whether a folder is that of a run, of whatever kind."""
    return (folder / CONFIG_FILE).exists()


def check_folder(folder: Path, record: RunRecord) -> None:
    """Refuse a folder that holds another run.

    Raises:
        UsageError: lists up to five fields that differ, saved -> given, and another folder.
    """
    path = folder / CONFIG_FILE
    if not holds_run(folder):
        _refuse_foreign(folder)
        return
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        kind = saved["kind"]
    except (ValueError, KeyError, TypeError) as problem:
        raise UsageError(
            f"{path} is no configuration of a run: give --log_dir {_subfolder(folder, 'run')}"
        ) from problem
    if kind != record.kind:
        raise UsageError(
            f"{folder} holds a {kind} run, this is a {record.kind} run: "
            f"give --log_dir {_subfolder(folder, record.kind)}"
        )
    if not saved_steps(folder):
        return  # it never came to a checkpoint: nothing would be continued otherwise than begun
    found = record.changed(saved, record.fixed)
    _refuse(found, f"{folder} holds a run", f"--log_dir {_subfolder(folder, 'again')}")


def _refuse_foreign(folder: Path) -> None:
    """What another program left must not be overwritten: its logs and weights have our names."""
    if saved_steps(folder):
        return  # our checkpoints tell what the run was
    theirs = [path.name for pattern in _RUN_FILES for path in sorted(folder.glob(pattern))]
    if theirs:
        raise UsageError(
            f"{folder} holds {theirs[0]} but no config.json, so it is no run of ours: "
            f"give --log_dir {_subfolder(folder, 'run')}"
        )


def open_folder(folder: Path, record: RunRecord, world: World) -> None:
    """Make the run folder and write ``config.json`` and the tokenizer (a collective).

    Every rank has checked the folder by then, and none goes on before the files are there.
    """
    barrier(world)
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record.described(), indent=1, ensure_ascii=False) + "\n"
        _write(folder / CONFIG_FILE, text)
        if record.tokenizer_json is not None:
            _write(folder / TOKENIZER_FILE, record.tokenizer_json)
    barrier(world)


def _write(path: Path, text: str) -> None:
    write_whole(path, text.encode("utf-8", "surrogatepass"))


def _fresh(cfg: TrainConfig, record: RunRecord) -> Start:
    if cfg.init_checkpoint is None:
        return Start()
    weights = load_weights(cfg.init_checkpoint, kind=record.kind)
    known = record.shaping & record.config.keys()
    # Heads, say, leave no trace in the shapes: the weights would load, and compute nonsense.
    found = record.changed(weights.config, sorted(known - record.process - _RESIZED))
    _refuse(found, f"{weights.path} is of a model", "another --init_checkpoint")
    _require_tokenizer(weights, record)
    changed = record.changed(weights.config, sorted(known & (record.process | _RESIZED)))
    notes = [f"weights from {cfg.init_checkpoint}, at step 0"]
    notes += [f"NOTE: they were trained otherwise: {', '.join(changed)}"] if changed else []
    return Start(weights=weights, notes=tuple(notes))


def _explicit(path: Path, record: RunRecord, warn: Callable[[str], None]) -> Start:
    """A whole checkpoint by its folder or its model file; else weights by any other file."""
    if path.is_dir():
        state = load_latest(path, warn)
        if state is None:
            raise UsageError(f"--resume_checkpoint {path} holds no complete checkpoint")
        return _exact(state, record)
    step, ema_rate = parse_name(path)
    averaged = ema_rate is not None or path.stem.endswith("_ema")
    if step is not None and not averaged and step in complete_steps(path.parent):
        return _exact(load_training_state(path.parent, step), record)
    weights = load_weights(path, kind=record.kind)
    found = record.changed(weights.config, sorted(record.shaping & record.config.keys()))
    _refuse(found, f"{path} is of a run", "another --resume_checkpoint")
    _require_tokenizer(weights, record)
    step = weights.step if step is None else step
    note = (
        f"NOTE: {path} holds weights alone: weights and averages start from it at step {step}, "
        "the optimizer starts afresh"
    )
    return Start(step=step, weights=weights, notes=(note,))


def _exact(state: TrainingState, record: RunRecord) -> Start:
    """Go on from a whole checkpoint, telling which of the flags that may change did."""
    where = f"{state.folder}, step {state.step},"
    if state.kind != record.kind:
        raise UsageError(f"{where} is of a {state.kind} run: give this {record.kind} another one")
    saved = _described(state.config, state.tokenizer_json, state.extra[_DATA])
    given = record.described()
    _refuse(record.changed(saved, record.fixed), f"{where} is of a run", "another --log_dir")
    free = sorted((saved.keys() & given.keys()) - set(record.fixed) - _LOCAL)
    changed = record.changed(saved, free)
    notes = [f"goes on from {state.folder} at step {state.step}"]
    notes += [f"changed since: {', '.join(changed)}"] if changed else []
    return Start(step=state.step, state=state, notes=tuple(notes))


# Flags that say where to look, not what to do.
_LOCAL = {"log_dir", "resume_checkpoint", "init_checkpoint", "dry_run"}


def _require_tokenizer(weights: Checkpoint, record: RunRecord) -> None:
    """Token ids mean nothing to weights that were trained with other ones."""
    if weights.tokenizer_json is not None and weights.tokenizer_json != record.tokenizer_json:
        raise UsageError(
            f"{weights.path} was trained with another tokenizer: take the tokenizer.json of its "
            "run with --tokenizer"
        )


def _refuse(found: list[str], what: str, instead: str) -> None:
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise UsageError(
            f"{what} with other settings ({'; '.join(found[:_SHOWN])}{more}): "
            f"give the saved values, or {instead}"
        )


def _subfolder(folder: Path, name: str) -> Path:
    """A subfolder that does not exist yet."""
    candidates = [folder / name, *(folder / f"{name}{number}" for number in range(2, 1000))]
    return next(path for path in candidates if not path.exists())


def _described(config: Mapping[str, Any], tokenizer_json: str | None, data: str) -> dict[str, Any]:
    text = "" if tokenizer_json is None else tokenizer_json
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return {**config, _TOKENIZER: digest, _DATA: data}
