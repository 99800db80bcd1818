"""Turn a guided-diffusion checkpoint into one that sample.py and train_generator.py take.

python scripts/convert_checkpoint.py --source 64x64_diffusion.pt --out_path adm64.pt --preset adm-64
"""

from __future__ import annotations

from diff_dalle.config import GeneratorRun, parse_section_and_run
from diff_dalle.conversion import ConvertConfig, convert_file
from diff_dalle.distributed import run_main


def convert_checkpoint(argv: list[str]) -> None:
    cfg, run = parse_section_and_run(ConvertConfig, GeneratorRun, argv)
    parameters = convert_file(cfg, run)
    print(f"{cfg.out_path}: {parameters:,} parameters")


def main() -> None:
    run_main(convert_checkpoint, alone=True)


if __name__ == "__main__":
    main()
