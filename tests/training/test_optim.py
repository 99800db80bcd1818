"""The optimizer against formulas and torch, the rate against its schedules, refused steps."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diff_dalle.distributed import World
from diff_dalle.errors import UsageError
from diff_dalle.training.muon import Muon, orthogonalise, share_out
from diff_dalle.training.optim import (
    GuardedStep,
    OptimConfig,
    clip_gradients,
    gradient_norm,
    learning_rate,
    make_optimizer,
    matrix_parameters,
)
from diff_dalle.training.precision import Precision, PrecisionConfig

CPU = torch.device("cpu")


class Small(nn.Module):
    """One of everything that a model has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(7, 6)
        self.positions = nn.Parameter(torch.randn(5, 6))
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(4, 8)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.point = nn.Conv1d(8, 8, 1)
        self.linear = nn.Linear(6, 8)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        text = self.linear(self.tokens.weight[:5] + self.positions).mean(0)  # [8]
        hidden = self.norm(self.first(x)) + text[:, None, None]
        hidden = self.middle(torch.tanh(hidden))
        hidden = self.point(hidden.flatten(2)).view(hidden.shape)
        return self.last(torch.tanh(hidden))


def names_of(model: nn.Module, group: list[Tensor]) -> set[str]:
    wanted = {id(p) for p in group}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


MATRICES = {f"{name}.weight" for name in ("first", "middle", "point", "linear", "last")}
EVERYTHING = {name for name, _ in Small().named_parameters()}


def test_only_matrices_and_convolutions_decay() -> None:
    model = Small()
    assert names_of(model, matrix_parameters(model)) == MATRICES
    groups = make_optimizer(model, OptimConfig(weight_decay=0.1)).param_groups
    decayed = [names_of(model, group["params"]) for group in groups if group["weight_decay"] == 0.1]
    spared = [names_of(model, group["params"]) for group in groups if group["weight_decay"] == 0.0]
    assert decayed == [MATRICES] and spared == [EVERYTHING - MATRICES]


