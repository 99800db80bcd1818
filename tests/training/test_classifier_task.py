"""The classifier's gradients, what it is shown, and how its retrieval is scored."""

import pytest
import torch
import torch.nn.functional as F
from loop_tiny import ALONE, STEPS, batch_of, classifier_task, held_out, process, tiny_clip
from torch import Tensor

from diff_dalle.data.batch import Batch
from diff_dalle.diffusion.timesteps import TimestepConfig
from diff_dalle.distributed import World
from diff_dalle.errors import UsageError
from diff_dalle.training import draws
from diff_dalle.training.classifier_task import ClassifierTask, ClassifierTaskConfig, retrieval
from diff_dalle.training.metrics import Meter
from diff_dalle.training.precision import Precision, PrecisionConfig
from diff_dalle.training.tasks import StepContext

CPU = torch.device("cpu")


def step(task: ClassifierTask, batch: Batch, loss_scale: float = 1.0) -> dict[str, float]:
    task.model.zero_grad()
    meter = Meter(CPU)
    total = batch.valid.sum().double()
    task.forward_backward(batch, StepContext(valid_total=total, loss_scale=loss_scale, meter=meter))
    return meter.means(World())


def gradients(task: ClassifierTask) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None}


def test_the_loss_is_clips_at_each_samples_own_noise_level() -> None:
    """Radford et al. 2021, figure 3, on pictures noised by hand."""
    model = tiny_clip(awake=True, dtype=torch.float64)
    batch = batch_of(range(6))
    means = step(classifier_task(model), batch)

    t = (draws.timestep(batch.seed) * STEPS).long()
    assert len(set(t.tolist())) > 2
    eps = draws.noise(batch.seed, (3, 16, 16)).double()
    x_t = process().add_noise(batch.image.double() / 127.5 - 1, t, eps)
    assert batch.tokens is not None and batch.mask is not None
    images, texts = model(x_t, t, batch.tokens, batch.mask)
    logits = model.scale() * images @ texts.T
    own = torch.arange(6)
    loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert means["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert means["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-6)


@pytest.mark.parametrize("microbatch", [1, 3])
def test_chunks_never_change_the_gradient(microbatch: int) -> None:
    model = tiny_clip(awake=True, dtype=torch.float64)
    batch = batch_of(range(6), bad=[4])
    loss = step(classifier_task(model), batch)["loss"]
    whole = gradients(classifier_task(model))
    pieces_loss = step(classifier_task(model, microbatch=microbatch), batch)["loss"]
    pieces = gradients(classifier_task(model))
    assert pieces_loss == pytest.approx(loss, rel=1e-12)
    assert len(whole) == len(list(model.parameters()))
    for name, gradient in whole.items():
        assert torch.allclose(pieces[name], gradient, rtol=1e-9, atol=1e-14), name


def test_a_broken_sample_is_nobodys_negative() -> None:
    model = tiny_clip(awake=True, dtype=torch.float64)
    task = classifier_task(model)
    loss = step(task, batch_of([0, 1, 3]))["loss"]
    without = gradients(task)
    assert step(task, batch_of([0, 1, 2, 3], bad=[2]))["loss"] == pytest.approx(loss, rel=1e-12)
    for name, gradient in gradients(task).items():
        assert torch.allclose(gradient, without[name], rtol=1e-9, atol=1e-14), name


def test_the_loss_scale_multiplies_every_gradient() -> None:
    task = classifier_task(tiny_clip(awake=True, dtype=torch.float64), microbatch=2)
    step(task, batch_of(range(4)))
    once = gradients(task)
    step(task, batch_of(range(4)), loss_scale=64.0)
    for name, gradient in gradients(task).items():
        assert torch.allclose(gradient, 64 * once[name], rtol=1e-12, atol=0), name


