"""How sampling is done where nobody says: which sampler, how many steps, how they are spread.

The numbers behind each choice: docs/decisions.md.
"""

from __future__ import annotations

from diff_dalle.diffusion.samplers import SAMPLERS
from diff_dalle.errors import UsageError
from diff_dalle.knobs import nearest

FAST_SAMPLER = "unipc"
# Those that draw noise were measured on known densities alone, the others on a trained model too.
BEST_SPACING = {name: "logsnr" for name in SAMPLERS} | {
    "ddpm": "quadratic",
    "dpmpp_2m_sde": "quadratic",
}


def check_sampler(name: str) -> None:
    """Raise a `UsageError` unless ``name`` is a sampler's."""
    if name not in SAMPLERS:
        raise UsageError(
            f"--sampler is {name!r}: it must be one of {', '.join(SAMPLERS)}"
            f"{nearest(name, SAMPLERS)}"
        )


def default_steps(sampler: str, *, image_size: int, upsampler: bool, num_steps: int) -> int:
    """The number of steps, at most the ``num_steps`` of the process.

    A function of the stage alone: chained or not, it draws the same picture. A base model decides
    what is there, an upsampler starts from a picture, and the larger one from more of it.

    >>> default_steps("heun", image_size=64, upsampler=False, num_steps=1000)
    10
    """
    if sampler in ("ddpm", "ddim"):
        # Those of GLIDE (Nichol et al. 2022).
        wanted = 27 if upsampler else 100
    else:
        wanted = 20 if not upsampler else 12 if image_size <= 256 else 6
    if sampler == "heun":
        wanted //= 2  # it asks the network twice a step
    return min(wanted, num_steps)
