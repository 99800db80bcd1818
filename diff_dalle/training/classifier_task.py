"""Training a noised CLIP: which caption belongs to which noised picture?

Symbols: docs/notation.md. B batch, L tokens, E embedding, N ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diff_dalle.data.batch import Batch
from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.timesteps import TimestepConfig, make_timestep_sampler
from diff_dalle.distributed import World, all_gather_objects, broadcast_object
from diff_dalle.errors import UsageError
from diff_dalle.knobs import knob, require
from diff_dalle.models.clip import NoisyCLIP
from diff_dalle.training import draws
from diff_dalle.training.contrastive import cached_step, contrastive_loss
from diff_dalle.training.metrics import QUARTILES
from diff_dalle.training.precision import Precision
from diff_dalle.training.stage import from_uint8
from diff_dalle.training.tasks import StepContext


@dataclass(frozen=True, kw_only=True)
class ClassifierTaskConfig:
    """When to stop training a classifier."""

    stop_early: int = knob(
        0, "stop after so many evaluations without a new best val_loss; 0: never"
    )

    def __post_init__(self) -> None:
        require(self.stop_early >= 0, "stop_early", self.stop_early, "be 0 or more")


class ClassifierTask:
    """A noised CLIP and its contrastive loss (Radford et al. 2021; Nichol et al. 2021, GLIDE).

    ``best.pt`` holds the weights themselves, not an average: a classifier's run is short beside
    the memory of an average, and the field guides with raw weights.

    Args:
        model: the CLIP, on the rank's device; float32, or float64 for exact comparisons.
        diffusion: the whole noise process, not respaced.
        cfg: when to stop.
        timesteps: how often each noise level is visited.
        world: the ranks.
        precision: the compute type.
        microbatch: samples encoded at once on one rank, to save memory; the loss is always that
            of the global batch. Less than 1 is the whole batch.
    Raises:
        UsageError: a timestep sampler that needs a loss for each sample.
    """

    kind = "classifier"
    keeps_best = True
    preview_from = None

    def __init__(
        self,
        model: NoisyCLIP,
        diffusion: GaussianDiffusion,
        cfg: ClassifierTaskConfig,
        timesteps: TimestepConfig,
        *,
        world: World,
        precision: Precision,
        microbatch: int = -1,
    ) -> None:
        if timesteps.schedule_sampler == "loss-second-moment":
            raise UsageError(
                "--schedule_sampler is loss-second-moment: a classifier has no loss of a single "
                "sample, take uniform or logsnr-normal"
            )
        self.model = model
        self.precision = precision
        self.stop_early = cfg.stop_early
        self._diffusion = diffusion
        self._world = world
        self._microbatch = microbatch
        self._timesteps = make_timestep_sampler(timesteps, diffusion)
        self._dtype = next(model.parameters()).dtype

    def forward_backward(self, batch: Batch, step: StepContext) -> Tensor:
        """The gradients of the contrastive loss of the global batch; see `Task`."""

        def loss_of(images: Tensor, texts: Tensor) -> Tensor:
            scale = self.model.scale()
            return contrastive_loss(images, texts, scale, batch.valid, self._world)

        result = cached_step(
            self.model,
            batch.chunk(self._microbatch),
            self._encode,
            loss_of,
            self._world,
            loss_scale=step.loss_scale,
        )
        weights = batch.valid.double()  # [B]
        step.meter.add("loss", result.loss)
        step.meter.add("logit_scale", self.model.scale())
        right = _nearest(result.image_features, result.text_features) == torch.arange(
            len(batch), device=weights.device
        )  # [B]: among the captions of this rank
        steps = self._diffusion.num_steps
        step.meter.add_by_quartile("acc", right.double(), self._steps(batch), steps, weights)
        return result.loss

    def _steps(self, batch: Batch) -> Tensor:
        """The timestep of each picture, int64 [B]; 0 for a CLIP of clean pictures."""
        if not self.model.cfg.noised:
            return torch.zeros_like(batch.seed)
        t, _ = self._timesteps.sample(draws.timestep(batch.seed))
        return t

    def _encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Image and text features, [B,E] each, the pictures noised to their timesteps."""
        eps = draws.noise(batch.seed, tuple(batch.image.shape[1:]))
        images = self._encode_images(batch, self._steps(batch), eps)
        return images, self._encode_texts(batch)

    def _encode_images(self, batch: Batch, t: Tensor, eps: Tensor) -> Tensor:
        x = from_uint8(batch.image, self._dtype)  # [B,3,H,W]
        if self.model.cfg.noised:
            x = self._diffusion.add_noise(x, t, eps.to(x))
        with self.precision.autocast():
            return self.model.encode_image(x, self._diffusion.model_time(t))

    def _encode_texts(self, batch: Batch) -> Tensor:
        assert batch.tokens is not None and batch.mask is not None
        with self.precision.autocast():
            return self.model.encode_text(batch.tokens, batch.mask)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Held-out loss and retrieval at a fixed (t, noise) of each sample in each quartile.

        All held-out samples of all ranks compete with one another. See `retrieval` for the
        names; with clean pictures there is one group, ``q0``, in place of four quartiles.
        """
        self.model.eval()
        groups = QUARTILES if self.model.cfg.noised else 1
        images: list[Tensor] = []  # [Q,m,E] a batch, valid samples only, on the CPU
        texts: list[Tensor] = []  # [m,E]
        tokens: list[Tensor] = []  # [m,L]
        for cpu_batch in batches:
            batch = cpu_batch.to(self._world.device)
            levels = torch.stack([self._held_out(batch, quartile) for quartile in range(groups)])
            images.append(levels[:, batch.valid].cpu())
            texts.append(self._encode_texts(batch)[batch.valid].cpu())
            tokens.append(cpu_batch.tokens[cpu_batch.valid])  # type: ignore[index]
        self.model.train()
        everyone = all_gather_objects((images, texts, tokens), self._world)
        values: dict[str, float] = {}
        if self._world.is_main and any(len(rows) for _, _, part in everyone for rows in part):
            values = retrieval(
                torch.cat([rows for part, _, _ in everyone for rows in part], dim=1),
                torch.cat([rows for _, part, _ in everyone for rows in part]),
                torch.cat([rows for _, _, part in everyone for rows in part]),
                self.model.scale().cpu(),
            )
        # Other numbers of threads differ in the last bit, and no rank may stop alone.
        return broadcast_object(values, self._world)

    def _held_out(self, batch: Batch, quartile: int) -> Tensor:
        """Image features [B,E] at each sample's fixed step within a timestep quartile."""
        t, eps = draws.held_out(
            batch.seed, tuple(batch.image.shape[1:]), quartile, self._diffusion.num_steps
        )
        if not self.model.cfg.noised:
            t = torch.zeros_like(t)
        return self._encode_images(batch, t, eps)

    def preview(self, batch: Batch, keys: Tensor, name: str) -> dict[str, Tensor]:
        """A classifier has nothing to show."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing beside the model."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


def retrieval(
    images: Tensor, texts: Tensor, tokens: Tensor, logit_scale: Tensor
) -> dict[str, float]:
    """How well features find one another, for each of Q noise levels and on average.

    A caption that several pictures share counts as right for each of them.

    Args:
        images: [Q,M,E], normalised, the same M pictures at Q noise levels.
        texts: [M,E], normalised.
        tokens: int64 [M,L], to tell equal captions.
        logit_scale: the factor on the cosines.
    Returns:
        Means over the levels, and the same names with ``_q0`` … for each: ``val_loss`` (of the
        M pairs as one batch), ``val_loss_shuffled`` (captions moved to the next picture),
        ``val_acc_i2t`` and ``val_acc_t2i`` (share of pictures that find their caption among
        all, and of captions that find their picture), ``val_caption_wins`` (share of pictures
        nearer to their own caption than to the next picture's other one).
    """
    alone = World(device=texts.device)
    same = (tokens[:, None] == tokens[None]).all(2)  # [M,M]
    valid = torch.ones(len(texts), dtype=torch.bool)
    rows = torch.arange(len(texts))
    next_texts = texts.roll(1, 0)
    comparable = ~same[rows, rows.roll(1)]  # [M]
    levels: list[dict[str, float]] = []
    for features in images:  # [M,E]
        own, other = (features * texts).sum(1), (features * next_texts).sum(1)  # [M]
        wins = (own > other)[comparable].double().mean()
        values = {
            "val_loss": contrastive_loss(features, texts, logit_scale, valid, alone),
            "val_loss_shuffled": contrastive_loss(features, next_texts, logit_scale, valid, alone),
            "val_acc_i2t": same[rows, _nearest(features, texts)].double().mean(),
            "val_acc_t2i": same[rows, _nearest(texts, features)].double().mean(),
            **({"val_caption_wins": wins} if comparable.any() else {}),
        }
        levels.append({name: float(value) for name, value in values.items()})
    means = {name: sum(level[name] for level in levels) / len(levels) for name in levels[0]}
    by_level = {f"{n}_q{q}": value for q, level in enumerate(levels) for n, value in level.items()}
    return means | by_level


def _nearest(queries: Tensor, candidates: Tensor) -> Tensor:
    """The most similar candidate of each query, int64 [M]."""
    return (queries @ candidates.T).argmax(1)
