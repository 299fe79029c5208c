"""The run plan: everything the parties agree on before a byte of a model moves.

A plan is public. Its digest names the run's rules; a site refuses a message whose plan has another one.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from shared.accounting import Mechanism, epsilon_of
from shared.errors import PlanError

OPTIMIZERS = ("adam", "sgd")
RANDOM_START = "random"


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will do. Every field is public and enters the digest.

    Attributes:
        task: Name of a registered task.
        rounds: Most aggregations; early stopping may end sooner, which spends less privacy.
        local_steps: Optimizer steps a site takes each round.
        sample_rate: Probability with which each patient joins a step.
        records_per_patient: Records drawn from each sampled patient (K).
        max_grad_norm: L2 bound on one patient's gradient.
        noise_multiplier: Noise standard deviation over ``max_grad_norm``; 0 trains without privacy.
        delta: The delta at which epsilon is stated; below one over the number of patients.
        optimizer: ``adam`` or ``sgd``, the site's local optimizer, started afresh each round.
        learning_rate: Of the local optimizer.
        momentum: Of ``sgd``.
        patience: End after this many rounds without a better held-out metric; 0 never ends early.
        min_sites: Quorum: a round with fewer replies is not aggregated and the run fails.
        deadline_s: How long a round waits for replies, in seconds.
        seed: Seeds the initial weights. It never seeds a hospital's noise.
        init: ``random``, or the SHA-256 of the public checkpoint that the run starts from.
    """

    task: str
    rounds: int
    local_steps: int
    sample_rate: float
    records_per_patient: int
    max_grad_norm: float
    noise_multiplier: float
    delta: float
    optimizer: str = "sgd"
    learning_rate: float
    momentum: float = 0.0
    patience: int = 0
    min_sites: int = 1
    deadline_s: float = 3600.0
    seed: int = 0
    init: str = RANDOM_START

    def __post_init__(self) -> None:
        for name in ("rounds", "local_steps", "records_per_patient", "min_sites"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1")
        for name in ("max_grad_norm", "learning_rate", "deadline_s"):
            _require(0.0 < getattr(self, name) < math.inf, f"{name} must be positive")
        _require(0.0 <= self.momentum < 1.0, "momentum must lie in [0, 1)")
        _require(0.0 < self.delta < 1.0, "delta must lie strictly between 0 and 1")
        _require(self.patience >= 0, "patience must not be negative")
        _require(self.optimizer in OPTIMIZERS, f"optimizer must be one of {', '.join(OPTIMIZERS)}")
        self.mechanism(self.rounds)  # checks sample_rate and noise_multiplier

    @property
    def private(self) -> bool:
        """Whether the run promises any privacy at all."""
        return self.noise_multiplier > 0.0

    def mechanism(self, rounds: int) -> Mechanism:
        """Return what ``rounds`` rounds of this plan do to one site's patients."""
        return Mechanism(self.sample_rate, self.noise_multiplier, rounds * self.local_steps)

    def epsilon(self, rounds: int | None = None) -> float:
        """Return the epsilon of ``rounds`` rounds, by default of the whole plan; the same at every site."""
        rounds = self.rounds if rounds is None else rounds
        return epsilon_of([self.mechanism(rounds)] if rounds else [], self.delta)

    def to_json(self) -> str:
        """Return the canonical text: sorted keys, no spaces; equal plans give equal texts."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> "RunPlan":
        """Parse a plan, refusing unknown and missing fields and wrong types.

        Raises:
            PlanError: With a sentence that names the field.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError("The plan is not valid JSON.") from error
        if not isinstance(values, dict):
            raise PlanError("The plan must be a JSON object.")
        return cls.from_mapping(values)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "RunPlan":
        """Build a plan from parsed values.

        Raises:
            PlanError: With a sentence that names the field.
        """
        types = {field.name: field.type for field in fields(cls)}
        if unknown := sorted(set(values) - set(types)):
            raise PlanError(f"The plan has unknown fields: {', '.join(unknown)}.")
        clean: dict[str, Any] = {}
        for name, value in values.items():
            accepted = (int, float) if types[name] is float else (types[name],)
            if not isinstance(value, accepted) or isinstance(value, bool):  # type: ignore[arg-type]
                raise PlanError(f"The plan's {name} has the wrong type.")
            clean[name] = float(value) if types[name] is float else value
        try:
            return cls(**clean)
        except TypeError as error:
            raise PlanError("The plan lacks a field that has no default.") from error


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise PlanError(f"The plan is impossible: {sentence}.")
