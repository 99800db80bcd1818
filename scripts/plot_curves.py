"""Draw curves from a run's progress.csv or from the JSON files of measurements.

python scripts/plot_curves.py --files runs/base/progress.csv --y loss val_loss --out loss.png
python scripts/plot_curves.py --files runs/evaluation/alignment*.json --x step --x_scale 32 \
    --x_label "images seen" --y colour background shape --out alignment.png
"""

from __future__ import annotations

from diff_dalle.distributed import run_main
from diff_dalle.evaluation.curves import CurvesConfig, draw_curves
from diff_dalle.flags import Parser


def plot(argv: list[str]) -> None:
    print(draw_curves(CurvesConfig(**Parser([CurvesConfig]).parse(argv))))


def main() -> None:
    run_main(plot, alone=True)


if __name__ == "__main__":
    main()
