"""What every test shares: one torch thread, so that times and results do not depend on cores."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


# Programs that tests start under mpiexec, not tests.
collect_ignore = ["programs"]
