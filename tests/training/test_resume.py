"""Where a run begins, and that an interrupted one ends as if nothing had happened."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loop_tiny import (
    ALONE,
    OPTIM,
    Stream,
    ToyTask,
    classifier_task,
    generator_task,
    held_out,
    record,
    tiny_clip,
    tiny_generator,
    train_config,
)
from torch import Tensor

from diff_dalle.diffusion.timesteps import TimestepConfig
from diff_dalle.errors import UsageError
from diff_dalle.training.checkpoint_file import load_weights
from diff_dalle.training.checkpoints import load_training_state
from diff_dalle.training.generator_task import GeneratorTaskConfig
from diff_dalle.training.loop import Data, RunRecord, train
from diff_dalle.training.precision import PrecisionConfig
from diff_dalle.training.resume import check_folder, choose_folder, find_start
from diff_dalle.training.tasks import Task


def generator(precision: str = "fp32") -> Task:
    return generator_task(
        tiny_generator(small_size=8, dropout=0.2, awake=True),
        GeneratorTaskConfig(gaussian_blur=True, cond_drop_prob=0.3),
        timesteps=TimestepConfig(schedule_sampler="loss-second-moment"),
        microbatch=3,
        precision=PrecisionConfig(precision=precision),
    )


def classifier() -> Task:
    return classifier_task(tiny_clip(dropout=0.2, awake=True), microbatch=3)


def trained(
    task: Task, folder: Path, stream: Stream | None = None, kind: str = "generator", **cfg: object
) -> Path:
    stream = stream or Stream()
    data = Data(train=stream, val=held_out)
    config = train_config(folder, **cfg)
    train(task, data, config, OPTIM, record=record(kind), world=ALONE)
    return folder


def leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{path}/{name}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{path}/{index}")
    else:
        yield path, value


def assert_same(first: Path, second: Path, step: int) -> None:
    """Bit-identical weights, averages, optimizer, and everything else of a checkpoint."""
    states = [load_training_state(folder, step) for folder in (first, second)]
    parts = ("model", "emas", "optimizer_state", "extra")
    pairs = [
        zip(leaves(getattr(states[0], p)), leaves(getattr(states[1], p)), strict=True)
        for p in parts
    ]
    compared = 0
    for (name, one), (other_name, two) in (pair for part in pairs for pair in part):
        assert name == other_name
        same = torch.equal(one, two) if isinstance(one, Tensor) else one == two
        assert same, name
        compared += 1
    assert compared > 100


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_generator_ends_bit_for_bit_alike(tmp_path: Path, precision: str) -> None:
    straight, broken = Stream(bad=(2,)), Stream(bad=(2,))
    trained(generator(precision), tmp_path / "a", straight, iterations=12)
    trained(generator(precision), tmp_path / "b", broken, iterations=5, save_interval=5)
    trained(generator(precision), tmp_path / "b", broken, iterations=12)
    assert broken.seen == straight.seen
    assert_same(tmp_path / "a", tmp_path / "b", 12)
    one, two = (load_training_state(tmp_path / n, 12).extra for n in "ab")
    assert one["samples"] == two["samples"] == 48
    assert int(one["task"]["timestep_sampler"]["counts"].sum()) == 47


def test_an_interrupted_classifier_ends_bit_for_bit_alike(tmp_path: Path) -> None:
    trained(classifier(), tmp_path / "a", kind="classifier", iterations=12)
    trained(classifier(), tmp_path / "b", kind="classifier", iterations=5)
    trained(classifier(), tmp_path / "b", kind="classifier", iterations=12)
    assert_same(tmp_path / "a", tmp_path / "b", 12)


def test_an_interrupted_run_forgets_no_count(tmp_path: Path) -> None:
    """Loss scale, skipped steps, evaluations since the best: what the others do not touch."""

    def toy(scores: list[float]) -> Task:
        with pytest.warns(UserWarning, match="fp16 on a CPU"):
            return ToyTask(spoil={1: math.inf}, scores=scores, precision="fp16")

    scores = [2.0, 0.0, 1.0, 0.0, 3.0, 0.0, 4.0, 0.0]
    trained(toy(scores), tmp_path / "a", iterations=8, eval_interval=2)
    trained(toy(scores[:4]), tmp_path / "b", iterations=4, eval_interval=2)
    trained(toy(scores[4:]), tmp_path / "b", iterations=8, eval_interval=2)
    extra = load_training_state(tmp_path / "b", 8).extra
    assert extra == load_training_state(tmp_path / "a", 8).extra
    assert extra["held_out"] == {"best": 1.0, "since_best": 2}
    assert extra["guard"]["skipped"] == 1
    assert 19 < extra["precision"]["lg_loss_scale"] < 19.1
    assert load_weights(tmp_path / "b" / "best.pt").step == 4


def test_losses_of_an_interrupted_run_are_the_same_lines(tmp_path: Path) -> None:
    trained(generator(), tmp_path / "a", iterations=6)
    trained(generator(), tmp_path / "b", iterations=4, save_interval=2)
    for path in (tmp_path / "b").glob("*000004*"):
        path.unlink()  # as if it had been killed between steps 2 and 4
    trained(generator(), tmp_path / "b", iterations=6)
    rows = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in "ab"]
    timeless = [
        [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in part]
        for part in rows
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 6


TIMES = {"img_per_sec", "data_wait_share", "time_to_first_batch", "eta"}


def test_the_order_of_samples_goes_on_when_the_batch_changes(tmp_path: Path) -> None:
    stream = Stream(batch_size=4)
    trained(ToyTask(), tmp_path, stream, iterations=3)
    stream.batch_size = 6
    trained(ToyTask(), tmp_path, stream, iterations=5, batch_size=6)
    assert stream.seen == [f"{i:06d}" for i in range(24)]
    assert load_training_state(tmp_path, 5).extra["samples"] == 24


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    stream = Stream()
    trained(ToyTask(), tmp_path, stream, iterations=2)
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")}
    seen = list(stream.seen)
    trained(ToyTask(), tmp_path, stream, iterations=2)
    assert stream.seen == seen
    assert files == {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")}


def test_averaged_weights_alone_start_a_run_from_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(ToyTask(), tmp_path / "a", iterations=4)
    average = tmp_path / "a" / "ema_0.9_000004.pt"
    start = find_start(
        train_config(tmp_path / "b", resume_checkpoint=str(average)),
        record(),
        tmp_path / "b",
        warn=print,
    )
    assert start.step == 4 and start.state is None and start.weights is not None
    capsys.readouterr()
    trained(ToyTask(), tmp_path / "b", iterations=4, resume_checkpoint=str(average))
    loud = [line for line in capsys.readouterr().out.splitlines() if "NOTE" in line]
    assert len(loud) == 1 and "optimizer starts afresh" in loud[0]

    trained(ToyTask(), tmp_path / "c", iterations=5, resume_checkpoint=str(average))
    state = load_training_state(tmp_path / "c", 5)
    before = load_weights(average).state_dict
    for name, tensor in state.emas["0.9"].items():  # one step of averaging away from the file
        expected = before[name] + 0.1 * (state.model[name] - before[name])
        assert torch.allclose(tensor, expected, atol=1e-6), name
    steps = {v for n, v in leaves(state.optimizer_state) if n.endswith("/step")}
    assert {float(s) for s in steps if isinstance(s, Tensor)} == {1.0}


def test_a_model_file_without_its_optimizer_starts_weights_alone(tmp_path: Path) -> None:
    trained(ToyTask(), tmp_path / "a", iterations=4)
    (tmp_path / "a" / "opt000004.pt").unlink()
    path = tmp_path / "a" / "model000004.pt"
    cfg = train_config(tmp_path / "b", resume_checkpoint=str(path))
    start = find_start(cfg, record(), tmp_path / "b", warn=print)
    assert start.weights is not None and start.step == 4


def test_averaged_weights_under_the_fields_other_name_are_no_whole_checkpoint(
    tmp_path: Path,
) -> None:
    trained(ToyTask(), tmp_path / "a", iterations=4)
    path = tmp_path / "a" / "model000004_ema.pt"
    path.write_bytes((tmp_path / "a" / "ema_0.9_000004.pt").read_bytes())
    cfg = train_config(tmp_path / "b", resume_checkpoint=str(path))
    start = find_start(cfg, record(), tmp_path / "b", warn=print)
    assert start.state is None and start.step == 4
    assert start.weights is not None and start.weights.ema_rate == 0.9


@pytest.mark.parametrize("name", ["", "model000004.pt", "opt000004.pt"])
def test_a_whole_checkpoint_elsewhere_is_gone_on_from_exactly(tmp_path: Path, name: str) -> None:
    trained(ToyTask(), tmp_path / "a", iterations=4)
    cfg = train_config(tmp_path / "b", resume_checkpoint=str(tmp_path / "a" / name))
    start = find_start(cfg, record(), tmp_path / "b", warn=print)
    assert start.state is not None and start.step == 4


def test_fine_tuning_starts_from_weights_at_step_0(tmp_path: Path) -> None:
    trained(ToyTask(), tmp_path / "a", iterations=3)
    weights = tmp_path / "a" / "model000003.pt"
    cfg = train_config(tmp_path / "b", init_checkpoint=str(weights))
    start = find_start(cfg, record(seed=7), tmp_path / "b", warn=print)
    assert start.step == 0 and start.weights is not None
    trained(ToyTask(), tmp_path / "b", iterations=2, init_checkpoint=str(weights))
    again = find_start(
        train_config(tmp_path / "b", init_checkpoint=str(weights)),
        record(),
        tmp_path / "b",
        warn=print,
    )
    assert again.step == 2 and again.weights is None  # the same command goes on


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    trained(ToyTask(), tmp_path / "a", iterations=1)
    weights = str(tmp_path / "a" / "model000001.pt")
    other = ToyTask()
    other.model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))
    with pytest.raises(UsageError, match="model000001.pt does not fit this run's model"):
        trained(other, tmp_path / "b", iterations=1, init_checkpoint=weights)
    assert not (tmp_path / "b").exists()


def test_weights_that_would_load_and_compute_nonsense_are_refused(tmp_path: Path) -> None:
    trained(ToyTask(), tmp_path / "a", iterations=1)
    weights = str(tmp_path / "a" / "model000001.pt")
    cfg = train_config(tmp_path / "b", init_checkpoint=weights)
    with pytest.raises(UsageError, match="norm_groups: 32 -> 8.*another --init_checkpoint"):
        find_start(cfg, record(norm_groups=8), tmp_path / "b", warn=print)
    start = find_start(cfg, record(image_size=32, prediction="v"), tmp_path / "b", warn=print)
    assert start.notes[1].endswith("image_size: 16 -> 32, prediction: eps -> v")


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    trained(ToyTask(), tmp_path / "a", iterations=1)
    other = dataclasses.replace(record(), tokenizer_json="{1}")
    cfg = train_config(tmp_path / "b", init_checkpoint=str(tmp_path / "a" / "model000001.pt"))
    with pytest.raises(UsageError, match="another tokenizer.*--tokenizer"):
        find_start(cfg, other, tmp_path / "b", warn=print)


def test_a_folder_of_another_kind_of_run_is_refused(tmp_path: Path) -> None:
    trained(ToyTask(), tmp_path, iterations=1)
    with pytest.raises(UsageError, match=f"holds a generator run.*{tmp_path}/classifier"):
        check_folder(tmp_path, record("classifier"))


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"image_size": 32}, "image_size: 16 -> 32"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"ema_rate": [0.5]}, "ema_rate"),
    ],
)
def test_a_run_of_other_settings_is_refused(
    tmp_path: Path, change: dict[str, object], shown: str
) -> None:
    trained(ToyTask(), tmp_path, iterations=1)
    with pytest.raises(UsageError, match=f"{shown}.*--log_dir {tmp_path}/again"):
        check_folder(tmp_path, record(**change))
    (tmp_path / "config.json").unlink()  # then the checkpoint itself tells
    with pytest.raises(UsageError, match=shown):
        find_start(train_config(tmp_path), record(**change), tmp_path, warn=print)


@pytest.mark.parametrize("change", [{"data": "other"}, {"tokenizer_json": "{1}"}])
def test_other_data_or_another_tokenizer_are_refused(
    tmp_path: Path, change: dict[str, str]
) -> None:
    trained(ToyTask(), tmp_path, iterations=1)
    with pytest.raises(UsageError, match="data: fing|tokenizer_sha256"):
        check_folder(tmp_path, dataclasses.replace(record(), **change))


def test_five_differences_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    def wide(value: int) -> RunRecord:
        flags = {f"flag_{i}": value for i in range(8)}
        return dataclasses.replace(record(**flags), shaping=frozenset(flags))

    trained(ToyTask(), tmp_path, iterations=1)
    (tmp_path / "config.json").write_text(json.dumps(wide(0).described()))
    with pytest.raises(UsageError, match="flag_4: 0 -> 1 and 3 more") as caught:
        check_folder(tmp_path, wide(1))
    assert str(caught.value).count("->") == 5


def test_a_run_that_never_saved_may_start_otherwise(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(record(image_size=99).described()))
    assert find_start(train_config(tmp_path), record(), tmp_path, warn=print).step == 0


@pytest.mark.parametrize("name", ["progress.csv", "model010000.pt", "ema_0.9999_010000.pt"])
def test_a_folder_of_another_program_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("step,loss\n5,0.1\n")
    with pytest.raises(UsageError, match=f"{name} but no config.json.*--log_dir {tmp_path}/run"):
        trained(ToyTask(), tmp_path, iterations=1)
    assert (tmp_path / name).read_text() == "step,loss\n5,0.1\n"


def test_a_flag_that_an_older_version_did_not_know_has_its_default(tmp_path: Path) -> None:
    trained(ToyTask(), tmp_path, iterations=1)  # its record has no norm_groups
    assert find_start(train_config(tmp_path), record(norm_groups=32), tmp_path, print).step == 1
    with pytest.raises(UsageError, match="norm_groups: 32 -> 8"):
        find_start(train_config(tmp_path), record(norm_groups=8), tmp_path, warn=print)


def test_what_may_change_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(ToyTask(), tmp_path, iterations=1)
    start = find_start(train_config(tmp_path), record(lr=5e-4), tmp_path, warn=print)
    assert any("lr: 0.001 -> 0.0005" in note for note in start.notes)


def test_without_resume_a_folder_with_checkpoints_is_not_overwritten(tmp_path: Path) -> None:
    trained(ToyTask(), tmp_path, iterations=2)
    cfg = train_config(tmp_path, resume_checkpoint="none")
    with pytest.raises(UsageError, match="already holds step 2.*auto"):
        find_start(cfg, record(), tmp_path, warn=print)


def test_the_same_command_goes_on_even_where_it_names_a_checkpoint(tmp_path: Path) -> None:
    before = trained(ToyTask(), tmp_path / "before", iterations=2)
    folder, weights = tmp_path / "run", str(before / "ema_0.9_000002.pt")
    cfg, asked = train_config(folder, resume_checkpoint=weights), record(resume_checkpoint=weights)
    train(ToyTask(), Data(train=Stream()), cfg, OPTIM, record=asked, world=ALONE)
    start = find_start(cfg, asked, folder, warn=print)
    assert start.state is not None and start.step == 3
    other = train_config(folder, resume_checkpoint=str(before / "model000002.pt"))
    with pytest.raises(UsageError, match="already holds step 3"):
        find_start(other, record(), folder, warn=print)


def test_a_folder_whose_checkpoint_lost_a_file_is_still_a_run(tmp_path: Path) -> None:
    trained(ToyTask(), tmp_path, iterations=2)
    (tmp_path / "opt000002.pt").unlink()
    table = (tmp_path / "progress.csv").read_bytes()
    with pytest.raises(UsageError, match="opt000002.pt is missing"):
        trained(ToyTask(), tmp_path, iterations=2)
    with pytest.raises(UsageError, match="image_size"):
        check_folder(tmp_path, record(image_size=32))
    assert (tmp_path / "progress.csv").read_bytes() == table


def test_a_damaged_newest_checkpoint_is_passed_over_loudly(tmp_path: Path) -> None:
    trained(ToyTask(), tmp_path, iterations=2, save_interval=1)
    path = tmp_path / "model000002.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    warnings: list[str] = []
    start = find_start(train_config(tmp_path), record(), tmp_path, warnings.append)
    assert start.step == 1 and len(warnings) == 1
    cfg = train_config(tmp_path / "b", resume_checkpoint=str(path))
    with pytest.raises(UsageError):
        find_start(cfg, record(), tmp_path / "b", warn=print)


@pytest.mark.parametrize("what", ["missing", "text"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "model000001.pt"
    if what == "text":
        path.write_text("not a checkpoint")
    cfg = train_config(tmp_path / "run", resume_checkpoint=str(path))
    with pytest.raises(UsageError, match="model000001.pt"):
        find_start(cfg, record(), tmp_path / "run", warn=print)


def test_the_run_folder_is_named_by_flag_then_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "environment"))
    assert choose_folder(train_config(tmp_path / "flag"), ALONE) == tmp_path / "flag"
    nameless = dataclasses.replace(train_config(tmp_path), log_dir=None)
    assert choose_folder(nameless, ALONE) == tmp_path / "environment"
    monkeypatch.delenv("OPENAI_LOGDIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fresh = choose_folder(nameless, ALONE)
    assert fresh.is_dir() and fresh.parent == tmp_path and not list(fresh.iterdir())
