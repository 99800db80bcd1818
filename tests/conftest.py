"""What every test shares: one torch thread (times and results do not depend on cores), oracles."""

import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

HERE = Path(__file__).parent
FOLDERS = HERE / "fixtures", HERE / "models" / "fixtures"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _commands_see_no_gpu() -> None:
    """Commands that tests start would choose a GPU, and two ranks may not share one.

    Here, not at import: processes that run tests would inherit it and skip the tests of the GPU,
    which this process has opened before the variable hides it.
    """
    if torch.cuda.is_available():
        torch.cuda.init()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


# Programs that tests start under mpiexec, not tests.
collect_ignore = ["programs"]


def reference_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The weights that the reference outputs were computed with, a function of the keys."""
    weights = {}
    for key, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        weight = torch.randn(tuple(shape), generator=generator)
        if len(shape) > 1:
            weight = weight / weight[0].numel() ** 0.5
        else:
            weight = weight * 0.1 + (1.0 if key.endswith("weight") else 0.0)
        weights[key] = weight
    return weights


@pytest.fixture
def adm() -> Callable[[str], tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Tensors and weights of a stored run of guided-diffusion."""

    def load(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        paths = [folder / f"{name}.safetensors" for folder in FOLDERS]
        with safe_open(next(path for path in paths if path.exists()), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            shapes = json.loads(file.metadata()["state_dict_shapes"])
        return tensors, reference_weights(shapes)

    return load
