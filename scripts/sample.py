"""Draw pictures for prompts with a cascade of generators; see README, "Sampling"."""

from __future__ import annotations

from diff_dalle.cascade import Cascade
from diff_dalle.cascade.share import draw_share, manifest_of, request_of
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
from diff_dalle.sampling_io.outputs import Workshop, make_output_folder


def sample(argv: list[str]) -> None:
    run = parse_sample_run(argv)
    cfg = run.sample
    world = start(cfg.device, timeout_s=7 * 86400)  # ranks meet when the slowest has drawn
    cascade = Cascade.load(
        cfg.model_path, cfg.classifier_path, world.device, cfg.resolved_precision
    )
    check_stated(run.stated, cascade.models)
    request = request_of(cascade, cfg)
    plan = cascade.plan(cfg, request.low_res)
    folder = broadcast_object(make_output_folder(cfg.log_dir) if world.is_main else None, world)
    assert folder is not None
    with errors_to(folder, world):
        count = len(request.prompts)
        made = Workshop.create(folder, count, cascade.sizes) if world.is_main else None
        workshop = broadcast_object(made, world)
        assert workshop is not None
        if world.is_main:
            print(f"drawing {count} images into {folder}", *cascade.notes, *request.notes, sep="\n")
        try:
            share = draw_share(
                cascade, plan, request, workshop, cfg, rank=world.rank, ranks=world.size
            )
            kept = {n: one for part in all_gather_objects(share, world) for n, one in part.items()}
            if world.is_main:
                manifest = manifest_of(cascade, plan, request, cfg, kept)
                captions = [prompt.text for prompt in request.prompts]
                for place in workshop.publish(captions, manifest, grid_size=cfg.grid_size):
                    print(place)
        finally:
            if world.is_main:
                workshop.discard()
    stop(world)


def main() -> None:
    run_main(sample)


if __name__ == "__main__":
    main()
