"""One private step against plain autograd, patient by patient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor, nn
from torch.optim import SGD

from shared.dp.step import PrivateStep, split
from shared.tasks.base import Batch

FEATURES = 6
BOUND = 0.5
NORMALISER = 7.0


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv1d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * (FEATURES - 2), 2)).double()


def loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch["x"].flatten(0, 1))
    labels = batch["y"]
    return nn.functional.cross_entropy(logits, labels.flatten(), reduction="none").view(labels.shape).mean(1)


def make_batch(patients: int, records: int, seed: int = 0) -> Batch:
    generator = Generator().manual_seed(seed)
    scale = torch.logspace(-2, 2, max(patients, 1), dtype=torch.float64)[:patients, None, None, None]
    return Batch(
        {
            "x": torch.randn(patients, records, 1, FEATURES, generator=generator, dtype=torch.float64) * scale,
            "y": torch.randint(2, (patients, records), generator=generator),
        }
    )


def update(batch: Batch, noise: float = 0.0, seed: int = 0, bound: float = BOUND) -> Tensor:
    """The flat change of the weights by one step of plain SGD at rate 1, times the normaliser: the noised sum."""
    model = make_model()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    step = PrivateStep(
        model,
        SGD(model.parameters(), lr=1.0),
        loss,
        noise_multiplier=noise,
        max_grad_norm=bound,
        expected_patients=NORMALISER,
        generator=Generator().manual_seed(seed),
    )
    step(batch)
    step.close()
    return (before - nn.utils.parameters_to_vector(model.parameters()).detach()) * NORMALISER


def patient(batch: Batch, index: int) -> Batch:
    return Batch({name: tensor[index : index + 1] for name, tensor in batch.fields.items()})


def clipped_by_hand(batch: Batch, bound: float = BOUND) -> Tensor:
    """The oracle: one backward pass of ordinary autograd per patient."""
    model = make_model()
    total = torch.zeros_like(nn.utils.parameters_to_vector(model.parameters()))
    for index in range(len(batch)):
        model.zero_grad()
        loss(model, patient(batch, index)).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        total += gradient * min(1.0, bound / (gradient.norm().item() + 1e-6))
    return total.detach()


@pytest.mark.parametrize("patients", [1, 2, 9])
@pytest.mark.parametrize("records", [1, 3])
@pytest.mark.parametrize("bound", [0.01, 0.5, 1e6])
def test_agrees_with_a_loop_over_patients(patients: int, records: int, bound: float) -> None:
    batch = make_batch(patients, records)
    torch.testing.assert_close(update(batch, bound=bound), clipped_by_hand(batch, bound), rtol=1e-10, atol=1e-12)


def test_an_empty_batch_is_a_noise_only_step() -> None:
    assert update(make_batch(0, 3), noise=0.0).abs().max() == 0.0
    noised = update(make_batch(0, 3), noise=2.0, seed=5)
    assert noised.abs().min() > 0.0
    assert noised.std().item() == pytest.approx(2.0 * BOUND, rel=0.4)


@given(
    patients=st.integers(1, 6), records=st.integers(1, 3), changed=st.integers(0, 5), seed=st.integers(0, 10_000)
)
def test_one_patient_moves_the_sum_by_at_most_the_bound(
    patients: int, records: int, changed: int, seed: int
) -> None:
    with_patient = make_batch(patients, records, seed)
    keep = torch.arange(patients) != changed % patients
    without = Batch({name: tensor[keep] for name, tensor in with_patient.fields.items()})
    moved = (update(with_patient) - update(without)).norm().item()
    assert moved <= BOUND * (1 + 1e-6)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e300])
def test_a_patient_without_a_finite_gradient_contributes_nothing(poison: float) -> None:
    clean = make_batch(4, 2)
    poisoned = Batch({**clean.fields, "x": clean["x"].clone()})
    poisoned["x"][1, 0, 0, 0] = poison
    rest = Batch({name: tensor[[0, 2, 3]] for name, tensor in clean.fields.items()})
    moved = update(poisoned) - update(rest)
    assert moved.isfinite().all()
    assert moved.norm().item() <= BOUND * (1 + 1e-6)


def test_parts_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(9, 2)
    whole = update(batch, noise=1.0)
    monkeypatch.setattr("shared.dp.step._RECORDS_AT_ONCE", 4)
    assert len(split(batch, 4)) == 5
    torch.testing.assert_close(update(batch, noise=1.0), whole, rtol=1e-12, atol=1e-12)


def test_noise_has_the_promised_scale() -> None:
    batch = make_batch(3, 1)
    signal = update(batch)
    draws = torch.cat([update(batch, noise=3.0, seed=seed) - signal for seed in range(200)])
    assert draws.mean().item() == pytest.approx(0.0, abs=0.05)
    assert draws.std().item() == pytest.approx(3.0 * BOUND, rel=0.03)


def test_the_normaliser_is_the_public_constant_whatever_the_batch() -> None:
    """The same patient moves the weights equally in a small and in a large data set's step."""
    one, nine = make_batch(1, 1), make_batch(9, 1)
    same = Batch({name: torch.cat([one[name]] * 9) for name in nine.fields})
    torch.testing.assert_close(update(same), 9 * update(one), rtol=1e-9, atol=1e-12)
