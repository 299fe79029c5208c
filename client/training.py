"""Local training: a site's patients improve the global weights for one round, privately if the plan says so.

Privacy: see :mod:`shared.dp.step` for one step. Patients join each step independently with the plan's
``sample_rate`` (Poisson), the normaliser is ``sample_rate × declared_patients``, a public constant, and the
number of steps is the plan's. Every step draws as many patients and takes as many passes, whoever joins
(:mod:`shared.dp.passes`). Nothing but the noised sums depends on who is in the store.

A task may improve the model before the private steps from the global weights alone, and keep parts of the model out
of them: :class:`shared.tasks.base.Task` says what it gets to see.

FedProx (Li et al., "Federated Optimization in Heterogeneous Networks", 2020) adds mu/2 · ‖w - w_global‖² to what a
site minimises. Its gradient mu · (w - w_global) depends on the global weights, which are public, and on the current
ones, which are made of earlier noised sums: it is post-processing. So it is added after clipping and noise, just
before the optimizer's update, and costs no privacy; inside the clipped gradient it would only use up the bound.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from shared.dp.memory import keep_freed_memory
from shared.dp.noise import KeyStream, NoiseSource, SecureNoise, SeededNoise
from shared.dp.passes import Passes, most_patients
from shared.dp.rungs import Rung
from shared.dp.selftest import Finding, Shape, climb, safe_rung
from shared.dp.step import OrdinaryStep, PrivateStep
from shared.errors import PolicyError
from shared.plan import FEDPROX, RunPlan
from shared.tasks.base import Batch, PatientDataset, Task, hold_all_but
from shared.tasks.sampling import poisson_sample
from shared.weights import Vector, pack, unpack


@dataclass(frozen=True)
class Randomness:
    """Everything random in one release, derived from its secret key.

    Attributes:
        uniform: Draws for the sampling of patients; the accounting counts on their secrecy.
        noise: The noise; the guarantee counts on its secrecy.
        augmentation: For what sees no patient. Not secret.
        draws: Key of which records are drawn and how they are changed; see :func:`draw_own`.
    """

    uniform: Callable[[int], npt.NDArray[np.float64]]
    noise: NoiseSource
    augmentation: Generator
    draws: bytes

    @classmethod
    def secure(cls, key: bytes) -> "Randomness":
        """Derive from ``KEY_BYTES`` random bytes, for patients who must be protected."""
        augmentation = _generator(key, b"augmentation", "cpu")
        uniform, noise = KeyStream(key, b"sampling").uniform, SecureNoise(KeyStream(key, b"noise"))
        return cls(uniform, noise, augmentation, _derived(key, b"draws"))

    @classmethod
    def simulated(cls, key: bytes) -> "Randomness":
        """Derive fast streams of torch's generator, for simulated patients only."""
        sampling = np.random.default_rng(list(key))
        noise = SeededNoise(_generator(key, b"noise", preferred_device()))
        return cls(sampling.random, noise, _generator(key, b"augmentation", "cpu"), _derived(key, b"draws"))


def train_round(
    task: Task,
    patients: PatientDataset,
    plan: RunPlan,
    round_number: int,
    weights: Vector,
    *,
    declared_patients: int,
    randomness: Randomness,
    rung: Rung | None = None,
) -> Vector:
    """Return the weights ``(D,)`` after one round of local training.

    Args:
        task: What is trained.
        patients: The site's data.
        plan: The agreed run.
        round_number: Counted from 1.
        weights: Global weights ``(D,)``.
        declared_patients: The site's public number of patients, synthetic ones included.
        randomness: Of this release; with everything else equal, the same gives the same result.
        rung: How the private passes run; by default the one that :func:`rung_of` finds.

    Raises:
        FederationError: With ``UNSAFE_KERNELS``, if no rung is safe on this machine.
        PolicyError: If there are more patients than a private round has room for.
        ProtocolError: If the weights do not fit the model or are not finite.
    """
    keep_freed_memory()
    device = preferred_device()
    model = task.build().to(device)
    unpack(weights, model)
    model.train()
    if task.post_process:
        task.post_process(model, plan, round_number, randomness.augmentation)
    optimizer = make_optimizer(hold_all_but(task.private(model), model), plan, round_number)
    if plan.strategy == FEDPROX:
        pull_back(optimizer, plan.proximal_mu)

    def draw(number: int, chosen: Tensor) -> Batch:
        own = _derived(randomness.draws, number.to_bytes(8, "big"))
        return draw_own(patients, chosen, plan.records_per_patient, own).to(device)

    def sampled() -> Tensor:
        return poisson_sample(len(patients), plan.sample_rate, randomness.uniform)

    steps = ((sampled(), partial(draw, number)) for number in range(plan.local_steps))
    if plan.private:
        check_room(len(patients), declared_patients)
        step = private_step(task, model, optimizer, plan, declared_patients, randomness.noise)
        rung = rung or rung_of(task, plan, declared_patients)
        passes = rung.passes(passes_of(task, plan, declared_patients))

        def train() -> None:
            for chosen, drawn in steps:
                step(passes.of_step(chosen, len(patients), drawn))

        rung.run(train)
        step.close()
    else:
        ordinary = OrdinaryStep(model, optimizer, task.loss)
        for chosen, drawn in steps:
            ordinary(drawn(chosen))
    return pack(model)


