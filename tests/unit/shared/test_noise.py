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


def test_a_purpose_fills_the_nonce_from_its_front() -> None:
    cipher = Cipher(algorithms.ChaCha20(KEY, b"u" + bytes(15)), mode=None).encryptor()
    assert KeyStream(KEY, b"u").words(3).tobytes() == cipher.update(bytes(24))


def test_a_word_becomes_the_uniform_of_its_first_53_bits() -> None:
    words = [0, (1 << 11) - 1, 1 << 11, 1 << 63, (1 << 64) - 1]
    assert Given(*words).uniform(5).tolist() == [0.0, 0.0, 2.0**-53, 0.5, 1.0 - 2.0**-53]


def test_a_word_becomes_the_normal_that_its_bits_name() -> None:
    """Its lowest bit is the sign; the others and a half, over 2⁶⁴, are the lower tail's mass."""
    head = 1 << 61
    mass = (head + 0.5) * 2.0**-64
    found = Given(2 * head, 2 * head + 1).normal(2)
    assert found.tolist() == [-special.ndtri(mass), special.ndtri(mass)]
    assert found[0] > 0


def test_a_small_head_is_continued_by_the_middle_of_the_next_words_cell() -> None:
    word = 3 << 62
    found = Given(2 * 5, word).normal(1)
    assert found.tolist() == [-special.ndtri((5 + (word + 0.5) * 2.0**-64) * 2.0**-64)]


def test_the_largest_small_head_takes_a_word_and_the_next_one_does_not() -> None:
    edge = 1 << 53
    assert Given(2 * edge).normal(1).tolist() == [-special.ndtri((edge + 0.5) * 2.0**-64)]
    stream = Given(2 * (edge - 1), 7)
    stream.normal(1)
    assert len(stream.words(1)) == 0, "the second word was taken"


@pytest.mark.parametrize(("deviation", "step"), [(1.0, -20), (1.999, -20), (2.0, -19), (0.75, -21), (1e-3, -30)])
def test_the_grids_step_is_the_power_of_two_at_or_below(deviation: float, step: int) -> None:
    assert grid_step(deviation) == 2.0**step


def test_secure_noise_is_the_streams_normals_on_the_grid() -> None:
    """Worked with exact fractions: the sum's nearest cell, and the rest with the noise to the nearest cell."""
    total = torch.tensor([[0.3, -7.25], [1e5 / 3, 0.0]], dtype=torch.float32)
    found = SecureNoise(KeyStream(KEY, b"noise")).add(total, 3.0)
    assert (found.dtype, found.shape) == (torch.float64, total.shape)
    normals, step = KeyStream(KEY, b"noise").normal(4), Fraction(grid_step(3.0))
    for value, normal, noised in zip(total.flatten().tolist(), normals, found.flatten().tolist(), strict=True):
        exact = Fraction(value) + 3 * Fraction(float(normal))
        assert abs(Fraction(noised) - exact) <= step / 2 * Fraction(1001, 1000)
        assert Fraction(noised) % step == 0


def test_a_single_precision_sum_is_noised_in_double_precision() -> None:
    total = torch.full((500,), 1e8 / 3, dtype=torch.float32)
    single, double = (SecureNoise(KeyStream(KEY, b"n")).add(t, 1e-3) for t in (total, total.double()))
    assert torch.equal(single, double)


def test_seeded_noise_is_that_of_the_seed_and_leaves_the_sum_alone() -> None:
    total = torch.arange(6.0).view(2, 3)
    found = SeededNoise(torch.Generator().manual_seed(4)).add(total, 2.0)
    noise = torch.empty(6).normal_(0.0, 2.0, generator=torch.Generator().manual_seed(4)).view(2, 3)
    assert torch.equal(found, noise + torch.arange(6.0).view(2, 3))
    assert torch.equal(total, torch.arange(6.0).view(2, 3))
    assert SeededNoise(torch.Generator().manual_seed(4)).add(total.double(), 2.0).dtype == torch.float64
