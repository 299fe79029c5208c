"""What the server demands of a reply before it may touch the global model. Pure."""

import math
from enum import StrEnum

import numpy as np
from flwr.app import Message

from server.average import LARGEST_WEIGHT
from shared.errors import ErrorCode, FederationError
from shared.messages import SiteOffer, TrainReply, TrainRequest, error_code
from shared.plan import RunPlan
from shared.weights import Vector

_SIGNAL_SLACK = 10.0
_ADAM_STEP = 7.3


class Dropped(StrEnum):
    """Why the server itself drops a reply, beside the error codes that sites send; these words stay in its registry."""

    MALFORMED = "malformed"
    FOREIGN_PLAN = "foreign-plan"
    STALE_ROUND = "stale-round"
    WRONG_SIZE = "wrong-size"
    NOT_FINITE = "not-finite"
    UPDATE_TOO_LARGE = "update-too-large"
    UPDATE_OVER_CAP = "update-over-cap"


FAULTY = frozenset(Dropped) - {Dropped.UPDATE_OVER_CAP}
"""What no honest site's reply is, short of a run without privacy that diverges. To pass the operator's cap alone is
none of it: under the noise that the plan asks for an honest update may well pass a cap below the plan's own bound."""


def check_offer(message: Message, plan: RunPlan) -> SiteOffer | ErrorCode:
    """Return a site's offer, or why there is none."""
    if message.has_error():
        return error_code(message)
    try:
        offer = SiteOffer.from_content(message.content)
    except FederationError as error:
        return error.code
    return offer if offer.plan_digest == plan.digest else ErrorCode.PLAN_CHANGED


def check_reply(
    message: Message, request: TrainRequest, declared_patients: int, cap: float | None = None
) -> Vector | ErrorCode | Dropped:
    """Return a reply's weights ``(D,)``, the site's own error code, or why the server drops the reply.

    Args:
        message: As received.
        request: What was asked.
        declared_patients: The site's.
        cap: The operator's bound on the L2 norm of the reply's weights minus the request's; ``None`` takes what the
            plan implies.
    """
    if message.has_error():
        return error_code(message)
    try:
        reply = TrainReply.from_content(message.content)
    except FederationError:
        return Dropped.MALFORMED
    return _fault(reply, request, declared_patients, cap) or reply.weights


def _fault(reply: TrainReply, request: TrainRequest, declared_patients: int, cap: float | None) -> Dropped | None:
    if reply.plan_digest != request.plan.digest:
        return Dropped.FOREIGN_PLAN
    if reply.round != request.round:
        return Dropped.STALE_ROUND
    if reply.weights.shape != request.weights.shape:
        return Dropped.WRONG_SIZE
    if not np.isfinite(reply.weights).all():
        return Dropped.NOT_FINITE
    update = np.linalg.norm(reply.weights.astype(np.float64) - request.weights)
    implied = largest_update(request.plan, len(request.weights), declared_patients)
    monstrous = np.abs(reply.weights).max(initial=0.0) >= LARGEST_WEIGHT
    if not monstrous and update <= (implied if cap is None else cap):
        return None
    return Dropped.UPDATE_TOO_LARGE if monstrous or update > implied else Dropped.UPDATE_OVER_CAP


def largest_update(plan: RunPlan, size: int, declared_patients: int) -> float:
    """Return the L2 norm that an honest site's update of one round cannot pass under ``plan``.

    With SGD a private step moves the weights by the learning rate times (clipped sum + noise) / n, with
    n = ``sample_rate`` · ``declared_patients``. The clipped sum is at most C a sampled patient, and about n are
    sampled; ten times that leaves room for a coarse figure and for chance. The noise's norm in D dimensions passes
    σC(√D + 10) with a probability below e⁻⁵⁰. Momentum multiplies the sum of steps by 1 / (1 - momentum) at most.

    With Adam (β₁ = 0.9, β₂ = 0.999) a step moves no weight by more than 7.3 learning rates, whatever the gradients:
    |m| / √v ≤ (1 - β₁) / √((1 - β₂)(1 - β₁²/β₂)) by Cauchy and Schwarz. So do a generator's steps, whose Adam
    (β₁ = 0.5, β₂ = 0.99) stays below 5.8.

    FedProx's pull only shortens the way, since the plan keeps ``learning_rate · proximal_mu`` below 1. Without
    privacy SGD has no bound: infinity.

    Args:
        plan: The agreed run.
        size: D, the number of weights.
        declared_patients: The site's.
    """
    generated = plan.generator_steps * plan.generator_learning_rate * _ADAM_STEP * math.sqrt(size)
    if plan.optimizer == "adam":
        return generated + plan.local_steps * plan.learning_rate * _ADAM_STEP * math.sqrt(size)
    if not plan.private:
        return math.inf
    expected = plan.sample_rate * declared_patients
    noise = plan.noise_multiplier * (math.sqrt(size) + 10.0) / expected
    # A site with very few expected patients may still sample one or two.
    step = plan.max_grad_norm * (_SIGNAL_SLACK * max(1.0, 1.0 / expected) + noise)
    return generated + plan.local_steps * plan.learning_rate * step / (1.0 - plan.momentum)
