"""Which device each stage samples on, and in which numbers it computes there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diff_dalle.errors import UsageError
from diff_dalle.knobs import AUTO
from diff_dalle.training.precision import Precision, PrecisionConfig

Device = str | torch.device
Devices = Device | Sequence[Device]
"""One device for all stages, or one a stage."""


def find_devices(asked: Devices) -> list[torch.device]:
    """The devices by those names, in that order; ``auto`` is a GPU if there is one.

    Raises:
        UsageError: no name, one that means nothing, or a device that is not there.
    """
    entries = [asked] if isinstance(asked, str | torch.device) else list(asked)
    if not entries:
        raise UsageError("--device names no device: give one for all stages, or one a stage")
    return [_find(entry) for entry in entries]


def _find(entry: Device) -> torch.device:
    if entry == AUTO:
        entry = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(entry)
    except RuntimeError as problem:
        raise UsageError(
            f"--device is {str(entry)!r}: give auto, cpu or cuda (cuda:1 for the second GPU)"
        ) from problem
    if not _is_there(device):
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise UsageError(f"--device is '{device}', but there is none here: use {', '.join(there)}")
    if device.type == "cuda" and device.index is None:  # so that it equals the one with a number
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _is_there(device: torch.device) -> bool:
    """Whether numbers can go there and come back."""
    if device.type == "cuda":
        return (device.index or 0) < torch.cuda.device_count()
    try:
        torch.zeros(1, device=device).cpu()
    except (AssertionError, ImportError, RuntimeError):  # as torch puts it, by kind of device
        return False
    return True


def devices_of_rank(asked: Sequence[str], own: torch.device, ranks: int) -> list[Device]:
    """What ``--device`` means on one of several processes, each of which has a device of its own.

    Args:
        asked: one name for all stages, or one a stage.
        own: the device that this process was given for the first name.
        ranks: the number of processes.
    Raises:
        UsageError: different devices for the stages, but more than one process.
    """
    if ranks > 1 and len(set(asked)) > 1:
        raise UsageError(
            f"--device is {' '.join(asked)}, but {ranks} processes were started: start one, or "
            "give one device, of which each process takes its own"
        )
    return [own if name == asked[0] else name for name in asked]


def choose_precisions(devices: Sequence[torch.device], asked: str) -> list[Precision]:
    """What the generators compute in, one a stage; fp32 on every CPU.

    Raises:
        UsageError: ``asked`` is no precision, whatever the devices.
    """
    elsewhere = PrecisionConfig(precision=asked)
    # fp16 is emulated on a CPU, and few CPUs are faster in bf16.
    on_cpu = PrecisionConfig(precision="fp32")
    return [Precision(on_cpu if d.type == "cpu" else elsewhere, d) for d in devices]


def device_notes(devices: Sequence[torch.device], precision: str, *, offload: bool) -> list[str]:
    """What the user should know of where the stages sample."""
    kinds = [device.type for device in devices]
    notes = []
    if "cpu" in kinds and precision not in (AUTO, "fp32"):
        where = "" if set(kinds) == {"cpu"} else " on the CPU"
        notes.append(f"sampling in fp32{where}: a CPU is slower in {precision}")
    if offload and set(kinds) == {"cpu"}:
        notes.append("--offload frees no memory: every stage samples on the CPU")
    return notes
