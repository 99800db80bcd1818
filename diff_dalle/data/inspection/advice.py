"""Which findings need action, in one line each: what, how much, what to do."""

from __future__ import annotations

from collections.abc import Iterator

from diff_dalle.data.inspection.findings import Findings, Part, Problem
from diff_dalle.data.inspection.tally import EMPTY_CAPTION, NO_CAPTION, TOO_SMALL

# Shares from which on a finding is worth somebody's time.
_CUT = 0.01  # so that the length which keeps 99 % is another one
_REPEATED = 0.01
_FRAMED = 0.05


def advice(findings: Findings) -> list[str]:
    """Lines for the user, the worst first; none where nothing needs doing."""
    checks = (_on_shards, _on_samples, _on_captions, _on_images)
    return [line for check in checks for line in check(findings)]


def _on_shards(findings: Findings) -> Iterator[str]:
    faults = findings.shards.faults
    if faults:
        faulty = sum(fault.count for fault in faults.values())
        yield (
            f"{faulty:,} of {findings.shards.count:,} shards are faulty ({_listed(faults)}) and "
            "may lack samples: copy or write them again"
        )


def _on_samples(findings: Findings) -> Iterator[str]:
    samples, known = findings.samples, (NO_CAPTION, EMPTY_CAPTION, TOO_SMALL)  # have their lines
    broken = {reason: p for reason, p in samples.problems.items() if reason not in known}
    if broken:
        yield f"broken samples ({_listed(broken)}) are skipped by every run: mend or remove them"
    small = findings.images.too_small
    if small.count:
        yield (
            f"{small.percent} of the images are smaller than {findings.image_size} px and skipped: "
            "give a smaller --image_size, or remove them"
        )
    silent = [samples.problems[r] for r in (NO_CAPTION, EMPTY_CAPTION) if r in samples.problems]
    if silent:
        without = Part(sum(p.count for p in silent), sum(p.share for p in silent))
        yield (
            f"{without.percent} of the samples have no caption and are skipped: write a .txt, "
            "name the field with --caption_key, or train without captions (--cond_text False)"
        )


def _on_captions(findings: Findings) -> Iterator[str]:
    captions = findings.captions
    if captions.cut.share > _CUT:
        yield (
            f"{captions.cut.percent} of the captions are cut at {findings.text_length} tokens: "
            f"--text_length {captions.lengths['99']} keeps 99 %"
        )
    if captions.duplicates.share > _REPEATED:
        yield (
            f"{captions.duplicates.percent} of the first captions repeat an earlier one: a "
            "classifier takes two of them in a batch for different ones, so say more or list "
            "several captions a sample"
        )


def _on_images(findings: Findings) -> Iterator[str]:
    images = findings.images
    if images.duplicates.share > _REPEATED:
        yield f"{images.duplicates.percent} of the images are copies of others: remove the copies"
    if images.white_border.share > _FRAMED:
        yield (
            f"{images.white_border.percent} of the images have a white border, which a model "
            "learns to draw: crop it away if it is no part of the picture"
        )
    if images.bars.share > _FRAMED:
        yield (
            f"{images.bars.percent} of the images have one colour along two opposite edges: "
            "crop bars away (a plain background does no harm)"
        )


def _listed(problems: dict[str, Problem]) -> str:
    return ", ".join(f"{problem.count:,} {reason}" for reason, problem in problems.items())
