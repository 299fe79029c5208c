"""Local training: a site's patients improve the global weights for one round, privately if the plan says so.

Privacy: see :mod:`shared.dp.step` for one step. Patients join each step independently with the plan's
``sample_rate`` (Poisson), the normaliser is ``sample_rate × declared_patients``, a public constant, and the
number of steps is the plan's: nothing but the noised sums depends on who is in the store.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from shared.dp.noise import KeyStream, NoiseSource, SecureNoise, SeededNoise
from shared.dp.step import OrdinaryStep, PrivateStep, padded_parts
from shared.plan import RunPlan
from shared.tasks.base import Batch, PatientDataset, Task
from shared.tasks.sampling import poisson_sample
from shared.weights import Vector, pack, unpack


@dataclass(frozen=True)
class Randomness:
    """Everything random in one release, derived from its secret key.

    Attributes:
        uniform: Draws for the sampling of patients; the accounting counts on their secrecy.
        noise: The noise; the guarantee counts on its secrecy.
        augmentation: Which records are drawn and how they are changed. Not secret: the bound holds for any.
    """

    uniform: Callable[[int], npt.NDArray[np.float64]]
    noise: NoiseSource
    augmentation: Generator

    @classmethod
    def secure(cls, key: bytes) -> "Randomness":
        """Derive from ``KEY_BYTES`` random bytes, for patients who must be protected."""
        augmentation = _generator(key, b"augmentation", "cpu")
        return cls(KeyStream(key, b"sampling").uniform, SecureNoise(KeyStream(key, b"noise")), augmentation)

    @classmethod
    def simulated(cls, key: bytes) -> "Randomness":
        """Derive fast streams of torch's generator, for simulated patients only."""
        sampling = np.random.default_rng(list(key))
        noise = SeededNoise(_generator(key, b"noise", preferred_device()))
        return cls(sampling.random, noise, _generator(key, b"augmentation", "cpu"))


def train_round(
    task: Task,
    patients: PatientDataset,
    plan: RunPlan,
    round_number: int,
    weights: Vector,
    *,
    declared_patients: int,
    randomness: Randomness,
) -> Vector:
    """Return the weights ``(D,)`` after one round of local training.

    Args:
        task: What is trained.
        patients: The site's data.
        plan: The agreed run.
        round_number: Counted from 1.
        weights: Global weights ``(D,)``.
        declared_patients: The site's public number of patients.
        randomness: Of this release; with everything else equal, the same gives the same result.

    Raises:
        ProtocolError: If the weights do not fit the model or are not finite.
    """
    device = preferred_device()
    model = task.build().to(device)
    unpack(weights, model)
    model.train()
    optimizer = make_optimizer(model, plan, round_number)

    def draw(chosen: Tensor) -> Batch:
        return patients.draw(chosen, plan.records_per_patient, randomness.augmentation).to(device)

    def sampled() -> Tensor:
        return poisson_sample(len(patients), plan.sample_rate, randomness.uniform)

    if not plan.private:
        ordinary = OrdinaryStep(model, optimizer, task.loss)
        for _ in range(plan.local_steps):
            ordinary(draw(sampled()))
        return pack(model)
    step = PrivateStep(
        model,
        optimizer,
        task.loss,
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.max_grad_norm,
        expected_patients=plan.sample_rate * declared_patients,
        noise=randomness.noise,
        engine=plan.engine,
    )
    for _ in range(plan.local_steps):
        step(padded_parts(sampled(), plan.records_per_patient, draw))
    step.close()
    return pack(model)


def make_optimizer(model: nn.Module, plan: RunPlan, round_number: int) -> Optimizer:
    """Return the plan's local optimizer with fresh state."""
    rate = plan.learning_rate_in(round_number)
    if plan.optimizer == "adam":
        return Adam(model.parameters(), lr=rate)
    return SGD(model.parameters(), lr=rate, momentum=plan.momentum)


def preferred_device() -> str:
    """Return ``cuda`` where there is a GPU, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _generator(key: bytes, purpose: bytes, device: str) -> Generator:
    seed = int.from_bytes(hashlib.sha256(key + purpose).digest()[:8], "big")
    return Generator(device).manual_seed(seed)
