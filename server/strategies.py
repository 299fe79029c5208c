"""How one model is made of the sites' weights: Flower's strategies, fed as the plan says.

| strategy | weighs by patients | in memory | reference |
| --- | --- | --- | --- |
| fedavg | yes | a running sum | McMahan et al., 2017 |
| fedprox | yes; the proximal term is the sites' (client.training) | a running sum | Li et al., 2020 |
| fedadam, fedyogi | yes | a running sum and two moments | Reddi et al., 2021 |
| median, trimmed-mean | no | every reply | Yin et al., 2018 |
| krum, multi-krum | no | every reply | Blanchard et al., 2017 |

The averaging strategies get one reply, the exact average of :mod:`server.average`, so that memory does not grow with
the number of sites. The robust ones look at every reply at once. They do not weigh: a hostile site that had declared
many patients would count for many. They get the sites' updates rather than their weights: all of them commute with a
shift, and Krum's distances lose fewer digits.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.serverapp.strategy import (
    FedAdam,
    FedAvg,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    Strategy,
)
from flwr.serverapp.strategy.fedopt import FedOpt

from server.average import StreamingAverage
from shared.errors import ProtocolError, StorageError
from shared.messages import ARRAYS, CONFIG, WEIGHT_KEY, WEIGHTS, global_weights, weighted_reply
from shared.plan import (
    FEDADAM,
    FEDAVG,
    FEDPROX,
    FEDYOGI,
    KRUM,
    MEDIAN,
    MULTI_KRUM,
    TRIMMED_MEAN,
    RunPlan,
)
from shared.weights import Vector

Moments = Mapping[str, npt.NDArray[np.floating]]
_KEYS: dict[str, Any] = {"weighted_by_key": WEIGHT_KEY, "arrayrecord_key": ARRAYS, "configrecord_key": CONFIG}
_MOMENTS = ("m_t", "v_t")


def _adaptive(plan: RunPlan) -> dict[str, Any]:
    return {"eta": plan.server_learning_rate, "tau": plan.tau}


_MAKERS: dict[str, Callable[[RunPlan], FedAvg]] = {
    FEDAVG: lambda _plan: FedAvg(**_KEYS),
    FEDPROX: lambda plan: FedProx(**_KEYS, proximal_mu=plan.proximal_mu),
    FEDADAM: lambda plan: FedAdam(**_KEYS, **_adaptive(plan)),
    FEDYOGI: lambda plan: FedYogi(**_KEYS, **_adaptive(plan)),
    MEDIAN: lambda _plan: FedMedian(**_KEYS),
    TRIMMED_MEAN: lambda _plan: FedTrimmedAvg(**_KEYS),
    KRUM: lambda plan: Krum(**_KEYS, num_malicious_nodes=plan.byzantine_sites),
    MULTI_KRUM: lambda plan: MultiKrum(**_KEYS, num_malicious_nodes=plan.byzantine_sites),
}
_ROBUST = frozenset({MEDIAN, TRIMMED_MEAN, KRUM, MULTI_KRUM})


def make_strategy(plan: RunPlan) -> Strategy:
    """Return the plan's strategy with fresh state."""
    return _MAKERS[plan.strategy](plan)


def moments(strategy: Strategy) -> Moments:
    """Return what an adaptive strategy carries from round to round; empty for the others and before round 1."""
    if not isinstance(strategy, FedOpt) or strategy.m_t is None or strategy.v_t is None:
        return {}
    return {"m_t": strategy.m_t[WEIGHTS], "v_t": strategy.v_t[WEIGHTS]}


def restore_moments(strategy: Strategy, saved: Moments) -> None:
    """Give a strategy back what :func:`moments` returned.

    Raises:
        StorageError: If that is not what this strategy carries.
    """
    if not isinstance(strategy, FedOpt):
        return
    if set(saved) != set(_MOMENTS):
        raise StorageError("The checkpoint lacks the strategy's state. Remove it to go on from the one before.")
    strategy.m_t, strategy.v_t = ({WEIGHTS: saved[name]} for name in _MOMENTS)


@dataclass
class RobustReplies:
    """Keeps every reply for a strategy that must see all of them.

    Attributes:
        start: The global weights ``(D,)``.
    """

    start: Vector
    replies: dict[str, Vector] = field(default_factory=dict)

    def add(self, site: str, _patients: int, weights: Vector) -> None:
        """Take one site's weights."""
        self.replies[site] = weights

    def aggregate(self, strategy: Strategy, plan: RunPlan, number: int) -> Vector:
        """Return the new global weights ``(D,)``."""
        # A quorum that is less because faulty replies were dropped may leave fewer than would hold the plan's number.
        hostile = min(plan.byzantine_sites, (len(self.replies) - 1) // 2)
        _fit(strategy, hostile, len(self.replies))
        updates = [self.replies[site] - self.start for site in sorted(self.replies)]
        merged = _ask(strategy, number, updates)
        return (self.start.astype(np.float64) + merged).astype(np.float32)


@dataclass
class AveragedReplies:
    """Averages replies as they arrive; see :mod:`server.average`."""

    start: Vector
    average: StreamingAverage

    def add(self, site: str, patients: int, weights: Vector) -> None:
        """Take one site's weights."""
        self.average.add(site, patients, weights)

    def aggregate(self, strategy: Strategy, _plan: RunPlan, number: int) -> Vector:
        """Return the new global weights ``(D,)``."""
        if isinstance(strategy, FedOpt):
            strategy.current_arrays = {WEIGHTS: self.start}
        return _ask(strategy, number, [self.average.result()])


Replies = RobustReplies | AveragedReplies


def collect(plan: RunPlan, start: Vector, most_patients: int, max_share: float) -> Replies:
    """Return what takes in one round's replies and aggregates them.

    Args:
        plan: Names the strategy.
        start: The global weights ``(D,)`` of the round.
        most_patients: Σ of the declared patients of the sites that are asked.
        max_share: See :func:`server.average.capped_shares`; the robust strategies do not weigh.
    """
    if plan.strategy in _ROBUST:
        return RobustReplies(start)
    return AveragedReplies(start, StreamingAverage(len(start), most_patients, max_share))


def _fit(strategy: Strategy, hostile: int, replies: int) -> None:
    """Tell the strategy what depends on how many replies there are."""
    if isinstance(strategy, FedTrimmedAvg):
        # Flower trims ⌊beta · n⌋ at each end; a hair above f / n is f whatever the rounding.
        strategy.beta = math.nextafter(hostile / replies, 1.0)
    elif isinstance(strategy, MultiKrum) and not isinstance(strategy, Krum):
        strategy.num_nodes_to_select = replies - hostile


def _ask(strategy: Strategy, number: int, vectors: list[Vector]) -> Vector:
    arrays, _ = strategy.aggregate_train(number, [weighted_reply(vector) for vector in vectors])
    if arrays is None:
        raise ProtocolError("The strategy gave no weights.")
    merged = global_weights(arrays)
    if not np.isfinite(merged).all():
        raise ProtocolError("The aggregated weights are not finite.")
    return merged
