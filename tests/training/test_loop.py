"""The loop around a task: what it keeps, when it stops, and what it never lets through."""

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from loop_tiny import (
    ALONE,
    OPTIM,
    SIZE,
    Stream,
    ToyTask,
    batch_of,
    generator_task,
    held_out,
    record,
    tiny_generator,
    train_config,
    trained,
)

from diff_dalle.data.batch import Batch
from diff_dalle.errors import UsageError
from diff_dalle.training import bad_share
from diff_dalle.training.checkpoint_file import load_weights
from diff_dalle.training.checkpoints import find_latest, load_training_state
from diff_dalle.training.lock import locked
from diff_dalle.training.loop import Data, TrainConfig, train
from diff_dalle.training.optim import OptimConfig
from diff_dalle.training.previews import PreviewConfig


def test_training_learns_and_writes_what_it_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optim = dataclasses.replace(OPTIM, lr=0.02)
    intervals = {"log_interval": 20, "save_interval": 30}
    rows = trained(ToyTask(), tmp_path, optim=optim, iterations=60, **intervals)
    assert [row["step"] for row in rows] == [20, 30, 40, 60]
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    assert rows[-1]["samples"] == 240
    for name in ("lr", "grad_norm", "param_norm", "img_per_sec", "data_wait_share", "eta"):
        assert math.isfinite(rows[0][name]), name
    assert rows[-1]["eta"] == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        ".lock",
        "config.json", "tokenizer.json", "progress.csv", "metrics.jsonl",
        "model000030.pt", "ema_0.9_000030.pt", "opt000030.pt", "manifest000030.json",
        "model000060.pt", "ema_0.9_000060.pt", "opt000060.pt", "manifest000060.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["kind"] == "generator" and config["image_size"] == SIZE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[-1] == f"run folder: {tmp_path}"
    assert any(line.startswith("step 20: loss ") and "eta" in line for line in lines)


def test_an_update_is_the_one_written_by_hand(tmp_path: Path) -> None:
    """Two steps of AdamW with clipping, warm-up and averaging, against torch alone."""
    optim = OptimConfig(lr=0.01, warmup_steps=2, lr_schedule="constant", max_grad_norm=0.1)
    trained(ToyTask(), tmp_path, iterations=2, optim=optim, ema_rate=(0.9, 0.5))

    model = ToyTask().model
    averages = {rate: [p.detach().clone() for p in model.parameters()] for rate in (0.9, 0.5)}
    adam = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for step, lr in enumerate((0.005, 0.01)):
        batch = batch_of(range(4 * step, 4 * step + 4))
        assert batch.tokens is not None
        output = model(batch.image.float().mean((2, 3)) / 255)[:, 0]
        adam.zero_grad()
        ((output - batch.tokens[:, 1] / 10) ** 2).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        adam.param_groups[0]["lr"] = lr
        adam.step()
        for rate, average in averages.items():
            for mean, p in zip(average, model.parameters(), strict=True):
                mean.lerp_(p.detach(), 1 - rate)

    state = load_training_state(tmp_path, 2)
    for name, p in model.named_parameters():
        assert torch.allclose(state.model[name], p, atol=1e-6), name
    for rate, average in averages.items():
        for (name, _), mean in zip(model.named_parameters(), average, strict=True):
            assert torch.allclose(state.emas[str(rate)][name], mean, atol=1e-6), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path: Path, bad: float) -> None:
    optim = dataclasses.replace(OPTIM, lr=0.05)
    rows = trained(ToyTask(spoil={2: bad}), tmp_path, iterations=5, optim=optim, save_interval=1)
    before, after = load_training_state(tmp_path, 2), load_training_state(tmp_path, 3)
    for name, weights in before.model.items():
        assert torch.equal(weights, after.model[name])
        assert torch.equal(before.emas["0.9"][name], after.emas["0.9"][name])
    last = load_training_state(tmp_path, 5)
    assert all(bool(tensor.isfinite().all()) for tensor in last.model.values())
    assert not torch.equal(last.model["0.weight"], after.model["0.weight"])
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert last.extra["samples"] == 20  # the order goes on past the skipped batch


