import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.prv import PRVAccountant

from shared.accounting import Mechanism, calibrate_noise, epsilon_of
from shared.errors import PlanError

DELTA = 1e-5


def rdp(mechanism: Mechanism, delta: float) -> float:
    accountant = RdpAccountant(orders=range(2, 64))  # any orders give an upper bound
    event = PoissonSampledDpEvent(mechanism.sample_rate, GaussianDpEvent(mechanism.noise_multiplier))
    return float(accountant.compose(event, mechanism.steps).get_epsilon(delta))


@pytest.mark.parametrize(
    ("mechanism", "published"),
    [
        # The two schedules of issue A; the second is Opacus's own MNIST-like example at 64 of 500.
        (Mechanism(0.01, 1.0, 10_000), 6.19),
        (Mechanism(64 / 500, 1.0, 400), 19.39),
    ],
)
def test_golden_epsilon(mechanism: Mechanism, published: float) -> None:
    assert epsilon_of([mechanism], DELTA) == pytest.approx(published, abs=0.01)


def test_full_participation_is_the_plain_gaussian_mechanism() -> None:
    # Closed form of Balle and Wang (2018), "Improving the Gaussian Mechanism": one step, sensitivity 1.
    noise, delta = 2.0, 1e-3
    epsilon = epsilon_of([Mechanism(1.0, noise, 1)], delta)

    def cdf(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    exact = cdf(1 / (2 * noise) - epsilon * noise) - math.exp(epsilon) * cdf(-1 / (2 * noise) - epsilon * noise)
    assert exact == pytest.approx(delta, rel=0.01)
    assert exact <= delta  # pessimistic, never optimistic


@settings(max_examples=10)
@given(
    sample_rate=st.floats(0.005, 0.5),
    noise=st.floats(0.7, 4.0),
    steps=st.integers(1, 500),
)
def test_rdp_is_never_below_pld(sample_rate: float, noise: float, steps: int) -> None:
    mechanism = Mechanism(sample_rate, noise, steps)
    assert epsilon_of([mechanism], DELTA) <= rdp(mechanism, DELTA) + 1e-6


@pytest.mark.parametrize("mechanism", [Mechanism(0.02, 1.1, 500), Mechanism(0.2, 2.0, 200)])
def test_agrees_with_opacus_prv(mechanism: Mechanism) -> None:
    accountant = PRVAccountant()
    accountant.history = [(mechanism.noise_multiplier, mechanism.sample_rate, mechanism.steps)]
    assert epsilon_of([mechanism], DELTA) == pytest.approx(accountant.get_epsilon(DELTA), abs=0.02)


def test_composition_does_not_depend_on_order_or_grouping() -> None:
    first, second = Mechanism(0.1, 1.0, 30), Mechanism(0.3, 2.0, 10)
    together = epsilon_of([first, second], DELTA)
    split = epsilon_of([Mechanism(0.1, 1.0, 10), second, Mechanism(0.1, 1.0, 20)], DELTA)
    assert together == split
    assert together > max(epsilon_of([first], DELTA), epsilon_of([second], DELTA))


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert epsilon_of([], DELTA) == 0.0
    assert epsilon_of([Mechanism(0.1, 0.0, 1)], DELTA) == math.inf
    assert epsilon_of([Mechanism(0.1, 1.0, 1), Mechanism(0.1, 0.0, 1)], DELTA) == math.inf


@pytest.mark.parametrize(
    ("epsilon", "sample_rate", "steps"), [(8.0, 0.5, 40), (1.0, 0.05, 100), (3.0, 1.0, 1), (12.0, 1.0, 60)]
)
def test_calibrated_noise_keeps_the_promise_and_wastes_little(epsilon: float, sample_rate: float, steps: int) -> None:
    noise = calibrate_noise(epsilon=epsilon, delta=DELTA, sample_rate=sample_rate, steps=steps)
    assert epsilon_of([Mechanism(sample_rate, noise, steps)], DELTA) <= epsilon
    assert epsilon_of([Mechanism(sample_rate, noise * 0.998, steps)], DELTA) > epsilon


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.inf, 1e-5])
def test_impossible_promises_are_refused(epsilon: float) -> None:
    with pytest.raises(PlanError):
        calibrate_noise(epsilon=epsilon, delta=DELTA, sample_rate=1.0, steps=1000)


@pytest.mark.parametrize(
    "values", [(0.0, 1.0, 1), (1.1, 1.0, 1), (0.1, -1.0, 1), (0.1, math.inf, 1), (0.1, math.nan, 1), (0.1, 1.0, 0)]
)
def test_impossible_mechanisms_are_refused(values: tuple[float, float, int]) -> None:
    with pytest.raises(PlanError):
        Mechanism(*values)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, math.nan])
def test_impossible_deltas_are_refused(delta: float) -> None:
    with pytest.raises(PlanError):
        epsilon_of([Mechanism(0.1, 1.0, 1)], delta)


def test_the_fourier_transforms_are_numpys_which_keeps_no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    real = np.fft.fft
    monkeypatch.setattr(np.fft, "fft", lambda array, length: (lengths.append(length), real(array, length))[1])
    epsilon_of([Mechanism(0.123, 2.345, 17)], 1e-4)
    assert lengths, "SciPy would hold the tables of every length that a run comes to"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((1.5, 1.0, 1), "sample-rate must lie in (0, 1], not 1.5."),
        ((0.5, -1.0, 1), "noise-multiplier must be zero or positive, not -1.0."),
        ((0.5, 1.0, 0), "A mechanism needs at least one step, not 0."),
    ],
)
def test_an_impossible_mechanism_is_refused_in_words(values: tuple[float, float, int], said: str) -> None:
    with pytest.raises(PlanError) as refused:
        Mechanism(*values)
    assert str(refused.value) == said
