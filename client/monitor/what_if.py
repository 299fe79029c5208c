"""The forecast under another dose or meal: exploratory, and not for clinical use.

A forecaster has learnt how insulin and food go together with what glucose did in the past of people who decided for
themselves; that is no model of what a dose causes. So an answer is given only where the model reacts to both as
physiology demands (insulin lowers, carbohydrate raises), and it is refused for a model without covariates.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from client.monitor.alarm import Quantiles
from shared.errors import PlanError
from shared.records import RecordStore
from shared.tasks.cgm import COVARIATES
from shared.tasks.cgm_windows import segment_edges
from shared.tasks.glucose_forecast import HISTORY, INPUTS, forecast, readings_at

WARNING: Final = "Exploratory: NOT FOR CLINICAL USE. A forecast is no statement of what a dose or a meal would cause."
_PROBE: Final = {"insulin": 2.0, "carbohydrate": 30.0}
_SIGN: Final = {"insulin": -1.0, "carbohydrate": 1.0}


@dataclass(frozen=True)
class Answer:
    """Two forecasts of the hour after a patient's last reading.

    Attributes:
        last_mg_dl: The last reading.
        as_recorded: ``(HORIZON, 3)`` mg/dL.
        changed: The same under the other dose and meal.
    """

    last_mg_dl: float
    as_recorded: Quantiles
    changed: Quantiles


def what_if(model: nn.Module, record: RecordStore, insulin_units: float, carbohydrate_g: float) -> Answer:
    """Forecast from a patient's last readings, as they are and under a changed dose and meal.

    What is added is taken to be given in the 5 minutes before the last reading; what is taken away, from the latest
    doses and meals of the last three hours.

    Args:
        model: The forecaster.
        record: Store of one patient, with insulin and carbohydrates.
        insulin_units: How much more, or with a minus less.
        carbohydrate_g: How much more, or with a minus less.

    Raises:
        PlanError: If the record has no covariates, the model does not react to them or the wrong way, or more is to
            be taken away than was given.
    """
    missing = [name for name in COVARIATES if name not in record.attributes.get("covariates", ())]
    if missing:
        raise PlanError(f"The export has no {' and no '.join(missing)}: there is nothing to change.")
    end = segment_edges(record)[1][-1:]
    readings = readings_at(record, end)
    _check_reaction(model, readings)
    changes = {"insulin": insulin_units, "carbohydrate": carbohydrate_g}
    other = readings
    for name, amount in changes.items():
        other = changed(other, name, amount)
    both = forecast(model, torch.cat([readings, other]))
    return Answer(float(readings[0, -1, 0]), both[0], both[1])


def changed(readings: Tensor, name: str, amount: float) -> Tensor:
    """Return readings ``(1, HISTORY, 4)`` with more or less of a covariate.

    Raises:
        PlanError: If less is left than nothing.
    """
    column, readings = INPUTS.index(name), readings.clone()
    if amount >= 0.0:
        readings[0, -1, column] += amount
        return readings
    left = -amount
    for step in range(HISTORY - 1, -1, -1):
        taken = min(left, float(readings[0, step, column]))
        readings[0, step, column] -= taken
        left -= taken
    if left > 1e-6:
        raise PlanError(f"In the last three hours less {name} was recorded than is to be taken away.")
    return readings


def _check_reaction(model: nn.Module, readings: Tensor) -> None:
    """Refuse a model that does not react to insulin and food, or the wrong way, at the end of the hour."""
    bare = readings.clone()
    bare[..., 1:3] = 0.0
    probes = torch.cat([bare, *(changed(bare, name, amount) for name, amount in _PROBE.items())])
    found = forecast(model, probes)[:, -1, 1]
    if not np.isfinite(found).all():  # NaN is neither zero nor negative
        raise PlanError("This model's forecast is not a number, so it cannot answer. Use another checkpoint.")
    for number, name in enumerate(_PROBE, start=1):
        reaction = _SIGN[name] * (found[number] - found[0])
        if reaction == 0.0:
            raise PlanError(f"This model was trained without {name}: it cannot say what another amount would change.")
        if reaction < 0.0:
            raise PlanError(
                f"This model reacts to {name} against all physiology: it has not learnt what {name} does, and no "
                "answer of it would mean anything. Use one that was trained on records of insulin and food."
            )