def private_step(
    task: Task, model: nn.Module, optimizer: Optimizer, plan: RunPlan, declared_patients: int, noise: NoiseSource
) -> PrivateStep:
    """Return the plan's private step on ``model``."""
    return PrivateStep(
        model,
        optimizer,
        task.loss,
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.max_grad_norm,
        expected_patients=plan.sample_rate * declared_patients,
        noise=noise,
        engine=plan.engine,
    )


def passes_of(task: Task, plan: RunPlan, declared_patients: int) -> Passes:
    """Return the passes of each of the plan's private steps."""
    return Passes.of(plan.records_per_patient, task.records_at_once, declared_patients, plan.sample_rate)


def rung_of(task: Task, plan: RunPlan, declared_patients: int) -> Rung:
    """Return how the plan's private passes run with torch's present number of threads.

    Raises:
        FederationError: With ``UNSAFE_KERNELS``, if no rung is safe on this machine.
    """
    return safe_rung(task, shape_of(task, plan, declared_patients), torch.get_num_threads())


def findings_of(task: Task, plan: RunPlan, declared_patients: int) -> tuple[Finding, ...]:
    """Return what the self-test found for the plan's private passes, rung by rung down to the one it took."""
    return climb(task, shape_of(task, plan, declared_patients), torch.get_num_threads())


def shape_of(task: Task, plan: RunPlan, declared_patients: int) -> Shape:
    """Return what the kernels see in the plan's private steps."""
    passes = passes_of(task, plan, declared_patients)
    return Shape(plan.engine, passes, plan.records_per_patient, preferred_device())


def check_room(patients: int, declared_patients: int) -> None:
    """Check that a private step has room for the patients of a site.

    Raises:
        PolicyError: If there are too many.
    """
    if patients > (most := most_patients(declared_patients)):
        raise PolicyError(
            f"The store holds more than {most} patients, the most for {declared_patients} declared ones. Declare more "
            "with 'fedward-site declare', have the server's operator enrol that, and start the daemon again."
        )


def draw_own(patients: PatientDataset, chosen: Tensor, records_per_patient: int, key: bytes) -> Batch:
    """Draw records of the ``chosen`` patients ``(B,)``, each patient's with a generator of that patient's own.

    The generator hangs on ``key``, which names release and step, and on the patient's pseudonym, and on nobody else:
    whoever else is in the store or joins the step, a patient's records are the same. So for every key, known or not,
    one patient more changes that patient's row only, which is what the bound on the sum counts on.
    """
    if not len(chosen):
        return patients.draw(chosen, records_per_patient, Generator())
    return Batch.joined(
        [
            patients.draw(one, records_per_patient, _generator(key, patients.keys[int(one)].tobytes(), "cpu"))
            for one in chosen.split(1)
        ]
    )


def make_optimizer(model: nn.Module, plan: RunPlan, round_number: int) -> Optimizer:
    """Return the plan's local optimizer with fresh state."""
    rate = plan.learning_rate_in(round_number)
    if plan.optimizer == "adam":
        return Adam(model.parameters(), lr=rate)
    return SGD(model.parameters(), lr=rate, momentum=plan.momentum)


def pull_back(optimizer: Optimizer, proximal_mu: float) -> None:
    """Let every update of ``optimizer`` also follow FedProx's pull to where its parameters are now."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    anchors = [parameter.detach().clone() for parameter in parameters]

    def pull(*_arguments: object) -> None:
        with torch.no_grad():
            for parameter, anchor in zip(parameters, anchors, strict=True):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - anchor, alpha=proximal_mu)

    # Runs between the noise, which the wrapping optimizer adds, and the update itself.
    optimizer.register_step_pre_hook(pull)


def preferred_device() -> str:
    """Return ``cuda`` where there is a GPU, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _derived(key: bytes, purpose: bytes) -> bytes:
    return hashlib.sha256(key + purpose).digest()


def _generator(key: bytes, purpose: bytes, device: str) -> Generator:
    return Generator(device).manual_seed(int.from_bytes(_derived(key, purpose)[:8], "big"))
