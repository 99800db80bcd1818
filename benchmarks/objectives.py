"""Which objective learns the demo scenes fastest: one network, one order of images, one sampler.

python scripts/make_demo_data.py --source shapes --out_dir data/shapes64 --num_train 40000 \
    --num_val 1000 --image_size 64 --seed 0
python benchmarks/objectives.py --data data/shapes64 --runs runs/objectives
python benchmarks/objectives.py --data data/shapes64 --runs runs/objectives --objectives v flow
python benchmarks/objectives.py --runs runs/objectives --table
python benchmarks/objectives.py --network upsampler-128 --data data/shapes256 --samples 96

Each objective trains the network from the same weights on the same images in the same order, with
the same noise; its average is drawn from at the given steps, from the same noise, by the same
sampler, and measured as evaluate_shapes.py or evaluate_upsampler.py does. All objectives reach a
step before one goes on, so the table can be read while the longer runs are under way. A second
table says after how many images the ancestors' eps with uniform weights is as good, in every
distance and in the last score.

Called again it goes on: a run at its last checkpoint, a measurement that is there is not taken
again. The learning rate falls to 0 at the last of --steps, so name them all from the start.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import machine
from objective_networks import NETWORKS

from diff_dalle.evaluation.features import ANY_PICTURE

ROOT = Path(__file__).parent.parent
UNIFORM = "--schedule_sampler uniform"
LOGSNR = "--schedule_sampler logsnr-normal --logsnr_mean -3 --logsnr_std 2"
BASELINE = "eps"  # of the ancestors
RESIDUAL = "x0-residual"  # of upsamplers alone
OBJECTIVES = {
    "x0-logsnr": f"--prediction x0 {LOGSNR}",
    "x0": f"--prediction x0 {UNIFORM}",
    RESIDUAL: f"--prediction x0 --low_res_residual True {UNIFORM}",
    "eps": f"--prediction eps {UNIFORM}",
    "eps-min-snr": f"--prediction eps --loss_weighting min-snr {UNIFORM}",
    "eps-logsnr": f"--prediction eps {LOGSNR}",
    "v": f"--prediction v {UNIFORM}",
    "v-min-snr": f"--prediction v --loss_weighting min-snr {UNIFORM}",
    "v-sigmoid": f"--prediction v --loss_weighting sigmoid {UNIFORM}",
    "v-logsnr": f"--prediction v {LOGSNR}",
    "v-zero-snr": f"--prediction v --zero_terminal_snr True {UNIFORM}",
    # Karras et al. 2022: ln(sigma) has mean -1.2 and deviation 1.2, and log-SNR is -2 ln(sigma).
    "edm": "--prediction edm --schedule_sampler logsnr-normal --logsnr_mean 2.4 --logsnr_std 2.4",
    "flow": "--prediction flow --noise_schedule flow --schedule_sampler logit-normal",
    "flow-uniform": f"--prediction flow --noise_schedule flow {UNIFORM}",
    "x0-logsnr-offset": f"--prediction x0 {LOGSNR} --noise_offset 0.1",
    "x0-logsnr-perturbed": f"--prediction x0 {LOGSNR} --input_perturbation 0.1",
}
EMA = "0.99"


def folder_of(objective: str, seed: int, args: argparse.Namespace) -> Path:
    return Path(args.runs / args.network / f"{objective}-{seed}")


def train(objective: str, seed: int, steps: int, args: argparse.Namespace) -> Path:
    """The averaged weights after so many steps, trained so far if they are not there."""
    folder = folder_of(objective, seed, args)
    weights = folder / f"ema_{EMA}_{steps:06d}.pt"
    if weights.exists():
        return weights
    # The rate falls towards the last step of all, so a run that stops on the way can go on.
    command = f"{NETWORKS[args.network].flags} --first_caption_prob 0.5 --ema_rate {EMA} "
    command += f"--batch_size {args.batch_size} --iterations {steps} "
    command += f"--lr_anneal_steps {args.steps[-1]} "
    command += f"--save_interval {args.save_interval} --eval_interval {args.save_interval} "
    command += f"--log_interval 50 --num_preview 0 --num_workers 1 --seed {seed} --report_to none "
    argv = [*command.split(), *OBJECTIVES[objective].split()]
    argv += ["--data_dir", f"{args.data}/train", "--val_data_dir", f"{args.data}/val"]
    script = [sys.executable, str(ROOT / "scripts" / "train_generator.py")]
    subprocess.run([*script, *argv, "--log_dir", str(folder)], check=True)
    return weights


def measure(weights: Path, args: argparse.Namespace) -> None:
    """Draw, score and write the numbers beside the weights, unless they are there."""
    out = measurement(weights, args.samples)
    if out.exists():
        return
    content = NETWORKS[args.network].measure(weights, args.data / "val", args.samples)
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
            folder_of(objective, seed, args) / f"ema_{EMA}_{steps:06d}.pt", args.samples
        )
        for objective, seed, steps in keys
    }
    return {
        key: json.loads(path.read_text(encoding="utf-8"))
        for key, path in paths.items()
        if path.exists()
    }


def as_good(one: dict[str, Any], other: dict[str, Any], score: str) -> bool:
    """Whether the first is no worse in any distance, nor in the score."""
    nearer = all(one["frechet"][name] <= value for name, value in other["frechet"].items())
    return nearer and one["scores"][score] >= other["scores"][score]


def compare(args: argparse.Namespace) -> None:
    """Images that the baseline needs to be as good as another objective, seed by seed."""
    found, score = read_all(args), NETWORKS[args.network].scores[-1]
    print(f"\n| objective | seed | images seen | {BASELINE} as good after | ratio |")
    print("|---" * 5 + "|")
    for (objective, seed, steps), content in found.items():
        baseline = {t: found[BASELINE, seed, t] for t in args.steps if (BASELINE, seed, t) in found}
        if objective == BASELINE or not baseline:
            continue
        equal = [t for t, other in baseline.items() if as_good(other, content, score)]
        least = min(equal, default=max(baseline))
        told, sign = (f"{least * args.batch_size:,}", "") if equal else (
            f"more than {least * args.batch_size:,}", "< ")  # fmt: skip
        print(f"| {objective} | {seed} | {steps * args.batch_size:,} | {told} "
              f"| {sign}{steps / least:.2f} |")  # fmt: skip


def show(args: argparse.Namespace) -> None:
    """The measurements that are there, one line an objective, seed and step."""
    network = NETWORKS[args.network]
    kinds = [f"Fréchet, {name}" for name in network.features]
    columns = ["objective", "seed", "images seen", *kinds, *network.scores]
    print(f"{args.network}, {args.samples} pictures\n\n| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for (objective, seed, steps), content in read_all(args).items():
        cells = [objective, str(seed), f"{steps * args.batch_size:,}"]
        cells += [f"{content['frechet'][name]:.3f}" for name in network.features]
        cells += [f"{content['scores'][name]:.3f}" for name in network.scores]
        print(f"| {' | '.join(cells)} |")
    compare(args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="tiny-64")
    parser.add_argument("--data", type=Path, default=Path("data/shapes64"), help="train and val")
    parser.add_argument("--runs", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", nargs="+", type=int, default=[500, 1000, 2000, 4000])
    parser.add_argument("--until", type=int, help="the last of --steps that is reached this time")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--save_interval", type=int, default=250)
    parser.add_argument("--samples", type=int, default=256, help="pictures of a measurement")
    parser.add_argument("--table", action="store_true", help="only show what was measured")
    args = parser.parse_args()
    args.steps.sort()
    if not args.objectives:
        upsampler = NETWORKS[args.network].features == ANY_PICTURE
        args.objectives = [name for name in OBJECTIVES if upsampler or name != RESIDUAL]
    print(machine("torch"))
    wanted = [steps for steps in args.steps if steps <= (args.until or steps)]
    for steps in [] if args.table else wanted:
        for seed in args.seeds:
            for objective in args.objectives:
                measure(train(objective, seed, steps, args), args)
    show(args)


if __name__ == "__main__":
    main()
