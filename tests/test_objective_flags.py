"""Flags of the objective: old runs keep their meaning, contradictions stop in one line."""

import pytest

from diff_dalle.config import (
    ClassifierRun,
    GeneratorRun,
    from_flat,
    make_diffusion,
    parse_run,
    to_flat,
)
from diff_dalle.errors import UsageError

NEWER = {
    "sigma_data": 0.5,
    "schedule_shift": 1.0,
    "zero_terminal_snr": False,
    "loss_weighting": "uniform",
    "min_snr_gamma": 5.0,
    "sigmoid_bias": 2.0,
    "noise_offset": 0.0,
    "input_perturbation": 0.0,
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "logit_uniform": 0.1,
}


@pytest.mark.parametrize(
    "flags",
    [
        "--zero_terminal_snr --prediction v --loss_weighting min-snr",
        "--zero_terminal_snr --prediction v --loss_weighting sigmoid",
        "--zero_terminal_snr --prediction v --schedule_sampler logsnr-normal --logsnr_uniform 0",
        "--zero_terminal_snr --prediction v --schedule_sampler logit-normal --logit_uniform 0",
        "--use_kl --input_perturbation 0.1",
        "--use_kl --loss_weighting min-snr",
        "--predict_xstart --prediction flow",
        "--low_res_residual --small_size 16 --prediction edm",
    ],
)
def test_objectives_that_undo_themselves_are_refused(flags: str) -> None:
    with pytest.raises(UsageError, match="^--.* is .*: it must ") as caught:
        parse_run(GeneratorRun, flags.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [
        "--noise_schedule flow --prediction v --schedule_sampler logit-normal --logit_uniform 0",
        "--zero_terminal_snr --prediction v --schedule_sampler logsnr-normal --logit_uniform 0",
        "--zero_terminal_snr --prediction v --logsnr_uniform 0 --logit_uniform 0",
    ],
)
def test_noise_alone_may_be_left_out_where_it_is_one_end_of_a_path(flags: str) -> None:
    """And a share that nothing reads is not asked about."""
    parse_run(GeneratorRun, flags.split())


@pytest.mark.parametrize("run_class", [GeneratorRun, ClassifierRun])
def test_a_run_from_before_a_flag_keeps_its_meaning(run_class: type) -> None:
    run = parse_run(run_class, ["--image_size", "64"])
    flat = to_flat(run)
    assert {name: flat.pop(name) for name in NEWER if name in flat}.items() <= NEWER.items()
    assert from_flat(run_class, flat) == run


def test_the_process_is_the_one_that_flags_ask_for() -> None:
    flags = "--noise_schedule flow --schedule_shift 2 --diffusion_steps 100"
    generator = make_diffusion(parse_run(GeneratorRun, f"{flags} --prediction edm".split()))
    clip = make_diffusion(parse_run(ClassifierRun, flags.split()))
    for diffusion in (generator, clip):  # s = 1/2 becomes 2/3
        assert float(diffusion.alpha_bar[49]) == pytest.approx(0.2, rel=1e-9)
    assert generator.prediction == "edm" and generator.sigma_data == 0.5
    flags = "--zero_terminal_snr --noise_schedule linear --prediction edm --sigma_data 0.25"
    generator = make_diffusion(parse_run(GeneratorRun, flags.split()))
    assert generator.alpha_bar[-1] == 0 and generator.sigma_data == 0.25
