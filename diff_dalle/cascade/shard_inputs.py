"""Shards as an input of sampling: any sample of them will do."""

from __future__ import annotations

from diff_dalle.data.dataset import Dataset
from diff_dalle.data.loader import DataConfig, open_data
from diff_dalle.errors import UsageError


def open_shards(path: str, flag: str, *, with_text: bool) -> Dataset:
    """The samples of a path that ``--flag`` names.

    Raises:
        UsageError: there are none.
    """
    cfg = DataConfig(data_dir=[path], num_workers=0)
    try:
        # Any picture will do here; those that are used are looked at one by one.
        return open_data(cfg, split="train", image_size=1, with_text=with_text, seed=0)
    except UsageError as problem:
        raise UsageError(str(problem).replace("--data_dir", f"--{flag}", 1)) from problem
