"""What a model descends from: its start, and every run since, as a checkpoint carries it.

:mod:`shared.provenance.card` says what that has cost the patients of each hospital.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from shared.accounting import MAX_NOISE_MULTIPLIER, Mechanism
from shared.errors import PlanError
from shared.plan import RANDOM_START

PUBLIC, UNKNOWN, RANDOM = "public", "unknown", RANDOM_START
ORIGINS: Final = (RANDOM, PUBLIC, UNKNOWN)
SHIPPED, OPERATOR = "shipped with Fedward", "the operator's word (--init-is-public)"
MOST_RUNS: Final = 64


@dataclass(frozen=True)
class Share:
    """A hospital's part in a run.

    Attributes:
        site: Its public name.
        steps: Noisy steps over its patients.
        key_sha256: Of its public key, where the server knows it.
    """

    site: str
    steps: int
    key_sha256: str | None = None


@dataclass(frozen=True)
class PastRun:
    """A run that a model comes from.

    Attributes:
        run: Its name.
        plan_digest: Of its plan.
        sample_rate: As in the plan.
        noise_multiplier: As in the plan; 0 for none.
        delta: As in the plan.
        sites: The hospitals whose patients may have been trained on.
    """

    run: str
    plan_digest: str
    sample_rate: float
    noise_multiplier: float
    delta: float
    sites: tuple[Share, ...]

    def mechanism(self, steps: int) -> Mechanism:
        """Return what so many steps of this run are."""
        return Mechanism(self.sample_rate, self.noise_multiplier, steps)

    def __post_init__(self) -> None:
        if not 0.0 <= self.noise_multiplier <= MAX_NOISE_MULTIPLIER or not 0.0 < self.delta < 1.0:
            raise PlanError(f"The run {self.run} in the ancestry has an impossible plan.")
        self.mechanism(1)


@dataclass(frozen=True)
class Ancestry:
    """All that a model comes from.

    Attributes:
        origin: ``random``, ``public``, or ``unknown`` where a start's origin was not recorded.
        start_sha256: Of the public start.
        said_by: On whose word the start is public.
        runs: Oldest first.
    """

    origin: str = RANDOM
    start_sha256: str | None = None
    said_by: str | None = None
    runs: tuple[PastRun, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.origin not in ORIGINS:
            raise PlanError(f"An ancestry begins {', '.join(ORIGINS)}, not otherwise.")
        if len(self.runs) > MOST_RUNS:
            raise PlanError(f"A model descends from at most {MOST_RUNS} runs. Start from a public checkpoint.")

    def followed_by(self, run: PastRun) -> "Ancestry":
        """Return the ancestry of what ``run`` made of this model."""
        return Ancestry(self.origin, self.start_sha256, self.said_by, (*self.runs, run))


def shares_of(steps: Mapping[str, int], keys: Mapping[str, str]) -> tuple[Share, ...]:
    """Return hospitals' shares by name, from their steps and the SHA-256 of their keys where those are known."""
    return tuple(Share(site, count, keys.get(site)) for site, count in sorted(steps.items()))
