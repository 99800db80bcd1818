"""Which checkpoints make a cascade, and which are refused."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diff_dalle import Cascade
from diff_dalle.errors import UsageError
from diff_dalle.training.precision import Precision, PrecisionConfig

TINY = runpy.run_path(str(Path(__file__).parents[1] / "programs" / "tiny_cascade.py"))


def files(folder: Path, *names: str) -> list[str]:
    return [str(folder / name) for name in names]


def test_a_folder_is_ordered_by_size(cascade: Cascade, folder: Path) -> None:
    assert cascade.sizes == [16, 32, 64]
    assert [Path(stage.path).name for stage in cascade.stages] == ["base.pt", "up32.pt", "up64.pt"]
    assert cascade.models[0].checkpoint.step == 7


def test_a_comma_list_and_a_list_are_the_same(folder: Path) -> None:
    paths = files(folder, "base.pt", "up32.pt")
    assert Cascade.load(",".join(paths)).sizes == Cascade.load(paths).sizes == [16, 32]


def test_a_folder_in_a_comma_list_is_ordered_by_size(folder: Path, tmp_path: Path) -> None:
    for name, model in (("a.pt", "up32.pt"), ("b.pt", "base.pt")):
        (tmp_path / name).write_bytes((folder / model).read_bytes())
    assert Cascade.load(f"{tmp_path},{folder / 'up64.pt'}").sizes == [16, 32, 64]


def test_paths_may_be_path_objects(folder: Path) -> None:
    assert Cascade.load(folder, folder / "clip.pt").sizes == [16, 32, 64]
    assert Cascade.load([folder / "base.pt"], [folder / "clip.pt"]).stages[0].guide is not None


def test_a_folder_of_runs_gives_the_newest_ema_of_each(folder: Path, tmp_path: Path) -> None:
    for name in ("model000003.pt", "ema_0.99_000002.pt", "ema_0.9_000003.pt", "ema_0.99_000003.pt"):
        TINY["write_generator"](tmp_path / "base" / name, image_size=16)
    (tmp_path / "base" / "opt000003.pt").write_bytes(b"no weights")
    TINY["write_generator"](tmp_path / "up" / "model000001.pt", image_size=32, small_size=16)
    TINY["write_clip"](tmp_path / "clip" / "model000009.pt", image_size=16)
    TINY["write_clip"](tmp_path / "clip" / "best.pt", image_size=16)
    cascade = Cascade.load(str(tmp_path), str(tmp_path))
    names = [Path(stage.path).name for stage in cascade.stages]
    assert names == ["ema_0.99_000003.pt", "model000001.pt"]
    guide = cascade.stages[0].guide
    assert guide is not None and Path(guide.path).name == "best.pt"


def test_one_clip_guides_the_stage_of_its_size(guided: Cascade, folder: Path) -> None:
    assert [stage.guide is not None for stage in guided.stages] == [True, False, False]
    paths = files(folder, "base.pt", "up32.pt")
    by_stage = Cascade.load(paths, [str(folder / "clip.pt"), "none"])
    assert [stage.guide is not None for stage in by_stage.stages] == [True, False]
    assert Cascade.load(paths, "none").stages[0].guide is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["clip.pt"], "clip.pt holds a classifier"),
        (["up32.pt", "base.pt"], r"base.pt makes 16 px, but .*up32.pt before it makes 32 px"),
        (["base.pt", "base.pt"], "from the smallest to the largest"),
        (["base.pt", "up64.pt"], r"up64.pt enlarges 32 px, but .* makes 16 px.*--small_size 16"),
        (["base.pt", "second.pt"], r"second.pt is a base model, but .*base.pt before it"),
        (["noise.pt"], "noise.pt is no checkpoint"),
        (["missing.pt"], "missing.pt does not exist"),
        (["empty"], "empty holds no checkpoint of a generator"),
        ([], "--model_path is missing"),
    ],
)
def test_what_makes_no_cascade_is_refused_in_one_line(
    folder: Path, tmp_path: Path, names: list[str], message: str
) -> None:
    TINY["write_generator"](tmp_path / "second.pt", image_size=32)
    (tmp_path / "noise.pt").write_bytes(b"weights?")
    (tmp_path / "empty").mkdir()
    paths = [str(folder / n if (folder / n).exists() else tmp_path / n) for n in names]
    with pytest.raises(UsageError, match=message) as error:
        Cascade.load(paths)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("classifiers", "message"),
    [
        (["base.pt"], "base.pt holds a generator"),
        (["clip.pt", "clip.pt"], "2 entries for 3 stages"),
        (["none", "clip.pt", "none"], r"sees 16 px, but the stages make 32 px"),
        (["clip64.pt"], None),
        (["clip8.pt"], r"sees 8 px, but the stages make 16, 32, 64 px"),
        (["missing.pt"], "--classifier_path .*missing.pt does not exist"),
    ],
)
def test_a_clip_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, classifiers: list[str], message: str | None
) -> None:
    for size in (8, 64):
        TINY["write_clip"](tmp_path / f"clip{size}.pt", image_size=size)
    known = {"none": "none"} | {n: str(folder / n) for n in ("base.pt", "clip.pt")}
    paths = [known.get(name, str(tmp_path / name)) for name in classifiers]
    if message is None:
        assert Cascade.load(str(folder), paths).stages[2].guide is not None
        return
    with pytest.raises(UsageError, match=message):
        Cascade.load(str(folder), paths)


def test_loaded_models_hold_their_weights_once_and_evaluate(guided: Cascade) -> None:
    guide = guided.stages[0].guide
    assert guide is not None
    for model in (*(stage.loaded.generator for stage in guided.stages), guide.loaded.clip):
        assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in guide.loaded.clip.parameters())
    assert all(not loaded.checkpoint.state_dict for loaded in guided.models)


def test_the_weights_of_a_generator_are_cast_once_not_at_every_step(
    guided_base: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast, with guidance of both kinds; no gradient reaches the generator."""
    monkeypatch.setattr(
        guided_base,
        "_precisions",
        [Precision(PrecisionConfig(precision="bf16"), torch.device("cpu"))],
    )
    generator = guided_base.stages[0].loaded.generator
    weights = {weight.data_ptr() for weight in generator.parameters() if weight.ndim > 1}

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in weights:
                self.count += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for steps in (1, 2):
        with Casts() as casts:
            drawn = guided_base.sample(["a"], steps=steps, guidance_scale=2.0)
        counts.append(casts.count)
    assert 0 < counts[0] == counts[1]
    assert drawn.stages[0].any()
    assert all(parameter.grad is None for parameter in generator.parameters())


