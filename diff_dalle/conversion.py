"""Published guided-diffusion weights as checkpoints of ours."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diff_dalle.config import GeneratorRun, make_generator, to_flat
from diff_dalle.errors import UsageError
from diff_dalle.knobs import knob, require
from diff_dalle.models.convert import convert_guided_diffusion
from diff_dalle.training.checkpoint_file import save_weights


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What to convert; the architecture comes from ``--preset adm-64`` or from model flags."""

    source: str = knob("", "guided-diffusion's .pt file of a generator")
    out_path: str = knob("", "the checkpoint to write")
    class_id: int | None = knob(
        None, "of a class-conditional source: the one class that the checkpoint draws, from 0"
    )

    def __post_init__(self) -> None:
        for name in ("source", "out_path"):
            require(bool(getattr(self, name)), name, getattr(self, name), "name a file")


def convert_file(cfg: ConvertConfig, run: GeneratorRun) -> int:
    """Convert one file.

    Returns:
        The number of parameters.
    Raises:
        UsageError: the source is no state dict, or does not fit the architecture.
    """
    _check_architecture(run)
    if Path(cfg.out_path).exists():
        raise UsageError(f"--out_path {cfg.out_path} exists: name a new file")
    state_dict = read_state_dict(cfg.source)
    with torch.device("meta"):
        generator = make_generator(run)
    converted = convert_guided_diffusion(state_dict, generator, cfg.class_id)
    Path(cfg.out_path).absolute().parent.mkdir(parents=True, exist_ok=True)
    save_weights(
        Path(cfg.out_path),
        kind=run.kind,
        config=to_flat(run),
        tokenizer_json=None,
        step=0,
        ema_rate=None,
        state_dict=converted,
    )
    return sum(tensor.numel() for tensor in converted.values())


def _check_architecture(run: GeneratorRun) -> None:
    """Refuse what guided-diffusion's generators cannot do, whatever their tensors' shapes."""
    stage = run.generator
    must = "be False: guided-diffusion's generators"
    require(not stage.cond_text, "cond_text", stage.cond_text, f"{must} read no text")
    told = stage.small_size > 0 and stage.aug_level_cond
    require(not told, "aug_level_cond", stage.aug_level_cond, f"{must} are told no noise level")
    residual = stage.low_res_residual
    require(not residual, "low_res_residual", residual, f"{must} predict without their input")


def read_state_dict(path: str) -> dict[str, Tensor]:
    """A plain dictionary of tensors from a ``.pt`` file; no code in it is ever run.

    Raises:
        UsageError: the file is missing or holds anything else.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as problem:
        raise UsageError(f"--source {path} cannot be read: {problem.strerror}") from problem
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as problem:
        raise UsageError(f"--source {path} is no state dict of tensors") from problem
    tensors = isinstance(loaded, dict) and all(isinstance(v, Tensor) for v in loaded.values())
    if not tensors:
        raise UsageError(f"--source {path} is no state dict of tensors")
    return loaded
