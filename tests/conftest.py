"""What every test shares: one torch thread, so that times and results do not depend on cores."""

import os

import pytest
import torch


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
