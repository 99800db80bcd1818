"""Every result tensor of the fixture, for all four processes, in float32 and in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.guidance import shift_mean
from diff_dalle.diffusion.losses import LossConfig, training_losses
from diff_dalle.diffusion.samplers import ddim_inversion_step, ddim_step, ddpm_step
from diff_dalle.diffusion.schedule import Schedule

FIXTURE = load_file(Path(__file__).parents[1] / "fixtures" / "diffusion_numbers.safetensors")
# name -> (schedule, respacing, prediction)
PROCESSES = {
    "linear_1000_eps_mse": ("linear", "", "eps"),
    "linear_250_eps_rescaled_mse": ("linear", "250", "eps"),
    "cosine_ddim25_eps_mse": ("cosine", "ddim25", "eps"),
    "cosine_1000_xstart_kl": ("cosine", "", "x0"),
}
INPUTS = ("x0", "eps", "model_output", "z", "grad", "t")


def process(name: str) -> GaussianDiffusion:
    schedule, respacing, prediction = PROCESSES[name]
    whole = Schedule.make(schedule, 1000)
    return GaussianDiffusion(
        whole.respace(respacing), prediction=prediction, variance="learned_range"
    )


def rounded_as_published(d: GaussianDiffusion) -> GaussianDiffusion:
    """The same process with alpha_bar rounded to float32 before 1 - alpha_bar is taken.

    The published DDIM steps do that, and lose up to 4e-4 of the last steps' noise. Ours subtract
    in float64, so only the rounded tables can reproduce those steps to the last digits.
    """
    here, prev, after = (
        table.float()
        for table in (d.schedule.alpha_bar, d.schedule.alpha_bar_prev, d.schedule.alpha_bar_next)
    )
    std = ((1 - prev) / (1 - here)).sqrt() * (1 - here / prev).sqrt()
    d._tables["posterior_std"] = std.double()
    for key, value in (("prev", prev), ("next", after)):
        d._tables[f"signal_{key}"] = value.sqrt().double()
        d._tables[f"sigma_{key}"] = (1 - value).sqrt().double()
    return d


def results(name: str, dtype: torch.dtype, ddim: GaussianDiffusion) -> dict[str, Tensor]:
    """What our code makes of the fixture's inputs, under the fixture's names."""
    d = process(name)
    x_0, eps, output, z, grad = (FIXTURE[f"{name}.{key}"].to(dtype) for key in INPUTS[:-1])
    t = FIXTURE[f"{name}.t"]
    x_t = d.add_noise(x_0, t, eps)
    p, q = d.posterior(output, x_t, t), d.q_posterior(x_0, x_t, t)
    # Unbounded, as published.
    guided = p.x_0 + d.schedule.reach[t].to(dtype).reshape(-1, 1, 1, 1) * grad
    variance = d.schedule.posterior_variance[t].reshape(-1, 1, 1, 1).expand_as(x_0)
    ours = {
        "timestep_map": d.schedule.timestep_map,
        "x_t": x_t,
        "p_mean_clipped": p.mean,
        "p_mean_unclipped": d.posterior(output, x_t, t, clip=False).mean,
        "p_log_variance": p.log_var,
        "pred_xstart_clipped": p.x_0,
        "q_posterior_mean": q.mean,
        "q_posterior_log_variance_clipped": q.log_var,
        "q_posterior_variance": variance,
        "guided_mean": shift_mean(p, grad).mean,
        "guided_score_mean": d.q_posterior(guided, x_t, t).mean,
        "guided_score_pred_xstart": guided,
        "ddpm": ddpm_step(d, output, x_t, t, z)[0],
        "ddim_eta0": ddim_step(ddim, output, x_t, t, z)[0],
        "ddim_eta1": ddim_step(ddim, output, x_t, t, z, eta=1.0)[0],
        "ddim_reverse": ddim_inversion_step(ddim, output, x_t, t)[0],
    }
    cfg = LossConfig(
        use_kl=name.endswith("kl"), rescale_learned_sigmas=name.endswith("rescaled_mse")
    )
    terms = training_losses(d, output, x_0, x_t, t, eps, cfg)
    if cfg.use_kl:
        return ours | {"loss_loss": terms.loss}
    assert terms.mse is not None and terms.vb is not None
    return ours | {"loss_loss": terms.loss, "loss_mse": terms.mse, "loss_vb": terms.vb}


def published(name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    mine = {k.removeprefix(prefix): v for k, v in FIXTURE.items() if k.startswith(prefix)}
    return {key: value for key, value in mine.items() if key not in INPUTS}


def relative_error(ours: Tensor, theirs: Tensor, floor: float = 1e-30) -> float:
    """Largest error of any sample, relative to that sample's largest value (or to ``floor``)."""
    ours, theirs = ours.double().reshape(len(ours), -1), theirs.double().reshape(len(theirs), -1)
    size = theirs.abs().amax(dim=1).clamp(min=floor)
    return float(((ours - theirs).abs().amax(dim=1) / size).max())


def test_the_fixture_holds_these_processes_only() -> None:
    assert {key.split(".")[0] for key in FIXTURE} == set(PROCESSES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PROCESSES)
def test_every_result_is_reproduced(name: str, dtype: torch.dtype) -> None:
    ours = results(name, dtype, ddim=rounded_as_published(process(name)))
    theirs = published(name)
    assert set(ours) == set(theirs)
    errors = {key: relative_error(ours[key], theirs[key]) for key in theirs}
    if name.endswith("kl"):
        # T times a difference of numbers near 1: float32 leaves about 1e-5 of it uncertain.
        errors["loss_loss"] = relative_error(ours["loss_loss"], theirs["loss_loss"], floor=10.0)
    assert max(errors.values()) < 3e-6, errors


@pytest.mark.parametrize("name", PROCESSES)
def test_unrounded_ddim_differs_by_the_published_rounding_only(name: str) -> None:
    ours, theirs = results(name, torch.float64, ddim=process(name)), published(name)
    for key in ("ddim_eta0", "ddim_eta1", "ddim_reverse"):
        assert relative_error(ours[key], theirs[key]) < 5e-4