def test_two_clips_of_one_size_are_not_chosen_between(folder: Path, tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        TINY["write_clip"](tmp_path / name, image_size=16)
    with pytest.raises(UsageError, match="two CLIPs of 16 px"):
        Cascade.load(str(folder), str(tmp_path))


def test_a_cpu_samples_in_fp32_and_says_so(folder: Path) -> None:
    with pytest.warns(UserWarning, match="sampling in fp32") as warned:
        cascade = Cascade.load(files(folder, "base.pt"), precision="fp16")
    assert cascade.precision == "fp32" and "fp32" in cascade.notes[0]
    assert warned[0].filename == __file__
    assert Cascade.load(files(folder, "base.pt")).notes == []


def test_an_average_of_mostly_initial_weights_is_pointed_out(tmp_path: Path) -> None:
    for rate, share in ((0.9, "48%"), (0.5, None), (None, None)):
        path = TINY["write_generator"](tmp_path / f"{rate}.pt", image_size=16, ema_rate=rate)
        notes = Cascade.load(str(path), warn=False).notes  # step 7: 0.9^7 is 0.478
        assert len(notes) == (share is not None)
        assert share is None or f"{share} of it" in notes[0] and "model000007.pt" in notes[0]


def test_an_unknown_device_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="--device is 'gpu': give auto, cpu or cuda"):
        Cascade.load(files(folder, "base.pt"), device="gpu")


def test_the_package_does_not_import_torch() -> None:
    code = "import diff_dalle, sys; assert 'torch' not in sys.modules; diff_dalle.__version__"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    with pytest.raises(AttributeError):
        __import__("diff_dalle").nothing  # noqa: B018
