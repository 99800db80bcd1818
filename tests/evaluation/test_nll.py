"""Bits per dimension on held-out pictures: the numbers, the files, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diff_dalle.data.captions import captions
from diff_dalle.data.scenes import sample_scene
from diff_dalle.data.writer import Sample, write_shards
from diff_dalle.diffusion.losses import vb_terms_bpd
from diff_dalle.errors import UsageError
from diff_dalle.evaluation.nll import NllReport, Part
from diff_dalle.evaluation.nll_run import Measurement, NllConfig
from diff_dalle.keyed_noise import key_of, normal
from diff_dalle.loading import load_generator
from diff_dalle.models.generator import Cond

ROOT = Path(__file__).parents[2]
TINY = runpy.run_path(str(ROOT / "tests" / "programs" / "tiny_cascade.py"))
CPU = torch.device("cpu")
FEW: dict[str, Any] = {"timestep_respacing": "3", "num_workers": 0, "device": "cpu"}
PICTURES = 5
Evaluate = Callable[[list[str]], None]


@pytest.fixture(scope="module")
def evaluate() -> Evaluate:
    return runpy.run_path(str(ROOT / "scripts" / "evaluate_nll.py"))["evaluate"]


def scene(index: int) -> Sample:
    """A picture of few colours, with its captions."""
    made = sample_scene(0, index, "val")
    return Sample(key=f"{index:04d}", captions=captions(made), truth=made.truth(), picture=made)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("val")
    write_shards(folder, scene, PICTURES, image_size=32)
    return folder


@pytest.fixture
def flags(models: Path, shards: Path, tmp_path: Path) -> dict[str, Any]:
    """Of a short measurement of the smallest stage."""
    found = {"model_path": [str(models / "base.pt")], "data_dir": [str(shards)]}
    return found | {"log_dir": str(tmp_path / "out"), **FEW}


def typed(flags: dict[str, Any]) -> list[str]:
    """The flags as a command line."""
    words: list[str] = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)] if values else []
    return words


def measure(flags: dict[str, Any], **run: Any) -> NllReport:
    return Measurement(NllConfig(**flags), CPU, show=False).run(**run)


def same(first: NllReport, second: NllReport) -> None:
    """Equal but for the order in which a convolution adds up."""
    np.testing.assert_allclose(first.total_bpd, second.total_bpd, rtol=1e-5)
    np.testing.assert_allclose(first.prior_bpd, second.prior_bpd, rtol=1e-5)
    for name, values in first.terms.items():
        np.testing.assert_allclose(values, second.terms[name], rtol=1e-4)


def test_the_script_writes_the_totals_and_the_terms(
    flags: dict[str, Any],
    models: Path,
    evaluate: Evaluate,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = {"timestep_respacing": "ddim2"}  # steps 0 and 10 of 20, so that the prior counts
    evaluate(typed(flags | few | {"batch_size": 3, "num_samples": 5}))
    folder = Path(flags["log_dir"])
    printed = capsys.readouterr().out
    content = json.loads((folder / "nll.json").read_text())
    with np.load(folder / "nll_terms.npz") as file:
        arrays = dict(file)
    assert content["step"] == 7 and content["count"] == 5 and content["num_steps"] == 2
    checkpoint = content["stages"][0]["checkpoint"]
    assert checkpoint["path"] == str(models / "base.pt") and len(checkpoint["sha256"]) == 64
    assert content["settings"]["timestep_respacing"] == "ddim2" and content["bad"] == []
    assert content["vb_bpd"]["mean"] == pytest.approx(float(arrays["vb"].sum()))
    total = content["total_bpd"]
    assert total["mean"] == pytest.approx(content["vb_bpd"]["mean"] + content["prior_bpd"]["mean"])
    assert total["mean"] == pytest.approx(arrays["total_bpd"].mean())
    assert content["prior_bpd"]["mean"] > 0.1
    error = 1.959964 * arrays["total_bpd"].std(ddof=1) / 5**0.5
    assert (total["low"], total["high"]) == pytest.approx(
        (total["mean"] - error, total["mean"] + error)
    )
    assert arrays["t"].tolist() == [10, 0]  # the noisiest first
    assert content["decoder_bpd"] == arrays["vb"][-1] and (arrays["mse"] > 0).all()
    lines = [line for line in printed.splitlines() if line.startswith("done ")]
    assert lines[-1] == f"done 5 samples: bpd={total['mean']:.5f}" and len(lines) == 2
    assert (folder / "nll.md").read_text() in printed + "\n"


def test_an_earlier_report_stays(flags: dict[str, Any], evaluate: Evaluate) -> None:
    folder = Path(flags["log_dir"])
    folder.mkdir()
    (folder / "nll_2_terms.npz").write_bytes(b"somebody's")
    for _ in range(2):
        evaluate(typed(flags | {"num_samples": 2, "timestep_respacing": "1"}))
    names = {path.name for path in folder.iterdir()}
    assert {"nll.json", "nll_terms.npz", "nll_3.json", "nll_3.md", "nll_3_terms.npz"} <= names
    assert "nll_2.json" not in names
    assert (folder / "nll_2_terms.npz").read_bytes() == b"somebody's"


@pytest.mark.parametrize("name", ["base.pt", "up32.pt"])
def test_numbers_are_those_of_float64_and_of_the_keys(
    models: Path, flags: dict[str, Any], name: str
) -> None:
    """Each picture by itself: its caption, its 8-bit small picture, its own noise."""
    flags |= {"model_path": [str(models / name)], "seed": 5, "clip_denoised": False}
    flags |= {"aug_level": 0.3} if name == "up32.pt" else {}
    measurement = Measurement(NllConfig(**flags), CPU, show=False)
    report, loaded = measurement.run(), load_generator(str(models / name))
    size, model, diffusion = loaded.run.image_size, loaded.generator.double(), loaded.diffusion
    assert loaded.tokenizer is not None
    for index in range(PICTURES):
        key = torch.tensor([key_of(5, -1, "00000.tar", f"{index:04d}")])
        pixels, texts = measurement.dataset.visit(index, with_text=True)
        assert texts is not None
        tokens, mask = loaded.tokenizer.encode([texts.first], 32)
        cond, x_0 = Cond(tokens=tokens, mask=mask), torch.tensor(pixels)[None] / 127.5 - 1
        if name == "up32.pt":
            boxes = torch.tensor(pixels).double().reshape(1, 3, 16, 2, 16, 2)
            low = boxes.mean((3, 5)).round() / 127.5 - 1
            low = 0.91**0.5 * low + 0.3 * normal(key, (3, 16, 16), 6)
            level = torch.tensor([0.3], dtype=torch.float64)
            cond = dataclasses.replace(cond, low_res=low, aug_level=level)
        bits = float(report.prior_bpd[index])
        for t, step in enumerate([0, 10, 19]):
            eps = normal(key, (3, size, size), 1000 + step).double()
            x_t = diffusion.add_noise(x_0.double(), torch.tensor([step]), eps)
            with torch.no_grad():
                output = model(x_t, torch.tensor([step]), cond)
            few = diffusion.respace("3")
            bits += float(vb_terms_bpd(few, output, x_0.double(), x_t, torch.tensor([t])))
        assert report.total_bpd[index] == pytest.approx(bits, rel=1e-4)


def test_neither_batch_nor_ranks_change_the_result(flags: dict[str, Any]) -> None:
    whole = measure(flags)
    assert len(whole.total_bpd) == PICTURES and whole.total_bpd.std() > 1e-3
    same(measure(flags | {"batch_size": 3}), whole)
    seen: list[Part] = []

    def alone(part: Part) -> list[Part]:
        seen.append(part)
        return [part]

    two = flags | {"batch_size": 2}
    measure(two, rank=1, ranks=2, gather=alone)
    together = measure(two, rank=0, ranks=2, gather=lambda part: [seen.pop(0), part])
    same(together, whole)
    assert not seen


def test_the_result_depends_on_the_seed_and_on_the_steps(flags: dict[str, Any]) -> None:
    first = measure(flags)
    np.testing.assert_array_equal(measure(flags).total_bpd, first.total_bpd)
    other = measure(flags | {"seed": 1})
    assert (other.total_bpd != first.total_bpd).all()
    np.testing.assert_array_equal(other.prior_bpd, first.prior_bpd)
    assert len(measure(flags | {"timestep_respacing": ""}).terms["vb"]) == 20


def test_samples_are_spread_and_the_terms_are_their_means(flags: dict[str, Any]) -> None:
    everything, some = measure(flags | {"num_samples": 0}), measure(flags | {"num_samples": 3})
    np.testing.assert_allclose(some.total_bpd, everything.total_bpd[[0, 1, 3]], rtol=1e-5)
    for report in (everything, some):
        bits = report.terms["vb"].sum() + report.prior_bpd.mean()
        assert bits == pytest.approx(report.total_bpd.mean())


def test_clipping_and_the_compute_type_are_heeded(flags: dict[str, Any]) -> None:
    first = measure(flags)
    unclipped = measure(flags | {"clip_denoised": False})
    assert (unclipped.terms["xstart_mse"] > first.terms["xstart_mse"]).all()
    rough = measure(flags | {"precision": "bf16"})
    np.testing.assert_allclose(rough.total_bpd, first.total_bpd, rtol=0.05)
    assert (rough.total_bpd != first.total_bpd).all()


def test_captions_are_told_where_the_generator_reads_them(
    flags: dict[str, Any], tmp_path: Path
) -> None:
    def called(index: int) -> Sample:
        return dataclasses.replace(scene(index), captions=["a star"])

    write_shards(tmp_path / "stars", called, PICTURES, image_size=32)
    stars = flags | {"data_dir": [str(tmp_path / "stars")]}
    assert (measure(stars).total_bpd != measure(flags).total_bpd).all()
    mute = TINY["write_generator"](
        tmp_path / "mute.pt", image_size=16, cond_text=False, learn_sigma=False
    )
    mute_flags = {"model_path": [str(mute)]}
    np.testing.assert_array_equal(
        measure(stars | mute_flags).total_bpd, measure(flags | mute_flags).total_bpd
    )


def test_a_batch_of_captions_is_read_once(flags: dict[str, Any]) -> None:
    """And so are the keys and values that each layer makes of it."""
    measurement = Measurement(NllConfig(**flags), CPU, show=False)
    generator, calls = measurement.stage.loaded.generator, []
    for name, module in generator.named_modules():
        if name.endswith(("cross.key", "cross.value")) or module is generator.text_encoder:
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    measurement.run()
    assert len(calls) == len(set(calls)) > 2


def test_broken_pictures_are_left_out_and_named(flags: dict[str, Any], tmp_path: Path) -> None:
    sound = measure(flags)
    shard = bytearray(Path(flags["data_dir"][0], "00000.tar").read_bytes())
    start = shard.index(b"0002.png")
    shard[start + 512 : start + 560] = bytes(48)
    (tmp_path / "00000.tar").write_bytes(shard)
    report = measure(flags | {"data_dir": [str(tmp_path)], "batch_size": 2})
    (row,) = report.bad
    assert row[1:] == ("0002", "not an image")
    rest = [index for index in range(PICTURES) if index != 2]
    np.testing.assert_allclose(report.total_bpd, sound.total_bpd[rest], rtol=1e-5)
    assert report.terms["vb"].sum() + report.prior_bpd.mean() == pytest.approx(
        report.total_bpd.mean()
    )
    assert report.to_json()["bad"] == [row]
    assert report.table().endswith("\nleft out: 1 not an image")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_dir": []}, "--data_dir .* name held-out shards"),
        ({"data_dir": ["gone"]}, "gone: no such file or folder"),
        ({"model_path": []}, "--model_path .* name one generator"),
        ({"model_path": ["clip.pt"]}, "clip.pt holds a classifier, which gives pictures no like"),
        ({"model_path": ["base.pt", "up32.pt"]}, "name one generator"),
        ({"model_path": ["up64.pt"]}, "too small"),
        ({"num_samples": 1}, "--num_samples is 1: it must be 2 or more"),
        ({"batch_size": 0}, "--batch_size is 0"),
        ({"aug_level": 1.5}, "--aug_level is 1.5"),
        ({"aug_level": 0.1}, "enlarges nothing"),
        ({"timestep_respacing": "21"}, "--timestep_respacing is '21'"),
        ({"precision": "fp8"}, "--precision is 'fp8'"),
        ({"precision": "bf16", "use_fp16": True}, "--precision is 'bf16': it must be fp16 or left"),
        ({"image_size": 64}, "--image_size is 64, but the checkpoints make 16"),
        ({"image_size": 16, "num_channels": 64}, "was trained with 32"),
        ({"guidance_scale": 2}, "unknown argument --guidance_scale"),
    ],
)
def test_what_cannot_be_measured_stops_in_one_line(
    flags: dict[str, Any], models: Path, evaluate: Evaluate, changes: dict[str, Any], message: str
) -> None:
    paths = [str(models / name) for name in changes.get("model_path", [])]
    changed = changes | ({"model_path": paths} if "model_path" in changes else {})
    with pytest.raises(UsageError, match=message) as error:
        evaluate(typed(flags | changed))
    assert "\n" not in str(error.value)
    assert not Path(flags["log_dir"]).exists()


def test_a_network_that_answers_nothing_is_reported(flags: dict[str, Any]) -> None:
    measurement = Measurement(NllConfig(**flags), CPU, show=False)
    for parameter in measurement.stage.loaded.generator.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(UsageError, match=f"{PICTURES} of {PICTURES} pictures is not finite"):
        measurement.run()


def test_one_picture_is_too_few(flags: dict[str, Any], tmp_path: Path) -> None:
    write_shards(tmp_path / "one", scene, 1, image_size=32)
    with pytest.raises(UsageError, match="gave 1 usable pictures .no more are there.: 2 are"):
        measure(flags | {"data_dir": [str(tmp_path / "one")]})


def test_mpiexec_measures_what_one_process_measures(
    flags: dict[str, Any], evaluate: Evaluate, tmp_path: Path
) -> None:
    """With another batch and with worker processes."""
    evaluate(typed(flags))
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    assert mpiexec is not None, "mpiexec is missing: pip install mpich"
    many = flags | {"log_dir": str(tmp_path / "many"), "batch_size": 2, "num_workers": 1}
    command = [mpiexec, "-n", "2", sys.executable, str(ROOT / "scripts" / "evaluate_nll.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *typed(many)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done ") == 2 and done.stdout.count("nll.json") == 1
    one, two = (
        dict(np.load(Path(folder) / "nll_terms.npz"))
        for folder in (flags["log_dir"], many["log_dir"])
    )
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, rtol=1e-4)
