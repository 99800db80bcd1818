"""What a run leaves on disk, never half-written, and how it is read back.

A checkpoint of step 200000 is four files: ``model200000.pt``, ``ema_0.9999_200000.pt`` (one
a rate), ``opt200000.pt`` and, written last, ``manifest200000.json``: it is the commit, and
without it the others are leftovers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diff_dalle.errors import UsageError
from diff_dalle.training.checkpoint_file import (
    FORMAT,
    NAME,
    VERSION,
    NewerFormat,
    common_fields,
    read_file,
    require_format,
    saver,
)
from diff_dalle.training.files import file_digest, publish, sync_folder, write_aside

_MANIFEST = re.compile(r"manifest(?P<step>\d+)\.json")


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Everything that a run goes on from."""

    folder: Path
    kind: str
    config: dict[str, Any]
    tokenizer_json: str | None
    step: int
    model: dict[str, Tensor]
    emas: dict[str, dict[str, Tensor]]  # by the rate's name, such as "0.9999"
    optimizer_state: dict[str, Any]
    extra: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    kind: str,
    config: Mapping[str, Any],
    tokenizer_json: str | None,
    model: Mapping[str, Tensor],
    emas: Mapping[str, Mapping[str, Tensor]],
    optimizer_state: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> Path:
    """Write one checkpoint; one rank does this. A kill at any instant harms no older one.

    Every file is written aside and fsynced; then all are renamed; the manifest comes last.

    Args:
        folder: the run's folder, which exists.
        step: updates made.
        kind: ``generator`` or ``classifier``.
        config: the run's flat configuration, plain values only.
        tokenizer_json: the tokenizer's file as text, or None without captions.
        model: the raw weights.
        emas: for every rate's name, the averaged weights.
        optimizer_state: the optimizer's state dict.
        extra: loss scale, samples seen and the like: plain values and tensors.
    Returns:
        The manifest's path.
    Raises:
        OSError: the disk is full or the folder cannot be written; older checkpoints stand.
    """
    shared = common_fields(kind, step, config, tokenizer_json)
    model_name, opt_name = f"model{step:06d}.pt", f"opt{step:06d}.pt"
    payloads = {model_name: {**shared, "ema_rate": None, "state_dict": dict(model)}}
    for rate, state in emas.items():
        name = f"ema_{rate}_{step:06d}.pt"
        payloads[name] = {**shared, "ema_rate": float(rate), "state_dict": dict(state)}
    payloads[opt_name] = {**shared, "optimizer": optimizer_state, "extra": extra}
    try:
        files = {name: write_aside(folder / name, saver(payloads[name])) for name in payloads}
        manifest = folder / f"manifest{step:06d}.json"
        # A second save of one step replaces files of the first, which is then not whole.
        manifest.unlink(missing_ok=True)
        sync_folder(folder)
        for name in files:
            publish(folder / name)
        record = {"format": FORMAT, "version": VERSION, "kind": kind, "step": step}
        text = json.dumps({**record, "files": files}, indent=1)
        write_aside(manifest, lambda file: file.write(text.encode()))
        publish(manifest)
    finally:
        _remove_leftovers(folder)
    return manifest


