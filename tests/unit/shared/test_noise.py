"""The noise: its distribution, its secrecy, and what its last bits tell."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy import optimize, special, stats

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


class Given(KeyStream):
    """A stream of given words."""

    def __init__(self, *words: int) -> None:
        self._left = list(words)

    def words(self, count: int) -> np.ndarray:
        """Return the next words."""
        taken, self._left = self._left[:count], self._left[count:]
        return np.array(taken, np.uint64)


def test_no_word_gives_an_infinite_value() -> None:
    extremes = [0, 1, 2, 2**63, 2**64 - 2, 2**64 - 1]
    values = Given(*extremes, 0, 2**64 - 1, 0).normal(len(extremes))
    assert np.isfinite(values).all()
    assert 13.1 < np.abs(values).max() < 13.11


def test_the_tail_has_128_bits_behind_it() -> None:
    """The tail's probability is what the words name, to the last bits; 64 bits ended at 9.1 standard deviations."""
    uniforms, values = [], []
    for head in (0, 1, 5, 2**20, 2**52, 2**53 - 1, 2**53, 2**60, 2**63 - 1):
        for more in (0, 1, 2**32, 2**63, 2**64 - 1):
            values.append(Given(2 * head, more).normal(1)[0])
            exact = Fraction(head) + (Fraction(2 * more + 1, 2**65) if head < 2**53 else Fraction(1, 2))
            uniforms.append(exact / 2**64)
            assert Given(2 * head + 1, more).normal(1)[0] == -values[-1]
    logs = np.array([math.log(u.numerator) - math.log(u.denominator) for u in uniforms])
    np.testing.assert_allclose(special.log_ndtr(-np.array(values)), logs, rtol=1e-13, atol=1e-12)
    assert all(one >= other for one, other in pairwise(values))
    assert min(uniforms) == Fraction(1, 2**129)


def test_a_word_more_is_taken_where_the_first_is_small_and_leaves_the_draws_independent() -> None:
    words = KeyStream(KEY, b"noise").words(COUNT + 1000)
    small = np.flatnonzero(words[:COUNT] >> np.uint64(1) < 2**53)
    assert len(small) == pytest.approx(COUNT / 1024, rel=0.2)
    stream = KeyStream(KEY, b"noise")
    first = stream.normal(COUNT)
    rest = words[COUNT + len(small) :]
    np.testing.assert_array_equal(stream.words(len(rest)), rest)
    plain = -special.ndtri(((words[:COUNT] >> np.uint64(1)).astype(float) + 0.5) * 2.0**-64)
    others = np.delete(np.arange(COUNT), small)
    np.testing.assert_array_equal(np.abs(first)[others], np.abs(plain)[others])
    np.testing.assert_allclose(np.abs(first)[small], plain[small], rtol=1e-3)


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
    """The words resolve the tail to 2⁻¹²⁸; where is that 2⁻¹⁰ of a grid cell's mass, and how often is it met?"""
    width = grid_step(deviation) / deviation
    edge = optimize.brentq(lambda z: stats.norm.logpdf(z) + math.log(width) + 118 * math.log(2), 3.0, 13.0)
    assert edge > 11.5
    assert 2**44 * 2 * stats.norm.sf(edge) < 2.0**-55


def test_outputs_that_only_one_neighbour_gives_are_as_rare_as_the_docstring_says() -> None:
    """Of 10⁶ steps at noise multiplier 0.3, however many coordinates share the patient's move."""
    reach = -special.ndtri(2.0**-129)
    for sharing in (1, 2, 3, 10, 1000, 10**7):
        beyond = 2 * sharing * stats.norm.sf(reach - 1 / 0.3 / math.sqrt(sharing))
        assert 10**6 * beyond < 2.0**-50


@pytest.mark.parametrize("signal", [1e3, 1e8, -1e8])
def test_a_large_sum_takes_no_bits_from_the_noise(signal: float) -> None:
    """The sum's whole cells are added exactly: shifting the sum by them shifts the output, to the bit."""
    noise = [SecureNoise(KeyStream(KEY, b"noise")).add(torch.full((2000,), s), 1.0) for s in (0.0, signal)]
    assert torch.equal(noise[1] - signal, noise[0])
