"""The networks that objectives are compared with, and how each one's pictures are measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from demo_scenes import features_of, held_out, real_features
from numpy.typing import NDArray

from diff_dalle.cascade.inputs import shrunk_to
from diff_dalle.data.loader import DataConfig
from diff_dalle.evaluation.alignment import score, truth_of
from diff_dalle.evaluation.drawing import Drawer, DrawingConfig
from diff_dalle.evaluation.features import ANY_PICTURE, FEATURES
from diff_dalle.evaluation.frechet import frechet_between
from diff_dalle.evaluation.upsampler_run import read_held_out
from diff_dalle.evaluation.upsampling import compare_with_lanczos

# As the presets of larger networks have it: no folded pixels, a learned variance.
UNFOLDED = "--patch_size 1 --learn_sigma True"
UPSAMPLER = (
    "--preset tiny-256 --image_size 128 --small_size 32 --crop_size 32 --low_res_residual False "
    f"--attention_positions False {UNFOLDED}"
)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, without its objective.

    Attributes:
        flags: of train_generator.py.
        scores: what its pictures are scored by besides Fréchet distances, higher is better; the
            last one counts where two objectives are compared.
        measure: weights, held-out shards and a number of pictures -> the distances, by kind of
            features, and these scores.
        features: the kinds of features.
    """

    flags: str
    scores: Sequence[str]
    measure: Callable[[Path, Path, int], dict[str, Any]]
    features: Sequence[str]


def by_ddim(weights: Path, steps: int, guidance_scale: float) -> Drawer:
    return Drawer(
        DrawingConfig(
            model_path=[str(weights)],
            use_ddim=True,
            timestep_respacing=[str(steps)],
            guidance_scale=[str(guidance_scale)],
            batch_size=32,
        )
    )


def distances(pictures: NDArray[np.uint8]) -> dict[str, float]:
    """Fréchet distances to real scenes of the same size."""
    found, real = features_of(pictures), real_features(pictures.shape[1])
    return {name: frechet_between(found[name], real[name]) for name in FEATURES}


def measure_base(weights: Path, _data: Path, samples: int) -> dict[str, Any]:
    """Pictures of held-out captions, DDIM in 20 steps with guidance 2."""
    captions, _ = held_out(samples)
    drawer = by_ddim(weights, steps=20, guidance_scale=2.0)
    (pictures,) = drawer.draw(captions, seed=0, classifier_scale=0.0)
    truths = [truth_of(caption) for caption in captions]
    shares = score(pictures, truths).shares
    means = {name: shares[name].mean for name in BASE_SCORES}
    return {"frechet": distances(pictures), "scores": means, **drawer.facts()}


def measure_upsampler(weights: Path, data: Path, samples: int) -> dict[str, Any]:
    """Held-out pictures shrunk and enlarged, DDIM in 6 steps without guidance."""
    drawer = by_ddim(weights, steps=6, guidance_scale=1.0)
    stage = drawer.cascade.stages[0]
    shards = DataConfig(data_dir=[str(data)], num_workers=0)
    true, captions = read_held_out(shards, samples, stage.image_size, with_text=True)
    small = shrunk_to(true, (stage.small_size, stage.small_size), stage.device)
    (pictures,) = drawer.draw(captions, seed=0, classifier_scale=0.0, low_res=small)
    report = compare_with_lanczos(true, small, pictures)
    nearness = {name: found.model for name, found in report.distances.items()}
    ratios = {"consistency, dB": report.consistency.mean, "truth, dB": report.psnr_model.mean}
    return {"frechet": nearness, "scores": ratios, **drawer.facts()}


BASE_SCORES = ("background", "colour", "shape", "all")
UPSAMPLER_SCORES = ("consistency, dB", "truth, dB")
NETWORKS = {
    "tiny-64": Network("--preset tiny-64", BASE_SCORES, measure_base, tuple(FEATURES)),
    "unfolded-32": Network(
        "--preset tiny-64 --image_size 32 --num_channels 32 --attention_resolutions 16,8 "
        f"{UNFOLDED}",
        BASE_SCORES,
        measure_base,
        tuple(FEATURES),
    ),
    "upsampler-128": Network(UPSAMPLER, UPSAMPLER_SCORES, measure_upsampler, ANY_PICTURE),
    "efficient-128": Network(
        f"{UPSAMPLER} --unet_layout efficient --num_res_blocks 2,4,4",
        UPSAMPLER_SCORES,
        measure_upsampler,
        ANY_PICTURE,
    ),
}
