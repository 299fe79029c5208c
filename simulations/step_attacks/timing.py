"""Does the time of a reply tell whether one patient is there?

A server may choose the weights it sends. Here it sends some under which one chosen patient's gradient, and nobody
else's, is not finite or is too small for the normal number format. Then it compares the processor time of a hospital's
rounds with that patient and without. An AUC of 0.5 is a guess; 1.0 tells for sure from a single reply.

The rounds are real ones, with sampling, drawing, clipping and noise. Every patient joins every step, which is the
server's best case. The weights against images are larger than a site's ``max-weights-norm`` permits by default.
"""

import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from statistics import median
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from client.training import Randomness, train_round
from shared.dp.noise import KEY_BYTES
from shared.drafting import draft_plan
from shared.errors import PlanError
from shared.models.cnn import LungCTNet
from shared.models.gan import ConditionalGan
from shared.models.recurrent import GLUCOSE_CENTRE, GLUCOSE_SCALE, GlucoseForecaster
from shared.plan import RunPlan
from shared.records import RecordStore
from shared.tasks import cgm, ct_nodules
from shared.tasks.base import Batch, Task
from shared.tasks.registry import find_task
from shared.weights import Vector, pack

PATIENTS: Final = 40
"""How many there are beside the one whom the server looks for."""
OVERFLOW, SUBNORMAL = "overflow", "subnormal"
_READINGS: Final = 200
_ALARM_MG_DL: Final = 350.0
"""Only the patient looked for has such glucose."""
_WARM_UP: Final = 3
_TINY: Final = 2e-38
"""A number just above the normal format's least, 1.2e-38."""


@dataclass(frozen=True)
class TimingResult:
    """What the server learns.

    Attributes:
        auc: How well the processor time of one reply tells a round with the patient from one without.
        replies: How many of each kind were timed.
        passes_without, passes_with: Passes of a round over the model.
        cpu_ms_without, cpu_ms_with: Median processor time of a round, all threads, in ms.
    """

    auc: float
    replies: int
    passes_without: int
    passes_with: int
    cpu_ms_without: float
    cpu_ms_with: float


