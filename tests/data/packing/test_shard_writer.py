"""Shards: closed before they grow beyond a bound, cut back to where a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from diff_dalle.data.packing.shard_writer import GrowingFile, ShardWriter, SplitState
from diff_dalle.errors import UsageError


@pytest.mark.parametrize(("blocks", "sizes"), [(18, [20_480]), (19, [20_480, 20_480])])
def test_the_bound_counts_the_end_of_the_tar(tmp_path: Path, blocks: int, sizes: list[int]) -> None:
    state = SplitState()
    writer = ShardWriter(tmp_path, state, samples_per_shard=9, shard_bytes=20_480)
    # Twice a header and 18 blocks leave room for the two blocks at the end, 19 do not.
    for key in ("a", "b"):
        writer.append(key, [("jpg", bytes(512 * blocks))])
    writer.end_shard()
    writer.sync()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".part"] * len(sizes)
    writer.publish()
    assert [path.stat().st_size for path in sorted(tmp_path.glob("*.tar"))] == sizes
    assert list(state.shards.values()) == sizes and state.length == 2


def test_a_file_is_cut_back_and_never_stretched(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"known, lost")
    file = GrowingFile(path, 5)
    file.append(b" again")
    file.sync()
    file.close()
    assert path.read_bytes() == b"known again"
    with pytest.raises(UsageError, match=r"file is damaged \(under 12 bytes\)"):
        GrowingFile(path, 12)
