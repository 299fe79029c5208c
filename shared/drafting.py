"""Draft a run plan from the little that its author says: task, epsilon, and whatever is to differ."""

import math
from collections.abc import Mapping
from typing import Any

from shared.accounting import calibrate_noise
from shared.errors import PlanError
from shared.plan import RunPlan
from shared.tasks.registry import find_task

MOST_EPSILON = 100.0
DELTA_SHARE = 0.1
"""A plan's delta, as a share of one over the largest declared number of patients."""


def draft_plan(task: str, *, epsilon: float, delta: float, overrides: Mapping[str, Any]) -> RunPlan:
    """Return a plan whose epsilon over all its rounds is at most ``epsilon`` at ``delta``.

    Args:
        task: Name of a registered task; its defaults fill what ``overrides`` leaves open.
        epsilon: The promise; ``inf`` trains without privacy.
        delta: See :class:`shared.plan.RunPlan`.
        overrides: Fields of the plan that are to differ from the task's defaults.

    Raises:
        PlanError: If the task is unknown, a field is impossible, or no usable noise keeps the promise.
    """
    found = find_task(task)
    defaults = {**found.defaults, **(found.without_privacy if math.isinf(epsilon) else {})}
    values = {**defaults, **overrides, "task": task, "delta": delta}
    noiseless = RunPlan.from_mapping({**values, "noise_multiplier": 0.0})
    if math.isnan(epsilon) or epsilon <= 0:
        raise PlanError(f"epsilon must be positive, not {epsilon}; 'inf' trains without privacy.")
    if math.isinf(epsilon):
        return noiseless
    if epsilon > MOST_EPSILON:
        raise PlanError(
            f"epsilon must be at most {MOST_EPSILON:g}: above that there is no privacy; say 'inf' for none."
        )
    noise = calibrate_noise(
        epsilon=epsilon,
        delta=delta,
        sample_rate=noiseless.sample_rate,
        steps=noiseless.rounds * noiseless.local_steps,
    )
    return RunPlan.from_mapping({**values, "noise_multiplier": noise})