def attack_time(task: str, *, replies: int = 200, threads: int = 1, weights: str = OVERFLOW) -> TimingResult:
    """Time ``replies`` rounds with the patient and as many without, in random order.

    Args:
        task: Name of a task that the attack has weights for.
        replies: Of each kind.
        threads: Of torch.
        weights: ``OVERFLOW`` or ``SUBNORMAL``: what the chosen patient's gradient is.

    Raises:
        PlanError: If there is no such task, or no hostile weights for it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        attack = Attack.on(find_task(task), weights)
        order = [False, True] * replies
        Random(0).shuffle(order)  # noqa: S311 - no secret
        timed = [(there, *attack.round(there)) for there in [False, True] * _WARM_UP + order][2 * _WARM_UP :]
    finally:
        torch.set_num_threads(before)
    without, there = ([(seconds, passes) for w, seconds, passes in timed if w is kind] for kind in (False, True))
    return TimingResult(
        auc=_auc([seconds for seconds, _ in without], [seconds for seconds, _ in there]),
        replies=replies,
        passes_without=without[0][1],
        passes_with=there[0][1],
        cpu_ms_without=1e3 * median(seconds for seconds, _ in without),
        cpu_ms_with=1e3 * median(seconds for seconds, _ in there),
    )


def _auc(without: list[float], there: list[float]) -> float:
    """Return how often a time with the patient is above one without; ties count half."""
    difference = np.subtract.outer(there, without)
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


@dataclass(frozen=True)
class Attack:
    """Hostile weights for a task, and a hospital with the patient and without.

    Attributes:
        task: What is trained.
        plan: One step that everybody joins.
        weights: ``(D,)`` what the server sends.
        stores: By whether the patient is there; the patient comes last.
    """

    task: Task
    plan: RunPlan
    weights: Vector
    stores: Mapping[bool, RecordStore]

    @classmethod
    def on(cls, task: Task, weights: str) -> "Attack":
        """Prepare the attack. Raises PlanError where there are no hostile weights for the task or of that name."""
        model = task.build()
        hostile = _HOSTILE.get((type(model), weights))
        if hostile is None:
            raise PlanError(f"There are no {weights!r} weights for {task.name}.")
        with torch.no_grad():
            hostile(model)
        overrides = {"local_steps": 1, "sample_rate": 1.0, "generator_steps": 0}
        plan = draft_plan(task.name, epsilon=8.0, delta=1e-3, overrides=overrides)
        whole = _STORES[task.store_kind]()
        stores = {True: whole, False: whole.subset(np.arange(PATIENTS))}
        return cls(task, plan, pack(model), stores)

    def round(self, there: bool) -> tuple[float, int]:
        """Train one round, with the patient or without; return its processor time in seconds and its passes."""
        passes = 0

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            nonlocal passes
            passes += 1
            return self.task.loss(model, batch)

        patients = self.task.load(self.stores[there])
        _ = len(patients), patients.keys  # a hospital's store is open before the question comes
        randomness = Randomness.secure(secrets.token_bytes(KEY_BYTES))
        began = time.process_time()
        train_round(
            replace(self.task, loss=loss),
            patients,
            self.plan,
            1,
            self.weights,
            declared_patients=PATIENTS,
            randomness=randomness,
        )
        return time.process_time() - began, passes


def _recurrent(model: nn.Module, gain: float, output: float) -> None:
    """Let the state move only above ``_ALARM_MG_DL``; there, a gradient grows by ``gain`` at each step back."""
    forecaster = cast(GlucoseForecaster, model)
    for parameter in model.parameters():
        parameter.zero_()
    cell = forecaster.memory
    size, steep = cell.hidden_size, 300.0
    of_input, of_state = cell.get_parameter("weight_ih_l0"), cell.get_parameter("weight_hh_l0")
    bias = cell.get_parameter("bias_ih_l0")
    alarm = steep * (_ALARM_MG_DL - GLUCOSE_CENTRE) / (3 * GLUCOSE_SCALE)
    if isinstance(cell, nn.GRU):  # gates r, z, n: z = 1 keeps the state
        bias[:size] = 20.0
        of_input[size : 2 * size, 1], bias[size : 2 * size] = -steep, alarm
    else:  # gates i, f, g, o: i = 0 and f = 0 leave nothing
        of_input[:size, 1], bias[:size] = steep, -alarm
        bias[size : 2 * size], bias[3 * size :] = -20.0, 20.0
    candidates = slice(2 * size, 3 * size)
    of_state[candidates] = gain * torch.eye(size)
    forecaster.readout.weight.fill_(output)


def _classifier(model: nn.Module, first: float, second: float, hidden: float, last: float, threshold: float) -> None:
    """Weigh every pixel by ``first`` above ``threshold``, and what follows by one number a layer."""
    network = cast(LungCTNet, model)
    layers = [network.features[0], network.features[3], network.classifier[1], network.classifier[3]]
    for layer, weight in zip(layers, (first, second, hidden, last), strict=True):
        layer.get_parameter("weight").fill_(weight)
        layer.get_parameter("bias").zero_()
    layers[0].get_parameter("bias").fill_(-9.0 * first * threshold)


def _discriminator(model: nn.Module, first: float, second: float, scale: float, last: float, offset: float) -> None:
    """Weigh every pixel by ``first``, and what follows by one number a layer; the generator draws nothing but grey."""
    gan = cast(ConditionalGan, model)
    for parameter in gan.parameters():
        parameter.zero_()
    layers = gan.discriminator.layers
    layers[0].get_parameter("weight").fill_(first)
    layers[0].get_parameter("bias").fill_(offset)
    layers[2].get_parameter("weight").fill_(second)
    layers[3].get_parameter("weight").fill_(scale)
    layers[3].get_parameter("bias").fill_(0.1)
    layers[5].get_parameter("weight").fill_(0.01)
    layers[6].get_parameter("weight").fill_(1.0)
    layers[9].get_parameter("weight").fill_(last)


_HOSTILE: Mapping[tuple[type[nn.Module], str], Callable[[nn.Module], None]] = {
    (GlucoseForecaster, OVERFLOW): lambda model: _recurrent(model, gain=30.0, output=1.0),
    (GlucoseForecaster, SUBNORMAL): lambda model: _recurrent(model, gain=0.9, output=_TINY),
    # A bright patch of 9 pixels overflows, a dark one does not.
    (LungCTNet, OVERFLOW): lambda model: _classifier(model, 6e37, _TINY, 1e-30, 1e-3, threshold=0.0),
    # Only a bright patch lights anything, and what lights has a tiny gradient.
    (LungCTNet, SUBNORMAL): lambda model: _classifier(model, 1.0, 0.01, 0.01, _TINY, threshold=0.6),
    # 16 bright pixels, 1.0 each for the discriminator, overflow; 16 dark ones, -0.6, and padding, -1.0, do not.
    (ConditionalGan, OVERFLOW): lambda model: _discriminator(model, 2.5e37, _TINY, 1e-37, 0.01, offset=2e38),
    # Where a bright patch turns the first layer negative, its slope takes the gradient below the normal format.
    (ConditionalGan, SUBNORMAL): lambda model: _discriminator(model, -1.0, 0.01, 1.0, _TINY, offset=5.0),
}
"""By the task's model and the kind of weights: writes them into the model."""


