"""Local training: a site's patients improve the global weights for one round, privately if the plan says so.

Privacy: see :mod:`shared.dp.step` for one step. Patients join each step independently with the plan's
``sample_rate`` (Poisson), the normaliser is ``sample_rate × declared_patients``, a public constant, and the
number of steps is the plan's: nothing but the noised sums depends on who is in the store.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Generator, nn
from torch.optim import SGD, Adam, Optimizer

from shared.dp.step import OrdinaryStep, PrivateStep
from shared.plan import RunPlan
from shared.tasks.base import PatientDataset, Task
from shared.tasks.sampling import poisson_sample
from shared.weights import Vector, pack, unpack


@dataclass(frozen=True)
class Randomness:
    """Two independent streams, derived from a release's secret key: who is sampled, and the noise."""

    sampling: Generator
    noise: Generator

    @classmethod
    def from_key(cls, key: bytes, device: str) -> "Randomness":
        """Derive both streams; the noise is drawn on the device that holds the gradients."""
        return cls(_generator(key, b"sampling", "cpu"), _generator(key, b"noise", device))


def train_round(
    task: Task, patients: PatientDataset, plan: RunPlan, weights: Vector, declared_patients: int, key: bytes
) -> Vector:
    """Return the weights after one round of local training.

    Args:
        task: What is trained.
        patients: The site's data.
        plan: The agreed run.
        weights: Global weights ``(D,)``.
        declared_patients: The site's public number of patients.
        key: Secret of this release; the same key and weights give the same result.

    Raises:
        ProtocolError: If the weights do not fit the model or are not finite.
    """
    device = preferred_device()
    model = task.build().to(device)
    unpack(weights, model)
    model.train()
    randomness = Randomness.from_key(key, device)
    step = _make_step(task, model, plan, declared_patients, randomness.noise)
    for _ in range(plan.local_steps):
        chosen = poisson_sample(len(patients), plan.sample_rate, randomness.sampling)
        step(patients.draw(chosen, plan.records_per_patient, randomness.sampling).to(device))
    step.close()
    return pack(model)


def make_optimizer(model: nn.Module, plan: RunPlan) -> Optimizer:
    """Return the plan's local optimizer with fresh state."""
    if plan.optimizer == "adam":
        return Adam(model.parameters(), lr=plan.learning_rate)
    return SGD(model.parameters(), lr=plan.learning_rate, momentum=plan.momentum)


def preferred_device() -> str:
    """Return ``cuda`` where there is a GPU, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _make_step(
    task: Task, model: nn.Module, plan: RunPlan, declared_patients: int, noise: Generator
) -> PrivateStep | OrdinaryStep:
    optimizer = make_optimizer(model, plan)
    if not plan.private:
        return OrdinaryStep(model, optimizer, task.loss)
    return PrivateStep(
        model,
        optimizer,
        task.loss,
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.max_grad_norm,
        expected_patients=plan.sample_rate * declared_patients,
        generator=noise,
    )


def _generator(key: bytes, purpose: bytes, device: str) -> Generator:
    seed = int.from_bytes(hashlib.sha256(key + purpose).digest()[:8], "big")
    return Generator(device).manual_seed(seed)
