"""Tiny models and made-up data, for the tests of the training loop and their programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from diff_dalle.data.batch import Batch
from diff_dalle.data.tokenizer import Tokenizer
from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.losses import LossConfig
from diff_dalle.diffusion.schedule import Schedule
from diff_dalle.diffusion.timesteps import TimestepConfig
from diff_dalle.distributed import World, all_reduce_sum_
from diff_dalle.keyed_noise import key_of
from diff_dalle.models.clip import CLIPConfig, NoisyCLIP
from diff_dalle.models.generator import Cond, Generator, GeneratorConfig
from diff_dalle.models.text import TextEncoderConfig
from diff_dalle.models.unet_config import UNetConfig
from diff_dalle.training.classifier_task import ClassifierTask, ClassifierTaskConfig
from diff_dalle.training.generator_task import GeneratorTask, GeneratorTaskConfig
from diff_dalle.training.loop import Data, RunRecord, TrainConfig, train
from diff_dalle.training.metrics import Meter
from diff_dalle.training.optim import OptimConfig
from diff_dalle.training.precision import Precision, PrecisionConfig
from diff_dalle.training.previews import PreviewConfig
from diff_dalle.training.tasks import PreviewFrom, StepContext, Task

Module = TypeVar("Module", bound=torch.nn.Module)
SIZE, LENGTH, VOCABULARY, STEPS = 16, 4, 20, 20
ALONE = World()


def sample(index: int, *, valid: bool = True) -> dict[str, torch.Tensor]:
    """One picture whose brightness its caption tells."""
    generator = torch.Generator().manual_seed(index)
    level = int(torch.randint(0, 16, (), generator=generator))
    noise = torch.randint(-20, 20, (3, SIZE, SIZE), generator=generator)
    image = (level * 16 + noise).clamp(0, 255).to(torch.uint8)
    tokens = torch.tensor([1, 3 + level, 2, 0])
    return {
        "image": image if valid else torch.zeros_like(image),
        "tokens": tokens,
        "mask": tokens > 0,
        "valid": torch.tensor(valid),
        "seed": torch.tensor(key_of(0, index)),
    }


def batch_of(indices: Iterable[int], *, bad: Iterable[int] = (), text: bool = True) -> Batch:
    """The samples of some numbers; those in ``bad`` are broken."""
    indices, bad = list(indices), set(bad)
    rows = [sample(index, valid=index not in bad) for index in indices]
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if not text:
        stacked |= {"tokens": None, "mask": None}
    broken = [("shard.tar", f"{i:06d}", "truncated") for i in indices if i in bad]
    return Batch(**stacked, keys=[f"{i:06d}" for i in indices], bad=broken)


@dataclasses.dataclass
class Stream:
    """Endless batches for one rank, as the loader orders them; remembers what it gave."""

    batch_size: int = 4
    world: World = ALONE
    bad: tuple[int, ...] = ()
    text: bool = True
    seen: list[str] = dataclasses.field(default_factory=list)

    def __call__(self, start: int) -> Iterator[Batch]:
        while True:
            first = start + self.world.rank * self.batch_size
            batch = batch_of(range(first, first + self.batch_size), bad=self.bad, text=self.text)
            self.seen += batch.keys
            yield batch
            start += self.batch_size * self.world.size


def held_out(world: World = ALONE, *, samples: int = 8, text: bool = True) -> Iterator[Batch]:
    """Each held-out sample once over all ranks."""
    yield batch_of(range(10_000 + world.rank, 10_000 + samples, world.size), text=text)


def process(prediction: str = "eps", *, learn_sigma: bool = True) -> GaussianDiffusion:
    """A short cosine process."""
    variance = "learned_range" if learn_sigma else "fixed_large"
    return GaussianDiffusion(
        Schedule.make("cosine", STEPS), prediction=prediction, variance=variance
    )


def tiny_generator(
    *,
    small_size: int = 0,
    cond_text: bool = True,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    awake: bool = False,
) -> Generator:
    """A generator of 16 px; ``awake`` gives zero-initialised parameters values too."""
    torch.manual_seed(0)
    unet = UNetConfig(
        image_size=SIZE,
        num_channels=32,
        num_res_blocks=1,
        channel_mult=(1, 1),
        attention_resolutions=(8,),
        num_head_channels=16,
        dropout=dropout,
    )
    text = TextEncoderConfig(
        text_length=LENGTH,
        enc_attn_dim=16,
        enc_depth=1,
        enc_head_channels=16,
        vocab_size=VOCABULARY,
        dropout_text=dropout,
    )
    cfg = GeneratorConfig(small_size=small_size, cond_text=cond_text)
    return _woken(Generator(cfg, unet, text), awake).to(dtype)


def tiny_clip(
    *,
    noised: bool = True,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    awake: bool = False,
) -> NoisyCLIP:
    """A noised CLIP of 16 px."""
    torch.manual_seed(0)
    cfg = CLIPConfig(
        image_size=SIZE,
        classifier_width=32,
        classifier_depth=1,
        classifier_channel_mult=(1, 1),
        classifier_attention_resolutions=(8,),
        classifier_enc_attn_dim=16,
        classifier_enc_depth=1,
        classifier_embed_dim=16,
        classifier_head_channels=16,
        text_length=LENGTH,
        vocab_size=VOCABULARY,
        noised=noised,
        dropout=dropout,
    )
    return _woken(NoisyCLIP(cfg), awake).to(dtype)


def _woken(module: Module, awake: bool) -> Module:
    if awake:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in module.parameters():
                if not parameter.any():
                    parameter.normal_(0, 0.05, generator=generator)
    return module


def generator_task(
    model: Generator,
    cfg: GeneratorTaskConfig | None = None,
    *,
    timesteps: TimestepConfig | None = None,
    world: World = ALONE,
    microbatch: int = -1,
    precision: PrecisionConfig | None = None,
    diffusion: GaussianDiffusion | None = None,
    loss: LossConfig | None = None,
) -> GeneratorTask:
    """The task of a generator, on a short process."""
    return GeneratorTask(
        model,
        diffusion or process(learn_sigma=model.cfg.learn_sigma),
        cfg or GeneratorTaskConfig(),
        loss or LossConfig(),
        timesteps or TimestepConfig(),
        world=world,
        precision=Precision(precision or PrecisionConfig(), world.device),
        microbatch=microbatch,
    )


class Spy(torch.nn.Module):
    """Looks like a generator and remembers what it was asked; output zero."""

    def __init__(self, cfg: GeneratorConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.unet = torch.nn.Module()
        self.unet.cfg = UNetConfig(image_size=SIZE, channel_mult=(1, 1))
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.asked: list[tuple[torch.Tensor, torch.Tensor, Cond]] = []

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        self.asked.append((x_t, t, cond))
        channels = 2 * x_t.shape[1] if self.cfg.learn_sigma else x_t.shape[1]
        return self.weight * torch.ones_like(x_t).repeat(1, channels // x_t.shape[1], 1, 1)


def logged(task: GeneratorTask, batch: Batch) -> dict[str, float]:
    """What one training step of a task measures."""
    meter = Meter(batch.valid.device)
    total = batch.valid.sum().double()
    task.forward_backward(batch, StepContext(valid_total=total, loss_scale=1.0, meter=meter))
    return meter.means(ALONE)


def classifier_task(
    model: NoisyCLIP,
    cfg: ClassifierTaskConfig | None = None,
    *,
    world: World = ALONE,
    microbatch: int = -1,
) -> ClassifierTask:
    """The task of a noised CLIP, on a short process."""
    return ClassifierTask(
        model,
        process(learn_sigma=False),
        cfg or ClassifierTaskConfig(),
        TimestepConfig(),
        world=world,
        precision=Precision(PrecisionConfig(), world.device),
        microbatch=microbatch,
    )


def record(kind: str = "generator", **config: object) -> RunRecord:
    """A record with a few flags, some of which shape the weights."""
    flags = {"kind": kind, "image_size": SIZE, "seed": 0, "ema_rate": [0.9], "lr": 1e-3} | config
    return RunRecord(
        config=flags,
        shaping=frozenset({"image_size", "norm_groups", "prediction"}),
        process=frozenset({"prediction"}),
        tokenizer_json="{}",
        data="fingerprint",
        defaults={"norm_groups": 32, "prediction": "eps"},
    )


def train_config(folder: Path, **changes: object) -> TrainConfig:
    """A short run without previews, one checkpoint at its end."""
    values: dict[str, object] = {
        "batch_size": 4,
        "iterations": 3,
        "ema_rate": (0.9,),
        "log_interval": 1,
        "eval_interval": 0,
        "log_dir": str(folder),
        "report_to": "none",
    }
    return TrainConfig(**(values | changes))


OPTIM = OptimConfig(lr=1e-3, warmup_steps=0, lr_schedule="constant")


class ToyTask:
    """The smallest thing that trains: guess a caption's number from its picture's brightness.

    Attributes:
        spoil: step number -> what to add to that step's loss.
        scores: what evaluations report, in turn, in place of real ones.
    """

    kind = "generator"
    keeps_best = True
    preview_from: PreviewFrom | None = None

    def __init__(
        self,
        *,
        world: World = ALONE,
        spoil: dict[int, float] | None = None,
        scores: Iterable[float] = (),
        stop_early: int = 0,
        precision: str = "fp32",
    ) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
        self.precision = Precision(PrecisionConfig(precision=precision), world.device)
        self.stop_early = stop_early
        self._world = world
        self._spoil = spoil or {}
        self._scores = iter(scores)
        self._step = 0

    def forward_backward(self, batch: Batch, step: StepContext) -> torch.Tensor:
        assert batch.tokens is not None
        bright = batch.image.float().mean((2, 3)) / 255  # [B,3]
        errors = (self.model(bright)[:, 0] - batch.tokens[:, 1] / 10) ** 2  # [B]
        loss = (errors * batch.valid).sum() / step.valid_total.float()
        loss = loss + self._spoil.get(self._step, 0.0)
        (loss * step.loss_scale).backward()
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            all_reduce_sum_(parameter.grad, self._world)
        step.meter.add("loss", errors, batch.valid.double())
        self._step += 1
        return loss.detach()

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        list(batches)
        return {"val_loss": next(self._scores, 1.0)}

    def preview(self, batch: Batch, keys: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
        return {name: batch.image}

    def state_dict(self) -> dict[str, int]:
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._step = state["step"]


def trained(
    task: Task,
    folder: Path,
    *,
    stream: Stream | None = None,
    val: bool = True,
    optim: OptimConfig = OPTIM,
    previews: PreviewConfig | None = None,
    tokenizer: Tokenizer | None = None,
    **cfg: object,
) -> list[dict[str, float]]:
    """The rows of metrics.jsonl of a run."""
    data = Data(train=stream or Stream(), val=held_out if val else None, tokenizer=tokenizer)
    config = train_config(folder, **cfg)
    rest = {"previews": previews, "record": record(task.kind), "world": ALONE}
    train(task, data, config, optim, **rest)
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