def _glucose() -> RecordStore:
    """Return patients with ordinary glucose, and last the one with a long run above ``_ALARM_MG_DL``."""
    generator = np.random.default_rng(1)
    readings = 140.0 + 6.0 * generator.normal(size=(PATIENTS + 1, _READINGS)).cumsum(1)
    readings = readings.clip(50.0, 330.0)
    readings[-1] = 360.0 + generator.normal(size=_READINGS)
    count = readings.size
    arrays: dict[str, npt.NDArray[Any]] = {
        "glucose": readings.ravel().astype(np.float32),
        "insulin": np.zeros(count, np.float32),
        "carbohydrate": np.zeros(count, np.float32),
        "minute_of_day": (5 * np.arange(count) % 1440).astype(np.int16),
        "segment": np.zeros(count, np.int32),
        "measured": np.ones(count, bool),
    }
    return _store(cgm.STORE_KIND, _READINGS, arrays)


def _nodules() -> RecordStore:
    """Return patients with a dark patch each, and last the one with a bright one."""
    side = ct_nodules.STORED_PX
    images = np.random.default_rng(1).normal(0.2, 0.01, (PATIENTS + 1, side, side))
    images[-1] = 1.0
    count = len(images)
    arrays: dict[str, npt.NDArray[Any]] = {
        "image": images.astype(np.float16),
        "malignant": np.zeros(count, np.uint8),
        "nodule": np.zeros(count, np.int32),
        "diameter_mm": np.full(count, 8.0, np.float32),
        "vendor": np.zeros(count, np.uint8),
    }
    return _store(ct_nodules.STORE_KIND, 1, arrays)


def _store(kind: str, records: int, arrays: dict[str, npt.NDArray[Any]]) -> RecordStore:
    names = b"".join(hashlib.sha256(bytes([patient])).digest()[:16] for patient in range(PATIENTS + 1))
    keys = np.frombuffer(names, np.uint8).reshape(-1, 16)
    return RecordStore(kind, {}, records * np.arange(PATIENTS + 2), keys, arrays, kind)


_STORES: Mapping[str, Callable[[], RecordStore]] = {cgm.STORE_KIND: _glucose, ct_nodules.STORE_KIND: _nodules}
