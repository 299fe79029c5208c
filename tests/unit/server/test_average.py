"""The running average: shares, exactness, independence of the order, and Flower's FedAvg as the oracle."""

from fractions import Fraction

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st

from server.average import LARGEST_WEIGHT, ExactSum, StreamingAverage, capped_shares
from shared.errors import FederationError
from shared.messages import ARRAYS, CONFIG, WEIGHT_KEY, global_weights, weighted_reply

SIZE = 5
declared = st.lists(st.integers(1, 50_000), min_size=1, max_size=12)
shares = st.floats(0.05, 1.0)
values = st.floats(-60_000.0, 60_000.0, width=32)
vectors = st.lists(values, min_size=SIZE, max_size=SIZE).map(lambda row: np.array(row, np.float32))
sites = st.lists(st.tuples(vectors, st.integers(1, 100_000)), min_size=1, max_size=10)


def average(replies: list[tuple[int, np.ndarray, int]], max_share: float = 1.0) -> np.ndarray:
    total = StreamingAverage(SIZE, sum(patients for _, _, patients in replies), max_share)
    for number, weights, patients in replies:
        total.add(f"site-{number}", patients, weights)
    return total.result()


@given(declared, shares)
def test_no_site_passes_its_share_and_a_cap_never_turns_the_order_round(patients: list[int], cap: float) -> None:
    result = capped_shares(patients, cap)
    assert sum(result) == pytest.approx(1.0)
    assert max(result) <= max(cap, 1 / len(patients)) * (1 + 1e-12)
    for first, own in zip(patients, result, strict=True):
        for second, other in zip(patients, result, strict=True):
            assert (own <= other * (1 + 1e-9)) or first > second
            below = max(own, other) < cap * (1 - 1e-9) and len(patients) * cap > 1
            assert not below or own * second == pytest.approx(other * first)


@pytest.mark.parametrize(
    ("patients", "cap", "expected"),
    [
        ([10, 20, 30], 1.0, [1 / 6, 1 / 3, 1 / 2]),
        ([10, 20, 30], 0.4, [0.2, 0.4, 0.4]),
        ([1000, 100, 100, 100], 0.4, [0.4, 0.2, 0.2, 0.2]),
        ([1000, 500, 1], 0.5, [0.5, 0.5 * 500 / 501, 0.5 / 501]),
        ([1000, 1], 0.4, [0.5, 0.5]),  # two sites cannot both keep below 0.4
        ([7], 0.4, [1.0]),
    ],
)
def test_what_the_cap_takes_goes_to_the_others(patients: list[int], cap: float, expected: list[float]) -> None:
    assert capped_shares(patients, cap) == pytest.approx(expected)


@given(sites, shares, st.randoms(use_true_random=False))
def test_the_average_does_not_depend_on_who_answers_first(
    replies: list[tuple[np.ndarray, int]], cap: float, random: object
) -> None:
    numbered = [(number, *reply) for number, reply in enumerate(replies)]
    shuffled = list(numbered)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first = average(numbered, cap)
    assert first.dtype == np.float32
    assert first.tobytes() == average(shuffled, cap).tobytes()


@given(sites, shares)
def test_the_average_is_that_of_the_shares(replies: list[tuple[np.ndarray, int]], cap: float) -> None:
    result = average([(number, *reply) for number, reply in enumerate(replies)], cap)
    weights = capped_shares([patients for _, patients in replies], cap)
    expected = sum(share * row.astype(np.float64) for share, (row, _) in zip(weights, replies, strict=True))
    largest = max(float(np.abs(row).max()) for row, _ in replies)
    np.testing.assert_allclose(result, expected, rtol=1e-7, atol=largest * 1e-14 + 1e-20)


@given(sites)
def test_the_sum_is_exact(replies: list[tuple[np.ndarray, int]]) -> None:
    """Against rational arithmetic: every float32 of at least 2^-40 is summed without any error."""
    total = ExactSum(SIZE, sum(patients for _, patients in replies))
    exact = [Fraction(0)] * SIZE
    for row, patients in replies:
        row[np.abs(row) < 2.0**-40] = 0.0
        total.add(row, patients)
        exact = [old + Fraction(float(value)) * patients for old, value in zip(exact, row, strict=True)]
    # float64 keeps 53 bits of the exact sum, give or take the last.
    for got, want in zip(total.value(), exact, strict=True):
        assert abs(Fraction(float(got)) - want) <= abs(want) * Fraction(1, 2**51)


def test_the_sum_holds_the_largest_weights_of_many_patients() -> None:
    most = np.full(SIZE, np.nextafter(np.float32(LARGEST_WEIGHT), np.float32(0)))
    total = ExactSum(SIZE, 3 * 2**38)
    for _ in range(3):
        total.add(most, 2**38)
    np.testing.assert_allclose(total.value(), 3 * 2.0**38 * most.astype(np.float64), rtol=1e-12)
    with pytest.raises(FederationError):
        ExactSum(SIZE, 2**60)


@given(sites)
def test_flowers_fedavg_says_the_same_to_float32_rounding(replies: list[tuple[np.ndarray, int]]) -> None:
    oracle = FedAvg(weighted_by_key=WEIGHT_KEY, arrayrecord_key=ARRAYS, configrecord_key=CONFIG)
    arrays, _ = oracle.aggregate_train(1, [weighted_reply(row, patients) for row, patients in replies])
    assert arrays is not None
    result = average([(number, *reply) for number, reply in enumerate(replies)])
    largest = max(float(np.abs(row).max()) for row, _ in replies)
    np.testing.assert_allclose(result, global_weights(arrays), atol=len(replies) * largest * 2.0**-23, rtol=0)


def test_memory_does_not_grow_with_the_number_of_sites() -> None:
    total = StreamingAverage(SIZE, 100_000, 0.25)
    for number in range(1000):
        total.add(f"site-{number}", 100, np.ones(SIZE, np.float32))
        assert len(total._kept) <= 4
    assert total.result().tolist() == [1.0] * SIZE


def test_an_average_of_nothing_is_an_error() -> None:
    with pytest.raises(FederationError):
        StreamingAverage(SIZE, 1, 1.0).result()
