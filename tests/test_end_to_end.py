"""The README's commands, as typed but smaller, from plain shards to a 3-stage picture.

The shards have img2dataset's form: gaps in the numbering, `_stats.json` beside, nothing of ours.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 50), "blue": (40, 70, 220)}
SMALL_GENERATOR = (
    "--num_channels 16 --num_res_blocks 1 --channel_mult 1,2 --attention_resolutions 8 "
    "--num_head_channels 16 --enc_attn_dim 32 --enc_depth 1 --enc_head_channels 16 "
    "--iterations 4 --log_interval 2 --save_interval 4 --num_preview 2 --num_workers 1"
)
SMALL_CLASSIFIER = (
    "--classifier_depth 1 --classifier_width 16 --classifier_enc_attn_dim 32 "
    "--classifier_channel_mult 1,2,2 --classifier_attention_resolutions 8 "
    "--classifier_head_channels 16 --classifier_enc_depth 1 --iterations 4 --log_interval 2 "
    "--eval_interval 2 --eval_samples 12 --save_interval 4 --num_workers 1"
)


def write_shards(folder: Path, samples: int, size: int) -> None:
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(folder / f"{3 * shard:05d}.tar", "w") as tar:
            for i in range(samples // 2):
                key = f"{shard:05d}{i:04d}"
                name = list(COLOURS)[int(numbers.integers(3))]
                picture = np.full((size, size, 3), 255, np.uint8)
                top, left = numbers.integers(0, size // 2, 2)
                picture[top : top + size // 2, left : left + size // 2] = COLOURS[name]
                file = io.BytesIO()
                Image.fromarray(picture).save(file, "JPEG", quality=95)
                caption = f"a {name} square"
                record = json.dumps({"caption": caption, "key": key, "status": "success"})
                for extension, data in (
                    ("jpg", file.getvalue()),
                    ("txt", caption.encode()),
                    ("json", record.encode()),
                ):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        (folder / f"{3 * shard:05d}_stats.json").write_text("{}")


def run(command: str, *, ranks: int = 0, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A script as a user types it, under mpiexec where there are ranks."""
    words = command.split("|") if "|" in command else command.split()
    launcher = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(ranks)] if ranks else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("OPENAI_LOGDIR", None)
    done = subprocess.run(
        [*launcher, sys.executable, *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three generators and a CLIP, each trained for a few steps; the base on two ranks."""
    folder = tmp_path_factory.mktemp("cascade")
    data = folder / "data"
    write_shards(data, samples=24, size=64)
    train = "scripts/train_generator.py --noise_schedule cosine --lr 3e-4"
    base = f"--image_size 16 --batch_size 4 --microbatch 2 --log_dir {folder}/runs/base"
    done = run(f"{train} --data_dir {data} {SMALL_GENERATOR} {base}", ranks=2)
    lines = done.stdout.strip().splitlines()
    assert lines[0] == lines[-1] == f"run folder: {folder}/runs/base"
    for size, small in ((32, 16), (64, 32)):
        upsampler = f"--image_size {size} --small_size {small} --gaussian_blur True --batch_size 4"
        run(
            f"{train} --data_dir {data} {SMALL_GENERATOR} {upsampler} "
            f"--log_dir {folder}/runs/up{size}"
        )
    run(
        f"scripts/train_classifier.py --data_dir {data} --val_data_dir {data} --image_size 16 "
        f"{SMALL_CLASSIFIER} --batch_size 6 --microbatch 3 --lr 3e-4 --weight_decay 0.1 "
        f"--log_dir {folder}/runs/clip"
    )
    return folder


def test_a_run_leaves_the_files_that_its_users_know(cascade: Path) -> None:
    names = {path.name for path in (cascade / "runs/base").iterdir()}
    assert {
        "config.json",
        "tokenizer.json",
        "progress.csv",
        "metrics.jsonl",
        "model000004.pt",
        "ema_0.9999_000004.pt",
        "opt000004.pt",
        "manifest000004.json",
        "samples_000004.png",
        "samples_000004.txt",
    } <= names
    assert "best.pt" in {path.name for path in (cascade / "runs/clip").iterdir()}
    rows = [json.loads(line) for line in open(cascade / "runs/base/metrics.jsonl")]
    assert [row["step"] for row in rows] == [2, 4] and rows[-1]["samples"] == 32


def test_the_cascade_samples_under_mpiexec_with_the_readme_flags(cascade: Path) -> None:
    runs, out = cascade / "runs", cascade / "out"
    paths = " ".join(f"{runs}/{name}/ema_0.9999_000004.pt" for name in ("base", "up32", "up64"))
    texts = cascade / "texts.txt"
    texts.write_text("a red square\n\n파란 사각형\n", encoding="utf-8")
    run(
        f"scripts/sample.py --model_path {paths} --classifier_path {runs}/clip/best.pt "
        f"--classifier_scale 1.0 --guidance_scale 3 --data_dir {texts} --image_size 16 "
        f"--num_channels 16 --num_res_blocks 1 --classifier_width 16 --noise_schedule cosine "
        f"--timestep_respacing 3 --num_samples 3 --grid_size 128 --save_png True --log_dir {out}",
        ranks=2,
    )
    images = np.load(out / "samples_3x64x64x3.npz")["arr_0"]
    assert images.shape == (3, 64, 64, 3) and images.dtype == np.uint8
    captions = (out / "samples_3x64x64x3.txt").read_text("utf-8").splitlines()
    assert captions == ["a red square", "파란 사각형", "a red square"]
    assert Image.open(out / "grid.jpg").size[0] <= 128


def test_the_same_command_goes_on_and_another_kind_is_refused(cascade: Path) -> None:
    base, data = cascade / "runs/base", cascade / "data"
    more = SMALL_GENERATOR.replace("--iterations 4", "--iterations 6")
    command = f"scripts/train_generator.py --noise_schedule cosine --data_dir {data} {more}"
    done = run(f"{command} --image_size 16 --batch_size 4 --log_dir {base}")
    assert "goes on from" in done.stdout and "changed since" in done.stdout
    assert (base / "model000006.pt").exists()
    done = run(
        f"scripts/train_classifier.py --data_dir {data} --image_size 16 {SMALL_CLASSIFIER} "
        f"--log_dir {base}",
        check=False,
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "generator run" in line and f"{base}/classifier" in line


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("scripts/train_generator.py --data_dir {0}/nowhere", "nowhere: no such file or folder"),
        ("scripts/train_generator.py --data_dir {0}/data --imagesize 64", "did you mean"),
        ("scripts/train_generator.py --data_dir {0}/data --image_size 128", "too small"),
        ("scripts/sample.py --model_path {0}/texts.md --prompts x", "texts.md"),
        ("scripts/sample.py --model_path {0}/runs/clip/best.pt --prompts x", "classifier"),
        (
            "scripts/sample.py --prompts x --model_path "
            "{0}/runs/up32/model000004.pt {0}/runs/base/model000004.pt",
            "smallest to the largest",
        ),
        (
            "scripts/sample.py --prompts x --model_path "
            "{0}/runs/base/model000004.pt {0}/runs/up64/model000004.pt",
            "small_size",
        ),
    ],
)
def test_bad_input_stops_in_one_line(cascade: Path, command: str, message: str) -> None:
    (cascade / "texts.md").write_text("not a checkpoint")
    done = run(command.format(cascade), check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert message in line
    assert "Traceback" not in done.stderr
