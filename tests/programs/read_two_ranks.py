"""Reads some global batches of a run and writes what its ranks saw together.

mpiexec -n 2 python read_two_ranks.py SHARDS OUT START COUNT GLOBAL_BATCH
"""

import hashlib
import itertools
import json
from pathlib import Path

from diff_dalle.data.loader import DataConfig, open_data, train_batches
from diff_dalle.distributed import World, all_gather_objects, run_main, start, stop

Sample = tuple[str, str, int]


def read(shards: str, world: World, first: int, count: int, batch_size: int) -> list[list[Sample]]:
    """Key, hash of the pixels and seed of every sample of this rank, batch by batch."""
    cfg = DataConfig(data_dir=[shards], num_workers=1, random_crop=True, random_flip=True)
    dataset = open_data(cfg, split="train", image_size=16, with_text=False, seed=4)
    batches = train_batches(
        dataset,
        tokenizer=None,
        text_length=8,
        batch_size=batch_size // world.size,
        rank=world.rank,
        world=world.size,
        start_sample=first,
    )
    seen = []
    for batch in itertools.islice(batches, count):
        pixels = [hashlib.sha256(one.numpy().tobytes()).hexdigest() for one in batch.image]
        seen.append(list(zip(batch.keys, pixels, batch.seed.tolist(), strict=True)))
    return seen


def main(argv: list[str]) -> None:
    shards, out, *numbers = argv
    world = start("cpu")
    everyone = all_gather_objects(read(shards, world, *map(int, numbers)), world)
    if world.is_main:
        steps = zip(*everyone, strict=True)
        Path(out).write_text(json.dumps([one for step in steps for part in step for one in part]))
    stop(world)


if __name__ == "__main__":
    run_main(main)
