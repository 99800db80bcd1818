"""What a run leaves on disk, never half-written, and how it is read back.

A checkpoint of step 200000 is four files: ``model200000.pt``, ``ema_0.9999_200000.pt`` (one
a rate), ``opt200000.pt`` and, written last, ``manifest200000.json``: it is the commit, and
without it the others are leftovers. Every ``.pt`` is a plain dictionary that carries the
run's configuration, the tokenizer and a SHA-256 of every tensor, so it also works alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from diff_dalle.errors import UsageError
from diff_dalle.training.digests import digests_of
from diff_dalle.training.files import (
    HashingFile,
    file_digest,
    publish,
    sync_folder,
    write_aside,
)

FORMAT = "diff_dalle checkpoint"
VERSION = 1
_NAME = re.compile(r"(?:model|ema_(?P<rate>[0-9.eE+-]+)_|opt)(?P<step>\d+)(?:_ema)?\.pt")
_MANIFEST = re.compile(r"manifest(?P<step>\d+)\.json")
_ZIP_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights with all that sampling needs to rebuild their model."""

    path: Path
    kind: str  # "generator" or "classifier"
    config: dict[str, Any]
    tokenizer_json: str | None
    step: int
    ema_rate: float | None  # None for raw weights
    state_dict: dict[str, Tensor]
    sha256: str  # of the file


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
    shared = _header(kind, step, config, tokenizer_json)
    model_name, opt_name = f"model{step:06d}.pt", f"opt{step:06d}.pt"
    payloads = {model_name: {**shared, "ema_rate": None, "state_dict": dict(model)}}
    for rate, state in emas.items():
        name = f"ema_{rate}_{step:06d}.pt"
        payloads[name] = {**shared, "ema_rate": float(rate), "state_dict": dict(state)}
    payloads[opt_name] = {**shared, "optimizer": optimizer_state, "extra": extra}
    try:
        files = {name: write_aside(folder / name, _saver(payloads[name])) for name in payloads}
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


def save_weights(
    path: Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    tokenizer_json: str | None,
    step: int,
    ema_rate: float | None,
    state_dict: Mapping[str, Tensor],
) -> None:
    """Write one file of weights, such as ``best.pt`` or a converted model: whole or not."""
    payload = _header(kind, step, config, tokenizer_json)
    write_aside(path, _saver({**payload, "ema_rate": ema_rate, "state_dict": dict(state_dict)}))
    publish(path)


def load_weights(path: str | Path, *, kind: str | None = None) -> Checkpoint:
    """Read a ``model….pt``, ``ema_….pt`` or ``best.pt`` onto the CPU and check every tensor.

    Args:
        path: the file.
        kind: refuse another kind than this one.
    Raises:
        UsageError: no such file, no checkpoint of ours, damaged, or of another kind.
    """
    path = Path(path)
    payload = _read(path)
    if "state_dict" not in payload:
        raise UsageError(f"{path} holds an optimizer, no weights: give the model or ema file")
    if kind is not None and payload["kind"] != kind:
        raise UsageError(f"{path} is a {payload['kind']}, but a {kind} belongs here")
    return Checkpoint(
        path=path,
        kind=payload["kind"],
        config=payload["config"],
        tokenizer_json=payload["tokenizer"],
        step=payload["step"],
        ema_rate=payload["ema_rate"],
        state_dict=payload["state_dict"],
        sha256=file_digest(path),
    )


def read_kind(path: str | Path) -> str:
    """``generator`` or ``classifier``, without reading the weights.

    Raises:
        UsageError: no such file, no checkpoint of ours, or damaged.
    """
    return str(_load(Path(path), mapped=True)["kind"])


def load_training_state(folder: str | Path, step: int) -> TrainingState:
    """Read the checkpoint of one step whole, and check every tensor.

    Raises:
        UsageError: a file is missing or damaged, or the files are of different saves.
    """
    folder = Path(folder)
    manifest = _complete_manifest(folder / f"manifest{step:06d}.json")
    if manifest is None:
        raise UsageError(
            f"{folder} has no complete checkpoint of step {step}: resume from one of "
            f"{complete_steps(folder) or 'no other'}, or give a model or ema file for its weights"
        )
    payloads = {name: _read(folder / name) for name in manifest["files"]}
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
    """The newest checkpoint that is whole and undamaged, or None where there is none.

    Args:
        folder: the run's folder.
        warn: told in one line about every damaged checkpoint that was passed over.
    Raises:
        UsageError: there are checkpoints, but all are damaged.
    """
    steps = complete_steps(folder)
    for step in reversed(steps):
        try:
            return load_training_state(folder, step)
        except UsageError as error:
            warn(f"step {step} is damaged, falling back to the one before: {error}")
    if steps:
        raise UsageError(f"all {len(steps)} checkpoints in {folder} are damaged: move them away")
    return None


