"""How good a model is, as a value: what the registry keeps and the report reads, without the model or torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shared.metrics import Estimate
from shared.operating_point import OperatingPoint


@dataclass(frozen=True)
class Evaluation:
    """How good a model is on a data set.

    Attributes:
        metrics: Metric name to value, with a 95% interval where one is computed.
        by_group: The primary metric for parts of the data that are worth telling apart (scanner vendors).
        details: What a report draws; plain JSON values.
        operating_point: Where the model's score becomes a decision, for a task that decides.
    """

    metrics: Mapping[str, float | Estimate]
    by_group: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    operating_point: OperatingPoint | None = None

    def value(self, name: str) -> float:
        """Return a metric's point value."""
        metric = self.metrics[name]
        return metric.value if isinstance(metric, Estimate) else metric
