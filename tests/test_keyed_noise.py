"""Keyed random numbers: published values, moments, and independence of the batch."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from diff_dalle import keyed_noise
from diff_dalle.keyed_noise import key_of, normal, uniform

KEYS = torch.tensor([7, 8, -9])


def mixed(value: int) -> int:
    """SplitMix64's finaliser of an unsigned 64-bit integer, as an unsigned one."""
    wrapped = torch.tensor([keyed_noise._wrap(value)])
    return int(keyed_noise._mix(wrapped)) % 2**64


@pytest.mark.parametrize(
    ("seed", "outputs"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]),
    ],
)
def test_splitmix64(seed: int, outputs: list[int]) -> None:
    """Its state grows by the golden ratio; output n is the finaliser of state n."""
    golden = 0x9E3779B97F4A7C15
    assert [mixed(seed + (n + 1) * golden) for n in range(len(outputs))] == outputs


def test_a_stream_reads_splitmix64_from_its_keys_own_state() -> None:
    golden = 0x9E3779B97F4A7C15
    start = mixed(7 + 3 * golden)  # key 7, stream 2
    wanted = [mixed(start + (n + 1) * golden) for n in range(4)]
    assert [bits % 2**64 for bits in keyed_noise._bits(KEYS[:1], 4, 2)[0].tolist()] == wanted
    numbers = uniform(KEYS[:1], (4,), stream=2)[0].double()
    assert numbers.tolist() == [((bits >> 41) + 0.5) / 2**23 for bits in wanted]


def test_uniform_numbers_fill_the_open_interval() -> None:
    u = uniform(torch.tensor([3]), (400_000,), stream=0)
    assert u.dtype == torch.float32 and 0 < float(u.min()) < 1e-4 < 1 - 1e-4 < float(u.max()) < 1
    counts = torch.histc(u, bins=100, min=0, max=1)
    chi_squared = float(((counts - 4000) ** 2 / 4000).sum())
    assert chi_squared < 99 + 5 * math.sqrt(2 * 99)


def test_the_ends_of_the_bits_stay_inside_the_open_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = torch.tensor([[0, -1, -(2**63), 2**63 - 1]])  # as unsigned: least, most, and the middle
    monkeypatch.setattr(keyed_noise, "_bits", lambda keys, count, stream: ends[:, :count])
    u = uniform(KEYS[:1], (4,), stream=0)[0].double()
    assert u.tolist() == [2.0**-24, 1 - 2.0**-24, 0.5 + 2.0**-24, 0.5 - 2.0**-24]
    assert torch.isfinite(normal(KEYS[:1], (8,), stream=0)).all()


def test_normal_numbers_have_the_moments_of_the_normal_distribution() -> None:
    count = 400_000
    z = normal(torch.tensor([3]), (count,), stream=1)[0].double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - moment) < 5 * math.sqrt(variance / count)
    halves = z[: count // 2] * z[count // 2 :]  # cosines and sines of the same angles
    assert abs(float(halves.mean())) < 5 / math.sqrt(count // 2)


def test_streams_and_keys_are_independent() -> None:
    z = torch.stack([normal(KEYS[:2], (100_000,), stream=s) for s in (0, 1)]).flatten(0, 1)
    correlations = torch.corrcoef(z) - torch.eye(4)
    assert float(correlations.abs().max()) < 5 / math.sqrt(100_000)


@pytest.mark.parametrize("draw", [uniform, normal])
def test_a_sample_does_not_see_its_batch(draw: object) -> None:
    assert callable(draw)
    together: Tensor = draw(KEYS, (3, 5), 4)
    assert together.shape == (3, 3, 5)
    assert torch.equal(together[2:], draw(KEYS[2:], (3, 5), 4))
    assert draw(KEYS, (), 4).shape == (3,)


def test_a_key_is_a_hash_of_its_parts() -> None:
    wanted = hashlib.blake2b("0\x1f파란 별".encode(), digest_size=8).digest()
    assert key_of(0, "파란 별") == int.from_bytes(wanted, "little") >> 1
    assert len({key_of(0, 12), key_of(1, 2), key_of("0", "1", "2"), key_of(12, 0)}) == 4


def test_names_that_are_no_utf8_have_keys() -> None:
    names = [b"caf\xe9.tar", b"caf\xe8.tar"]
    keys = [key_of(0, name.decode("utf-8", "surrogateescape")) for name in names]
    assert keys[0] != keys[1] and all(0 <= key < 2**63 for key in keys)
