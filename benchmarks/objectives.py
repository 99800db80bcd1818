"""Which objective learns the demo scenes fastest: one network, one order of images, one sampler.

python scripts/make_demo_data.py --source shapes --out_dir data/shapes64 --num_train 40000 \
    --num_val 1000 --image_size 64 --seed 0
python benchmarks/objectives.py --data data/shapes64 --runs runs/objectives
python benchmarks/objectives.py --data data/shapes64 --runs runs/objectives --objectives v flow
python benchmarks/objectives.py --runs runs/objectives --table

Each objective trains the network of `tiny-64` from the same weights on the same images in the same
order, with the same noise; its average is drawn from at the given steps, from the same noise, by
the same sampler, and measured as evaluate_shapes.py does, and by the Fréchet distance to real
pictures of other scenes. All objectives reach a step before one goes on, so the table can be read
while the longer runs are under way. A second table says after how many images the ancestors' eps
with uniform weights is as good, in every distance and in alignment.

Called again it goes on: a run at its last checkpoint, a
measurement that is there is not taken again. The learning rate falls to 0 at the last of --steps,
so name them all from the start.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from demo_scenes import features_of, held_out, real_features
from measure import machine
from numpy.typing import NDArray

from diff_dalle.evaluation.alignment import score_detections, shapes_detector, truth_of
from diff_dalle.evaluation.drawing import Drawer, DrawingConfig
from diff_dalle.evaluation.features import FEATURES
from diff_dalle.evaluation.frechet import frechet_between

ROOT = Path(__file__).parent.parent
UNIFORM = "--schedule_sampler uniform"
BASELINE = "eps"  # of the ancestors
OBJECTIVES = {
    "preset": "",  # x0, steps by a normal log-SNR
    "x0": UNIFORM,
    "eps": f"--prediction eps {UNIFORM}",
    "eps-min-snr": f"--prediction eps --loss_weighting min-snr {UNIFORM}",
    "v": f"--prediction v {UNIFORM}",
    "v-min-snr": f"--prediction v --loss_weighting min-snr {UNIFORM}",
    "v-sigmoid": f"--prediction v --loss_weighting sigmoid {UNIFORM}",
    "v-zero-snr": f"--prediction v --zero_terminal_snr True {UNIFORM}",
    # Karras et al. 2022: ln(sigma) has mean -1.2 and deviation 1.2, and log-SNR is -2 ln(sigma).
    "edm": "--prediction edm --schedule_sampler logsnr-normal --logsnr_mean 2.4 --logsnr_std 2.4",
    "flow": "--prediction flow --noise_schedule flow --schedule_sampler logit-normal",
    "flow-uniform": f"--prediction flow --noise_schedule flow {UNIFORM}",
    "preset-offset": "--noise_offset 0.1",
    "preset-perturbed": "--input_perturbation 0.1",
}
SIZE, EMA = 64, "0.99"
SAMPLER = {"use_ddim": True, "timestep_respacing": ["20"], "guidance_scale": ["2.0"]}


def train(objective: str, seed: int, steps: int, args: argparse.Namespace) -> Path:
    """The averaged weights after so many steps, trained so far if they are not there."""
    folder = args.runs / f"{objective}-{seed}"
    weights = folder / f"ema_{EMA}_{steps:06d}.pt"
    if weights.exists():
        return weights
    # The rate falls towards the last step of all, so a run that stops on the way can go on.
    command = f"--preset tiny-64 --first_caption_prob 0.5 --batch_size {args.batch_size} "
    command += f"--ema_rate {EMA} --lr_anneal_steps {args.steps[-1]} --iterations {steps} "
    command += f"--save_interval {args.save_interval} --eval_interval {args.save_interval} "
    command += f"--log_interval 50 --num_preview 0 --num_workers 1 --seed {seed} --report_to none "
    argv = [*command.split(), *OBJECTIVES[objective].split()]
    argv += ["--data_dir", f"{args.data}/train", "--val_data_dir", f"{args.data}/val"]
    script = [sys.executable, str(ROOT / "scripts" / "train_generator.py")]
    subprocess.run([*script, *argv, "--log_dir", str(folder)], check=True)
    return weights


def distances(pictures: Sequence[NDArray[np.uint8]]) -> dict[str, float]:
    """Fréchet distances to real scenes."""
    found, real = features_of(pictures), real_features(SIZE)
    return {name: frechet_between(found[name], real[name]) for name in FEATURES}


def measure(weights: Path, args: argparse.Namespace) -> None:
    """Draw, score and write the numbers beside the weights, unless they are there."""
    out = measurement(weights, args.samples)
    if out.exists():
        return
    captions, _ = held_out(args.samples)
    cfg = DrawingConfig(
        model_path=[str(weights)], num_samples=args.samples, batch_size=32, **SAMPLER
    )
    (pictures,) = Drawer(cfg).draw(captions, seed=0, classifier_scale=0.0)
    truths = [truth_of(caption) for caption in captions]
    scores = score_detections(shapes_detector().detect_all(pictures), truths)
    content = {
        "frechet": distances(pictures),
        "shares": dataclasses.asdict(scores)["shares"],
        "confidence": scores.confidence,
        "settings": dataclasses.asdict(cfg),
    }
    part = out.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(out)


def measurement(weights: Path, samples: int) -> Path:
    return weights.with_name(f"{weights.stem}_{samples}.json")


def read_all(args: argparse.Namespace) -> dict[tuple[str, int, int], dict[str, Any]]:
    """The measurements that are there, by objective, seed and step."""
    keys = itertools.product(args.objectives, args.seeds, args.steps)
    paths = {
        (objective, seed, steps): measurement(
            args.runs / f"{objective}-{seed}" / f"ema_{EMA}_{steps:06d}.pt", args.samples
        )
        for objective, seed, steps in keys
    }
    return {
        key: json.loads(path.read_text(encoding="utf-8"))
        for key, path in paths.items()
        if path.exists()
    }


def as_good(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the first is no worse in any distance, nor in background, colour and shape."""
    nearer = all(one["frechet"][name] <= value for name, value in other["frechet"].items())
    return nearer and one["shares"]["all"]["mean"] >= other["shares"]["all"]["mean"]


