"""How near few steps of a trained model come to many of the same noise, by sampler and spacing.

python benchmarks/spacings.py --model_path base.pt [--samples 16] [--guidance_scale 2]

The reference is UniPC in 80 steps, even in log-SNR, from the same noise. Distances are root mean
squares in grey levels over all pixels, and of the median picture, since one picture that goes
elsewhere outweighs all others. Samplers that draw noise have no such distance.
"""

from __future__ import annotations

import argparse

import numpy as np
from demo_scenes import held_out
from measure import machine
from numpy.typing import NDArray

from diff_dalle.cascade import Cascade
from diff_dalle.diffusion.spacing import SPACINGS

REFERENCE = ("unipc", 80, "logsnr")
# Heun's method asks the network twice a step but at the last.
COUNTS = {"ddim": (20,), "dpmpp_2m": (20, 12, 6), "unipc": (20, 12, 6), "heun": (10,)}


def drawn(
    cascade: Cascade, sampler: str, steps: int, spacing: str, args: argparse.Namespace
) -> NDArray[np.float64]:
    """Pictures of held-out captions, [N,H,W,3]."""
    captions, _ = held_out(args.samples)
    result = cascade.sample(
        captions,
        sampler=sampler,
        steps=steps,
        step_spacing=spacing,
        guidance_scale=args.guidance_scale,
        batch_size=args.samples,
    )
    return result.stages[-1].astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_path", required=True, help="a base model of the demo scenes")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    args = parser.parse_args()
    cascade = Cascade.load(args.model_path, device="cpu", warn=False)
    print(f"{machine('torch')}; {args.samples} pictures, all (median picture)\n")
    print(f"| | {' | '.join(SPACINGS)} |")
    print("|---" * (len(SPACINGS) + 1) + "|")
    reference = drawn(cascade, *REFERENCE, args)
    for sampler, counts in COUNTS.items():
        for steps in counts:
            cells = []
            for spacing in SPACINGS:
                off = drawn(cascade, sampler, steps, spacing, args) - reference
                each = np.square(off).mean(axis=(1, 2, 3))  # [N]
                told = np.sqrt(each.mean()), np.sqrt(np.median(each))
                cells.append("{:.2f} ({:.2f})".format(*told))
            print(f"| {sampler} {steps} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
