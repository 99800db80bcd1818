"""Measure an upsampler on held-out pictures, beside Lanczos interpolation.

python scripts/evaluate_upsampler.py --model_path up256.pt --data_dir D/val --num_samples 256
"""

from __future__ import annotations

from diff_dalle.distributed import run_main
from diff_dalle.evaluation.upsampler_run import UpsamplerConfig, evaluate_upsampler
from diff_dalle.flags import Parser


def evaluate(argv: list[str]) -> None:
    files, table = evaluate_upsampler(UpsamplerConfig(**Parser([UpsamplerConfig]).parse(argv)))
    print(table, "", *files, sep="\n")


def main() -> None:
    run_main(evaluate, alone=True)


if __name__ == "__main__":
    main()
