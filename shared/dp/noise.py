"""Gaussian noise: from a cipher in deployments, from torch's seeded generator in simulations.

**Secure noise.** A ChaCha20 key stream (RFC 8439) under a 256-bit key from the operating system gives 64-bit words;
one bit is the sign, and 63 bits are the head of a uniform U in (0, ½), which the inverse normal distribution function
maps to a half-normal. Where the head is below 2⁵³, once in 1,024 draws, a further word continues it, so that U has 127
bits; elsewhere that word would be lost in double precision. How many words a tensor's noise takes depends on the noise
alone, and every word is uniform whatever came before it, so the draws stay independent. Torch's own generator would
not do: it is a Mersenne Twister of which 32 bits are seeded, so whoever holds one noised update can search all seeds.

**Floating point.** Noise added in floating point leaves marks in the low bits that tell the sum it was added to
(Mironov, "On Significance of the Least Significant Bits for Differential Privacy", CCS 2012). Defence: sum and noise
are added in double precision and *rounded to a grid* whose step is a power of two near 2⁻²⁰ of the noise's
standard deviation. Every output is a multiple of the step, whatever the data; rounding is post-processing of the
real-valued mechanism. The sum's own multiples of the step are set aside before and added after, both exactly, so that
a large sum takes no bits from the noise.

**How far this is from the Gaussian**, for D ≤ 10⁷ coordinates and T ≤ 10⁶ steps, D·T < 2⁴⁴ draws, with s = 1/σ for
noise multiplier σ and lengths in standard deviations of the noise:

- *No output is impossible.* U is at least 2⁻¹²⁹, so noise reaches 13.1. A patient moves the sum by at most s. An
  output that one neighbour gives and the other cannot needs noise beyond 13.1 - s: for σ ≥ 0.3, a site's default
  least, beyond 9.7, with probability below 2⁻⁷¹. Only one coordinate of a step can move that far: if k do, each moves
  by s/√k. Over T steps such an output has probability below 2⁻⁵⁰. (Words of 64 bits alone reached 9.1.)
- *The tail is resolved.* U is resolved to 2⁻¹²⁸ and to a relative 2⁻⁵³. The first is more than 2⁻¹⁰ of a grid cell's
  mass only beyond 11.5, where any of all draws lies with probability below 2⁻⁵⁵.
- *Rounding does not add up.* Rounding moves the border of a cell at distance z by at most 2⁻⁵¹·z, and a cell is at
  least 2⁻²¹ wide: a cell's mass errs by a relative e ≤ 2⁻²⁹·z. A coordinate that does not move has the same mass
  under both neighbours, and no error. Let one move by x in a share q of the steps, from P to P'. The errors of P'
  average to 0 under P', so they change the expected privacy loss by Σ (P' - P)·e ≤ 2⁻²⁹·q·x·E[z²] = 2⁻²⁹·q·x. A step's
  x add up to at most √D·s. T steps change it by at most 2⁻²⁹·q·√D·T·s, even if all errors point the same way, which
  nothing makes them do. A plan has q·√T·s ≤ 25 (``shared/plan.py``), so this is at most 25·2⁻²⁹·√(D·T): 2·10⁻⁴ for
  LungCTNet's 420,610 parameters and 40 steps, 0.15 for the largest D and T.
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
_SMALL_HEAD = np.uint64(1 << 53)
"""Below it a head is exact in double precision, so that what follows it counts."""


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
        heads = words >> np.uint64(1)
        half = (heads.astype(np.float64) + 0.5) * 2.0**-64
        small = np.flatnonzero(heads < _SMALL_HEAD)
        half[small] = (heads[small] + _fraction(self.words(len(small)))) * 2.0**-64
        signs = 1.0 - 2.0 * (words & np.uint64(1)).astype(np.float64)
        return np.asarray(signs * -ndtri(half))


def _fraction(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Return the middle of the cell of (0, 1) that each word names."""
    return (words.astype(np.float64) + 0.5) * 2.0**-64


@dataclass(frozen=True)
class SecureNoise:
    """Noise from a key stream, rounded to a grid; see the module."""

    stream: KeyStream

    def add(self, total: Tensor, standard_deviation: float) -> Tensor:
        """Return a float64 tensor of multiples of ``grid_step(standard_deviation)``."""
        noise = torch.from_numpy(self.stream.normal(total.numel())).view(total.shape).to(total.device)
        step = grid_step(standard_deviation)
        cells = total.double() / step
        whole = cells.round()
        # In place: these are millions of numbers. What is left of the sum is less than a cell.
        return noise.mul_(standard_deviation / step).add_(cells.sub_(whole)).round_().add_(whole).mul_(step)


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