def compare(args: argparse.Namespace) -> None:
    """Images that the baseline needs to be as good as another objective, seed by seed."""
    found = read_all(args)
    print(f"\n| objective | seed | images seen | {BASELINE} as good after | ratio |")
    print("|---" * 5 + "|")
    for (objective, seed, steps), content in found.items():
        baseline = {t: found[BASELINE, seed, t] for t in args.steps if (BASELINE, seed, t) in found}
        if objective == BASELINE or not baseline:
            continue
        equal = [t for t, other in baseline.items() if as_good(other, content)]
        least = min(equal, default=max(baseline))
        told, sign = (f"{least * args.batch_size:,}", "") if equal else (
            f"more than {least * args.batch_size:,}", "< ")  # fmt: skip
        print(f"| {objective} | {seed} | {steps * args.batch_size:,} | {told} "
              f"| {sign}{steps / least:.2f} |")  # fmt: skip


def show(args: argparse.Namespace) -> None:
    """The measurements that are there, one line an objective, seed and step."""
    columns = ["background", "colour", "shape", "all"]
    print(f"| objective | seed | images seen | Fréchet, {' | Fréchet, '.join(FEATURES)} |", end="")
    print(f" {' | '.join(columns)} |")
    print("|---" * (3 + len(FEATURES) + len(columns)) + "|")
    for (objective, seed, steps), content in read_all(args).items():
        cells = [objective, str(seed), f"{steps * args.batch_size:,}"]
        # An older measurement lacks features that came later.
        frechet = [content["frechet"].get(name, math.nan) for name in FEATURES]
        cells += [f"{distance:.3f}" for distance in frechet]
        cells += [f"{content['shares'][name]['mean']:.3f}" for name in columns]
        print(f"| {' | '.join(cells)} |")
    compare(args)
    real = distances([scene.draw(SIZE) for scene in held_out(args.samples)[1]])
    floor = ", ".join(f"{name} {value:.3f}" for name, value in real.items())
    print(f"\n{args.samples} real pictures: Fréchet {floor}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/shapes64"), help="train and val")
    parser.add_argument("--runs", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=[*OBJECTIVES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", nargs="+", type=int, default=[500, 1000, 2000, 4000])
    parser.add_argument("--until", type=int, help="the last of --steps that is reached this time")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--save_interval", type=int, default=250)
    parser.add_argument("--samples", type=int, default=256, help="pictures of a measurement")
    parser.add_argument("--table", action="store_true", help="only show what was measured")
    args = parser.parse_args()
    args.steps.sort()
    print(machine("torch"))
    wanted = [steps for steps in args.steps if steps <= (args.until or steps)]
    for steps in [] if args.table else wanted:
        for seed in args.seeds:
            for objective in args.objectives:
                measure(train(objective, seed, steps, args), args)
    show(args)


if __name__ == "__main__":
    main()
