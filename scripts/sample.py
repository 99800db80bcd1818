"""Draw pictures for prompts with a cascade of generators; see README, "Sampling"."""

from __future__ import annotations

from diff_dalle.cascade.consistency import describe_consistency
from diff_dalle.cascade.share import draw_share, load_cascade, manifest_of, open_writer, request_of
from diff_dalle.cascade.timing import Timing
from diff_dalle.config import parse_sample_run
from diff_dalle.distributed import (
    all_gather_objects,
    broadcast_object,
    errors_to,
    run_main,
    start,
    stop,
)
from diff_dalle.loading import check_stated
from diff_dalle.sampling_io.outputs import make_output_folder, publish


def sample(argv: list[str]) -> None:
    run = parse_sample_run(argv)
    cfg = run.sample
    world = start(cfg.device[0], timeout_s=7 * 86400)  # ranks meet when the slowest has drawn
    cascade = load_cascade(cfg, world.device, world.size)
    check_stated(run.stated, cascade.models)
    request = request_of(cascade, cfg)
    plan = cascade.plan(cfg, request.low_res, request.contrast_texts, request.edits)
    folder = broadcast_object(make_output_folder(cfg.log_dir) if world.is_main else None, world)
    assert folder is not None
    with errors_to(folder, world):
        made = open_writer(folder, cascade, plan, request) if world.is_main else None
        writer = broadcast_object(made, world)
        assert writer is not None
        writer.require_shared()
        if world.is_main:
            notes = [*writer.notes(), *cascade.notes, *plan.notes(), *request.notes]
            notes.append(plan.describe_cost())
            print(f"drawing {writer.count} images into {folder}", *notes, sep="\n")
        with writer.session(world.rank):
            rank, ranks = world.rank, world.size
            mine = draw_share(cascade, plan, request, writer, cfg, rank=rank, ranks=ranks)
            shares = all_gather_objects(mine, world)
            if world.is_main:
                kept = [writer.kept, *(share.kept for share in shares)]
                timing = Timing.total([share.timing for share in shares])
                manifest = manifest_of(cascade, plan, request, cfg, writer, kept, timing)
                png, side = cfg.save_png, cfg.grid_size
                told = describe_consistency(manifest["images"], plan.names)
                files = publish(writer, request.texts, manifest, grid_size=side, png=png)
                print(*timing.describe(plan.names), *told, *files, sep="\n")
    stop(world)


def main() -> None:
    run_main(sample)


if __name__ == "__main__":
    main()
