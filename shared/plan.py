"""The run plan: everything the parties agree on before a byte of a model moves.

A plan is public. Its digest names the run's rules; a site refuses a message whose plan has another one.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from shared.accounting import MAX_NOISE_MULTIPLIER, Mechanism, epsilon_of
from shared.errors import PlanError, StorageError
from shared.provenance.bounded import parse_json
from shared.suggest import suggestion

OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("constant", "linear")
ENGINES = ("bookkeeping", "opacus")
FEDAVG, FEDPROX, FEDADAM, FEDYOGI = "fedavg", "fedprox", "fedadam", "fedyogi"
MEDIAN, TRIMMED_MEAN, KRUM, MULTI_KRUM = "median", "trimmed-mean", "krum", "multi-krum"
STRATEGIES = (FEDAVG, FEDPROX, FEDADAM, FEDYOGI, MEDIAN, TRIMMED_MEAN, KRUM, MULTI_KRUM)
_MAJORITY = frozenset({MEDIAN, TRIMMED_MEAN})
_KRUM = frozenset({KRUM, MULTI_KRUM})
RANDOM_START = "random"
_LIMITS: dict[str, tuple[float, float]] = {
    "rounds": (1, 100_000),
    "local_steps": (1, 10_000),
    "records_per_patient": (1, 64),
    "min_sites": (1, 100_000),
    "sample_rate": (1e-4, 1.0),
    "max_grad_norm": (1e-3, 1e3),
    "noise_multiplier": (0.0, MAX_NOISE_MULTIPLIER),
    "learning_rate": (1e-8, 1e3),
    "generator_steps": (0, 10_000),
    "generator_learning_rate": (1e-8, 1.0),
    "generator_pause": (0.0, 1.0),
    "deadline_s": (0.1, 1e7),
    "proximal_mu": (1e-8, 1e3),
    "server_learning_rate": (1e-8, 1e3),
    "tau": (1e-12, 1e3),
    "byzantine_sites": (1, 10_000),
}
"""Beyond these a plan is a mistake or an attack: a bound so small that its noise rounds to nothing, a batch that
exhausts memory when somebody is sampled and not when nobody is."""
_REPLY_GRID_S = (0.1, 86_400.0)
_KINDS: dict[Any, str] = {str: "a text", int: "a whole number", float: "a number"}
_LEAST_NOISE = 0.05
_MOST_STEPS, _MOST_LOSS = 1_000_000, 25.0
"""What a plan may ask of the accountant: beyond these it would fill gigabytes for minutes, to refuse in the end."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will do. Every field is public and enters the digest.

    Attributes:
        task: Name of a registered task.
        rounds: Most aggregations; early stopping may end sooner, and epsilon is stated of all of them.
        local_steps: Optimizer steps a site takes each round.
        sample_rate: Probability with which each patient joins a step.
        records_per_patient: Records drawn from each sampled patient (K).
        max_grad_norm: L2 bound on one patient's gradient.
        noise_multiplier: Noise standard deviation over ``max_grad_norm``; 0 trains without privacy.
        delta: The delta at which epsilon is stated; below one over the number of patients.
        optimizer: ``adam`` or ``sgd``, the site's local optimizer, started afresh each round.
        learning_rate: Of the local optimizer, in the first round.
        schedule: ``constant``, or ``linear``: the rate falls by equal parts and would reach 0 one round after
            the last, so that late noise moves the model less.
        momentum: Of ``sgd``.
        patience: End after this many rounds without a better held-out metric; 0 never ends early.
        min_sites: The operator's quorum; see :attr:`quorum`.
        deadline_s: How long a round waits for replies, in seconds.
        reply_grid_s: A site's reply to a round leaves only whole multiples of so many seconds after the question came;
            0 lets it leave at once. The work is constant; this also hides what else the machine does.
        seed: Seeds the initial weights. It never seeds a hospital's noise.
        engine: Who clips: ``bookkeeping``, or ``opacus``, the slow reference.
        init: ``random``, or the SHA-256 of the public checkpoint that the run starts from.
        strategy: How the server makes one model of the sites' weights: one of ``STRATEGIES``.
        proximal_mu: Of ``fedprox``: how strongly a site is pulled back to the global weights.
        server_learning_rate: Of ``fedadam`` and ``fedyogi``.
        tau: Of ``fedadam`` and ``fedyogi``: added to the root of the second moment.
        generator_steps: Most updates of a generative model's generator in a round; they see no patient.
        generator_learning_rate: Of its Adam, in the first round; it falls as ``schedule`` says.
        generator_pause: The generator rests for the round once the discriminator recognises less than this share of
            its images: so the discriminator gets as many more steps for each of the generator's as it needs.
        byzantine_sites: How many hostile sites ``median``, ``trimmed-mean``, ``krum`` and ``multi-krum`` withstand.
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
    schedule: str = "constant"
    momentum: float = 0.0
    patience: int = 0
    min_sites: int = 1
    deadline_s: float = 3600.0
    reply_grid_s: float = 0.0
    seed: int = 0
    engine: str = "bookkeeping"
    init: str = RANDOM_START
    strategy: str = FEDAVG
    proximal_mu: float = 0.01
    server_learning_rate: float = 0.1
    tau: float = 1e-3
    byzantine_sites: int = 1
    generator_steps: int = 0
    generator_learning_rate: float = 1e-3
    generator_pause: float = 0.1

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            _require(low <= getattr(self, name) <= high, f"{name} must lie between {low:g} and {high:g}")
        quiet = 0.0 < self.noise_multiplier < _LEAST_NOISE
        _require(not quiet, f"noise_multiplier must be 0 or at least {_LEAST_NOISE:g}")
        steps = self.rounds * self.local_steps
        _require(steps <= _MOST_STEPS, f"rounds times local_steps must be at most {_MOST_STEPS}")
        if self.noise_multiplier:
            # The composition's central limit (Bu et al., "Deep Learning with Gaussian Differential Privacy", 2020).
            loss = self.sample_rate * math.sqrt(steps * math.expm1(min(self.noise_multiplier**-2, 700.0)))
            _require(loss <= _MOST_LOSS, "its epsilon would be in the hundreds; use more noise, or none at all")
        low, high = _REPLY_GRID_S
        on_grid = self.reply_grid_s == 0.0 or low <= self.reply_grid_s <= high
        _require(on_grid, f"reply_grid_s must be 0 or lie between {low:g} and {high:g}")
        _require(self.reply_grid_s < self.deadline_s, "deadline_s must be longer than reply_grid_s")
        _require(0.0 <= self.momentum < 1.0, "momentum must lie in [0, 1)")
        _require(0.0 < self.delta < 1.0, "delta must lie strictly between 0 and 1")
        _require(self.patience >= 0, "patience must not be negative")
        words = {"optimizer": OPTIMIZERS, "engine": ENGINES, "schedule": SCHEDULES, "strategy": STRATEGIES}
        for name, known in words.items():
            word = getattr(self, name)
            if word not in known:
                meant = suggestion(word, known)
                raise PlanError(f"The plan is impossible: {name} must be one of {', '.join(known)}.{meant}")
        overshoots = self.strategy == FEDPROX and self.learning_rate * self.proximal_mu > 1.0
        _require(not overshoots, "learning_rate times proximal_mu must be at most 1, or the pull overshoots")

    @property
    def private(self) -> bool:
        """Whether the run promises any privacy at all."""
        return self.noise_multiplier > 0.0

    @property
    def quorum(self) -> int:
        """The fewest replies that are aggregated: ``min_sites``, and what the strategy needs to withstand f sites.

        A median or trimmed mean of n needs n ≥ 2f + 1; Krum's theorem needs n ≥ 2f + 3 (Blanchard et al., 2017).
        """
        return self.quorum_beside(0)

    def quorum_beside(self, faulty: int) -> int:
        """Return the quorum when ``faulty`` replies of a round were found out and dropped.

        Of the f sites that the strategy withstands those are not among the rest any more. Without this, one hostile
        site of the fewest that Krum needs could end a run by sending what is sure to be dropped. More than f faulty
        ones break the assumption, and nothing is made easier. It is for the caller to count no reply that an honest
        site could have sent: each one counted lets one honest reply fewer outvote a hostile one that is still there.
        """
        hidden = self.byzantine_sites - (faulty if faulty <= self.byzantine_sites else 0)
        if self.strategy in _MAJORITY:
            return max(self.min_sites, 2 * hidden + 1)
        if self.strategy in _KRUM:
            return max(self.min_sites, 2 * hidden + 3)
        return self.min_sites

    def learning_rate_in(self, round_number: int) -> float:
        """Return the local learning rate of one round, counted from 1."""
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * self._left(round_number)

    def generator_learning_rate_in(self, round_number: int) -> float:
        """Return the generator's learning rate of one round, counted from 1."""
        return self.generator_learning_rate * (1.0 if self.schedule == "constant" else self._left(round_number))

    def _left(self, round_number: int) -> float:
        return (self.rounds + 1 - round_number) / self.rounds

    def mechanism(self, rounds: int) -> Mechanism:
        """Return what ``rounds`` rounds of this plan do to one site's patients."""
        return Mechanism(self.sample_rate, self.noise_multiplier, rounds * self.local_steps)

    def epsilon(self, rounds: int | None = None) -> float:
        """Return the epsilon of ``rounds`` rounds, by default of the whole plan; the same at every site."""
        rounds = self.rounds if rounds is None else rounds
        return epsilon_of([self.mechanism(rounds)] if rounds else [], self.delta)

    def stated_epsilon(self, rounds: int) -> float:
        """Return the epsilon that is stated of a site that took part in ``rounds`` rounds: the whole plan's, or none.

        Which rounds are run may depend on what earlier ones gave: patience looks at the model, an operator stops a run,
        a site misses a deadline. Tight composition holds for a schedule that is fixed beforehand, so a run that ends
        early is a part of its whole plan, whose epsilon always holds (post-processing).
        """
        return self.epsilon() if rounds else 0.0

    def to_json(self) -> str:
        """Return the canonical text: sorted keys, no spaces; equal plans give equal texts.

        A reply grid of 0 is left out, so that a plan that has none keeps the digest it had before there were any.
        """
        values = asdict(self)
        if not self.reply_grid_s:
            del values["reply_grid_s"]
        return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)

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
            values = parse_json(text, "The plan")
        except StorageError as error:
            raise PlanError(f"The plan is not valid JSON of a plan: {error}") from error
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
        if missing := [field.name for field in fields(cls) if field.default is MISSING and field.name not in values]:
            raise PlanError(as_written(f"The plan lacks {', '.join(missing)}."))
        clean: dict[str, Any] = {}
        for name, value in values.items():
            accepted = (int, float) if types[name] is float else (types[name],)
            if not isinstance(value, accepted) or isinstance(value, bool):  # type: ignore[arg-type]
                raise PlanError(as_written(f"The plan's {name} has the wrong type: it must be {_KINDS[types[name]]}."))
            clean[name] = float(value) if types[name] is float else value
        return cls(**clean)


def as_written(sentence: str) -> str:
    """Return a sentence with the plan's fields spelt as people write them in a file: ``deadline-s``."""
    names = sorted((field.name for field in fields(RunPlan) if "_" in field.name), key=len, reverse=True)
    return re.sub(rf"\b({'|'.join(names)})\b", lambda found: found[0].replace("_", "-"), sentence)


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise PlanError(as_written(f"The plan is impossible: {sentence}."))
