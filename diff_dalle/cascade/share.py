"""One rank's share of a sampling run, and the manifest of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import diff_dalle
from diff_dalle.cascade.cascade import Cascade
from diff_dalle.cascade.inputs import Reader, Request, read_request
from diff_dalle.cascade.plan import Plan
from diff_dalle.sampling_io.config import SampleConfig
from diff_dalle.sampling_io.outputs import Workshop


def request_of(cascade: Cascade, cfg: SampleConfig) -> Request:
    """What the flags ask this cascade to draw; its notes name prompts that are cut.

    Raises:
        UsageError: as `read_request`.
    """
    first = cascade.stages[0]
    reader = Reader(
        reads_text=cascade.reads_text, small_size=first.small_size, image_size=first.image_size
    )
    request = read_request(cfg, reader)
    request.notes.extend(cascade.describe_cut(list(dict.fromkeys(request.prompts))))
    return request


def draw_share(
    cascade: Cascade,
    plan: Plan,
    request: Request,
    workshop: Workshop,
    cfg: SampleConfig,
    *,
    rank: int,
    ranks: int,
) -> dict[int, int]:
    """Draw and store every ``ranks``-th picture from number ``rank`` on.

    Rank 0 shows its own progress in network steps.

    Returns:
        The candidate that was kept for each picture of this rank.
    """
    mine = range(rank, workshop.count, ranks)
    kept: dict[int, int] = {}
    with tqdm(total=len(mine) * plan.steps, unit="step", disable=rank > 0) as bar:

        def on_step(stage: int, step: int, x_0: Tensor) -> None:
            bar.set_description(f"{cascade.sizes[stage]} px", refresh=False)
            bar.update(len(x_0))

        for indices, result in cascade.batches(
            plan,
            mine,
            [prompt.text for prompt in request.prompts],
            batch_size=cfg.batch_size,
            low_res=request.low_res,
            on_step=on_step,
        ):
            workshop.write(indices, result.stages, cfg.save_png)
            kept |= dict(zip(indices, result.candidates, strict=True))
    workshop.flush()
    return kept


def manifest_of(
    cascade: Cascade, plan: Plan, request: Request, cfg: SampleConfig, kept: Mapping[int, int]
) -> dict[str, Any]:
    """What JSON says of a finished run: enough to draw every picture again.

    Args:
        cascade: what drew.
        plan: how.
        request: what was to be drawn.
        cfg: the flags.
        kept: for each index the candidate that was kept.
    """
    stages = [
        {**stage.describe(), "steps": part.steps, **asdict(part.settings)}
        | {"classifier_scale": part.classifier_scale}
        for stage, part in zip(cascade.stages, plan.stages, strict=True)
    ]
    images = [
        {"index": index, "prompt": prompt.text, "source": prompt.source, "candidate": kept[index]}
        for index, prompt in enumerate(request.prompts)
    ]
    return {
        "diff_dalle": diff_dalle.__version__,
        "torch": torch.__version__,
        "device": cascade.device.type,
        "precision": cascade.precision,
        "seed": plan.seed,
        "batch_size": cfg.batch_size,
        "rerank": plan.rerank,
        "low_res": cfg.low_res,
        "stages": stages,
        "notes": request.notes,
        "images": images,
    }
