"""Train the classifier behind the `shapes` features from nothing, and measure it.

python benchmarks/train_shapes_classifier.py --out diff_dalle/evaluation/shapes_classifier.npz

One-object scenes at 64 pixels, every combination of attributes as often as every other, those that
generators never see in training included. Half of the pictures of a batch are damaged as pictures
of young models are: shifted colours, blur, noise, JPEG. Measured on scenes of other places and
extents. Weights are written as float16, and measured as they are written.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from measure import machine
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F

from diff_dalle.data.scenes import one_object_scenes
from diff_dalle.data.shapes import Scene
from diff_dalle.evaluation.shapes_classifier import (
    DAMAGES,
    HEADS,
    SIDE,
    ShapesClassifier,
    classes_of,
)

Pictures = NDArray[np.uint8]
WITHHELD, SHOWN = 480, 3_360  # combinations that generators never see in training, and others
RATE = 3e-3
TRAIN_SEED, TEST_SEED = 10, 11  # of the places and extents


def scenes_of(seed: int, turns: int) -> list[Scene]:
    """All combinations of attributes, each ``turns`` times, at different places."""
    withheld = one_object_scenes(WITHHELD * turns, seed, held_out_only=True)
    return withheld + one_object_scenes(SHOWN * turns, seed, held_out_only=False)


def shifted(picture: Pictures, rng: np.random.Generator) -> Pictures:
    """Each channel brighter or darker, by up to 12 levels."""
    return (picture + rng.uniform(-12, 12, 3)).round().clip(0, 255).astype(np.uint8)


def blurred(picture: Pictures, rng: np.random.Generator) -> Pictures:
    kernel = ImageFilter.GaussianBlur(rng.uniform(0.2, 1.5))
    return np.asarray(Image.fromarray(picture).filter(kernel))


def noised(picture: Pictures, rng: np.random.Generator) -> Pictures:
    noise = rng.uniform(1, 25) * rng.standard_normal(picture.shape)
    return (picture + noise).round().clip(0, 255).astype(np.uint8)


def compressed(picture: Pictures, rng: np.random.Generator) -> Pictures:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=int(rng.integers(40, 96)))
    return np.asarray(Image.open(file))


DAMAGE = {"colour": shifted, "blur": blurred, "noise": noised, "jpeg": compressed}


def damaged(picture: Pictures, rng: np.random.Generator) -> tuple[Pictures, list[float]]:
    """Half of the pictures as they are, the others with each damage or without it; and which."""
    share = 0.5 if rng.random() < 0.5 else 0.0
    used = [float(rng.random() < share) for _ in DAMAGES]
    for name, use in zip(DAMAGES, used, strict=True):
        if use:
            picture = DAMAGE[name](picture, rng)
    return picture, used


def tensor_of(pictures: Sequence[Pictures]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def train(scenes: list[Scene], args: argparse.Namespace) -> ShapesClassifier:
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    pictures = [scene.draw(SIDE) for scene in scenes]
    classes = torch.tensor([classes_of(scene) for scene in scenes])  # [N, heads]
    network = ShapesClassifier().to(memory_format=torch.channels_last)  # a third faster
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, args.steps)
    for step in range(args.steps):
        rows = rng.integers(0, len(scenes), args.batch_size)
        seen, used = zip(*(damaged(pictures[row], rng) for row in rows), strict=True)
        logits = network(tensor_of(seen))
        wanted = classes[rows].T  # [heads, B]
        losses = [F.cross_entropy(logits[k], row) for k, row in zip(HEADS, wanted, strict=True)]
        losses.append(F.binary_cross_entropy_with_logits(logits["damage"], torch.tensor(used)))
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    return network.eval()


@torch.no_grad()
def accuracies(
    network: ShapesClassifier, pictures: list[Pictures], scenes: list[Scene], used: str
) -> dict[str, float]:
    """The share of right answers of each head; ``used`` is the damage done, if any."""
    classes = torch.tensor([classes_of(scene) for scene in scenes]).T  # [heads, N]
    logits = [network(batch) for batch in tensor_of(pictures).split(128)]
    found = {name: torch.cat([part[name] for part in logits]).argmax(dim=1) for name in HEADS}
    shares = {k: (found[k] == row).double().mean() for k, row in zip(HEADS, classes, strict=True)}
    wanted = torch.tensor([name == used for name in DAMAGES])
    damage = torch.cat([part["damage"] for part in logits]) > 0
    shares["damage"] = (damage == wanted).all(dim=1).double().mean()
    return {name: round(share.item(), 4) for name, share in shares.items()}


def measured(network: ShapesClassifier, scenes: list[Scene]) -> dict[str, dict[str, float]]:
    """Accuracies on scenes as they are and under each damage; printed as a Markdown table."""
    rng = np.random.default_rng(0)
    plain = [scene.draw(SIDE) for scene in scenes]
    kinds = {"64 px": plain, "256 px": [scene.draw(256) for scene in scenes]}
    kinds |= {name: [damage(p, rng) for p in plain] for name, damage in DAMAGE.items()}
    columns = [f"{len(scenes)} held-out scenes", *HEADS, "damage"]
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    table = {}
    for name, pictures in kinds.items():
        table[name] = accuracies(network, pictures, scenes, name)
        print(f"| {name} | {' | '.join(f'{share:.4f}' for share in table[name].values())} |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the npz file to write")
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--turns", type=int, default=4, help="scenes of each combination")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and damage")
    args = parser.parse_args()
    print(machine("torch"))
    start = time.process_time()
    network = train(scenes_of(TRAIN_SEED, args.turns), args)
    print(f"trained in {time.process_time() - start:.0f} s of processor time")
    arrays = {name: tensor.half().numpy() for name, tensor in network.state_dict().items()}
    network.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    metadata = {name: vars(args)[name] for name in ("steps", "batch_size", "turns", "seed")}
    metadata["accuracy"] = measured(network, scenes_of(TEST_SEED, 1))
    np.savez(args.out, metadata=np.array(json.dumps(metadata)), **arrays)


if __name__ == "__main__":
    main()
