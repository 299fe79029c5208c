"""Differential-privacy accounting: epsilon as a function of the plan alone.

Every function here is pure. The mechanism is the Poisson-subsampled Gaussian; the neighbouring relation is
adding or removing one patient with all of that patient's records; composition is tight, by the privacy loss
distribution (PLD) of Google's ``dp_accounting`` with its pessimistic estimate. It holds for mechanisms that are fixed
beforehand; :mod:`shared.renyi` has what holds for those that are chosen after seeing earlier results.

**Room for a step's sample.** A step takes at most a public number c of patients and cuts a larger sample
(:mod:`shared.dp.passes`). Let J be who was sampled of the patients that both neighbouring data sets hold. Whether J
has c patients or more does not depend on the one patient more. So the uncut step may also tell that, for the same
privacy loss: its output is a mixture over J, and the hockey-stick divergence is at most its mean over J. In a run of T
such steps, look only at the outcomes in which J never had c patients: there the cut step *is* the uncut one, on both
data sets. The rest has a probability of at most T·η, η = ``OVERFLOW_PROBABILITY``. So (ε, δ) of the uncut run is
(ε, δ + T·η) of the run that cuts, and epsilon is stated at what is left of delta. e^ε does not enter.

References:
    Koskela, Jälkö, Honkela, "Computing Tight Differential Privacy Guarantees Using FFT", AISTATS 2020.
    Doroshenko et al., "Connect the Dots: Tighter Discrete Approximations of Privacy Loss Distributions",
    PETS 2022.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.errors import PlanError

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

MAX_NOISE_MULTIPLIER = 64.0
"""Above this nothing is left of the signal."""
_MIN_NOISE_MULTIPLIER = 0.05
"""Below this the PLD of one step no longer fits in memory and epsilon is in the hundreds: no privacy at all."""
_CALIBRATION_TOLERANCE = 1e-3
OVERFLOW_PROBABILITY = 2.0**-40
"""How likely a step's sample is, at most, to fill the public room for it (:mod:`shared.dp.passes`)."""
_LOSS_INTERVAL = 5e-4
"""Width of a step of the discretised privacy loss. Rounding goes the private way; dp_accounting's own is 1e-4, which
takes five times as long in every round for an epsilon that is smaller by a relative 1e-6 to 2e-4."""


@dataclass(frozen=True, order=True)
class Mechanism:
    """``steps`` compositions of one Poisson-subsampled Gaussian mechanism.

    Attributes:
        sample_rate: Probability in (0, 1] with which each patient joins a step.
        noise_multiplier: Standard deviation of the noise over the clipping norm; 0 means no privacy.
        steps: How many noisy steps, at least 1.
    """

    sample_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not 0.0 < self.sample_rate <= 1.0:
            raise PlanError(f"sample-rate must lie in (0, 1], not {self.sample_rate}.")
        if not 0.0 <= self.noise_multiplier < math.inf:
            raise PlanError(f"noise-multiplier must be zero or positive, not {self.noise_multiplier}.")
        if self.steps < 1:
            raise PlanError(f"A mechanism needs at least one step, not {self.steps}.")


def epsilon_of(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """Return the epsilon at ``delta`` of all ``mechanisms`` composed; ``inf`` if any adds no noise.

    Raises:
        PlanError: If ``delta`` is not in (0, 1).
    """
    check_delta(delta)
    released = tuple(mechanisms)
    left = left_of_delta(delta, released)
    if left <= 0.0:
        return math.inf
    steps: Counter[tuple[float, float]] = Counter()
    for mechanism in released:
        steps[mechanism.sample_rate, mechanism.noise_multiplier] += mechanism.steps
    return _epsilon(tuple(sorted((*key, count) for key, count in steps.items())), left)


def check_delta(delta: float) -> None:
    """Check that a delta means something.

    Raises:
        PlanError: If it is not in (0, 1).
    """
    if not 0.0 < delta < 1.0:
        raise PlanError(f"delta must lie strictly between 0 and 1, not {delta}.")


def left_of_delta(delta: float, mechanisms: Iterable[Mechanism]) -> float:
    """Return what the steps' full samples leave of ``delta``; negative if nothing is left."""
    return delta - OVERFLOW_PROBABILITY * sum(mechanism.steps for mechanism in mechanisms)


class _NumpyFourier:
    """Has dp_accounting's Fourier transforms done by NumPy, through SciPy's own switch.

    SciPy keeps the tables of its last sixteen lengths. Every round composes one step more and so has a length of its
    own: a daemon would hold 280 MiB of tables that nobody asks for again. NumPy, with the same algorithm, keeps none.
    """

    __ua_domain__ = "numpy.scipy.fft"

    @staticmethod
    def __ua_function__(method: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Answer a call of ``scipy.fft``; what NumPy does not have is left to SciPy."""
        function = getattr(np.fft, method.__name__, None)
        return NotImplemented if function is None else function(*arguments, **options)


@lru_cache(maxsize=4096)
def _epsilon(composition: tuple[tuple[float, float, int], ...], delta: float) -> float:
    if not composition:
        return 0.0
    if any(noise < _MIN_NOISE_MULTIPLIER for _, noise, _ in composition):
        return math.inf
    import scipy.fft
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    with scipy.fft.set_backend(_NumpyFourier):
        losses = [_one_step(sample_rate, noise).self_compose(steps) for sample_rate, noise, steps in composition]
        total = reduce(PrivacyLossDistribution.compose, losses)
    return float(total.get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def _one_step(sample_rate: float, noise: float) -> "PrivacyLossDistribution":
    """The costly part of the accounting, the same for any number of steps."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(
        noise, sampling_prob=sample_rate, pessimistic_estimate=True, value_discretization_interval=_LOSS_INTERVAL
    )


def calibrate_noise(*, epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """Return the least noise multiplier (to a relative 0.001) whose epsilon does not exceed ``epsilon``.

    The result always errs on the private side.

    Raises:
        PlanError: If no noise in a usable range reaches ``epsilon``.
    """
    if not 0.0 < epsilon < math.inf:
        raise PlanError(f"epsilon must be positive and finite, not {epsilon}.")
    from scipy.optimize import brentq

    def excess(log_noise: float) -> float:
        """Log of spent over promised; falls smoothly with the noise, so that few evaluations find its root."""
        spent = epsilon_of([Mechanism(sample_rate, math.exp(log_noise), steps)], delta)
        return math.log(max(spent, 1e-12) / epsilon)

    low = high = 0.0
    while excess(high) > 0:
        low, high = high, high + 1.0
        if high > math.log(MAX_NOISE_MULTIPLIER):
            raise PlanError(
                f"No usable noise gives epsilon {epsilon} at delta {delta:g} over {steps} steps. "
                "Ask for a larger epsilon, fewer rounds or a lower sample rate."
            )
    while excess(low) <= 0:
        low, high = low - 0.5, low
        if low < math.log(_MIN_NOISE_MULTIPLIER):
            return _MIN_NOISE_MULTIPLIER
    log_noise = float(brentq(excess, low, high, xtol=_CALIBRATION_TOLERANCE / 2))
    while excess(log_noise) > 0:
        log_noise += _CALIBRATION_TOLERANCE / 2
    return math.exp(log_noise)
