"""What a nodule classifier is compared with at no cost: the nodule's size alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from shared.records import RecordStore
from shared.tasks.nodule_classification import TASK, judge_nodules


def size_alone(_training: Mapping[str, RecordStore], judged: RecordStore) -> dict[str, Any]:
    """Judge the annotated diameter as if it were a model's score; nothing where data has no diameter."""
    if "diameter_mm" not in judged.arrays:
        return {}
    evaluation = judge_nodules(judged, np.asarray(judged.arrays["diameter_mm"], np.float64))
    return {"size_only": {TASK.metric: evaluation.metrics[TASK.metric]}}