def complete_steps(folder: str | Path) -> list[int]:
    """Steps with a manifest whose files all exist in the right size, in rising order."""
    found = []
    for path in Path(folder).glob("manifest*.json"):
        match = _MANIFEST.fullmatch(path.name)
        if match and _complete_manifest(path) is not None:
            found.append(int(match["step"]))
    return sorted(found)


def find_latest(folder: str | Path) -> int | None:
    """The step of the newest complete checkpoint, by its number, or None."""
    return max(complete_steps(folder), default=None)


def parse_name(path: str | Path) -> tuple[int | None, float | None]:
    """Step and EMA rate as a file's name tells them; None where it does not.

    >>> parse_name("runs/ema_0.9999_010000.pt"), parse_name("model010000_ema.pt")
    ((10000, 0.9999), (10000, None))
    """
    match = _NAME.fullmatch(Path(path).name)
    if match is None:
        return None, None
    return int(match["step"]), float(match["rate"]) if match["rate"] else None


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


def _header(
    kind: str, step: int, config: Mapping[str, Any], tokenizer_json: str | None
) -> dict[str, Any]:
    """What every ``.pt`` of a save says alike."""
    record = {"format": FORMAT, "version": VERSION, "kind": kind, "step": step}
    return {**record, "config": dict(config), "tokenizer": tokenizer_json}


def _saver(payload: Mapping[str, Any]) -> Callable[[HashingFile], object]:
    """A function that writes a payload with its digests."""

    def save(file: HashingFile) -> None:
        portable = _portable(payload, "")
        torch.save({**portable, "sha256": digests_of(portable)}, cast(IO[bytes], file))

    return save


def _portable(value: Any, path: str) -> Any:
    """Plain containers and numbers, and tensors on the CPU that own their memory.

    Raises:
        TypeError: anything else, which ``weights_only`` would not load.
    """
    if isinstance(value, Mapping):
        return {key: _portable(inner, f"{path}/{key}") for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_portable(inner, path) for inner in value)
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor if alone else tensor.clone()  # a view would take its whole base along
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{path} is a {type(value).__name__}: a checkpoint takes plain values only")


def _load(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """What one of our ``.pt`` files holds; no code in it can run.

    Args:
        path: the file.
        mapped: leave the tensors on disk until they are read.
    Raises:
        UsageError: it is missing, not ours, of a newer format, or cannot be loaded.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(len(_ZIP_MAGIC))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): check the path") from error
    if magic != _ZIP_MAGIC:
        raise _no_checkpoint(path, "it is not even a file of torch.save")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file makes torch raise almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise _no_checkpoint(path, f"or it is damaged: {reason}") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise _no_checkpoint(path, "it holds something else")
    if not isinstance(payload.get("version"), int) or payload["version"] > VERSION:
        raise UsageError(
            f"{path} has format {payload.get('version')}, this diff_dalle reads up to {VERSION}: "
            "install a newer one"
        )
    return payload


def _read(path: Path) -> dict[str, Any]:
    """Load one of our ``.pt`` files and check every tensor.

    Raises:
        UsageError: see `_load`; or a tensor is damaged.
    """
    payload = _load(path)
    saved = payload.pop("sha256", {})
    try:
        found = digests_of(payload)
        wrong = [name for name in {**saved, **found} if saved.get(name) != found.get(name)]
    except Exception as error:
        raise UsageError(f"{path} is damaged: use another checkpoint") from error
    if wrong:
        raise UsageError(
            f"{path} is damaged: {wrong[0]} has not the SHA-256 that it was saved with; use "
            "another checkpoint"
        )
    return payload


def _no_checkpoint(path: Path, reason: str) -> UsageError:
    return UsageError(
        f"{path} is no checkpoint of diff_dalle ({reason}); guided-diffusion weights are "
        "converted by scripts/convert_checkpoint.py"
    )


def _complete_manifest(path: Path) -> dict[str, Any] | None:
    """A manifest whose files all exist in the right size, or None."""
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT or manifest["version"] > VERSION:
            return None
        files = manifest["files"].items()
        whole = all((path.parent / name).stat().st_size == file["bytes"] for name, file in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None


def _remove_leftovers(folder: Path) -> None:
    """Delete what killed saves left behind: only files with our names, only ``.tmp``."""
    for path in folder.glob("*.tmp"):
        name = path.name.removesuffix(".tmp")
        if _NAME.fullmatch(name) or _MANIFEST.fullmatch(name):
            path.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Lists for tuples, as a configuration read from JSON has them."""
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
