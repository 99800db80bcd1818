"""Grids of samples on the way: what they show, and when."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from loop_tiny import ALONE, OPTIM, ToyTask, batch_of, generator_task, tiny_generator, trained
from PIL import Image
from torch import Tensor

from diff_dalle.data.tokenizer import Tokenizer
from diff_dalle.errors import UsageError
from diff_dalle.training.previews import PreviewConfig, plan_previews, read_prompts


class Painter(ToyTask):
    """Previews the colour of its first weight."""

    preview_from = "prompts"

    def preview(self, batch: object, keys: Tensor, name: str) -> dict[str, Tensor]:
        level = float(next(self.model.parameters()).detach().flatten()[0]) * 100 + 128
        return {name: torch.full((len(keys), 3, 4, 4), int(level), dtype=torch.uint8)}


def test_previews_show_raw_and_averaged_weights_with_their_captions(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["red circle", "빨간 원"], vocab_size=300)
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("\ufeffred circle\r\n\r\n빨간 원\n".encode())
    task = Painter()
    optim = dataclasses.replace(OPTIM, lr=0.1)
    trained(
        task,
        tmp_path / "run",
        optim=optim,
        iterations=4,
        ema_rate=(0.9, 0.99),
        previews=PreviewConfig(num_preview=3, sample_interval=2, validation_prompts=str(prompts)),
        tokenizer=tokenizer,
    )
    grids = sorted(path.name for path in (tmp_path / "run").glob("samples_*"))
    stems = ["samples_000002", "samples_000004"]
    assert grids == [f"{stem}.{end}" for stem in stems for end in ("png", "txt")]
    picture = Image.open(tmp_path / "run" / "samples_000004.png")
    assert picture.size == (2 * 4, 3 * 4)
    levels = {picture.getpixel((1, 4 * row + 1)) for row in range(3)}
    assert len(levels) == 3  # the weights and both averages differ
    text = (tmp_path / "run" / "samples_000004.txt").read_text(encoding="utf-8")
    assert text.splitlines() == [
        "rows: model, ema_0.9, ema_0.99", "column 1: red circle", "column 2: 빨간 원"
    ]  # fmt: skip


def test_previews_take_their_captions_from_the_data() -> None:
    tokenizer = Tokenizer.train(["abc"], vocab_size=259)
    batch = batch_of(range(5), bad=[1])
    preview = plan_previews(
        generator_task(tiny_generator()),
        batch,
        interval=1,
        number=3,
        prompts=[],
        tokenizer=tokenizer,
        seed=0,
        world=ALONE,
    )
    assert preview.batch.keys == ["000000", "000002", "000003"]  # whole samples only
    assert preview.captions[0] == tokenizer.decode(batch_of([0]).tokens[0])
    assert len(set(preview.keys.tolist())) == 3


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    for name in ("empty.txt", "missing.txt"):
        with pytest.raises(UsageError, match=f"--validation_prompts .*{name}"):
            read_prompts(str(tmp_path / name))


@pytest.mark.parametrize("wrong", [{"num_preview": -1}, {"sample_interval": -1}])
def test_wrong_knobs_of_previews_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(wrong))} is"):
        PreviewConfig(**wrong)


def test_previews_grow_fewer_with_their_size() -> None:
    cfg = PreviewConfig()
    assert [cfg.resolved_num_preview(size) for size in (64, 256, 1024)] == [8, 8, 2]


@pytest.mark.parametrize(
    ("previews", "steps"),
    [
        (None, []),
        (PreviewConfig(num_preview=0), []),
        (PreviewConfig(), [2, 4, 5]),
        (PreviewConfig(sample_interval=3), [3, 5]),
    ],
)
def test_previews_come_with_checkpoints_or_when_told(
    tmp_path: Path, previews: PreviewConfig | None, steps: list[int]
) -> None:
    trained(Painter(), tmp_path, previews=previews, iterations=5, save_interval=2)
    made = sorted(int(path.stem[-6:]) for path in tmp_path.glob("samples_*.png"))
    assert made == steps


def test_a_task_that_has_nothing_to_show_makes_no_grid(tmp_path: Path) -> None:
    trained(ToyTask(), tmp_path, previews=PreviewConfig(), iterations=1)
    assert not list(tmp_path.glob("samples_*"))
