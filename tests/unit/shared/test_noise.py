"""The noise: its distribution, its secrecy, and what its last bits tell."""

import math

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy import optimize, stats

from shared.dp.noise import KeyStream, SecureNoise, SeededNoise, grid_step

COUNT = 400_000
KEY = bytes(range(32))


@pytest.fixture(scope="module")
def normal() -> np.ndarray:
    return KeyStream(KEY, b"noise").normal(COUNT)


def test_the_stream_is_chacha20() -> None:
    """RFC 8439, appendix A.1, test vector 1: the key stream of an all-zero key and nonce."""
    words = KeyStream(bytes(32), b"").words(2)
    assert words.tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"


def test_moments(normal: np.ndarray) -> None:
    # Standard errors at this size: mean 0.0016, variance 0.0022, skew 0.0039, kurtosis 0.0077.
    assert abs(normal.mean()) < 0.007
    assert abs(normal.var() - 1) < 0.01
    assert abs(stats.skew(normal)) < 0.016
    assert abs(stats.kurtosis(normal)) < 0.032


def test_kolmogorov_smirnov(normal: np.ndarray) -> None:
    assert stats.kstest(normal, "norm").pvalue > 1e-3


def test_tails(normal: np.ndarray) -> None:
    for bound in (2.0, 3.0, 4.0):
        expected = 2 * stats.norm.sf(bound) * COUNT
        assert abs((np.abs(normal) > bound).sum() - expected) < 4.5 * math.sqrt(expected)


def test_neighbours_are_uncorrelated(normal: np.ndarray) -> None:
    assert abs(np.corrcoef(normal[:-1], normal[1:])[0, 1]) < 0.008
    assert abs(np.corrcoef(np.abs(normal[:-1]), np.abs(normal[1:]))[0, 1]) < 0.008


def test_no_word_gives_an_infinite_value(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = np.array([0, 1, 2, 2**63, 2**64 - 2, 2**64 - 1], np.uint64)
    monkeypatch.setattr(KeyStream, "words", lambda _self, _count: extremes)
    values = KeyStream(KEY, b"x").normal(len(extremes))
    assert np.isfinite(values).all()
    assert 9 < np.abs(values).max() < 9.3


@pytest.mark.parametrize("bit", [0, 31, 32, 63, 64, 128, 255])
def test_every_bit_of_the_key_counts(bit: int) -> None:
    """Torch's generator would see 32 of them."""
    other = (int.from_bytes(KEY, "big") ^ (1 << bit)).to_bytes(32, "big")
    first, second = KeyStream(KEY, b"noise").normal(1000), KeyStream(other, b"noise").normal(1000)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


def test_purposes_are_independent() -> None:
    first, second = KeyStream(KEY, b"noise").uniform(1000), KeyStream(KEY, b"sampling").uniform(1000)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


def test_uniforms_fill_the_half_open_unit_interval() -> None:
    uniform = KeyStream(KEY, b"u").uniform(COUNT)
    assert 0.0 <= uniform.min() < uniform.max() < 1.0
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("deviation", [1e-6, 0.7, 3.0, 1e4])
@pytest.mark.parametrize("signal", [0.0, 1e-12, 1 / 3, 1e5])
def test_outputs_lie_on_the_grid_whatever_the_data(deviation: float, signal: float) -> None:
    """The support of the output tells nothing: the defence against Mironov's attack."""
    total = torch.full((2000,), signal, dtype=torch.float64)
    noised = SecureNoise(KeyStream(KEY, b"noise")).add(total, deviation)
    step = grid_step(deviation)
    assert torch.equal(noised, (noised / step).round() * step)
    assert 2.0**-21 < step / deviation <= 2.0**-20
    assert (noised - signal).std().item() == pytest.approx(deviation, rel=0.1)


def test_the_low_bits_of_seeded_noise_do_tell() -> None:
    """Why simulations' noise is for simulations: off the grid, a zero and a tiny signal differ in the last bits."""
    step = grid_step(1.0)
    total = torch.zeros(2000, dtype=torch.float64)
    noised = SeededNoise(torch.Generator().manual_seed(1)).add(total, 1.0)
    assert not torch.equal(noised, (noised / step).round() * step)


def test_nothing_but_the_cipher_feeds_secure_noise() -> None:
    torch.manual_seed(0)
    first = SecureNoise(KeyStream(KEY, b"noise")).add(torch.zeros(10), 1.0)
    torch.manual_seed(1)
    assert torch.equal(first, SecureNoise(KeyStream(KEY, b"noise")).add(torch.zeros(10), 1.0))
    stream = Cipher(algorithms.ChaCha20(KEY, b"noise".ljust(16, b"\0")), mode=None).encryptor()
    assert stream.update(bytes(8)) == KeyStream(KEY, b"noise").words(1).tobytes()


@pytest.mark.parametrize("deviation", [1.0, 1.999])
def test_cells_that_the_words_resolve_badly_are_as_rare_as_the_docstring_says(deviation: float) -> None:
    """A word resolves the tail to 2⁻⁶⁴; where is that 2⁻¹⁰ of a grid cell's mass, and how often is it met?"""
    width = grid_step(deviation) / deviation
    edge = optimize.brentq(lambda z: stats.norm.pdf(z) * width - 2.0**-54, 3.0, 9.0)
    assert edge > 6.6
    assert 2 * stats.norm.sf(edge) < 4e-11
