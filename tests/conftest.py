"""What every test shares: one torch thread, so that times and results do not depend on cores."""

import os

import pytest
import torch

# Commands that tests start would choose a GPU where there is one, and two ranks share none.
# Tests of the GPU itself run in this process, which has looked by now.
GPUS = torch.cuda.device_count()
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


# Programs that tests start under mpiexec, not tests.
collect_ignore = ["programs"]
