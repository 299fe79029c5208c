"""Gaussian noise: from a cipher in deployments, from torch's seeded generator in simulations.

**Secure noise.** A ChaCha20 key stream (RFC 8439) under a 256-bit key from the operating system gives 64-bit words;
one bit is the sign and 63 bits a uniform in (0, ½), which the inverse normal distribution function maps to a
half-normal. Tails are resolved to 2⁻⁶⁴ (about 9.1 σ), the bulk to double precision. Torch's own generator would not
do: it is a Mersenne Twister of which 32 bits are seeded, so whoever holds one noised update can search all seeds.

**Floating point.** Noise added in floating point leaves marks in the low bits that tell the sum it was added to
(Mironov, "On Significance of the Least Significant Bits for Differential Privacy", CCS 2012). Defence: sum and noise
are added in double precision and *rounded to a grid* whose step is a power of two near 2⁻²⁰ of the noise's
standard deviation. Every output is a multiple of the step, whatever the data; rounding is post-processing of the
real-valued mechanism. A cell in the bulk holds 2⁻²¹ of the mass against a resolution of 2⁻⁵³ or finer, so the
probability of an output differs from the exact mechanism's by a relative 2⁻³²; cells where the relative error could
reach 2⁻¹⁰ lie beyond 6.6 σ and are hit with probability below 4·10⁻¹¹ a coordinate.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy.special import ndtri
from torch import Generator, Tensor

KEY_BYTES = 32
_NONCE_BYTES = 16
_GRID_BITS = 20


class NoiseSource(Protocol):
    """Adds Gaussian noise to a sum."""

    def add(self, total: Tensor, standard_deviation: float) -> Tensor:
        """Return ``total`` (float64, any shape) with independent noise on every element."""


class KeyStream:
    """An endless stream of secret words, fixed by key and purpose; different purposes are independent.

    Args:
        key: ``KEY_BYTES`` secret bytes.
        purpose: Up to 16 bytes that tell streams of one key apart; it serves as the cipher's nonce.
    """

    def __init__(self, key: bytes, purpose: bytes) -> None:
        nonce = purpose.ljust(_NONCE_BYTES, b"\0")
        self._cipher = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """Return the next ``count`` 64-bit words."""
        return np.frombuffer(self._cipher.update(bytes(8 * count)), np.uint64)

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Return ``count`` uniforms in [0, 1), of 53 bits each."""
        return (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, count: int) -> npt.NDArray[np.float64]:
        """Return ``count`` standard normal values."""
        words = self.words(count)
        half = ((words >> np.uint64(1)).astype(np.float64) + 0.5) * 2.0**-64
        signs = 1.0 - 2.0 * (words & np.uint64(1)).astype(np.float64)
        return np.asarray(signs * -ndtri(half))


@dataclass(frozen=True)
class SecureNoise:
    """Noise from a key stream, rounded to a grid; see the module."""

    stream: KeyStream

    def add(self, total: Tensor, standard_deviation: float) -> Tensor:
        """Return a float64 tensor of multiples of ``grid_step(standard_deviation)``."""
        noise = torch.from_numpy(self.stream.normal(total.numel())).view(total.shape).to(total.device)
        step = grid_step(standard_deviation)
        return ((total.double() + standard_deviation * noise) / step).round() * step


@dataclass(frozen=True)
class SeededNoise:
    """Repeatable noise for simulations. It protects nobody: whoever knows the seed can subtract it."""

    generator: Generator

    def add(self, total: Tensor, standard_deviation: float) -> Tensor:
        """Return ``total`` with noise from torch's generator."""
        # One run of memory, whatever the total's layout: torch draws many times faster into that.
        noise = torch.empty(total.numel(), dtype=total.dtype, device=total.device)
        noise.normal_(0.0, standard_deviation, generator=self.generator)
        return noise.view(total.shape).add_(total)


def grid_step(standard_deviation: float) -> float:
    """Return the grid's step: the power of two at or below 2⁻²⁰ of the noise's standard deviation."""
    return math.ldexp(1.0, math.floor(math.log2(standard_deviation)) - _GRID_BITS)
