"""Off-loading: whose weights are on the device, how often they move, and what stays the same.

A copy in other memory stands for one on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diff_dalle import Cascade
from diff_dalle.cascade import offload
from diff_dalle.cascade.stages import Stage
from diff_dalle.sampling_io.config import SampleConfig

PROMPTS = ["a red circle", "a star", "파란 별"]
OPTIONS: dict[str, Any] = {"steps": 2, "guidance_scale": 2, "batch_size": 1}


class Watch:
    """A cascade's weights: where they are when they are read, and how often they came."""

    def __init__(self, cascade: Cascade) -> None:
        self.cascade = cascade
        self.came: list[int] = []  # picture sizes of the stages that came, in order
        self.most = 0  # stages that were there at once
        self._homes = [first_weight(stage).data_ptr() for stage in cascade.stages]
        for number, stage in enumerate(cascade.stages):
            readers = [
                stage.loaded.generator,
                stage.guide and stage.guide.loaded.clip.image_encoder,
            ]
            for reader in filter(None, readers):
                reader.register_forward_pre_hook(lambda *_, number=number: self._read(number))

    def there(self) -> list[int]:
        """Numbers of the stages whose weights are away from home."""
        weights = [first_weight(stage).data_ptr() for stage in self.cascade.stages]
        return [n for n, home in enumerate(self._homes) if weights[n] != home]

    def _read(self, number: int) -> None:
        assert number in self.there()
        self.most = max(self.most, len(self.there()))


def first_weight(stage: Stage) -> Tensor:
    return next(stage.loaded.generator.parameters())


@pytest.fixture
def watched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes off-loading cascades, watched."""
    monkeypatch.setattr(offload, "_copy", lambda data, device: data.clone())
    visit = offload.Visit.__init__

    def make(device: Any = "cpu", paths: Any = folder, clip: bool = True) -> Watch:
        clips = folder / "clip.pt" if clip else None
        watch = Watch(Cascade.load(paths, clips, device, offload=True, warn=False))

        def come(self: offload.Visit, modules: Any, device: torch.device) -> None:
            sizes = [s.image_size for s in watch.cascade.stages if s.loaded.generator is modules[0]]
            watch.came += sizes
            visit(self, modules, device)

        monkeypatch.setattr(offload.Visit, "__init__", come)
        return watch

    yield make


def weights(cascade: Cascade) -> list[Tensor]:
    return [t.clone() for s in cascade.stages for m in s.modules for t in m.state_dict().values()]


@pytest.mark.parametrize("rerank", [1, 3])
def test_one_stage_at_a_time_and_the_same_bit_for_bit(
    watched: Any, guided: Cascade, rerank: int
) -> None:
    """Pictures and weights; a stage comes once a batch, however many candidates it draws."""
    watch = watched()
    before = weights(watch.cascade)
    drawn = watch.cascade.sample(PROMPTS, rerank=rerank, **OPTIONS)
    assert watch.came == [16, 32, 64] * len(PROMPTS)
    assert watch.most == 1 and watch.there() == []
    expected = guided.sample(PROMPTS, rerank=rerank, **OPTIONS)
    assert drawn.candidates == expected.candidates
    for one, other in zip(drawn.stages, expected.stages, strict=True):
        np.testing.assert_array_equal(one, other)
    assert all(map(torch.equal, before, weights(watch.cascade)))


def test_a_stage_with_a_device_to_itself_comes_once_a_call(watched: Any) -> None:
    watch = watched(["cpu", "cpu:0", "cpu"])
    watch.cascade.sample(PROMPTS[:2], **OPTIONS)
    assert watch.came == [16, 32, 64, 16, 64]  # the second has its device to itself
    assert watch.most == 2 and watch.there() == []
    watch.cascade.sample(PROMPTS[:1], **OPTIONS)
    assert watch.came[5:] == [16, 32, 64]  # and is away between calls


def test_a_single_stage_stays_for_all_batches(watched: Any, folder: Path) -> None:
    watch = watched(paths=folder / "base.pt")
    watch.cascade.sample(PROMPTS, **OPTIONS)
    assert watch.came == [16] and watch.there() == []


def test_weights_go_home_whatever_ends_the_call(
    watched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = watched()
    plan = watch.cascade.plan(SampleConfig(steps=["2"]))
    batches = watch.cascade.batches(plan, range(3), PROMPTS, batch_size=1)
    next(batches)
    assert watch.there() == [2]
    batches.close()
    assert watch.there() == []

    def stop(stage: int, step: int, x_0: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch.cascade.draw(plan, [0], PROMPTS[:1], on_step=stop)
    assert watch.there() == []
    for preview in watch.cascade.stream(PROMPTS[:1], steps=2):
        assert watch.there() in ([preview.stage], [])
        break
    copies = iter(range(3))

    def full(data: Tensor, device: torch.device) -> Tensor:
        next(copies)
        return data.clone()

    monkeypatch.setattr(offload, "_copy", full)
    with pytest.raises(StopIteration):  # as a device without room for a fourth tensor
        offload.Visit(watch.cascade.stages[0].modules, torch.device("cpu"))
    assert watch.there() == []


def test_without_it_nothing_moves(guided: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(offload, "_copy")
    guided.sample(PROMPTS[:1], **OPTIONS)


def test_on_a_cpu_it_is_said_to_be_in_vain(folder: Path) -> None:
    with pytest.warns(UserWarning, match="--offload frees no memory: every stage samples on the"):
        cascade = Cascade.load(folder, device="cpu", offload=True)
    assert cascade.sample(PROMPTS[:1], steps=1).images
