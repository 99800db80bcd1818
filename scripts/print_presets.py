"""Print models_hparams.md: every preset with its flags, parameters, GFLOPs and memory.

python scripts/print_presets.py > models_hparams.md
"""

from __future__ import annotations

from diff_dalle.distributed import run_main
from diff_dalle.preset_table import preset_table


def print_presets(argv: list[str]) -> None:
    print(preset_table(), end="")


def main() -> None:
    run_main(print_presets)


if __name__ == "__main__":
    main()
