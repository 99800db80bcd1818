"""What a loaded cascade takes to draw: four base pictures, one picture of every stage, and again.

python benchmarks/cascade.py --model_path base.pt up256.pt up1024.pt [--device cuda] [--offload]

Default settings, no guidance. Seconds by the clock and, on a CPU, of computing on all cores
together: the first depend on what else the machine does, the second far less. Imports are not in
them. Every line is one call; the second call of a line finds everything loaded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from measure import machine

from diff_dalle.cascade import Cascade, CascadeResult

PROMPT = "a large red circle above a small blue star"
Result = TypeVar("Result")


def measured(work: Callable[[], Result]) -> tuple[Result, str]:
    """What the work returns, and its seconds as two cells of the table."""
    wall, computed = time.perf_counter(), time.process_time()
    result = work()
    taken = time.perf_counter() - wall, time.process_time() - computed
    return result, " | ".join(f"{seconds:.2f}" for seconds in taken)


def stages_of(cascade: Cascade, result: CascadeResult) -> str:
    """Seconds and evaluations a stage, as two cells."""
    seconds = zip(cascade.sizes, result.seconds, strict=True)
    told = ", ".join(f"{size} px {value:.2f}" for size, value in seconds)
    return f"{told} | {', '.join(map(str, result.evaluations))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_path", nargs="+", required=True, help="as for sample.py")
    parser.add_argument("--device", nargs="+", default=["cpu"], help="as for sample.py")
    parser.add_argument("--offload", action="store_true", help="as for sample.py")
    args = parser.parse_args()
    device = args.device if len(args.device) > 1 else args.device[0]

    def load() -> Cascade:
        return Cascade.load(args.model_path, device=device, offload=args.offload, warn=False)

    print(f"{machine('torch')}; {torch.get_num_threads()} threads; {', '.join(args.device)}\n")
    print("| | seconds | computing | seconds a stage | evaluations a picture |")
    print("|---|---|---|---|---|")
    cascade, cells = measured(load)
    print(f"| load {len(cascade.stages)} stages | {cells} | | |", flush=True)
    base = Cascade.load(
        cascade.stages[0].path, device=args.device[0], offload=args.offload, warn=False
    )
    for name, drawer, count in (("four", base, 4), ("one", cascade, 1)):
        for call in ("first", "second"):
            result, cells = measured(
                lambda drawer=drawer, count=count: drawer.sample([PROMPT] * count)
            )
            size = drawer.sizes[-1]
            print(f"| {name} of {size} px, {call} call | {cells} | {stages_of(drawer, result)} |")


if __name__ == "__main__":
    main()
