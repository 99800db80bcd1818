"""Samplers and step counts on a trained base model: alignment and Fréchet distance, paired.

python benchmarks/sampling_quality.py --model_path ema.pt --out_dir runs/quality
python benchmarks/sampling_quality.py --model_path ema.pt --out_dir runs/quality \
    --arms unipc:20:logsnr:1 unipc:20:logsnr:4 unipc:20:logsnr:4:1,5

The model is one of the demo scenes. An arm is sampler:steps:spacing, then the scale and the
interval of classifier-free guidance where there is any. Every arm draws the same pictures, that
is the 480 captions that training never shows, again and again, each time from other noise, and
every arm from the same. Alignment is the share of pictures whose colour, shape and background are
right; the Fréchet distance is to 2,000 real scenes of those captions. A caption counts once:
differences to the first arm are paired over captions, by each one's mean over its pictures, and
the intervals of ratios of Fréchet distances come from resampling captions with all of their
pictures. Called again it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import cast

import numpy as np
from demo_scenes import features_of, held_out, real_features
from measure import machine
from numpy.typing import NDArray
from tqdm import tqdm

from diff_dalle import Cascade
from diff_dalle.cascade import SampleSettings
from diff_dalle.cascade.settings import as_flags
from diff_dalle.evaluation.alignment import right, shapes_detector, truth_of
from diff_dalle.evaluation.features import FEATURES
from diff_dalle.evaluation.frechet import frechet_between
from diff_dalle.evaluation.intervals import paired_difference

ARMS = ["ddpm:250:uniform", "unipc:20:logsnr", "dpmpp_2m:20:logsnr", "ddim:20:uniform"]
CHUNK, RESAMPLES = 50, 200

Pictures = NDArray[np.uint8]


def settings_of(arm: str) -> SampleSettings:
    """What an arm stands for."""
    names = ("sampler", "steps", "step_spacing", "guidance_scale", "guidance_interval")
    return cast(SampleSettings, dict(zip(names, arm.split(":"), strict=False)))


def claim(out_dir: Path, cascade: Cascade) -> None:
    """Keep the pictures of one model in a folder; exit where it holds another's."""
    model = json.dumps(cascade.stages[0].describe()["checkpoint"]["sha256"])
    note = out_dir / "model.json"
    out_dir.mkdir(parents=True, exist_ok=True)
    if note.exists() and note.read_text(encoding="utf-8") != model:
        raise SystemExit(f"error: {out_dir} holds pictures of another model: give another folder")
    note.write_text(model, encoding="utf-8")


def draw(cascade: Cascade, arm: str, captions: list[str], out_dir: Path) -> Pictures:
    """uint8 [N,H,W,3], a file a chunk of captions."""
    settings = settings_of(arm)
    folder = out_dir / arm.replace(":", "-")
    folder.mkdir(parents=True, exist_ok=True)
    chunks = []
    for start in tqdm(range(0, len(captions), CHUNK), arm, unit="chunk"):
        path = folder / f"{start:05d}.npy"
        wanted = len(captions[start : start + CHUNK])
        if not path.exists() or len(np.load(path, mmap_mode="r")) != wanted:
            # A chunk has a seed of its own, so that it may be drawn alone.
            result = cascade.sample(
                captions[start : start + CHUNK],
                **settings,
                seed=start,
                batch_size=CHUNK,
            )
            np.save(path.with_suffix(".part.npy"), result.stages[0])
            path.with_suffix(".part.npy").replace(path)
        chunks.append(np.load(path))
    return np.concatenate(chunks)


def groups_of(captions: list[str]) -> list[NDArray[np.intp]]:
    """The numbers of each caption's pictures."""
    _, which = np.unique(captions, return_inverse=True)
    return [np.flatnonzero(which == number) for number in range(which.max() + 1)]


def ratio(
    ours: NDArray[np.float64],
    theirs: NDArray[np.float64],
    real: NDArray[np.float64],
    groups: list[NDArray[np.intp]],
) -> str:
    """Fréchet distance of the first over that of the second, with a 95 % interval."""
    rng = np.random.default_rng(0)
    resampled = []
    for _ in range(RESAMPLES):
        rows = np.concatenate([groups[n] for n in rng.integers(0, len(groups), len(groups))])
        resampled.append(frechet_between(ours[rows], real) / frechet_between(theirs[rows], real))
    low, high = np.quantile(resampled, [0.025, 0.975])
    middle = frechet_between(ours, real) / frechet_between(theirs, real)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument(
        "--arms", nargs="+", default=ARMS, help="sampler:steps:spacing[:scale[:LOW,HIGH]]"
    )
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()
    cascade = Cascade.load(args.model_path)
    claim(args.out_dir, cascade)
    captions, _ = held_out(args.samples)
    groups = groups_of(captions)
    truths = [truth_of(caption) for caption in captions]
    real = real_features(cascade.sizes[0])
    detector = shapes_detector()
    print(machine("torch"))
    names = list(FEATURES)
    print(f"| arm | evaluations | right | less the first's | {' | '.join(names)} | "
          f"{' | '.join(f'{name}, over the first' for name in names)} |")  # fmt: skip
    print("|---" * (4 + 2 * len(names)) + "|")
    first = None
    for arm in args.arms:
        pictures = draw(cascade, arm, captions, args.out_dir)
        verdicts = right(detector.detect_all(pictures), truths)["all"]
        shares = np.array([verdicts[rows].mean() for rows in groups])
        found = features_of(pictures)
        first = first or (shares, found)
        (plan,) = cascade.plan(as_flags(settings_of(arm))).stages
        cells = [
            arm,
            str(plan.evaluations),
            f"{verdicts.mean():.3f}",
            str(paired_difference(shares, first[0])),
        ]
        cells += [f"{frechet_between(found[name], real[name]):.3f}" for name in names]
        cells += [ratio(found[name], first[1][name], real[name], groups) for name in names]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
