"""`scripts/sample.py`: from flags to files, alone and under mpiexec."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diff_dalle import Cascade
from diff_dalle.data.dataset import Dataset, Raw
from diff_dalle.distributed import World
from diff_dalle.errors import UsageError
from diff_dalle.sampling_io.store import read_pictures

ROOT = Path(__file__).parents[2]
FEW = ["--steps", "2", "--device", "cpu"]
PROMPTS = ["a red circle", "파란 별 위의 빨간 원", "a star"]


Sample = Callable[[list[str]], None]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def write_shard(path: Path, samples: list[tuple[str, bytes, str]]) -> Path:
    """A tar of (key, image bytes, caption)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, image, caption in samples:
            for name, data in ((f"{key}.png", image), (f"{key}.txt", caption.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def png(picture: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    return data.getvalue()


def noise(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def test_a_folder_and_prompts_are_enough(
    folder: Path, tmp_path: Path, sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    sample(["--model_path", str(folder), "--prompts", *PROMPTS, "--log_dir", str(out), *FEW])
    assert {path.name for path in out.iterdir()} == {
        "samples_3x16x16x3.npz",
        "samples_3x16x16x3.txt",
        "samples_3x32x32x3.npz",
        "samples_3x32x32x3.txt",
        "samples_3x64x64x3.npz",
        "samples_3x64x64x3.txt",
        "samples_3x64x64x3.json",
        "grid.jpg",
        "grid.txt",
    }
    expected = Cascade.load(str(folder)).sample(PROMPTS, steps=2)
    for size, pictures in zip((16, 32, 64), expected.stages, strict=True):
        written = read_pictures(out / f"samples_3x{size}x{size}x3.npz")
        np.testing.assert_array_equal(written, pictures)
    assert (out / "grid.txt").read_text(encoding="utf-8").splitlines() == PROMPTS
    with Image.open(out / "grid.jpg") as grid:
        assert grid.size == (192, 64)
    printed = capsys.readouterr().out.splitlines()
    assert str(out) in printed[0] and str(out / "grid.jpg") in printed
    assert sum(line.startswith("shrunk, against what was enlarged") for line in printed) == 1
    images = json.loads((out / "samples_3x64x64x3.json").read_text())["images"]
    for stage, told in enumerate(expected.consistency):
        written = [image["consistency"][stage] for image in images]
        assert written == [told and told.to_json(n) for n in range(3)]


def test_the_manifest_tells_how_to_draw_each_picture_again(
    folder: Path, tmp_path: Path, sample: Sample
) -> None:
    argv = ["--model_path", str(folder), "--classifier_path", str(folder / "clip.pt")]
    argv += [
        "--prompts",
        *PROMPTS,
        "--seed",
        "9",
        "--rerank",
        "2",
        "--guidance_scale",
        "2",
        "1",
        "1",
    ]
    sample([*argv, "--classifier_scale", "3", "--log_dir", str(tmp_path), *FEW])
    manifest = json.loads((tmp_path / "samples_3x64x64x3.json").read_text())
    assert manifest["seed"] == 9 and manifest["rerank"] == 2
    assert [image["prompt"] for image in manifest["images"]] == PROMPTS
    assert all(image["candidate"] in (0, 1) for image in manifest["images"])
    base, first_up, _ = manifest["stages"]
    assert base["guidance_scale"] == 2.0 and first_up["guidance_scale"] == 1.0
    assert base["classifier_scale"] == 3.0 and first_up["classifier"] is None
    digest = subprocess.run(["sha256sum", folder / "base.pt"], capture_output=True, text=True)
    assert base["checkpoint"]["sha256"] == digest.stdout.split()[0]
    assert Path(base["classifier"]["path"]).name == "clip.pt"
    # What it says, given again, draws the same.
    again = Cascade.load(
        [stage["checkpoint"]["path"] for stage in manifest["stages"]], base["classifier"]["path"]
    ).sample(
        [image["prompt"] for image in manifest["images"]],
        seed=manifest["seed"],
        guidance_scale=[stage["guidance_scale"] for stage in manifest["stages"]],
        classifier_scale=[stage["classifier_scale"] for stage in manifest["stages"]],
        sampler=[stage["sampler"] for stage in manifest["stages"]],
        steps=[stage["timestep_respacing"] for stage in manifest["stages"]],
        step_spacing=[stage["step_spacing"] for stage in manifest["stages"]],
        rerank=manifest["rerank"],
        batch_size=manifest["batch_size"],
    )
    written = read_pictures(tmp_path / "samples_3x64x64x3.npz")
    np.testing.assert_array_equal(written, again.stages[2])


def test_stated_flags_are_accepted_where_they_agree_and_refused_where_not(
    folder: Path, tmp_path: Path, sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    """The field's users repeat their training flags."""
    argv = ["--model_path", str(folder / "base.pt"), "--prompts", "x", "--log_dir", str(tmp_path)]
    argv += ["--image_size", "16", "--num_channels", "32", "--noise_schedule", "cosine", *FEW]
    sample([*argv, "--use_fp16", "True", "--dropout", "0.3"])
    assert "fp32" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--num_res_blocks is 3"):
        sample([*argv, "--num_res_blocks", "3"])
    with pytest.raises(UsageError, match="--sigma_small is True.* trained with False"):
        sample([*argv, "--sigma_small", "True"])


def test_stated_flags_of_the_noise_process_are_the_generators(
    folder: Path, tmp_path: Path, sample: Sample
) -> None:
    """The CLIP beside it was trained on 1000 linear steps and eps."""
    argv = ["--model_path", str(folder / "base.pt"), "--classifier_path", str(folder / "clip.pt")]
    argv += ["--prompts", "x", "--log_dir", str(tmp_path), "--classifier_width", "32", *FEW]
    process = ["--prediction", "v", "--noise_schedule", "cosine", "--diffusion_steps", "20"]
    sample([*argv, *process])
    with pytest.raises(UsageError, match="--prediction is x0, but the generator of 16 px"):
        sample([*argv, "--prediction", "x0"])
    with pytest.raises(UsageError, match="--classifier_width is 64, but the classifier of 16 px"):
        sample([*argv, "--classifier_width", "64"])
    with pytest.raises(UsageError, match="--image_size is 8, but the checkpoints make 16$"):
        sample([*argv, "--image_size", "8"])


def test_prompts_from_a_file_are_repeated_and_long_ones_named(
    folder: Path, tmp_path: Path, sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_bytes("\ufeffone\r\n\r\n".encode() + b"long " * 40 + b"\r\nthree\n")
    argv = ["--model_path", str(folder / "base.pt"), "--data_dir", str(captions), *FEW]
    sample([*argv, "--num_samples", "5", "--log_dir", str(tmp_path / "out")])
    lines = (tmp_path / "out" / "samples_5x16x16x3.txt").read_text().splitlines()
    long = ("long " * 40).strip()
    assert lines == ["one", long, "three", "one", long]
    printed = capsys.readouterr().out
    assert printed.count("captions.txt line 3: ") == 1 and "cut to 32" in printed
    # Repeats of a prompt are different pictures.
    pictures = read_pictures(tmp_path / "out" / "samples_5x16x16x3.npz")
    assert not np.array_equal(pictures[0], pictures[3])


def test_any_unicode_is_drawn_line_by_line(folder: Path, tmp_path: Path, sample: Sample) -> None:
    lines = ["👩\u200d🚀", "דג אדום", "\u202eoverride", "a\x00b", "< start ></s>", "e\u0301"]
    lines += ["a\u2028b", "x" * 100_000, "\ufffd", "z"]
    captions = tmp_path / "captions.txt"
    captions.write_bytes("\n\n".join(lines).encode() + b"\n\xed\xa0\x80\n \n")
    argv = ["--model_path", str(folder / "base.pt"), "--data_dir", str(captions), "--steps", "1"]
    sample([*argv, "--device", "cpu", "--batch_size", "11", "--log_dir", str(tmp_path / "out")])
    assert read_pictures(tmp_path / "out" / "samples_11x16x16x3.npz").shape[0] == 11
    written = (tmp_path / "out" / "samples_11x16x16x3.txt").read_text(encoding="utf-8")
    assert written.splitlines()[:6] == lines[:6] and len(written.splitlines()) == 11
    manifest = json.loads((tmp_path / "out" / "samples_11x16x16x3.json").read_text())
    assert [image["prompt"] for image in manifest["images"]][:10] == lines


def test_prompts_from_shards(folder: Path, tmp_path: Path, sample: Sample) -> None:
    write_shard(tmp_path / "data" / "0.tar", [("a", png(noise(8)), "first")])
    write_shard(tmp_path / "data" / "1.tar", [("b", png(noise(8)), "second\n")])
    argv = ["--model_path", str(folder / "base.pt"), "--data_dir", str(tmp_path / "data"), *FEW]
    sample([*argv, "--log_dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "grid.txt").read_text().splitlines() == ["first", "second"]


def test_no_more_captions_are_read_than_are_drawn(
    folder: Path,
    tmp_path: Path,
    sample: Sample,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = "abcde"
    write_shard(tmp_path / "0.tar", [(name, png(noise(8)), name) for name in names])
    read, plain = [], Dataset.read

    def spy(self: Dataset, sample: int, *, image: bool = True) -> Raw:
        read.append(sample)
        return plain(self, sample, image=image)

    monkeypatch.setattr(Dataset, "read", spy)
    argv = ["--model_path", str(folder / "base.pt"), "--data_dir", str(tmp_path / "0.tar"), *FEW]
    sample([*argv, "--num_samples", "2", "--log_dir", str(tmp_path / "out")])
    assert max(read) == 1 and "skipped" not in capsys.readouterr().out


def test_samples_without_a_caption_are_counted(
    folder: Path, tmp_path: Path, sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "0.tar", [("a", png(noise(8)), "first"), ("b", png(noise(8)), " ")])
    argv = ["--model_path", str(folder / "base.pt"), "--data_dir", str(tmp_path / "0.tar"), *FEW]
    sample([*argv, "--log_dir", str(tmp_path / "out")])
    assert "0.tar: skipped 1 samples without a usable caption" in capsys.readouterr().out


def test_stage_by_stage_through_files_equals_one_run(
    folder: Path, tmp_path: Path, sample: Sample
) -> None:
    """The captions beside the npz come along."""
    argv = [*FEW, "--log_dir", str(tmp_path)]
    sample(["--model_path", str(folder), "--prompts", *PROMPTS, *argv])
    small = str(tmp_path / "samples_3x16x16x3.npz")
    sample(["--model_path", str(folder / "up32.pt"), "--low_res", small, *argv])
    one, alone = (
        read_pictures(tmp_path / f"samples_3x32x32x3{number}.npz") for number in ("", "_2")
    )
    np.testing.assert_array_equal(one, alone)


def test_captions_beside_an_npz_are_those_that_were_typed(
    folder: Path, tmp_path: Path, sample: Sample
) -> None:
    prompts = ["a red\ncircle", r"a red\ncircle"]  # one line of the .txt stands for both
    base, out = ["--model_path", str(folder / "base.pt")], tmp_path / "up"
    sample([*base, "--prompts", *prompts, *FEW, "--log_dir", str(tmp_path)])
    npz = tmp_path / "samples_2x16x16x3.npz"
    argv = ["--model_path", str(folder / "up32.pt"), "--low_res", str(npz), *FEW]
    sample([*argv, "--log_dir", str(out)])
    manifest = json.loads((out / "samples_2x32x32x3.json").read_text())
    assert [image["prompt"] for image in manifest["images"]] == prompts
    npz.with_suffix(".json").unlink()
    npz.with_suffix(".txt").write_bytes(b"\xff\n\xff\n")
    with pytest.raises(UsageError, match="samples_2x16x16x3.txt is no UTF-8"):
        sample([*argv, "--log_dir", str(out)])


def test_an_upsampler_alone_takes_shards(
    folder: Path, tmp_path: Path, sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scaled down as its training did; broken and small pictures are skipped and counted."""
    small = noise(16)
    large = small.repeat(2, axis=0).repeat(2, axis=1)
    samples = [
        ("0", png(large), "a star"),
        ("1", b"<html>", "broken"),
        ("2", png(noise(8)), "too small"),
        ("3", png(small), "of the smaller size"),
        ("4", png(large), ""),
    ]
    shard = write_shard(tmp_path / "data" / "0.tar", samples)
    argv = ["--model_path", str(folder / "up32.pt"), "--log_dir", str(tmp_path / "out"), *FEW]
    sample([*argv, "--low_res", str(shard)])
    printed = capsys.readouterr().out
    assert "skipped 1 samples (too small)" in printed
    assert (tmp_path / "out" / "grid.txt").read_text().splitlines() == [
        "a star",
        "of the smaller size",
    ]
    drawn = read_pictures(tmp_path / "out" / "samples_2x32x32x3.npz")
    expected = Cascade.load(str(folder / "up32.pt")).sample(
        ["a star", "of the smaller size"], steps=2, low_res=np.stack([small, small])
    )
    np.testing.assert_array_equal(drawn, expected.stages[0])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model_path", "base.pt"], "--prompts is missing"),
        (["--model_path", "up32.pt", "--prompts", "a"], "is an upsampler"),
        (["--model_path", "up32.pt", "--low_res", "two.npz", "--prompts", "a"], "2 pictures"),
        (["--model_path", "up32.pt", "--low_res", "two.npz"], "--prompts is missing"),
        (["--model_path", "base.pt", "--low_res", "two.npz", "--prompts", "a", "b"], "base model"),
        (["--model_path", "base.pt", "--low_res", "a.tar"], "base model"),
        (["--model_path", "up32.pt", "--low_res", "none.npz"], "none.npz holds no picture"),
        (["--model_path", "up32.pt", "--low_res", "clip.pt", "--prompts", "a"], "no npz"),
        (["--model_path", "up32.pt", "--low_res", "gone", "--prompts", "a"], "--low_res .*gone"),
        (["--model_path", "base.pt", "--data_dir", "gone"], "--data_dir .*gone"),
        (["--model_path", "base.pt", "--prompts", "a", "--data_dir", "."], "without --data_dir"),
        (["--model_path", "clip.pt", "--prompts", "a"], "holds a classifier"),
        (["--model_path", "base.pt", "--prompts", "a", "--batch_size", "0"], "--batch_size"),
        (["--model_path", "base.pt", "--prompts", "a", "--sed", "1"], "--seed"),
        (["--prompts", "a"], "--model_path is missing"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, sample: Sample, argv: list[str], message: str
) -> None:
    np.savez(tmp_path / "two.npz", np.zeros((2, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "none.npz", np.zeros((0, 16, 16, 3), np.uint8))
    write_shard(tmp_path / "a.tar", [("0", png(noise(32)), "a star")])
    places = {name: str(folder / name) for name in ("base.pt", "up32.pt", "clip.pt")}
    places |= {name: str(tmp_path / name) for name in ("two.npz", "none.npz", "a.tar", "gone")}
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=message) as error:
        sample([*(places.get(word, word) for word in argv), "--log_dir", str(out), *FEW])
    assert "\n" not in str(error.value)
    assert not out.exists()


def mpiexec() -> str:
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    assert found is not None, "mpiexec is missing: pip install mpich"
    return found


def test_mpiexec_draws_what_one_process_draws(folder: Path, tmp_path: Path, sample: Sample) -> None:
    count = 5
    argv = ["--model_path", str(folder), "--classifier_path", str(folder / "clip.pt")]
    argv += ["--guidance_scale", "2", "--prompts", *PROMPTS, "--num_samples", str(count), *FEW]
    sample([*argv, "--log_dir", str(tmp_path / "one")])
    command = [mpiexec(), "-n", "2", sys.executable, str(ROOT / "scripts" / "sample.py")]
    command += [*argv, "--log_dir", str(tmp_path / "many"), "--batch_size", "2", "--save_png"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("grid.jpg") == 1  # rank 0 alone speaks
    for size in (16, 32, 64):
        name = f"samples_{count}x{size}x{size}x3.npz"
        one, many = (read_pictures(tmp_path / run / name) for run in ("one", "many"))
        assert np.abs(one.astype(int) - many).max() <= 1
    pictures = tmp_path / "many" / f"samples_{count}x64x64x3"
    assert len(list(pictures.glob("*.png"))) == count
    texts = [(tmp_path / run / "grid.txt").read_text() for run in ("one", "many")]
    assert texts[0] == texts[1]
    assert not list((tmp_path / "many").glob(".samples_*"))


def test_a_rank_that_finishes_early_waits_for_days(
    folder: Path, tmp_path: Path, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks draw for hours without meeting, and one may have slower hardware than another."""
    start, waits = sample.__globals__["start"], []  # type: ignore[attr-defined]

    def spy(device: str, *, timeout_s: float) -> World:
        waits.append(timeout_s)
        return start(device, timeout_s=timeout_s)

    monkeypatch.setitem(sample.__globals__, "start", spy)  # type: ignore[attr-defined]
    argv = ["--model_path", str(folder / "base.pt"), "--prompts", "a", *FEW]
    sample([*argv, "--log_dir", str(tmp_path)])
    assert waits[0] >= 2 * 24 * 3600


def test_a_mistake_ends_every_rank_with_one_line(folder: Path, tmp_path: Path) -> None:
    command = [mpiexec(), "-n", "2", sys.executable, str(ROOT / "scripts" / "sample.py")]
    command += ["--model_path", str(folder / "clip.pt"), "--prompts", "a", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--log_dir", str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "clip.pt holds a classifier" in errors[0]
    assert "Traceback" not in done.stderr
