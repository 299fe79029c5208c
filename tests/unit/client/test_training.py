"""One round of local training: it does exactly what the plan accounts for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import client.training
from client.training import Randomness, draw_own, train_round
from shared.dp.noise import SecureNoise
from shared.dp.optimizer import noise_deviation
from shared.plan import FEDPROX, RunPlan
from shared.records import RecordStore
from shared.tasks.registry import find_task
from shared.weights import pack

TASK = find_task("nodule-classification")
PLAN = RunPlan(
    task=TASK.name,
    rounds=4,
    local_steps=3,
    sample_rate=0.5,
    records_per_patient=2,
    max_grad_norm=0.7,
    noise_multiplier=2.0,
    delta=1e-3,
    learning_rate=0.5,
)
DECLARED = 20


class Recorder:
    """A noise source that remembers what it was asked for and adds nothing."""

    def __init__(self) -> None:
        self.deviations: list[float] = []
        self.totals: list[torch.Tensor] = []

    def add(self, total: torch.Tensor, standard_deviation: float) -> torch.Tensor:
        self.deviations.append(standard_deviation)
        self.totals.append(total.clone())
        return total


@pytest.fixture
def store(tmp_path: Path, make_nodule_store: Any) -> RecordStore:
    return make_nodule_store(tmp_path / "store", patients=24)


def start() -> np.ndarray:
    torch.manual_seed(0)
    return pack(TASK.build())


def train(store: RecordStore, randomness: Randomness, plan: RunPlan = PLAN, number: int = 1) -> np.ndarray:
    return train_round(TASK, TASK.load(store), plan, number, start(), declared_patients=DECLARED, randomness=randomness)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def test_as_many_noised_steps_of_the_planned_size_as_the_plan_says(store: RecordStore) -> None:
    recorder = Recorder()
    train(store, replace(Randomness.secure(key(1)), noise=recorder))
    parameters = len(list(TASK.build().parameters()))
    assert recorder.deviations == [noise_deviation(2.0, 0.7)] * (3 * parameters)


def test_the_update_is_the_noised_sum_over_the_public_normaliser(store: RecordStore) -> None:
    recorder = Recorder()
    plan = replace(PLAN, local_steps=1)
    moved = start() - train(store, replace(Randomness.secure(key(1)), noise=recorder), plan)
    total = torch.cat([part.flatten() for part in recorder.totals]).numpy()
    np.testing.assert_allclose(moved, 0.5 * total / (0.5 * DECLARED), rtol=1e-3, atol=1e-7)
    assert np.linalg.norm(total) <= 0.7 * 24


def test_the_learning_rate_follows_the_schedule(store: RecordStore) -> None:
    plan = replace(PLAN, local_steps=1, schedule="linear")
    moves = [
        np.linalg.norm(start() - train(store, replace(Randomness.secure(key(1)), noise=Recorder()), plan, number))
        for number in (1, 3)
    ]
    assert moves[1] == pytest.approx(moves[0] / 2, rel=1e-4)


def test_every_step_samples_afresh(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real, drawn = client.training.poisson_sample, []

    def remember(*arguments: Any) -> torch.Tensor:
        chosen = real(*arguments)
        drawn.append((arguments[:2], tuple(chosen.tolist())))
        return chosen

    monkeypatch.setattr(client.training, "poisson_sample", remember)
    train(store, Randomness.secure(key(1)))
    assert [arguments for arguments, _ in drawn] == [(24, 0.5)] * 3
    assert len({chosen for _, chosen in drawn}) == 3


def test_an_empty_step_is_pure_noise_that_differs_by_key(store: RecordStore) -> None:
    """Nobody joins, so the update is the noise: of the right scale, unlike under another key, unlike the sampling."""
    plan = replace(PLAN, local_steps=1, sample_rate=1e-4)
    noises = []
    for number in (1, 2):
        secure = Randomness.secure(key(number))
        nobody = replace(secure, uniform=lambda count: np.ones(count) - 1e-9)
        moved = start() - train(store, nobody, plan)
        noises.append(moved.astype(np.float64) * 1e-4 * DECLARED / 0.5)
    assert noises[0].std() == pytest.approx(2.0 * 0.7, rel=0.01)
    assert abs(np.corrcoef(noises[0], noises[1])[0, 1]) < 0.01
    assert abs(noises[0].mean()) < 0.02


def test_the_same_key_repeats_and_another_does_not(store: RecordStore) -> None:
    first, again, other = (train(store, Randomness.secure(key(n))) for n in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_deployments_draw_from_the_cipher_and_simulations_do_not() -> None:
    assert isinstance(Randomness.secure(key(1)).noise, SecureNoise)
    assert not isinstance(Randomness.simulated(key(1)).noise, SecureNoise)


def test_sampling_and_noise_are_different_streams() -> None:
    secure = Randomness.secure(key(1))
    noise = secure.noise.add(torch.zeros(5000, dtype=torch.float64), 1.0).numpy()
    assert abs(np.corrcoef(secure.uniform(5000), noise)[0, 1]) < 0.06


def test_the_engines_agree(store: RecordStore) -> None:
    quiet = replace(PLAN, local_steps=1)
    results = [
        train(store, replace(Randomness.secure(key(1)), noise=Recorder()), replace(quiet, engine=engine))
        for engine in ("bookkeeping", "opacus")
    ]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-7)


def test_without_privacy_nothing_is_clipped_or_noised(store: RecordStore) -> None:
    recorder = Recorder()
    plan = replace(PLAN, noise_multiplier=0.0)
    train(store, replace(Randomness.secure(key(1)), noise=recorder), plan)
    assert recorder.deviations == []


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_fedprox_is_the_gradient_of_the_proximal_term_by_autograd(
    store: RecordStore,
    optimizer: str,
) -> None:
    """Without privacy: the same steps with mu/2 · ‖w - w_global‖² inside the loss, differentiated by torch."""
    plan = replace(
        PLAN,
        noise_multiplier=0.0,
        strategy=FEDPROX,
        proximal_mu=1.5,
        optimizer=optimizer,
        learning_rate=0.05 if optimizer == "sgd" else 0.005,
    )
    ours = train(store, Randomness.simulated(key(3)), plan)
    anchors: list[torch.Tensor] = []

    def with_term(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        if not anchors:
            anchors.extend(p.detach().clone() for p in model.parameters())
        distance = sum(((p - a) ** 2).sum() for p, a in zip(model.parameters(), anchors, strict=True))
        return TASK.loss(model, batch) + 0.5 * 1.5 * distance

    explicit = train_round(
        replace(TASK, loss=with_term),
        TASK.load(store),
        replace(plan, strategy="fedavg"),
        1,
        start(),
        declared_patients=DECLARED,
        randomness=Randomness.simulated(key(3)),
    )
    plain = train(store, Randomness.simulated(key(3)), replace(plan, strategy="fedavg"))
    assert np.linalg.norm(ours - explicit) < 1e-4 * np.linalg.norm(ours - plain)


def test_fedproxs_pull_is_added_after_clipping_and_noise(store: RecordStore) -> None:
    """Its first step equals FedAvg's, since there is no distance yet; then w - lr · (g + mu · (w - w_global))."""
    fedprox = replace(PLAN, strategy=FEDPROX, proximal_mu=1.0, local_steps=1)
    recorders = [Recorder(), Recorder(), Recorder()]

    def moved(recorder: Recorder, plan: RunPlan) -> np.ndarray:
        return train(store, replace(Randomness.secure(key(1)), noise=recorder), plan) - start()

    one = moved(recorders[0], fedprox)
    np.testing.assert_array_equal(one, moved(recorders[1], replace(fedprox, strategy="fedavg")))
    two = moved(recorders[2], replace(fedprox, local_steps=2))
    count = len(recorders[2].totals) // 2
    second = torch.cat([part.flatten() for part in recorders[2].totals[count:]]).numpy() / (0.5 * DECLARED)
    np.testing.assert_allclose(two, one - 0.5 * (second + 1.0 * one), rtol=1e-3, atol=1e-6)
    # What is noised is clipped data only: the pull would have pushed the sum over the patients' bound.
    assert recorders[2].deviations == [noise_deviation(2.0, 0.7)] * (2 * count)


def test_one_patient_more_changes_nobody_elses_records(
    make_nodule_store: Callable[..., RecordStore], tmp_path: Path
) -> None:
    store = make_nodule_store(tmp_path / "store", patients=12, seed=3)
    task = find_task("nodule-classification")
    whole, without = task.load(store), task.load(store.subset(np.delete(np.arange(12), 4)))
    key = b"release and step"
    with_them = draw_own(whole, torch.arange(12), 3, key)
    without_them = draw_own(without, torch.arange(11), 3, key)
    others = torch.from_numpy(np.delete(np.arange(12), 4))
    for name, field in without_them.fields.items():
        assert torch.equal(with_them[name][others], field)
    assert not torch.equal(draw_own(whole, torch.arange(12), 3, b"another step")["image"], with_them["image"])
