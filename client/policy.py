"""The hospital's decision on a plan: accepted, or refused with a code. Pure."""

from datetime import datetime

import numpy as np

from client.config import SitePolicy
from shared.dp.step import ENGINES
from shared.errors import ErrorCode, FederationError, PolicyError
from shared.plan import RunPlan
from shared.tasks.base import Task, hold_all_but
from shared.tasks.registry import find_task
from shared.weights import Vector, unpack


def check_plan(plan: RunPlan, policy: SitePolicy) -> None:
    """Check a plan against the hospital's rules, apart from the budget.

    Raises:
        PolicyError: Naming the rule.
        PlanError: If the task does not exist here.
    """
    find_task(plan.task)
    refusals = {
        f"the task {plan.task} is not permitted here": plan.task not in policy.tasks,
        f"its delta is above max-delta {policy.max_delta}": plan.delta > policy.max_delta,
        f"its noise-multiplier is below min-noise-multiplier {policy.min_noise_multiplier}": (
            plan.noise_multiplier < policy.min_noise_multiplier
        ),
        f"its max-grad-norm is above {policy.max_grad_norm}": plan.max_grad_norm > policy.max_grad_norm,
        f"its sample-rate is above max-sample-rate {policy.max_sample_rate}": plan.sample_rate > policy.max_sample_rate,
    }
    if broken := [rule for rule, refused in refusals.items() if refused]:
        raise PolicyError(f"The plan is refused: {'; '.join(broken)}. Change the plan or site.toml.")


def check_engine(plan: RunPlan, task: Task) -> None:
    """Check that the plan's engine can clip the gradients of the task's model, before anything is spent.

    Raises:
        PolicyError: If it cannot.
    """
    if not plan.private:
        return
    model = task.build()
    hold_all_but(task.private(model), model)
    try:
        ENGINES[plan.engine](model).close()
    except FederationError as error:
        raise PolicyError(f"The plan is refused: engine {plan.engine!r} cannot train {task.name}. {error}") from error


def check_weights(weights: Vector, task: Task, policy: SitePolicy) -> None:
    """Check the server's weights ``(D,)`` before they reach the model that trains, and before anything is spent.

    Raises:
        ProtocolError: If they do not fit the task's model or are not finite.
        PolicyError: If they are larger than the site permits, or their norm is.
    """
    if weights.nbytes > policy.max_message_mib * 2**20:
        raise PolicyError(f"The weights have {weights.nbytes} bytes, above max-message-mib {policy.max_message_mib}.")
    unpack(weights, task.build())
    norm = float(np.linalg.norm(weights.astype(np.float64)))
    if not norm <= policy.max_weights_norm:
        raise PolicyError(f"The weights' norm {norm:.3g} is above max-weights-norm {policy.max_weights_norm:g}.")


def check_hours(moment: datetime, policy: SitePolicy) -> None:
    """Check that a new round may begin now.

    Raises:
        PolicyError: Outside the hours of ``site.toml``.
    """
    if not policy.opening_hours.permit(moment):
        raise PolicyError(
            f"New rounds train here only at {policy.hours} ({', '.join(policy.days)}).", ErrorCode.OUTSIDE_HOURS
        )