def test_steps_that_are_never_finite_stop_the_run(tmp_path: Path) -> None:
    task = ToyTask(spoil=dict.fromkeys(range(3, 100), math.nan))
    with pytest.raises(UsageError, match="not finite"):
        trained(task, tmp_path, iterations=100, save_interval=2)
    assert load_training_state(tmp_path, 2).step == 2
    assert "not finite" in (tmp_path / "error.txt").read_text()


def test_fp16_lowers_its_scale_instead(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="fp16 on a CPU"):
        task = ToyTask(spoil={1: math.inf}, precision="fp16")
    rows = trained(task, tmp_path, iterations=4)
    assert [round(row["lg_loss_scale"]) for row in rows] == [20, 19, 19, 19]
    assert rows[-1]["skipped_steps"] == 1


def test_bad_samples_are_counted_by_reason(tmp_path: Path) -> None:
    rows = trained(ToyTask(), tmp_path, stream=Stream(bad=(1, 6, 7)), iterations=4, log_interval=2)
    lines = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["000001", "000006", "000007"]
    assert {line["reason"] for line in lines} == {"truncated"}
    assert [row["bad_share"] for row in rows] == [3 / 8, 0.0]


def test_broken_held_out_samples_are_counted_once(tmp_path: Path) -> None:
    class Reading(ToyTask):
        def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
            return {"val_loss": float(sum(len(batch) for batch in batches))}

    def held_out_with_one_broken() -> Iterator[Batch]:
        yield batch_of(range(4), bad=(2,))

    data = Data(train=Stream(), val=held_out_with_one_broken)
    cfg = train_config(tmp_path, iterations=4, eval_interval=1)
    train(Reading(), data, cfg, OPTIM, record=record(), world=ALONE)
    (line,) = (tmp_path / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "000002"


def test_too_many_bad_samples_stop_the_run_where_it_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bad_share, "WINDOW", 8)
    run = {"iterations": 5, "max_bad_share": 0.25}
    with pytest.raises(UsageError, match="3 of the last 8 samples .*--max_bad_share 0.25"):
        trained(ToyTask(), tmp_path, stream=Stream(bad=(1, 9, 10, 11)), **run)
    assert find_latest(tmp_path) == 3  # samples 4 to 11
    lines = (tmp_path / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["000001", "000009", "000010", "000011"]
    rows = trained(ToyTask(), tmp_path, **run)
    assert rows[-1]["step"] == 5


def test_another_global_batch_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(ToyTask(), tmp_path, iterations=1)
    trained(ToyTask(), tmp_path, stream=Stream(batch_size=6), iterations=2, batch_size=6)
    told = "a step has 6 samples on all ranks together, it had 4: --global_batch_size 4 keeps it"
    assert told in capsys.readouterr().out


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    task = ToyTask(scores=[3.0, 9.0, 1.0, 9.0, math.nan, 9.0])  # raw and averaged in turn
    rows = trained(task, tmp_path, iterations=3, eval_interval=1, save_interval=1)
    assert [row["val_loss"] for row in rows] == pytest.approx([3.0, 1.0, math.nan], nan_ok=True)
    assert [row["ema_val_loss"] for row in rows] == [9.0, 9.0, 9.0]
    best = load_weights(tmp_path / "best.pt")
    assert (best.step, best.kind, best.ema_rate) == (2, "generator", None)
    for name, weights in load_training_state(tmp_path, 2).model.items():
        assert torch.equal(best.state_dict[name], weights)


@pytest.mark.parametrize("start", ["the beginning", "weights alone", "other data in between"])
def test_no_worse_weights_replace_the_best(tmp_path: Path, start: str) -> None:
    run = {"iterations": 2, "eval_interval": 1}
    trained(ToyTask(scores=[0.5]), tmp_path, **run)
    more: dict[str, object] = {"iterations": 4, "eval_interval": 1}
    if start == "the beginning":  # it never came to a checkpoint
        (tmp_path / "manifest000002.json").unlink()
    elif start == "weights alone":
        more["resume_checkpoint"] = str(tmp_path / "ema_0.9_000002.pt")
    else:
        cfg = train_config(tmp_path, iterations=3, eval_interval=1)
        train(ToyTask(), Data(train=Stream()), cfg, OPTIM, record=record(), world=ALONE)
        (tmp_path / "best.pt").unlink()  # what the checkpoints remember counts
        trained(ToyTask(scores=[0.6, 9.0]), tmp_path, **more)
        assert not (tmp_path / "best.pt").exists()
        return
    trained(ToyTask(scores=[0.7, 9.0, 0.6, 9.0, 0.4, 9.0, 0.8, 9.0]), tmp_path, **more)
    best = load_weights(tmp_path / "best.pt")
    assert (best.step, best.score) == ((3, 0.4) if start == "the beginning" else (1, 0.5))


def test_a_run_of_other_settings_replaces_the_best(tmp_path: Path) -> None:
    trained(ToyTask(scores=[0.5]), tmp_path, iterations=1, eval_interval=1)
    (tmp_path / "manifest000001.json").unlink()
    cfg = train_config(tmp_path, iterations=1, eval_interval=1)
    data = Data(train=Stream(), val=held_out)
    other = record(image_size=32)
    train(ToyTask(scores=[0.9]), data, cfg, OPTIM, record=other, world=ALONE)
    assert load_weights(tmp_path / "best.pt").score == 0.9


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    trained(ToyTask(), tmp_path, iterations=1)
    with (
        locked(tmp_path),
        pytest.raises(UsageError, match=r"is in use by another run \(process \d+ on .*--log_dir"),
    ):
        trained(ToyTask(), tmp_path, iterations=2)
    trained(ToyTask(), tmp_path, iterations=2)


def test_a_task_may_keep_no_best(tmp_path: Path) -> None:
    task = ToyTask()
    task.keeps_best = False
    trained(task, tmp_path, iterations=2, eval_interval=1)
    assert not (tmp_path / "best.pt").exists()


def test_training_stops_early_on_request_and_stays_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = [2.0, 0.0, 1.0, 0.0, 1.5, 0.0, 1.2, 0.0]
    trained(ToyTask(scores=scores, stop_early=2), tmp_path, iterations=50, eval_interval=2)
    assert load_training_state(tmp_path, 8).step == 8  # saved although no save was due
    assert "stops at step 8" in capsys.readouterr().out
    stream = Stream()
    trained(ToyTask(stop_early=2), tmp_path, stream=stream, iterations=50, eval_interval=2)
    assert not stream.seen
    rows = trained(ToyTask(stop_early=4), tmp_path, iterations=9, eval_interval=2)
    assert rows[-1]["step"] == 9


def test_without_held_out_data_nothing_is_evaluated(tmp_path: Path) -> None:
    rows = trained(ToyTask(), tmp_path, val=False, iterations=2, eval_interval=1)
    assert "val_loss" not in rows[-1] and not (tmp_path / "best.pt").exists()


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_dry_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = tree(tmp_path)
    task = generator_task(tiny_generator())
    cfg = train_config(tmp_path / "run", dry_run=2, iterations=1000)
    data = Data(train=Stream(), val=held_out)
    rest = {"previews": PreviewConfig(num_preview=0), "record": record(), "world": ALONE}
    assert train(task, data, cfg, OPTIM, **rest) is None
    assert tree(tmp_path) == before
    said = capsys.readouterr().out
    parameters = sum(p.numel() for p in task.model.parameters())
    for part in (
        f"{parameters:,} parameters from step 0 to 1,000, 4,000 samples",
        f"checkpoints of 0.01 GiB each to {tmp_path / 'run'}",
        "samples_000002.png",
        "model000002.pt",
        "GiB at its peak",
    ):
        assert part in said
    assert "step 2: loss" in said and "step 3: loss" not in said


def test_a_dry_run_in_a_run_folder_changes_nothing(tmp_path: Path) -> None:
    trained(ToyTask(), tmp_path, iterations=3)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    cfg = train_config(tmp_path, dry_run=1, iterations=10)
    data = Data(train=Stream())
    train(ToyTask(), data, cfg, OPTIM, record=record(), world=ALONE)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"microbatch": 0},
        {"iterations": 0},
        {"log_interval": 0},
        {"dry_run": -1},
        {"init_checkpoint": "a.pt", "resume_checkpoint": "b.pt"},
    ],
)
def test_wrong_knobs_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(wrong))} is"):
        TrainConfig(**wrong)
