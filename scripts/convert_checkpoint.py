"""Turn a guided-diffusion checkpoint into one that sample.py and train_generator.py take.

python scripts/convert_checkpoint.py --preset adm-256 --source 256x256_diffusion_uncond.pt \
    --out_path adm256.pt
python scripts/convert_checkpoint.py --preset adm-64 --source 64x64_diffusion.pt --class_id 207 \
    --out_path adm64_golden_retriever.pt
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
