"""What two ranks (or one) must agree on; rank 0 writes what it found as JSON.

Usage: dist_collectives.py RESULT_FILE
"""

from __future__ import annotations

import atexit
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diff_dalle.distributed import (
    World,
    all_gather,
    all_gather_objects,
    all_gather_with_grad,
    all_reduce_sum_,
    average_gradients_,
    barrier,
    broadcast_object,
    collectives,
    run_main,
    start,
    stop,
    synchronise_parameters,
)
from diff_dalle.errors import UsageError
from diff_dalle.training.contrastive import cached_step, contrastive_loss
from diff_dalle.training.digests import require_same_on_all_ranks
from diff_dalle.training.optim import GuardedStep, OptimConfig, make_optimizer
from diff_dalle.training.precision import Precision, PrecisionConfig

Found = dict[str, Any]


def main(argv: list[str]) -> int:
    world = start("cpu", timeout_s=60)
    found: Found = {"threads": torch.get_num_threads()}
    for check in (
        place,
        sums_and_objects,
        gather_gradient,
        parameters_and_buffers,
        averaged_gradients,
        two_ranks_equal_one,
        cached_contrastive,
        drift,
        skipped_step,
        ddp_in_a_cycle,
    ):
        check(world, found)
    if world.is_main:
        with open(argv[0], "w", encoding="utf-8") as file:
            json.dump(found, file)
    atexit.register(threads_left, Path(argv[0]).with_suffix(f".{world.rank}"))
    stop(world)
    return 0