def load_training_state(folder: str | Path, step: int) -> TrainingState:
    """Read the checkpoint of one step whole, and check every tensor.

    Raises:
        UsageError: a file is missing or damaged, or the files are of different saves.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder, step)
    payloads = {name: read_file(folder / name) for name in manifest["files"]}
    for name, record in manifest["files"].items():
        if file_digest(folder / name) != record["sha256"]:
            raise UsageError(f"{folder / name} is not the file that {folder}'s manifest names")
    model = payloads[f"model{step:06d}.pt"]
    opt = payloads[f"opt{step:06d}.pt"]
    return TrainingState(
        folder=folder,
        kind=model["kind"],
        config=model["config"],
        tokenizer_json=model["tokenizer"],
        step=step,
        model=model["state_dict"],
        emas={
            str(payload["ema_rate"]): payload["state_dict"]
            for payload in payloads.values()
            if payload.get("ema_rate") is not None
        },
        optimizer_state=opt["optimizer"],
        extra=opt["extra"],
    )


def load_latest(folder: str | Path, warn: Callable[[str], None]) -> TrainingState | None:
    """The newest checkpoint that is whole and undamaged, or None where none was ever saved.

    Args:
        folder: the run's folder.
        warn: told in one line about every checkpoint that was passed over.
    Raises:
        UsageError: there are checkpoints, but none can be used; or a newer version of this
            library wrote the newest.
    """
    reason = ""
    for step in reversed(saved_steps(folder)):
        try:
            return load_training_state(folder, step)
        except NewerFormat:
            raise
        except UsageError as error:
            warn(f"step {step} cannot be used, falling back to the one before: {error}")
            reason = reason or str(error)
    if reason:
        raise UsageError(
            f"no checkpoint in {folder} can be used ({reason}): put the files back, give "
            "--resume_checkpoint a model or ema file for its weights, or another --log_dir"
        )
    return None


def saved_steps(folder: str | Path) -> list[int]:
    """Steps whose checkpoint was once saved whole, in rising order: those with a manifest."""
    names = (_MANIFEST.fullmatch(path.name) for path in Path(folder).glob("manifest*.json"))
    return sorted(int(match["step"]) for match in names if match)


def complete_steps(folder: str | Path) -> list[int]:
    """Saved steps whose files all exist in the right size, in rising order."""
    return [step for step in saved_steps(folder) if _is_complete(Path(folder), step)]


def find_latest(folder: str | Path) -> int | None:
    """The step of the newest complete checkpoint, by its number, or None."""
    return max(complete_steps(folder), default=None)


def differences(
    saved: Mapping[str, Any], given: Mapping[str, Any], fields: Collection[str]
) -> list[str]:
    """One text ``field: saved -> given`` for each of ``fields`` that differs.

    A list equals a tuple, and a field that one side lacks differs.
    """
    found = []
    for field in fields:
        old, new = saved.get(field, "(absent)"), given.get(field, "(absent)")
        if _plain(old) != _plain(new):
            found.append(f"{field}: {old} -> {new}")
    return found


def checkpoint_bytes(model: nn.Module, ema_count: int, moments: int = 2) -> int:
    """About how large one checkpoint is: weights, averages and the optimizer's moments."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    return weights * (1 + ema_count + moments) + buffers * (1 + ema_count)


def _is_complete(folder: Path, step: int) -> bool:
    try:
        _read_manifest(folder, step)
    except UsageError:
        return False
    return True


def _read_manifest(folder: Path, step: int) -> dict[str, Any]:
    """The manifest of a step whose files all exist in the right size.

    Raises:
        UsageError: says what is missing.
    """
    path = folder / f"manifest{step:06d}.json"
    try:
        manifest = json.loads(path.read_bytes())
        ours, version, files = manifest["format"] == FORMAT, manifest["version"], manifest["files"]
        sizes = {name: int(file["bytes"]) for name, file in files.items()}
    except FileNotFoundError:
        others = complete_steps(folder) or "no other"
        raise UsageError(
            f"{folder} has no complete checkpoint of step {step}: resume from one of {others}, "
            "or give a model or ema file for its weights"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged: use another checkpoint") from error
    if not ours:
        raise UsageError(f"{path} is no manifest of diff_dalle: move it away")
    require_format(path, version)
    for name, size in sizes.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, not {size}"
            raise UsageError(f"{file} {state}: the checkpoint of step {step} is not whole")
    return manifest


def _remove_leftovers(folder: Path) -> None:
    """Delete what killed saves left behind: only files with our names, only ``.tmp``."""
    for path in folder.glob("*.tmp"):
        name = path.name.removesuffix(".tmp")
        if NAME.fullmatch(name) or _MANIFEST.fullmatch(name):
            path.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Lists for tuples, as a configuration read from JSON has them."""
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
