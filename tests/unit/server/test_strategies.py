"""Every strategy against an oracle, and the robust ones against hostile sites."""

from dataclasses import replace

import numpy as np
import pytest

from server.strategies import collect, make_strategy, moments, restore_moments
from shared.errors import FederationError, StorageError
from shared.plan import STRATEGIES, RunPlan

PLAN = RunPlan(
    task="nodule-classification",
    rounds=3,
    local_steps=1,
    sample_rate=0.5,
    records_per_patient=1,
    max_grad_norm=1.0,
    noise_multiplier=1.0,
    delta=1e-3,
    learning_rate=0.1,
)
SIZE = 400
ROBUST = ("median", "trimmed-mean", "krum", "multi-krum")


def start() -> np.ndarray:
    return np.random.default_rng(1).normal(0.0, 0.5, SIZE).astype(np.float32)


def honest(number: int, weights: np.ndarray) -> np.ndarray:
    """Return weights on the way to the vector of ones, differing a little from site to site."""
    noise = np.random.default_rng(number).normal(0.0, 0.02, SIZE)
    return (weights + 0.3 * (1.0 - weights) + noise).astype(np.float32)


def aggregate(plan: RunPlan, weights: np.ndarray, replies: list[np.ndarray], strategy=None, number: int = 1):  # type: ignore[no-untyped-def]
    taken = collect(plan, weights, 10 * len(replies), 1.0)
    for site, reply in enumerate(replies):
        taken.add(f"site-{site}", 10, reply)
    return taken.aggregate(strategy or make_strategy(plan), plan, number)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_moves_the_model_to_where_the_sites_are(name: str) -> None:
    plan, weights = replace(PLAN, strategy=name), start()
    strategy, away = make_strategy(plan), np.linalg.norm(1.0 - weights)
    for number in (1, 2, 3):
        weights = aggregate(plan, weights, [honest(site, weights) for site in range(5)], strategy, number)
        assert weights.dtype == np.float32
    assert np.linalg.norm(1.0 - weights) < 0.85 * away


def test_fedprox_averages_like_fedavg() -> None:
    replies = [honest(site, start()) for site in range(3)]
    results = [aggregate(replace(PLAN, strategy=name), start(), replies) for name in ("fedavg", "fedprox")]
    assert results[0].tobytes() == results[1].tobytes()
    np.testing.assert_allclose(results[0], np.mean(np.float64(replies), axis=0), rtol=1e-6)


@pytest.mark.parametrize(("name", "eta"), [("fedadam", 0.3), ("fedyogi", 0.05)])
def test_the_adaptive_strategies_follow_reddi_et_al(name: str, eta: float) -> None:
    """Algorithm 2 of "Adaptive Federated Optimization"; Adam with Kingma and Ba's bias correction, as Flower does."""
    plan = replace(PLAN, strategy=name, server_learning_rate=eta, tau=1e-2)
    strategy, weights = make_strategy(plan), start()
    expected, m, v = weights.astype(np.float64), np.zeros(SIZE), np.zeros(SIZE)
    for number in (1, 2, 3):
        replies = [honest(site, weights) for site in range(4)]
        weights = aggregate(plan, weights, replies, strategy, number)
        delta = np.mean(np.float64(replies), axis=0) - expected
        m = 0.9 * m + 0.1 * delta
        if name == "fedadam":
            v = 0.99 * v + 0.01 * delta**2
            rate = eta * np.sqrt(1 - 0.99 ** (number + 1)) / (1 - 0.9 ** (number + 1))
        else:
            v = v - 0.01 * delta**2 * np.sign(v - delta**2)
            rate = eta
        expected = expected + rate * m / (np.sqrt(v) + 1e-2)
        np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-5)


