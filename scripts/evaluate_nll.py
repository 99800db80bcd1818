"""Measure how many bits a dimension a generator needs for held-out pictures.

python scripts/evaluate_nll.py --model_path ema_0.9999_200000.pt --data_dir D/val --log_dir runs/nll
mpiexec -n 8 python scripts/evaluate_nll.py --model_path up256.pt --data_dir D/val \
    --num_samples 0 --timestep_respacing 250
"""

from __future__ import annotations

from diff_dalle.config import parse_with_stated
from diff_dalle.distributed import (
    all_gather_objects,
    broadcast_object,
    errors_to,
    run_main,
    start,
    stop,
)
from diff_dalle.evaluation.nll_run import Measurement, NllConfig
from diff_dalle.loading import check_stated
from diff_dalle.sampling_io.outputs import make_output_folder
from diff_dalle.training.run_data import require_same_data


def evaluate(argv: list[str]) -> None:
    cfg, stated = parse_with_stated(NllConfig, argv)
    world = start(cfg.device, timeout_s=7 * 86400)  # ranks meet when the slowest has its batch
    measurement = Measurement(cfg, world.device, show=world.is_main)
    check_stated(stated, [measurement.stage.loaded])
    require_same_data([measurement.dataset], world)
    folder = broadcast_object(make_output_folder(cfg.log_dir) if world.is_main else None, world)
    assert folder is not None
    with errors_to(folder, world):
        report = measurement.run(
            rank=world.rank, ranks=world.size, gather=lambda part: all_gather_objects(part, world)
        )
        if world.is_main:
            print(report.table(), "", *measurement.write(folder, report), sep="\n")
    stop(world)


def main() -> None:
    run_main(evaluate)


if __name__ == "__main__":
    main()
