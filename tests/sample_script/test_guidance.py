"""`scripts/sample.py`: guidance from flags to manifest, and what makes a command the same."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diff_dalle import Cascade
from diff_dalle.cascade.share import open_writer, request_of
from diff_dalle.errors import UsageError
from diff_dalle.sampling_io.config import SampleConfig
from diff_dalle.sampling_io.store import read_pictures

ROOT = Path(__file__).parents[2]
TINY = runpy.run_path(str(ROOT / "tests" / "programs" / "tiny_cascade.py"))
FEW = ["--timestep_respacing", "2", "--device", "cpu"]
PROMPTS = ["a red circle", "파란 별 위의 빨간 원"]
Sample = Callable[[list[str]], None]


@pytest.fixture(scope="module")
def cascade(folder: Path) -> Cascade:
    return Cascade.load(str(folder / "base.pt"), str(folder / "clip.pt"))


def test_the_manifest_tells_how_the_pictures_were_guided(
    folder: Path, tmp_path: Path, sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it says, given again, draws the same; repeated prompts repeat what they lead from."""
    argv = ["--model_path", str(folder / "base.pt"), str(folder / "up32.pt")]
    argv += ["--classifier_path", str(folder / "clip.pt"), "--prompts", *PROMPTS, *FEW]
    argv += ["--num_samples", "3", "--negative_prompts", "grey", "", "--contrast", "prompts"]
    argv += ["--guidance_scale", "3", "1", "--guidance_interval", "0,100", "all"]
    argv += ["--guidance_schedule", "cosine", "--guidance_rescale", "0.5"]
    argv += ["--classifier_interval", "0.01,inf", "--classifier_schedule", "linear"]
    sample([*argv, "--log_dir", str(tmp_path)])
    manifest = json.loads((tmp_path / "samples_3x32x32x3.json").read_text())
    base, up = manifest["stages"]
    assert base["guidance_interval"] == "0,100" and up["guidance_interval"] == "all"
    assert base["guidance_schedule"] == "cosine" and base["guidance_rescale"] == 0.5
    assert base["classifier_interval"] == "0.01,inf" and base["classifier_schedule"] == "linear"
    assert (base["steps"], base["evaluations"], up["evaluations"]) == (2, 3, 2)
    assert base["classifier_evaluations"] == 2 and up["classifier_evaluations"] == 0
    assert manifest["contrast"] == "prompts" and manifest["contrast_captions"] == 2
    assert [image["negative_prompt"] for image in manifest["images"]] == ["grey", "", "grey"]
    printed = capsys.readouterr().out
    assert "network evaluations a picture: 16 px 3 (2 steps) and 2 of the CLIP, 32 px 2" in printed

    def stated(name: str) -> list[Any]:
        return [stage[name] for stage in manifest["stages"]]

    again = Cascade.load(
        [stage["checkpoint"]["path"] for stage in manifest["stages"]], base["classifier"]["path"]
    ).sample(
        [image["prompt"] for image in manifest["images"]],
        negative_prompts=[image["negative_prompt"] for image in manifest["images"]],
        guidance_scale=stated("guidance_scale"),
        guidance_interval=stated("guidance_interval"),
        guidance_schedule=stated("guidance_schedule"),
        guidance_rescale=stated("guidance_rescale"),
        classifier_interval=stated("classifier_interval"),
        classifier_schedule=stated("classifier_schedule"),
        contrast=manifest["contrast"],
        sampler=stated("sampler"),
        steps=stated("timestep_respacing"),
        step_spacing=stated("step_spacing"),
    )
    written = read_pictures(tmp_path / "samples_3x32x32x3.npz")
    np.testing.assert_array_equal(written, again.stages[1])


def test_guidance_is_part_of_what_makes_a_command_the_same(
    cascade: Cascade, tmp_path: Path
) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("a star\n")

    def request(**changes: Any) -> str:
        values: dict[str, Any] = {"prompts": PROMPTS, "guidance_scale": ["3"]} | changes
        cfg = SampleConfig(contrast=str(captions), **values)
        asked = request_of(cascade, cfg)
        plan = cascade.plan(cfg, None, asked.contrast_texts)
        writer = open_writer(tmp_path, cascade, plan, asked)
        assert writer.lock is not None
        writer.lock.close()
        return writer.work.name

    first = request()
    assert request() == first
    assert request(batch_size=1) == first
    others = {
        request(negative_prompts=["grey"]),
        request(negative_prompts=["grey", ""]),
        request(guidance_interval=["0.3,5"]),
        request(guidance_schedule=["linear"]),
        request(guidance_rescale=["0.7"]),
        request(classifier_interval=["0.3,5"]),
        request(classifier_schedule=["linear"]),
    }
    captions.write_text("another\n")  # the same file name
    others.add(request())
    assert len(others) == 8 and first not in others


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--guidance_interval", "5,1", "--guidance_scale", "2"], "--guidance_interval is '5,1'"),
        (["--guidance_schedule", "linea", "--guidance_scale", "2"], "did you mean linear"),
        (["--guidance_rescale", "2", "--guidance_scale", "2"], "--guidance_rescale"),
        (["--negative_prompts", "a"], "--negative_prompts are read by"),
        (["--negative_prompts", "a", "b", "c", "--guidance_scale", "2"], "3 entries for 2 prompts"),
        (["--contrast", "gone.txt"], "--contrast gone.txt is no file"),
        (["--contrast", "prompts"], "but no CLIP guides any stage"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, sample: Sample, argv: list[str], message: str
) -> None:
    out = tmp_path / "out"
    base = ["--model_path", str(folder / "base.pt"), "--prompts", *PROMPTS, *FEW]
    with pytest.raises(UsageError, match=message) as error:
        sample([*base, *argv, "--log_dir", str(out)])
    assert "\n" not in str(error.value) and not out.exists()


def test_negative_prompts_need_captions(tmp_path: Path, sample: Sample) -> None:
    path = TINY["write_generator"](tmp_path / "base.pt", image_size=16, cond_text=False)
    argv = ["--model_path", str(path), "--negative_prompts", "a", "--guidance_scale", "2", *FEW]
    with pytest.raises(UsageError, match="--guidance_scale is 2, but .* without captions"):
        sample([*argv, "--log_dir", str(tmp_path / "out")])
