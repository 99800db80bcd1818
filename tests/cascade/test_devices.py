"""Stages on devices of their own: which, what travels between them, and in which numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diff_dalle import Cascade
from diff_dalle.cascade.devices import choose_precisions, devices_of_rank, find_devices
from diff_dalle.errors import UsageError

CPU = torch.device("cpu")
OTHER = torch.device("cpu", 0)  # the same memory under another name
PROMPTS = ["a red circle", "a star"]
OPTIONS: dict[str, Any] = {"steps": 2, "guidance_scale": 2, "rerank": 3, "batch_size": 1}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and there is none")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_devices_by_name(two_gpus: None) -> None:
    second = torch.device("cuda", 1)
    assert find_devices("cpu") == [CPU]
    assert find_devices(["cuda:1", second, "cpu"]) == [second, second, CPU]


@no_gpu
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert find_devices(["auto", "cpu"]) == [CPU, CPU]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("gpu", "--device is 'gpu': give auto, cpu or cuda"),
        ("cuda:2", "--device is 'cuda:2', but there is none here: use cpu, cuda:0, cuda:1"),
        (["cpu", "meta"], "--device is 'meta', but there is none here: use cpu"),
        (["cpu", "vulkan"], "--device is 'vulkan', but there is none here"),
        ([], "--device names no device"),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_one_line(
    asked: Any, message: str, two_gpus: None
) -> None:
    with pytest.raises(UsageError, match=message) as error:
        find_devices(asked)
    assert "\n" not in str(error.value)


def test_devices_are_looked_at_before_anything_is_loaded() -> None:
    with pytest.raises(UsageError, match="--device is 'cuda:99'"):
        Cascade.load("no such folder", device="cuda:99")


@pytest.mark.parametrize("count", [2, 4])
def test_the_number_of_devices_must_fit_the_stages(folder: Path, count: int) -> None:
    with pytest.raises(UsageError, match=f"--device has {count} entries for 3 stages: give one"):
        Cascade.load(folder, device=["cpu"] * count)


def test_a_stage_computes_as_its_device_can() -> None:
    devices = [torch.device("cuda", 0), CPU]
    assert [one.name for one in choose_precisions(devices, "fp16")] == ["fp16", "fp32"]
    assert [one.device for one in choose_precisions(devices, "fp16")] == devices


def test_a_precision_that_there_is_not_is_refused_on_a_cpu_too(folder: Path) -> None:
    with pytest.raises(UsageError, match="--precision is 'fp15': it must be one of auto, fp32"):
        Cascade.load(folder / "base.pt", precision="fp15")


def test_a_rank_has_a_device_of_its_own() -> None:
    own = torch.device("cuda", 3)
    assert devices_of_rank(["cuda"], own, ranks=8) == [own]
    assert devices_of_rank(["cuda", "cuda"], own, ranks=8) == [own, own]
    assert devices_of_rank(["auto", "cpu", "auto"], own, ranks=1) == [own, "cpu", own]
    with pytest.raises(UsageError, match="--device is cuda:0 cpu, but 2 processes were started"):
        devices_of_rank(["cuda:0", "cpu"], own, ranks=2)


def test_a_folders_stages_take_the_devices_by_size(folder: Path) -> None:
    cascade = Cascade.load(folder, folder / "clip.pt", ["cpu", "cpu:0", "cpu"])
    assert cascade.sizes == [16, 32, 64]
    assert cascade.devices == [CPU, OTHER, CPU]
    assert [Path(stage.path).name for stage in cascade.stages] == ["base.pt", "up32.pt", "up64.pt"]


class Moves(TorchFunctionMode):
    """Tensors that are sent to `OTHER`."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and OTHER in args[1:]:
            self.sent.append(args[0])
        return func(*args, **(kwargs or {}))


def test_pictures_travel_as_bytes_and_are_the_same(guided: Cascade, folder: Path) -> None:
    """With candidates and both kinds of guidance; what else crosses is tokens and small tables."""
    spread = Cascade.load(folder, folder / "clip.pt", ["cpu", "cpu:0", "cpu"])
    with Moves() as moves:
        drawn = spread.sample(PROMPTS, **OPTIONS)
    pictures = [tensor for tensor in moves.sent if tensor.ndim == 4]
    assert [(tensor.dtype, *tensor.shape) for tensor in pictures] == [
        (torch.uint8, 1, 3, 16, 16)
    ] * 2
    assert any(tensor.dtype == torch.int64 for tensor in moves.sent)  # tokens
    expected = guided.sample(PROMPTS, **OPTIONS)
    assert drawn.candidates == expected.candidates
    for one, other in zip(drawn.stages, expected.stages, strict=True):
        np.testing.assert_array_equal(one, other)


@gpu
def test_stages_on_a_gpu_and_the_cpu_draw_and_agree(folder: Path) -> None:
    """fp32 on both; rounding may move a value by a few grey levels."""
    spread = Cascade.load(folder, folder / "clip.pt", ["cuda", "cpu", "cuda"], "fp32")
    for stage in spread.stages:
        assert all(p.device == stage.device for m in stage.modules for p in m.parameters())
    drawn = spread.sample(PROMPTS, steps=2)
    expected = Cascade.load(folder, folder / "clip.pt", "cpu").sample(PROMPTS, steps=2)
    for one, other in zip(drawn.stages, expected.stages, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 3


@gpu
def test_off_loading_empties_the_gpu_between_calls(folder: Path) -> None:
    plain = Cascade.load(folder, device="cuda").sample(PROMPTS, steps=2)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    cascade = Cascade.load(folder, device="cuda", offload=True)
    assert torch.cuda.memory_allocated() == before
    drawn = cascade.sample(PROMPTS, steps=2)
    weights = sum(
        p.nbytes for stage in cascade.stages for m in stage.modules for p in m.parameters()
    )
    assert torch.cuda.memory_allocated() - before < weights / 10
    for one, other in zip(drawn.stages, plain.stages, strict=True):
        np.testing.assert_array_equal(one, other)