def test_muon_moves_inner_matrices_and_adamw_the_rest() -> None:
    model = Small()
    model.linear.bias.requires_grad_(False)
    optimizer = make_optimizer(model, OptimConfig(optimizer="muon", weight_decay=0.1))
    by_muon = names_of(model, optimizer.parts["muon"].param_groups[0]["params"])
    assert by_muon == {"middle.weight", "point.weight", "linear.weight"}
    assert names_of(model, optimizer.parameters) == EVERYTHING - {"linear.bias"}
    edges, rest = optimizer.parts["adamw"].param_groups
    assert names_of(model, edges["params"]) == {"first.weight", "last.weight"}
    assert (edges["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


def test_adamw_follows_its_paper() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, three steps in float64."""
    layer = nn.Linear(3, 2, bias=False).double()
    cfg = OptimConfig(lr=0.1, weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.95, adam_eps=1e-3)
    optimizer = make_optimizer(layer, cfg)
    weight = layer.weight.detach().clone()
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 4):
        gradient = torch.randn(2, 3, dtype=torch.float64)
        layer.weight.grad = gradient.clone()
        optimizer.step()
        m = 0.8 * m + 0.2 * gradient
        v = 0.95 * v + 0.05 * gradient**2
        update = (m / (1 - 0.8**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-3)
        weight = weight - 0.1 * 0.3 * weight - 0.1 * update
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-12, atol=1e-12)


def quintic(singular_values: Tensor) -> Tensor:
    """Five steps of Jordan et al. 2024 on a singular value."""
    s = singular_values
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parametrize("shape", [(8, 8), (8, 15), (8, 16), (6, 54), (20, 5), (1, 7), (7, 1)])
def test_orthogonalise_acts_on_singular_values_alone(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    norm = matrices.flatten(1).norm(dim=1)
    expected = u @ torch.diag_embed(quintic(s / norm[:, None])) @ vh
    torch.testing.assert_close(orthogonalise(matrices), expected, rtol=1e-9, atol=1e-9)
    single = orthogonalise(matrices.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-3, atol=2e-4)


def test_orthogonalise_survives_bad_matrices() -> None:
    assert torch.equal(orthogonalise(torch.zeros(2, 3, 9)), torch.zeros(2, 3, 9))
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(1, 16, 1, generator=generator) @ torch.randn(1, 1, 96, generator=generator)
    values = torch.linalg.svdvals(orthogonalise(thin * 1e-12))[0]
    assert 0.6 < values[0] < 1.3 and values[1] < 1e-2  # rank 1 stays rank 1, however small


def test_muon_agrees_with_torch_on_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(24, 16, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon([ours], lr=0.1, weight_decay=0.2)
    reference = torch.optim.Muon(
        [theirs], lr=0.1, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        ours.grad = torch.randn(24, 16, generator=generator)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    moved, expected = (ours - start).flatten(), (theirs - start).flatten()
    # torch's works in bf16, hence the tolerance.
    assert torch.linalg.norm(moved - expected) < 0.02 * torch.linalg.norm(expected)


def test_muon_flattens_convolutions_and_batches_equal_shapes() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 8, 4, 3, 3, generator=generator, dtype=torch.float64)
    gradients = torch.randn(2, 3, 8, 4, 3, 3, generator=generator, dtype=torch.float64)
    together = [nn.Parameter(x.clone()) for x in start]
    together[1].data = together[1].data.to(memory_format=torch.channels_last)
    flat = [nn.Parameter(x.flatten(1).clone()) for x in start]
    batched = Muon(together, lr=0.1)
    alone = [Muon([p], lr=0.1) for p in flat]
    for step in gradients:
        for p, q, gradient in zip(together, flat, step, strict=True):
            p.grad, q.grad = gradient.clone(), gradient.flatten(1).clone()
        batched.step()
        for one in alone:
            one.step()
    for p, q in zip(together, flat, strict=True):
        torch.testing.assert_close(p.detach().flatten(1), q.detach(), rtol=1e-12, atol=1e-12)


def test_the_size_of_muons_step_is_like_adamws() -> None:
    p = nn.Parameter(torch.zeros(64, 64))
    p.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    Muon([p], lr=1.0).step()
    assert 0.15 < float(p.detach().pow(2).mean().sqrt()) < 0.25  # Liu et al. 2025: 0.2


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_work_is_shared_out_evenly(ranks: int) -> None:
    costs = [9.0, 1.0, 4.0, 4.0, 2.0, 7.0, 3.0]
    owners = share_out(costs, ranks)
    work = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(ranks)]
    assert sum(work) == sum(costs)
    assert max(work) <= max(9.0, 4 / 3 * sum(costs) / ranks)  # Graham 1969


def test_muon_takes_no_vectors() -> None:
    with pytest.raises(ValueError, match=r"not \(4,\)"):
        Muon([nn.Parameter(torch.zeros(4))], lr=0.1)


def steps(model: nn.Module, optimizer: object, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()  # type: ignore[attr-defined]
        model(torch.randn(2, 3, 4, 4, generator=generator)).pow(2).mean().backward()
        optimizer.step()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_resuming_goes_on_bit_for_bit(name: str) -> None:
    cfg = OptimConfig(optimizer=name, lr=1e-2, weight_decay=0.1)
    whole = Small()
    optimizer = make_optimizer(whole, cfg)
    steps(whole, optimizer, 3, seed=1)
    steps(whole, optimizer, 3, seed=2)
    first = Small()
    optimizer = make_optimizer(first, cfg)
    steps(first, optimizer, 3, seed=1)
    saved = copy.deepcopy(optimizer.state_dict())
    second = Small()
    second.load_state_dict(first.state_dict())
    resumed = make_optimizer(second, cfg)
    resumed.load_state_dict(saved)
    steps(second, resumed, 3, seed=2)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True)
    )


def test_resuming_takes_the_knobs_of_today() -> None:
    model = Small()
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1))
    steps(model, optimizer, 1, seed=1)
    resumed = make_optimizer(model, OptimConfig(lr=5e-3, weight_decay=0.2, adam_beta2=0.9))
    resumed.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in resumed.param_groups] == [5e-3, 5e-3]
    assert [group["weight_decay"] for group in resumed.param_groups] == [0.2, 0.0]
    assert resumed.param_groups[0]["betas"] == (0.9, 0.9)


def test_resuming_with_another_optimizer_or_model_is_refused() -> None:
    state = make_optimizer(Small(), OptimConfig()).state_dict()
    with pytest.raises(UsageError, match=r"optimizer is adamw, this run's is muon\+adamw"):
        make_optimizer(Small(), OptimConfig(optimizer="muon")).load_state_dict(state)
    with pytest.raises(UsageError, match="fits another model"):
        make_optimizer(nn.Linear(2, 2), OptimConfig()).load_state_dict(state)


def rates(cfg: OptimConfig, kind: str, iterations: int) -> Callable[[int], float]:
    return lambda step: learning_rate(cfg, step, iterations, kind)


def test_a_constant_rate_after_a_linear_warm_up() -> None:
    rate = rates(OptimConfig(lr=0.4, warmup_steps=4), "generator", 100)
    assert [rate(step) for step in (0, 1, 2, 3, 4, 99)] == [0.1, 0.2, 0.4 * 0.75, 0.4, 0.4, 0.4]
    assert rates(OptimConfig(lr=0.4), "generator", 100)(0) == 0.4


def test_the_cosine_ends_at_its_share_of_the_peak() -> None:
    rate = rates(OptimConfig(lr=2.0, warmup_steps=10, lr_end=0.25), "classifier", 110)
    assert math.isclose(rate(9), 2.0) and math.isclose(rate(10), 2.0)
    assert math.isclose(rate(60), 2.0 * (0.25 + 0.75 / 2))
    assert math.isclose(rate(35), 2.0 * (0.25 + 0.75 * 0.5 * (1 + math.sqrt(0.5))))
    assert math.isclose(rate(110), 0.5) and math.isclose(rate(1000), 0.5)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("kind", ["generator", "classifier"])
def test_no_warm_up_and_nothing_but_warm_up_divide_by_nothing(kind: str, schedule: str) -> None:
    for warmup, first in ((0, 2.0), (10, 0.2)):
        rate = rates(OptimConfig(lr=2.0, warmup_steps=warmup, lr_schedule=schedule), kind, 10)
        assert math.isclose(rate(0), first)
        assert all(0 <= rate(step) <= 2 for step in range(11))


def test_linear_annealing_reaches_zero() -> None:
    by_steps = rates(OptimConfig(lr=1.0, lr_anneal_steps=50), "generator", 100)
    assert [by_steps(step) for step in (0, 10, 25, 50, 80)] == [1.0, 0.8, 0.5, 0.0, 0.0]
    by_flag = rates(OptimConfig(lr=1.0, anneal_lr=True), "classifier", 100)
    assert [by_flag(step) for step in (0, 25, 50)] == [1.0, 0.75, 0.5]
    assert rates(OptimConfig(lr=1.0, lr_schedule="linear"), "generator", 100)(25) == 0.75


def test_auto_is_constant_for_generators_and_cosine_with_warm_up_for_the_classifier() -> None:
    cfg = OptimConfig()
    assert cfg.resolved_schedule("generator") == "constant"
    assert cfg.resolved_schedule("classifier") == "cosine"
    assert cfg.resolved_warmup("generator", 100_000) == 0
    assert cfg.resolved_warmup("classifier", 1000) == 50
    assert cfg.resolved_warmup("classifier", 300_000) == 2000


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"lr": math.nan},
        {"optimizer": "sgd"},
        {"adam_beta1": 1.0},
        {"weight_decay": -0.1},
        {"lr_schedule": "step"},
        {"lr_end": 2.0},
        {"warmup_steps": -1},
        {"lr_schedule": "cosine", "anneal_lr": True},
    ],
)
def test_wrong_knobs_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(wrong))}"):
        OptimConfig(**wrong)  # type: ignore[arg-type]


def test_clipping_scales_by_the_global_norm() -> None:
    model = nn.Linear(2, 1)
    unused = nn.Parameter(torch.zeros(3))
    model.weight.grad = torch.tensor([[3.0, 0.0]])
    model.bias.grad = torch.tensor([4.0])
    assert gradient_norm([*model.parameters(), unused]) == 5.0
    for never in (0.0, 10.0):
        clip_gradients([*model.parameters(), unused], 5.0, never)
        assert torch.equal(model.bias.grad, torch.tensor([4.0]))
    clip_gradients([*model.parameters(), unused], 5.0, 1.0)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.0]]))
    torch.testing.assert_close(model.bias.grad, torch.tensor([0.8]))


def guarded(precision: str = "fp32", **knobs: float) -> tuple[nn.Module, GuardedStep]:
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight)
    cfg = OptimConfig(**knobs)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = Precision(PrecisionConfig(precision=precision), CPU)
    return model, GuardedStep(make_optimizer(model, cfg), kind, cfg, World())


def set_gradients(model: nn.Module, value: float) -> None:
    for p in model.parameters():
        p.grad = torch.full_like(p, value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_skips_the_step_and_is_counted(bad: float) -> None:
    model, step = guarded()
    set_gradients(model, 1.0)
    model.weight.grad[1, 0] = bad  # type: ignore[index, union-attr]
    outcome = step.step()
    assert outcome.skipped and not math.isfinite(outcome.grad_norm)
    assert torch.equal(model.weight, torch.ones(2, 2))  # type: ignore[arg-type]
    assert not step.optimizer.parts["adamw"].state
    set_gradients(model, 1.0)
    outcome = step.step()
    assert not outcome.skipped and math.isclose(outcome.grad_norm, math.sqrt(6), rel_tol=1e-6)
    assert not torch.equal(model.weight, torch.ones(2, 2))  # type: ignore[arg-type]
    assert step.state_dict() == {"skipped": 1, "skipped_in_row": 0}


def test_bad_gradients_without_end_stop_the_run() -> None:
    model, step = guarded()
    with pytest.raises(UsageError, match="not finite for 10 steps in a row.*lower --lr"):
        for _ in range(100):
            set_gradients(model, math.nan)
            step.step()
    assert step.skipped == 10
    assert torch.equal(model.weight, torch.ones(2, 2))  # type: ignore[arg-type]


def test_fp16_overflows_lower_the_scale_and_the_norm_is_unscaled() -> None:
    model, step = guarded("fp16", max_grad_norm=0.5)
    for _ in range(12):
        set_gradients(model, math.inf)
        assert step.step().skipped
    assert step.precision.lg_loss_scale == 8.0
    set_gradients(model, 3.0 * step.precision.loss_scale)
    outcome = step.step()
    assert not outcome.skipped and math.isclose(outcome.grad_norm, 3 * math.sqrt(6), rel_tol=1e-6)
    assert math.isclose(step.precision.lg_loss_scale, 8.001)
    total = sum(float(p.grad.pow(2).sum()) for p in model.parameters() if p.grad is not None)
    assert math.isclose(math.sqrt(total), 0.5, rel_tol=1e-4)


def test_the_counts_survive_a_checkpoint() -> None:
    model, step = guarded()
    set_gradients(model, math.nan)
    step.step()
    _, resumed = guarded()
    resumed.load_state_dict(step.state_dict())
    assert (resumed.skipped, resumed.skipped_in_row) == (1, 1)
