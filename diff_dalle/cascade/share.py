"""A sampling run: what it is to draw, one rank's share of it, the manifest of the whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import diff_dalle
from diff_dalle.cascade.cascade import Cascade
from diff_dalle.cascade.consistency import measure_stages
from diff_dalle.cascade.cut import cut_of
from diff_dalle.cascade.devices import devices_of_rank
from diff_dalle.cascade.init_images import read_given
from diff_dalle.cascade.inputs import Reader, Request, read_request, shrunk_to
from diff_dalle.cascade.plan import Plan, check_start
from diff_dalle.cascade.sizing import choose_sizes, small_size
from diff_dalle.cascade.timing import Timing
from diff_dalle.sampling_io.config import SampleConfig, in_short
from diff_dalle.sampling_io.writer import OutputWriter

_PLACES = ("path", "source")  # the facts that say where something lies


@dataclass(frozen=True)
class Share:
    """What one rank drew.

    Attributes:
        kept: for each picture, the candidate that was kept.
        timing: of these pictures.
    """

    kept: dict[int, int]
    timing: Timing


def load_cascade(cfg: SampleConfig, own: torch.device, ranks: int) -> Cascade:
    """The cascade that the flags name, for one of ``ranks`` processes, whose device is ``own``.

    Its notes are not told yet.

    Raises:
        UsageError: as `Cascade.load`, or devices for the stages but several processes.
    """
    devices = devices_of_rank(cfg.device, own, ranks)
    return Cascade.load(
        cfg.model_path,
        cfg.classifier_path,
        devices,
        cfg.resolved_precision,
        offload=cfg.offload,
        warn=False,
    )


def request_of(cascade: Cascade, cfg: SampleConfig) -> Request:
    """What the flags ask this cascade to draw; its notes name prompts that are cut.

    Raises:
        UsageError: as `read_request`.
    """
    check_start(cascade.stages[0], cfg.low_res is not None)  # before any picture is decoded
    sizes = choose_sizes(cascade.stages, cfg.size)
    small = small_size(cascade.stages, sizes)
    reader = Reader(reads_text=cascade.reads_text, small=small, size=sizes[0])
    given = read_given(cfg.init_images, cfg.masks, sizes, cfg.num_samples)
    request = read_request(cfg, reader, given)
    request.notes.extend(cut_of(cascade.stages, request))
    return request


def open_writer(folder: Path, cascade: Cascade, plan: Plan, request: Request) -> OutputWriter:
    """Where the pictures gather; those that an interrupted run of this request drew are there.

    Batch size, ranks, and form and place of the files may have been others. For one rank only.

    Raises:
        UsageError: as `OutputWriter.open`.
    """
    facts = [_without_places(_facts(cascade, plan)), request.texts, request.negative_texts]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for picture in () if request.low_res is None else request.low_res:
        digest.update(picture.tobytes())
    return OutputWriter.open(folder, digest.hexdigest(), len(request.prompts), plan.sizes)


def draw_share(
    cascade: Cascade,
    plan: Plan,
    request: Request,
    writer: OutputWriter,
    cfg: SampleConfig,
    *,
    rank: int,
    ranks: int,
) -> Share:
    """Draw and store this rank's share of the missing pictures.

    Rank 0 shows its own progress in network steps.
    """
    mine = writer.share(rank, ranks)
    kept: dict[int, int] = {}
    timings = [Timing(images=0, seconds=(0.0,) * len(cascade.stages))]
    with tqdm(total=len(mine) * plan.steps, unit="step", disable=rank > 0) as bar:

        def on_step(stage: int, step: int, x_0: Tensor) -> None:
            bar.set_description(f"{plan.names[stage]} px", refresh=False)
            bar.update(len(x_0))

        for indices, result in cascade.batches(
            plan,
            mine,
            request.texts,
            negative_prompts=request.negative_texts,
            batch_size=cfg.batch_size,
            low_res=request.low_res,
            on_step=on_step,
        ):
            writer.write(indices, result.stages, result.candidates, rank=rank)
            kept |= dict(zip(indices, result.candidates, strict=True))
            timings.append(Timing(images=len(indices), seconds=tuple(result.seconds)))
    return Share(kept, Timing.total(timings))


def manifest_of(
    cascade: Cascade,
    plan: Plan,
    request: Request,
    cfg: SampleConfig,
    writer: OutputWriter,
    kept: Sequence[Mapping[int, int]],
    timing: Timing,
) -> dict[str, Any]:
    """What JSON says of a finished run: enough to draw every picture again.

    Args:
        cascade: what drew.
        plan: how.
        request: what was to be drawn.
        cfg: the flags.
        writer: holds all pictures.
        kept: tables that say of every index, in one of them, which candidate was kept.
        timing: of what this call drew.
    """
    candidates = {index: candidate for table in kept for index, candidate in table.items()}
    images: list[dict[str, Any]] = [
        {"index": n, "prompt": prompt.text, "source": prompt.source, "candidate": candidates[n]}
        | {"consistency": _consistency_of(cascade, plan, request, writer, n)}
        | plan.edits.describe_picture(n)
        for n, prompt in enumerate(request.prompts)
    ]
    for image, negative in zip(images, request.negative_prompts, strict=False):
        image["negative_prompt"] = negative.text
    return {
        **_facts(cascade, plan),
        "low_res": cfg.low_res,
        "contrast": cfg.contrast,
        "batch_size": cfg.batch_size,
        "offload": cfg.offload,
        "timing": timing.to_json(),
        "notes": [*cascade.notes, *plan.notes(), *request.notes],
        "images": images,
    }


def _consistency_of(
    cascade: Cascade, plan: Plan, request: Request, writer: OutputWriter, index: int
) -> list[dict[str, float] | None]:
    """How well each stage of one picture kept to what it enlarged; None for a base model.

    It is read off the stored pictures, so that those from before an interruption count alike.
    """
    small = None
    if request.low_res is not None:
        assert plan.small is not None  # a plan with small pictures has their size
        given = request.low_res[plan.edits.entries([index], len(request.low_res))]
        small = shrunk_to(given, plan.small, cascade.devices[0])
    stages = [store.read(index)[None] for store in writer.stores]
    parts = measure_stages(stages, small)
    return [None if part is None else part.to_json(0) for part in parts]


def _without_places(facts: Any) -> Any:
    """Facts less where files lie: the hashes beside say what is in them."""
    if isinstance(facts, dict):
        return {name: _without_places(fact) for name, fact in facts.items() if name not in _PLACES}
    return [_without_places(fact) for fact in facts] if isinstance(facts, list) else facts


def _facts(cascade: Cascade, plan: Plan) -> dict[str, Any]:
    """What decides the pictures beside prompts and small pictures, and where it lay."""
    stages = []
    for number, (stage, part) in enumerate(zip(cascade.stages, plan.stages, strict=True)):
        drawn = plan.candidates(number)
        height, width = part.size
        counts = {
            "width": width,
            "height": height,
            "steps": part.steps,
            "evaluations": plan.evaluations[number],
            "classifier_evaluations": drawn * part.classifier_evaluations,
        }
        stages.append(
            {**stage.describe(), **counts, **asdict(part.settings), **asdict(part.classifier)}
        )
    contrast = hashlib.sha256(json.dumps(plan.contrast.texts).encode()).hexdigest()
    return {
        "diff_dalle": diff_dalle.__version__,
        "torch": torch.__version__,
        "device": in_short([device.type for device in cascade.devices]),
        "precision": cascade.precision,
        "seed": plan.seeds.seed,
        "seeds": list(plan.seeds.each),
        "rerank": plan.rerank,
        "contrast_captions": len(plan.contrast.texts),
        "contrast_sha256": contrast if plan.contrast.texts else None,
        **plan.edits.describe(),
        "stages": stages,
    }
