"""One ``.pt`` file of a checkpoint: what it says of itself, and how it is read and trusted.

Every ``.pt`` is a plain dictionary that carries the run's configuration, the tokenizer and a
SHA-256 of every tensor, so it also works alone. No code in such a file can run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from diff_dalle.errors import UsageError
from diff_dalle.training.digests import digests_of
from diff_dalle.training.files import HashingFile, file_digest, publish, write_aside

FORMAT = "diff_dalle checkpoint"
VERSION = 1
NAME = re.compile(r"(?:model|ema_(?P<rate>[0-9.eE+-]+)_|opt)(?P<step>\d+)(?:_ema)?\.pt")
_ZIP_MAGIC = b"PK\x03\x04"


class NewerFormat(UsageError):
    """A file that a newer version of this library wrote."""


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
    score: float | None  # the held-out loss for which `best.pt` was kept


def save_weights(
    path: Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    tokenizer_json: str | None,
    step: int,
    ema_rate: float | None,
    state_dict: Mapping[str, Tensor],
    score: float | None = None,
) -> None:
    """Write one file of weights, such as ``best.pt`` or a converted model: whole or not."""
    payload = common_fields(kind, step, config, tokenizer_json)
    payload |= {"ema_rate": ema_rate, "score": score, "state_dict": dict(state_dict)}
    write_aside(path, saver(payload))
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
    payload = read_file(path)
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
        score=payload.get("score"),
    )


@dataclass(frozen=True, kw_only=True)
class Header:
    """What any ``.pt`` says of itself, an optimizer's too.

    Attributes:
        kind: "generator" or "classifier".
        config: the run's flags and values.
        tokenizer_json: None without captions.
        score: see `Checkpoint`.
    """

    kind: str
    config: dict[str, Any]
    tokenizer_json: str | None
    score: float | None


def read_header(path: str | Path) -> Header:
    """What a file says of itself, without reading its tensors.

    Raises:
        UsageError: no such file, no checkpoint of ours, or damaged.
    """
    payload = _load(Path(path), mapped=True)
    return Header(
        kind=str(payload["kind"]),
        config=payload["config"],
        tokenizer_json=payload["tokenizer"],
        score=payload.get("score"),
    )


def read_kind(path: str | Path) -> str:
    """``generator`` or ``classifier``; see `read_header`."""
    return read_header(path).kind


def parse_name(path: str | Path) -> tuple[int | None, float | None]:
    """Step and EMA rate as a file's name tells them; None where it does not.

    >>> parse_name("runs/ema_0.9999_010000.pt"), parse_name("model010000_ema.pt")
    ((10000, 0.9999), (10000, None))
    """
    match = NAME.fullmatch(Path(path).name)
    if match is None:
        return None, None
    return int(match["step"]), float(match["rate"]) if match["rate"] else None


def require_format(path: Path, version: object) -> None:
    """Refuse what a newer version wrote.

    Raises:
        NewerFormat: this version cannot read it.
    """
    if not isinstance(version, int) or version > VERSION:
        raise NewerFormat(
            f"{path} has format {version}, this diff_dalle reads up to {VERSION}: "
            "install a newer one"
        )


def common_fields(
    kind: str, step: int, config: Mapping[str, Any], tokenizer_json: str | None
) -> dict[str, Any]:
    """What every ``.pt`` of a save says alike."""
    record = {"format": FORMAT, "version": VERSION, "kind": kind, "step": step}
    return {**record, "config": dict(config), "tokenizer": tokenizer_json}


def saver(payload: Mapping[str, Any]) -> Callable[[HashingFile], object]:
    """A function that writes a payload, of plain values and tensors, with its digests."""

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
    require_format(path, payload.get("version"))
    return payload


def read_file(path: Path) -> dict[str, Any]:
    """What one of our ``.pt`` files holds, every tensor checked, on the CPU.

    Raises:
        UsageError: it is missing, not ours, of a newer format, or damaged.
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
