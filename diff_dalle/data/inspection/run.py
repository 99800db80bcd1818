"""An inspection from its flags to the table on the terminal and the files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from diff_dalle.data.caption_fields import DEFAULT_KEY
from diff_dalle.data.inspection.advice import advice
from diff_dalle.data.inspection.findings import Findings
from diff_dalle.data.inspection.look import Sight, look_at
from diff_dalle.data.inspection.sheet import MOST, write_sheet
from diff_dalle.data.inspection.table import table
from diff_dalle.data.inspection.tally import Tally, shard_findings
from diff_dalle.data.json_files import write_json
from diff_dalle.data.loader import DataConfig, Dataset, open_data
from diff_dalle.data.order import spread
from diff_dalle.data.tokenizer_training import tokenizer_of
from diff_dalle.errors import UsageError
from diff_dalle.knobs import knob, require


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Which data to inspect, and for what kind of run."""

    data_dir: list[str] = knob([], "folders, tar files or patterns of shards")
    image_size: int = knob(64, "pixels of the square that the run would train on")
    text_length: int = knob(48, "tokens of a caption that the run would read")
    tokenizer: str | None = knob(None, "tokenizer.json to use instead of the one with the shards")
    caption_key: str = knob(DEFAULT_KEY, "field of the .json that holds captions")
    max_samples: int = knob(0, "look at so many samples, evenly spread; 0: at all")
    num_workers: int = knob(
        2, "processes that look (--show_order: of each rank); 0: in this one", aliases=["workers"]
    )
    out_dir: str | None = knob(
        None, "folder for inspection.json and contact_sheet.png; without it no report is written"
    )

    def __post_init__(self) -> None:
        require(self.image_size >= 1, "image_size", self.image_size, "be positive")
        require(self.text_length >= 2, "text_length", self.text_length, "be 2 (start, end) or more")
        require(bool(self.caption_key), "caption_key", self.caption_key, "name a field")
        for name, value in (("max_samples", self.max_samples), ("num_workers", self.num_workers)):
            require(value >= 0, name, value, "be 0 or more")


class Inspection(NamedTuple):
    """What an inspection has found, in every form.

    Attributes:
        findings: the numbers.
        advice: which of them need action, in words.
        files: what was written.
    """

    findings: Findings
    advice: list[str]
    files: list[Path]

    @property
    def text(self) -> str:
        """The table for people, and the names of the files."""
        names = "".join(f"\n{path}" for path in self.files)
        return table(self.findings, self.advice) + (f"\n{names}" if names else "")

    def require_usable(self) -> None:
        """Raises `UsageError` where a run with captions could not use a single sample."""
        samples = self.findings.samples
        if not samples.usable.count:
            reason, problem = next(iter(samples.problems.items()))
            where = " ".join(self.findings.data_dir)
            raise UsageError(
                f"--data_dir {where}: none of {samples.read:,} samples can be trained on, "
                f"{problem.count:,} of them: {reason}; see what is to do above"
            )


def inspect_data(cfg: InspectConfig) -> Inspection:
    """Look at the samples of some shards as a run with captions would.

    With ``out_dir`` it writes ``inspection.json``, ``contact_sheet.png`` and
    ``contact_sheet.txt`` there, replacing those of an earlier inspection.

    Raises:
        UsageError: no shards, no image that can be decoded, or a folder that cannot be written.
    """
    folder = None if cfg.out_dir is None else _make_folder(Path(cfg.out_dir))
    dataset = _open(cfg)
    tokenizer, source = tokenizer_of(dataset)
    samples = spread(len(dataset), cfg.max_samples)
    wanted = samples[spread(len(samples), MOST)] if folder else samples[:0]
    sights = look_at(
        dataset,
        samples,
        image_size=cfg.image_size,
        tokenizer=tokenizer,
        shown=frozenset(wanted.tolist()),
        num_workers=cfg.num_workers,
    )
    tally, shown = _count(sights, len(samples))
    findings = Findings(
        data_dir=cfg.data_dir,
        image_size=cfg.image_size,
        text_length=cfg.text_length,
        shards=shard_findings(dataset),
        samples=tally.samples(len(dataset)),
        images=tally.images(),
        captions=tally.captions(cfg.text_length, tokenizer.vocab_size, source),
        speed=tally.speed(),
    )
    to_do = advice(findings)
    files = [] if folder is None else _write(folder, findings, to_do, shown)
    return Inspection(findings, to_do, files)


def _open(cfg: InspectConfig) -> Dataset:
    data = DataConfig(
        data_dir=cfg.data_dir,
        tokenizer=cfg.tokenizer,
        caption_key=cfg.caption_key,
        num_workers=0,
    )
    # Data that a run would refuse for their size or want of captions are what is looked for.
    return open_data(data, split="train", image_size=1, with_text=False, seed=0)


def _count(sights: Iterable[Sight], total: int) -> tuple[Tally, list[Sight]]:
    """The counts, and the samples of the contact sheet."""
    from tqdm import tqdm

    tally, shown = Tally(), []
    for sight in tqdm(sights, "inspecting", total, delay=2.0, mininterval=1.0, unit="img"):
        tally.add(sight)
        if sight.shown is not None:
            shown.append(sight)
    return tally, shown


def _make_folder(folder: Path) -> Path:
    """Made at the start: an hour of reading should not end at a typing error."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def _write(folder: Path, findings: Findings, to_do: list[str], shown: list[Sight]) -> list[Path]:
    path = folder / "inspection.json"
    try:
        write_json(path, {**findings.as_json(), "advice": to_do})
        return [path, *(write_sheet(folder, shown) if shown else [])]
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> UsageError:
    return UsageError(f"--out_dir {folder}: cannot be written ({error.strerror}), name another")