def threads_left(path: Path) -> None:
    """Write which threads of the process group live when the interpreter ends."""
    names = [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")]
    path.write_text(json.dumps([name for name in names if "gloo" in name]))


def ddp_in_a_cycle(world: World, found: Found) -> None:
    """DDP's reducer holds the process group, and its module often sits in a cycle."""
    keeper: list[Any] = [nn.parallel.DistributedDataParallel(nn.Linear(2, 2))]
    keeper.append(keeper)
    keeper[0](torch.ones(1, 2)).sum().backward()
    found["ddp"] = True


def place(world: World, found: Found) -> None:
    found["worlds"] = all_gather_objects(
        (world.rank, world.size, world.local_rank, world.local_size, world.launcher), world
    )
    names = "[n for n in os.environ if n.startswith(('PMI_', 'MPI_LOCAL'))]"
    child = subprocess.run(
        [sys.executable, "-c", f"import os; print({names})"], capture_output=True, text=True
    )
    found["child_sees_mpi"] = child.stdout.strip()


def sums_and_objects(world: World, found: Found) -> None:
    found["sum"] = all_reduce_sum_(torch.tensor([world.rank + 1.0]), world).tolist()
    found["gathered"] = all_gather(torch.tensor([[world.rank]]), world).tolist()
    found["broadcast"] = all_gather_objects(broadcast_object({"of": world.rank}, world), world)
    barrier(world)


def gather_gradient(world: World, found: Found) -> None:
    """d(Σ_r L_r)/dx for losses that weigh every row differently, against autograd alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(world.size * 3, 4, generator=generator, dtype=torch.float64)
    weights = torch.randn(world.size, *x.shape, generator=generator, dtype=torch.float64)
    mine = x[world.rank * 3 : world.rank * 3 + 3].clone().requires_grad_()
    (all_gather_with_grad(mine, world) ** 2 * weights[world.rank]).sum().backward()
    assert mine.grad is not None
    whole = x.clone().requires_grad_()
    sum((whole**2 * w).sum() for w in weights).backward()  # type: ignore[union-attr]
    assert whole.grad is not None
    difference = (all_gather(mine.grad, world) - whole.grad).abs().max()
    found["gather_gradient_error"] = float(difference)


class Mixed(nn.Module):
    """Parameters and buffers of several types and memory layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(3)
        self.short = nn.Parameter(torch.randn(5).to(torch.bfloat16))
        self.register_buffer("flags", torch.rand(6) > 0.5)


def parameters_and_buffers(world: World, found: Found) -> None:
    torch.manual_seed(world.rank)
    module = Mixed()
    assert module.norm.running_mean is not None and module.norm.num_batches_tracked is not None
    module.norm.running_mean.normal_()
    module.norm.num_batches_tracked.fill_(world.rank + 7)
    sent = copy.deepcopy(module.state_dict())
    synchronise_parameters(module, world)
    states = all_gather_objects(module.state_dict(), world)
    found["unsynchronised"] = [
        name for name in sent for state in states if not torch.equal(state[name], states[0][name])
    ]
    found["changed_on_rank_0"] = [n for n in sent if not torch.equal(sent[n], states[0][n])]


def averaged_gradients(world: World, found: Found) -> None:
    """Several buckets, several types, and a parameter that only rank 0 used."""
    collectives._BUCKET_ELEMENTS = 8
    shapes = [(3, 2), (5,), (20,), (), (2, 2)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    parameters.append(nn.Parameter(torch.zeros(4, dtype=torch.float64)))
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    for index, p in enumerate(parameters):
        if index != 1 or world.rank == 0:
            p.grad = torch.full_like(p, 10.0 * index + world.rank)
    average_gradients_([*parameters, frozen], world)
    found["averages"] = [sorted({float(v) for v in p.grad.flatten()}) for p in parameters]  # type: ignore[union-attr]
    found["frozen_has_gradient"] = frozen.grad is not None


def two_ranks_equal_one(world: World, found: Found) -> None:
    """Weights after steps on halves of a batch, averaged, against one process, in float64."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = x.flip(1) ** 2

    def trained(inputs: Tensor, targets: Tensor, among: World) -> list[Tensor]:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)).double()
        optimizer = make_optimizer(model, OptimConfig(lr=1e-2, optimizer="muon"), among)
        for _ in range(5):
            optimizer.zero_grad()
            ((model(inputs) - targets) ** 2).mean().backward()
            average_gradients_(model.parameters(), among)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    rows = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
    split = trained(x[rows], y[rows], world)
    whole = trained(x, y, World())
    errors = [float((a - b).abs().max()) for a, b in zip(split, whole, strict=True)]
    found["two_ranks_weight_error"] = max(errors)


class TwoTowers(nn.Module):
    """Features with dropout in both towers and a learned scale."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(dropout))
        self.image_out, self.text = nn.Linear(16, 7), nn.Linear(4, 7)
        self.dropout = nn.Dropout(dropout)
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def encode(self, chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, texts = chunk
        image = self.image_out(self.image(images))
        text = self.text(self.dropout(texts))
        return nn.functional.normalize(image, dim=1), nn.functional.normalize(text, dim=1)


def cached_contrastive(world: World, found: Found) -> None:
    """Cached gradients of all ranks against one process that sees the whole batch."""
    rows = 12 // world.size
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    texts = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    valid = torch.tensor([True] * 4 + [False] + [True] * 5 + [False] * 2)
    torch.manual_seed(3)
    whole = TwoTowers(0.0).double()
    whole_loss = contrastive_loss(
        *whole.encode((images, texts)), whole.log_scale.exp(), valid, World()
    )
    whole_loss.backward()
    mine = slice(world.rank * rows, (world.rank + 1) * rows)
    errors, losses = {}, []
    for sizes in ([rows], [rows // 2] * 2, [1, rows - 1], [2, 1, rows - 3], [1] * rows):
        model = TwoTowers(0.0).double()
        model.load_state_dict(whole.state_dict())
        chunks = list(zip(images[mine].split(sizes), texts[mine].split(sizes), strict=True))
        result = cached_step(
            model,
            chunks,
            model.encode,
            lambda i, t, m=model: contrastive_loss(i, t, m.log_scale.exp(), valid[mine], world),
            world,
            loss_scale=8.0,
        )
        losses.append(abs(float(result.loss - whole_loss.detach())))
        for (name, a), b in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            error = float((a.grad / 8.0 - b.grad).abs().max() / b.grad.abs().max())
            errors[name] = max(error, errors.get(name, 0.0))
    found["cached_gradient_errors"] = errors
    found["cached_loss_error"] = max(losses)


def drift(world: World, found: Found) -> None:
    """One flipped bit on the last rank is found and named."""
    tensors = {"fine": torch.ones(3), "flipped": torch.zeros(2, dtype=torch.int32)}
    require_same_on_all_ranks(tensors.items(), world)
    if world.rank == 1:
        tensors["flipped"][1] ^= 1 << 7
    try:
        require_same_on_all_ranks(tensors.items(), world)
        message = ""
    except UsageError as error:
        message = str(error)
    found["drift"] = all_gather_objects(message, world)


def skipped_step(world: World, found: Found) -> None:
    """A gradient that is not finite on the last rank alone skips the step everywhere."""
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight)
    precision = Precision(PrecisionConfig(), world.device)
    cfg = OptimConfig()
    guarded = GuardedStep(make_optimizer(model, cfg), precision, cfg, world)
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan if world.rank == world.size - 1 else 1.0)
    outcome = guarded.step()
    found["skipped"] = all_gather_objects(
        (outcome.skipped, guarded.skipped, model.weight.detach().tolist()), world
    )


if __name__ == "__main__":
    run_main(main)