def test_median_and_trimmed_mean_are_what_their_names_say() -> None:
    replies = [honest(site, start()) for site in range(5)]
    median = aggregate(replace(PLAN, strategy="median"), start(), replies)
    np.testing.assert_allclose(median, np.median(replies, axis=0), rtol=1e-5, atol=1e-6)
    for hostile in (1, 2):
        trimmed = aggregate(replace(PLAN, strategy="trimmed-mean", byzantine_sites=hostile), start(), replies)
        middle = np.sort(np.float64(replies), axis=0)[hostile : 5 - hostile].mean(axis=0)
        np.testing.assert_allclose(trimmed, middle, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("replies", range(3, 60))
def test_as_many_are_trimmed_as_the_plan_says_whatever_the_rounding(replies: int) -> None:
    column = np.arange(replies, dtype=np.float32) ** 2
    for hostile in {1, 2, (replies - 1) // 3, (replies - 1) // 2} - {0}:
        if 2 * hostile < replies:
            plan = replace(PLAN, strategy="trimmed-mean", byzantine_sites=hostile)
            result = aggregate(plan, np.zeros(1, np.float32), [row[None] for row in column])
            assert result.tolist() == pytest.approx([column[hostile : replies - hostile].mean()])


def test_krum_takes_the_reply_nearest_to_its_neighbours_and_multi_krum_all_but_the_farthest() -> None:
    replies = [honest(site, start()) for site in range(6)]
    exact = np.float64(replies)
    distances = np.square(exact[:, None] - exact[None]).sum(-1)
    scores = [np.sort(row)[1 : 6 - 1 - 2 + 1].sum() for row in distances]
    krum = aggregate(replace(PLAN, strategy="krum"), start(), replies)
    np.testing.assert_allclose(krum, replies[int(np.argmin(scores))], rtol=1e-6, atol=1e-7)
    multi = aggregate(replace(PLAN, strategy="multi-krum"), start(), replies)
    np.testing.assert_allclose(multi, exact[np.argsort(scores)[:5]].mean(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("attack", [lambda w: w * np.float32(1000), lambda w: -w, lambda w: w - np.float32(50)])
def test_one_hostile_site_of_five_hardly_moves_a_robust_strategy(name: str, attack) -> None:  # type: ignore[no-untyped-def]
    plan = replace(PLAN, strategy=name)
    replies = [honest(site, start()) for site in range(5)]
    clean = aggregate(plan, start(), replies)
    poisoned = aggregate(plan, start(), [*replies[:4], attack(replies[4])])
    spread = float(np.std(np.float64(replies[:4]), axis=0).mean())
    assert np.abs(poisoned - clean).mean() < 2 * spread
    ordinary = aggregate(PLAN, start(), [*replies[:4], attack(replies[4])])
    assert np.abs(ordinary - clean).mean() > 5 * np.abs(poisoned - clean).mean()


NOISE_SD, LARGE = 0.06, 20_000
"""About what epsilon 8 adds to each of LungCTNet's weights in a round of a hundred patients; they are smaller."""
ATTACKS = {
    "x1000": lambda w: w * np.float32(1000),
    "flipped": lambda w: -w,
    "away": lambda w: w + np.float32(50),
    "random": lambda w: np.random.default_rng(9).normal(0.0, 1.0, len(w)).astype(np.float32),
}


def under_noise(attack: str, seed: int) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Return global weights, four honest replies of mostly noise, and the hostile one."""
    generator = np.random.default_rng(seed)
    weights = generator.normal(0.0, 0.03, LARGE).astype(np.float32)
    drift = generator.normal(0.0, 0.005, LARGE)
    replies = [(weights + drift + generator.normal(0.0, NOISE_SD, LARGE)).astype(np.float32) for _ in range(5)]
    return weights, replies[:4], ATTACKS[attack](replies[4])


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", ROBUST)
def test_under_privacys_noise_one_hostile_site_of_five_cannot_leave_the_honest_ones_range(
    name: str, attack: str, seed: int
) -> None:
    weights, replies, hostile = under_noise(attack, seed)
    result = aggregate(replace(PLAN, strategy=name), weights, [*replies[:2], hostile, *replies[2:]])
    low, high = np.min(replies, axis=0), np.max(replies, axis=0)
    assert (result >= low - 1e-5).all()
    assert (result <= high + 1e-5).all()
    if name == "krum":
        assert min(np.abs(result - reply).max() for reply in replies) < 1e-5, "it takes one of the honest replies"
    if name == "multi-krum":
        np.testing.assert_allclose(result, np.mean(np.float64(replies), axis=0), atol=1e-5)


@pytest.mark.parametrize("name", ["median", "trimmed-mean"])
def test_what_hides_in_the_noise_moves_a_median_and_not_multi_krum(name: str) -> None:
    """The limit that docs/security.md states: within that range a hostile site can push every weight the same way."""
    weights, replies, hostile = under_noise("flipped", 1)

    def shrunk(strategy: str) -> float:
        result = aggregate(replace(PLAN, strategy=strategy), weights, [*replies, hostile])
        return float(1.0 - result @ weights / (weights @ weights))

    assert shrunk(name) > 0.1
    assert abs(shrunk("multi-krum")) < 0.03


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_order_of_replies_does_not_matter(name: str) -> None:
    plan, weights = replace(PLAN, strategy=name), start()
    results = set()
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3]):
        taken = collect(plan, weights, 100, 0.5)
        for site in order:
            taken.add(f"site-{site}", 10 + site, honest(site, weights))
        results.add(taken.aggregate(make_strategy(plan), plan, 1).tobytes())
    assert len(results) == 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_moments_survive_and_only_adaptive_strategies_have_them(name: str) -> None:
    plan = replace(PLAN, strategy=name)
    first, second = make_strategy(plan), make_strategy(plan)
    assert moments(first) == {}
    weights = aggregate(plan, start(), [honest(site, start()) for site in range(5)], first)
    adaptive = name in ("fedadam", "fedyogi")
    assert set(moments(first)) == ({"m_t", "v_t"} if adaptive else set())
    restore_moments(second, moments(first))
    replies = [honest(site, weights) for site in range(5)]
    assert (
        aggregate(plan, weights, replies, first, 2).tobytes() == aggregate(plan, weights, replies, second, 2).tobytes()
    )
    if adaptive:
        with pytest.raises(StorageError):
            restore_moments(second, {})


def test_a_model_that_is_not_finite_is_never_made() -> None:
    plan = replace(PLAN, strategy="fedadam", server_learning_rate=1e3, tau=1e-12)
    huge = np.full(SIZE, 6e4, np.float32)
    strategy = make_strategy(plan)
    restore_moments(strategy, {"m_t": np.full(SIZE, 3e38, np.float32), "v_t": np.zeros(SIZE, np.float32)})
    with np.errstate(over="ignore"), pytest.raises(FederationError, match="not finite"):
        aggregate(plan, huge, [huge], strategy)
