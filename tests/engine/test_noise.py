"""The noise is a pure function of (seed, position, token), and it is Gumbel distributed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tca_kernels.reference import gumbel_noise
from tca_runtime.engine.noise import noise_keys

MASK32, MASK64 = 2**32 - 1, 2**64 - 1


def draw_noise(seeds: list[int], positions: list[int], vocab_size: int) -> torch.Tensor:
    as_uint = [np.array(values, dtype=np.uint64) for values in (seeds, positions)]
    return gumbel_noise(torch.from_numpy(noise_keys(*as_uint)), vocab_size)


def reference_bits(seed: int, position: int, token: int) -> int:
    """The same mixing with Python's unbounded integers."""

    def mix64(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK64
        x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK64
        return x ^ x >> 31

    key = mix64((mix64(seed) + position * 0x9E3779B97F4A7C15) & MASK64)
    x = (token + (key & MASK32)) & MASK32
    x = (x ^ x >> 16) * 0x7FEB352D & MASK32
    x = (x ^ x >> 15) + (key >> 32) & MASK32
    x = x * 0x846CA68B & MASK32
    return (x ^ x >> 16) & 0x7FFFFFFF


@given(
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**20),
    vocab_size=st.integers(1, 200),
)
def test_integer_overflow_wraps_as_specified(seed: int, position: int, vocab_size: int) -> None:
    noise = draw_noise([seed], [position], vocab_size)[0]
    bits = np.array([reference_bits(seed, position, t) for t in range(vocab_size)])
    uniform = (bits + 0.5) / 2**31
    exponential = -np.log1p(-uniform)
    # A uniform near 1 has few bits left below it in float32: its conversion, the factor that keeps
    # it below 1 and their product together change 1 - u by so much.
    rounding = 2.0**-23 * np.exp(exponential) / exponential
    difference = np.abs(noise.numpy() + np.log(exponential))
    assert (difference <= 1e-4 * np.abs(np.log(exponential)) + 1e-5 + rounding).all()


def test_rows_do_not_depend_on_each_other() -> None:
    seeds, positions = [97 * i for i in range(6)], [i % 3 for i in range(6)]
    together = draw_noise(seeds, positions, 1000)
    for i in range(6):
        assert torch.equal(together[i], draw_noise(seeds[i : i + 1], positions[i : i + 1], 1000)[0])


@pytest.mark.parametrize("axis", ["seed", "position", "token"])
def test_distribution_and_independence_along(axis: str) -> None:
    n = 1 << 16
    line, fixed = list(range(n)), [12345] * n
    if axis == "token":
        noise = draw_noise(fixed[:1], fixed[:1], n)[0]
    elif axis == "seed":
        noise = draw_noise(line, fixed, 1)[:, 0]
    else:
        noise = draw_noise(fixed, line, 1)[:, 0]
    uniform = (-(-noise.double()).exp()).exp()
    counts = torch.histc(uniform, 256, 0, 1)
    chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum()
    # 255 degrees of freedom: mean 255, standard deviation 22.6.
    assert 145 < chi_square < 365
    for lag in (1, 2, 3, 256):
        correlation = torch.corrcoef(torch.stack([uniform[lag:], uniform[:-lag]]))[0, 1]
        assert abs(correlation) < 5 / n**0.5


def test_every_value_is_finite() -> None:
    noise = draw_noise(list(range(64)), [0] * 64, 1 << 15)
    assert torch.isfinite(noise).all()
    assert noise.max() > 10
