"""Random checkpoints of a 16 -> 32 -> 64 px cascade with noised CLIPs, written in a second.

Weights that training starts at zero are random here too: else every caption and every small
picture would be without effect. Loaded by tests through `runpy`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diff_dalle.config import ClassifierRun, GeneratorRun, from_flat, to_flat
from diff_dalle.data.tokenizer import Tokenizer
from diff_dalle.models.clip import NoisyCLIP
from diff_dalle.models.generator import Generator
from diff_dalle.training.checkpoint_file import save_weights

CAPTIONS = ["a red circle", "a large blue square above a small star", "파란 별 위의 빨간 원"]
TEXT = {"text_length": 32}
GENERATOR = TEXT | {
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": (1, 1),
    "attention_resolutions": (8,),
    "num_head_channels": 16,
    "enc_attn_dim": 32,
    "enc_depth": 1,
    "enc_head_channels": 16,
    "diffusion_steps": 20,
    "noise_schedule": "cosine",
    # Smooth in the input at every step, where eps of a random network is divided by almost 0.
    "prediction": "v",
}
CLIP = TEXT | {
    "classifier_width": 32,
    "classifier_depth": 1,
    "classifier_channel_mult": (1, 1),
    "classifier_attention_resolutions": (8,),
    "classifier_enc_attn_dim": 32,
    "classifier_enc_depth": 1,
    "classifier_head_channels": 16,
    "classifier_embed_dim": 16,
    "noise_schedule": "linear",
    "diffusion_steps": 1000,
}


def write_generator(
    path: Path, *, vocab_size: int = 300, ema_rate: float | None = None, **flags: Any
) -> Path:
    """A random generator; ``flags`` change `GENERATOR`."""
    tokenizer = Tokenizer.train(CAPTIONS, vocab_size) if flags.get("cond_text", True) else None
    vocabulary = {"vocab_size": tokenizer.vocab_size if tokenizer else 0}
    run = from_flat(GeneratorRun, GENERATOR | vocabulary | flags)
    torch.manual_seed(run.image_size)
    generator = Generator(run.generator, run.unet, run.text)
    return _save(path, "generator", to_flat(run), tokenizer, generator, ema_rate)


def write_clip(path: Path, *, vocab_size: int = 280, **flags: Any) -> Path:
    """A random noised CLIP; ``flags`` change `CLIP`."""
    tokenizer = Tokenizer.train(CAPTIONS, vocab_size)
    run = from_flat(ClassifierRun, CLIP | {"vocab_size": tokenizer.vocab_size} | flags)
    torch.manual_seed(run.image_size)
    return _save(path, "classifier", to_flat(run), tokenizer, NoisyCLIP(run.clip))


def write_cascade(folder: Path) -> Path:
    """``base.pt``, ``up32.pt``, ``up64.pt`` and ``clip.pt`` (16 px) in a folder."""
    write_generator(folder / "base.pt", image_size=16)
    # Each checkpoint has a tokenizer of its own, which the others' vocabularies do not hold.
    write_generator(folder / "up32.pt", image_size=32, small_size=16, vocab_size=290)
    write_generator(folder / "up64.pt", image_size=64, small_size=32, vocab_size=265)
    write_clip(folder / "clip.pt", image_size=16)
    return folder


def _save(
    path: Path,
    kind: str,
    config: dict[str, Any],
    tokenizer: Tokenizer | None,
    model: torch.nn.Module,
    ema_rate: float | None = None,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.03)
    save_weights(
        path,
        kind=kind,
        config=config,
        tokenizer_json=None if tokenizer is None else tokenizer.to_json(),
        step=7,
        ema_rate=ema_rate,
        state_dict=model.state_dict(),
    )
    return path
