"""Means, norms and pace, and the files and dashboards they go to."""

import csv
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diff_dalle.distributed import World
from diff_dalle.errors import UsageError
from diff_dalle.training.metrics import Meter, Pace, norm
from diff_dalle.training.run_log import CsvTable, RunLog, open_log

CPU = torch.device("cpu")


def test_means_are_weighted_over_batches() -> None:
    meter = Meter(CPU)
    meter.add("loss", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    meter.add("loss", torch.tensor([6.0]), torch.tensor([2.0]))
    meter.add("lr", 0.5)
    assert meter.means(World()) == {"loss": 15 / 4, "lr": 0.5}
    assert meter.means(World()) == {}


def test_what_has_no_weight_or_is_not_finite_counts_nothing() -> None:
    meter = Meter(CPU)
    meter.add("loss", torch.tensor([math.nan, 3.0]), torch.tensor([0.0, 1.0]))
    meter.add("loss", torch.tensor([math.nan, math.inf]), torch.tensor([1.0, 1.0]))
    meter.add("vb", torch.tensor([1.0]), torch.tensor([0.0]))
    assert meter.means(World()) == {"loss": 3.0}


def test_quartiles_hold_their_timesteps() -> None:
    meter = Meter(CPU)
    t = torch.tensor([0, 24, 25, 49, 50, 74, 75, 99])
    meter.add_by_quartile("loss", t.double(), t, 100, torch.ones(8))
    means = meter.means(World())
    assert [means[f"loss_q{q}"] for q in range(4)] == [12.0, 37.0, 62.0, 87.0]
    assert means["loss"] == 49.5


def test_norm_is_that_of_all_numbers_together() -> None:
    assert norm([torch.tensor([3.0]), torch.tensor([[4.0, 12.0]])]) == pytest.approx(13.0)


def test_pace_counts_waiting_and_work() -> None:
    pace = Pace()
    pace.stepped(10, waiting=1.0, working=3.0)
    pace.stepped(10, waiting=0.0, working=1.0)
    assert pace.seconds_per_step == 2.5
    values = pace.measure(steps_left=0)
    assert values["img_per_sec"] == pytest.approx(4.0)
    assert values["data_wait_share"] == pytest.approx(0.2)
    assert values["eta"] == 0
    assert values["time_to_first_batch"] == 1.0
    pace.stepped(10, waiting=3.0, working=1.0)
    later = pace.measure(steps_left=0)
    assert later["data_wait_share"] == 0.75 and "time_to_first_batch" not in later


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "progress.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    text = (folder / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def quiet_log(folder: Path, start_step: int = 0) -> RunLog:
    return open_log(folder, "none", start_step=start_step, config={})


def test_columns_grow_and_no_row_is_lost(tmp_path: Path) -> None:
    log = quiet_log(tmp_path)
    log.write(1, {"loss": 0.5})
    log.write(2, {"loss": 0.25, "val_loss": 1.0})
    log.write(3, {"loss": 0.125})
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"]
    assert [row["loss"] for row in rows(tmp_path)] == ["0.5", "0.25", "0.125"]
    assert [row["val_loss"] for row in rows(tmp_path)] == ["", "1.0", ""]
    assert lines(tmp_path, "metrics.jsonl")[1] == {"step": 2, "loss": 0.25, "val_loss": 1.0}


def test_a_resumed_run_repeats_no_row(tmp_path: Path) -> None:
    log = quiet_log(tmp_path)
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": float(step), "val_loss": 0.5})
        log.bad(step, [("a.tar", f"{step:06d}", "truncated")])
    resumed = quiet_log(tmp_path, start_step=2)
    for step in (3, 4):
        resumed.write(step, {"loss": 10.0 * step, "new": 1.0})
        resumed.bad(step, [("a.tar", f"{step:06d}", "too small")])
    resumed.close()
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [
        ("1", "1.0"), ("2", "2.0"), ("3", "30.0"), ("4", "40.0")
    ]  # fmt: skip
    assert rows(tmp_path)[0]["val_loss"] == "0.5" and rows(tmp_path)[3]["new"] == "1.0"
    assert [row["step"] for row in lines(tmp_path, "metrics.jsonl")] == [1, 2, 3, 4]
    bad = lines(tmp_path, "bad_samples.jsonl")
    assert [row["reason"] for row in bad] == ["truncated"] * 2 + ["too small"] * 2
    assert bad[0] == {"step": 1, "shard": "a.tar", "key": "000001", "reason": "truncated"}


def test_a_row_torn_by_a_crash_is_dropped(tmp_path: Path) -> None:
    log = quiet_log(tmp_path)
    log.write(1, {"loss": 1.0, "mse": 1.0})
    with (tmp_path / "progress.csv").open("a", encoding="utf-8") as file:
        file.write("2,0.")
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')
    resumed = quiet_log(tmp_path, start_step=2)
    resumed.write(2, {"loss": 2.0, "mse": 2.0})
    assert [row["loss"] for row in rows(tmp_path)] == ["1.0", "2.0"]
    assert [row["step"] for row in lines(tmp_path, "metrics.jsonl")] == [1, 2]


def test_a_bad_sample_is_listed_once_however_often_it_is_met(tmp_path: Path) -> None:
    odd = ("\udcc7\u00d1.tar", "a\u2028b", "too small")  # a folder name that is no UTF-8
    plain = ("a.tar", "1", "truncated")
    log = quiet_log(tmp_path)
    log.bad(1, [odd, plain, plain])
    log.bad(2, [plain, ("a.tar", "2", "truncated")])
    resumed = quiet_log(tmp_path, start_step=1)  # what came after step 1 will be met again
    resumed.bad(2, [plain, odd, ("a.tar", "2", "truncated")])
    found = lines(tmp_path, "bad_samples.jsonl")
    assert [(row["step"], row["key"]) for row in found] == [(1, "a\u2028b"), (1, "1"), (2, "2")]
    assert found[0]["shard"] == odd[0]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = open_log(None, "tensorboard", start_step=0, config={})
    log.write(1, {"loss": 1.0})
    log.bad(1, [("a.tar", "k", "truncated")])
    log.image(1, "samples", np.zeros((2, 2, 3), np.uint8))
    log.close()
    assert not list(tmp_path.iterdir())


def test_unknown_reporters_are_refused() -> None:
    with pytest.raises(UsageError, match="--report_to names 'tensorbord'"):
        open_log(None, "tensorbord", start_step=0, config={})


def test_a_missing_reporter_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install wandb"):
        open_log(None, "wandb", start_step=0, config={})
    open_log(None, "auto", start_step=0, config={})  # does without


def test_tensorboard_holds_curves_and_pictures(tmp_path: Path) -> None:
    log = open_log(tmp_path, "auto", start_step=0, config={})
    log.write(1, {"loss": 2.0})
    log.write(2, {"loss": 1.0})
    log.image(2, "samples", np.full((4, 8, 3), 128, np.uint8))
    log.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]
    picture = events.Images("samples")[0]
    assert (picture.step, picture.width, picture.height) == (2, 8, 4)


def test_wandb_writes_offline_into_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = open_log(tmp_path, "wandb", start_step=0, config={"lr": 0.5})
    log.write(1, {"loss": 2.0})
    log.image(1, "samples", np.zeros((4, 4, 3), np.uint8))
    log.close()
    name = (tmp_path / "wandb_run_id.txt").read_text()
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) == 1 and files[0].stat().st_size > 0


def test_a_table_survives_a_crash_during_its_rewrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = CsvTable(tmp_path / "progress.csv", 0)
    table.write(1, {"loss": 1.0})

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        table.write(2, {"loss": 1.0, "mse": 1.0})
    assert [row["loss"] for row in rows(tmp_path)] == ["1.0"]
