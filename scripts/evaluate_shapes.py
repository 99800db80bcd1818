"""Measure whether pictures of one-object scenes say what their captions say.

python scripts/evaluate_shapes.py --model_path ema_0.9999_200000.pt --log_dir runs/evaluation
python scripts/evaluate_shapes.py --model_path base.pt up256.pt up1024.pt
python scripts/evaluate_shapes.py --model_path base.pt --classifier_path clip.pt \
    --classifier_scale 0 1 2 4 8 --seeds 0 1 2
python scripts/evaluate_shapes.py --write_captions captions.txt
mpiexec -n 2 python scripts/sample.py --model_path base.pt --data_dir captions.txt --log_dir out
python scripts/evaluate_shapes.py --images out/samples_256x64x64x3.npz \
    --captions out/samples_256x64x64x3.txt
"""

from __future__ import annotations

from diff_dalle.distributed import run_main
from diff_dalle.evaluation.shapes_run import ShapesConfig, evaluate_shapes
from diff_dalle.flags import Parser


def evaluate(argv: list[str]) -> None:
    files, table = evaluate_shapes(ShapesConfig(**Parser([ShapesConfig]).parse(argv)))
    print(table, "", *files, sep="\n")


def main() -> None:
    run_main(evaluate, alone=True)


if __name__ == "__main__":
    main()