def test_without_noise_the_clean_pictures_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_clip(noised=False)
    seen = []
    encode = model.encode_image

    def spy(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return encode(x, t)

    monkeypatch.setattr(model, "encode_image", spy)
    batch = batch_of(range(4))
    task = classifier_task(model)
    means = step(task, batch)
    assert torch.equal(seen[0][0], batch.image.float() / 127.5 - 1)
    assert not seen[0][1].any()
    assert "acc_q0" in means and "acc_q1" not in means
    values = task.evaluate(held_out())
    assert "val_loss_q0" in values and "val_loss_q1" not in values


def test_a_sampler_that_needs_single_losses_is_refused() -> None:
    with pytest.raises(UsageError, match="loss-second-moment"):
        ClassifierTask(
            tiny_clip(),
            process(),
            ClassifierTaskConfig(),
            TimestepConfig(schedule_sampler="loss-second-moment"),
            world=ALONE,
            precision=Precision(PrecisionConfig(), CPU),
        )


def test_perfect_features_find_each_other() -> None:
    features = torch.eye(5)
    tokens = torch.arange(5)[:, None]
    scores = retrieval(torch.stack([features, features]), features, tokens, torch.tensor(100.0))
    assert scores["val_acc_i2t"] == scores["val_acc_t2i_q1"] == scores["val_caption_wins"] == 1.0
    assert scores["val_loss"] < 1e-6 < 50 < scores["val_loss_shuffled"]


def test_wrong_features_find_others_and_levels_are_kept_apart() -> None:
    features = torch.eye(4)
    tokens = torch.arange(4)[:, None]
    images = torch.stack([features, features.roll(1, 0)])
    scores = retrieval(images, features, tokens, torch.tensor(10.0))
    assert (scores["val_acc_i2t_q0"], scores["val_acc_i2t_q1"]) == (1.0, 0.0)
    assert scores["val_acc_t2i"] == 0.5
    assert scores["val_loss"] == pytest.approx((scores["val_loss_q0"] + scores["val_loss_q1"]) / 2)
    assert scores["val_caption_wins_q0"] == 1.0 and scores["val_caption_wins_q1"] == 0.0


def test_one_direction_can_fail_alone() -> None:
    images = F.normalize(torch.tensor([[1.0, 0.0], [0.8, 0.6]]), dim=1)
    texts = F.normalize(torch.tensor([[1.0, 0.0], [0.99, 0.1]]), dim=1)
    scores = retrieval(images[None], texts, torch.arange(2)[:, None], torch.tensor(10.0))
    assert scores["val_acc_i2t"] == 1.0
    assert scores["val_acc_t2i"] == 0.5  # both captions lie nearer to the first picture


def test_a_shared_caption_is_right_for_each_of_its_pictures() -> None:
    images, texts = torch.eye(3)[[0, 1, 0]], torch.eye(3)[[0, 1, 0]]
    tokens = torch.tensor([[7], [8], [7]])
    scores = retrieval(images[None], texts, tokens, torch.tensor(10.0))
    assert scores["val_acc_i2t"] == scores["val_acc_t2i"] == 1.0
    assert scores["val_caption_wins"] == 1.0  # the pair with equal captions is not compared


def test_an_evaluation_is_the_same_every_time_and_for_any_batches() -> None:
    task = classifier_task(tiny_clip(dropout=0.3, awake=True))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    whole = task.evaluate([batch_of(range(6))])
    assert torch.equal(torch.get_rng_state(), state) and task.model.training
    pieces = task.evaluate([batch_of([0, 1, 2, 3]), batch_of([4, 5, 90], bad=[90])])
    assert pieces == pytest.approx(whole, rel=1e-5)
    names = [f"val_{what}_q{q}" for q in range(4) for what in ("loss", "acc_i2t", "acc_t2i")]
    assert set(names) <= whole.keys()
    assert task.evaluate([batch_of([0], bad=[0])]) == {}


def test_a_classifier_has_nothing_to_preview() -> None:
    task = classifier_task(tiny_clip())
    assert task.preview_from is None
    assert task.preview(batch_of([0]), torch.tensor([1]), "model") == {}
