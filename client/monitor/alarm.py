"""When to warn: pure rules over one patient's readings and forecasts.

An *episode* of a rule begins when the reading or the watched forecast lies beyond the threshold, and ends when both
are back on the safe side by more than the hysteresis. In an episode an alert is raised at most once for what is
*predicted* and once for what is *present*, and never within the refractory time of the patient's last alert of the
same rule: what is still so after that time is told then, so that waiting loses nothing that lasts.

A forecast that is not a number lies beyond no threshold, so silence would look like safety. It is an episode of its
own kind, as are readings that intake would not believe: told once, again after the refractory time if it lasts, and
over with the next forecast. A record that is only too short yet is no such episode: every sensor begins with one.
"""

import hashlib
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from statistics import NormalDist
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from shared.errors import PlanError
from shared.forecast_metrics import HYPER_MG_DL, HYPO_MG_DL, QUANTILES
from shared.tasks.cgm import RANGE_MG_DL, STEP_MIN
from shared.tasks.cgm_windows import HORIZON

Kind = Literal["low", "high"]
NO_FORECAST: Final = "no-forecast"
"""The kind of an alert that says: of this patient nothing is foreseen, so nobody would be warned."""
MODEL_FAILED, SENSOR_STUCK = "forecast-not-a-number", "sensor-stuck"
"""Why there is no forecast."""
Quantiles = npt.NDArray[np.float64]
_ID_DIGITS: Final = 32


class Stage(IntEnum):
    """How far an episode has come."""

    SAFE = 0
    PREDICTED = 1
    PRESENT = 2


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What is watched for.

    Attributes:
        kind: Which side of the threshold is dangerous.
        threshold_mg_dl: A value beyond it is an event.
        quantile: Of the forecast that is compared with the threshold, within those that the model gives.
        horizon_min: How far ahead is looked, in whole steps.
        hysteresis_mg_dl: How far back on the safe side everything must be before an episode ends.
        refractory_min: Least time between two alerts of this rule for one patient.

    Raises:
        PlanError: If a value makes no sense.
    """

    kind: Kind
    threshold_mg_dl: float
    quantile: float
    horizon_min: int = 30
    hysteresis_mg_dl: float = 10.0
    refractory_min: int = 30

    def __post_init__(self) -> None:
        longest = HORIZON * STEP_MIN
        rules = {
            f"the threshold must lie between {RANGE_MG_DL[0]:g} and {RANGE_MG_DL[1]:g} mg/dL": (
                RANGE_MG_DL[0] < self.threshold_mg_dl < RANGE_MG_DL[1]
            ),
            f"the quantile must lie between {QUANTILES[0]} and {QUANTILES[-1]}": (
                QUANTILES[0] <= self.quantile <= QUANTILES[-1]
            ),
            f"the horizon must be {STEP_MIN} to {longest} minutes": STEP_MIN <= self.horizon_min <= longest,
            "hysteresis and refractory time must not be negative": (
                self.hysteresis_mg_dl >= 0.0 and self.refractory_min >= 0
            ),
        }
        if broken := [rule for rule, holds in rules.items() if not holds]:  # NaN holds nowhere
            raise PlanError(f"The alarm for {self.kind} values is wrong: {'; '.join(broken)}.")

    def excess(self, value: float) -> float:
        """Return how far a value is beyond the threshold, in mg/dL; negative on the safe side."""
        return self.threshold_mg_dl - value if self.kind == "low" else value - self.threshold_mg_dl


LOW_QUANTILE: Final = 0.25
HIGH_QUANTILE: Final = 0.5
"""What is watched unless somebody chooses: see docs/glucose.md for what the alternatives cost."""
DEFAULT_RULES: Final = (
    Rule(kind="low", threshold_mg_dl=HYPO_MG_DL, quantile=LOW_QUANTILE),
    Rule(kind="high", threshold_mg_dl=HYPER_MG_DL, quantile=HIGH_QUANTILE),
)


@dataclass(frozen=True)
class Alarm:
    """The state of one rule for one patient.

    Attributes:
        told: The worst stage of the present episode that somebody was alerted to.
        start_s: When the present episode began; None outside one.
        last_alert_s: When the last alert was raised, of whatever episode.
        threshold_mg_dl: Of the rule that all this was said by: another one begins afresh. None before the first reading
            and in states written before it was kept.
    """

    told: int = Stage.SAFE
    start_s: int | None = None
    last_alert_s: int | None = None
    threshold_mg_dl: float | None = None


@dataclass(frozen=True)
class Alert:
    """One warning. It names the patient: it is for those who treat, and goes nowhere else.

    Attributes:
        id: The same whenever the same stream is watched with the same secret and rule.
        patient_id: As in the stream.
        kind: ``low``, ``high`` or ``no-forecast``.
        stage: ``predicted`` or ``present``.
        time: Of the reading that raised it, ISO 8601.
        episode_start: When the episode began, ISO 8601.
        glucose_mg_dl: The reading.
        threshold_mg_dl: The rule's; None for ``no-forecast``.
        quantile: The watched one; None for ``no-forecast``.
        forecast_mg_dl: Its most dangerous value within the horizon; None where there was no forecast.
        expected_in_min: When the watched quantile first crosses; 0 if present, None where there was no forecast.
        band_mg_dl: The quantiles 0.05, 0.5 and 0.95 at the horizon; None where there was no forecast.
        reason: Why nothing can be foreseen, of ``no-forecast``; else None.
    """

    id: str
    patient_id: str
    kind: str
    stage: str
    time: str
    episode_start: str
    glucose_mg_dl: float
    threshold_mg_dl: float | None
    quantile: float | None
    forecast_mg_dl: float | None
    expected_in_min: int | None
    band_mg_dl: tuple[float, float, float] | None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return asdict(self)


def watched_path(forecast: Quantiles, quantile: float, horizon_min: int) -> npt.NDArray[np.float64]:
    """Return one quantile of a forecast ``(HORIZON, 3)`` up to the horizon, ``(steps,)`` mg/dL.

    Between the quantiles that the model gives it follows a normal distribution of another width on either side of
    the median.
    """
    steps = horizon_min // STEP_MIN
    outer = 0 if quantile < 0.5 else -1
    weight = NormalDist().inv_cdf(quantile) / NormalDist().inv_cdf(QUANTILES[outer])
    middle = forecast[:steps, 1]
    path: npt.NDArray[np.float64] = middle + weight * (forecast[:steps, outer] - middle)
    return path


def first_crossing(rule: Rule, path: npt.NDArray[np.float64]) -> int | None:
    """Return after how many minutes the path first lies beyond the threshold, or None."""
    beyond = [number for number, value in enumerate(path, start=1) if rule.excess(float(value)) > 0.0]
    return beyond[0] * STEP_MIN if beyond else None


def advance(
    rule: Rule, alarm: Alarm, time_s: int, glucose: float, path: npt.NDArray[np.float64] | None, *, fresh: bool = False
) -> tuple[Alarm, Stage]:
    """Take in a reading and the forecast made at it.

    Args:
        rule: What is watched for.
        alarm: The state before; one of another threshold counts as none.
        time_s: Of the reading, later than every one before.
        glucose: The reading, mg/dL.
        path: The watched quantile up to the horizon, or None where no forecast could be made.
        fresh: Whether the patient's record begins anew after a gap: an episode does not outlast it.

    Returns:
        The state after, and the stage to alert to; ``SAFE`` for no alert.
    """
    if alarm.threshold_mg_dl != rule.threshold_mg_dl:  # what was told at another threshold says nothing of this one
        alarm = Alarm(threshold_mg_dl=rule.threshold_mg_dl)
    if fresh:
        alarm = _over(alarm)
    ahead = max((rule.excess(float(value)) for value in path), default=-np.inf) if path is not None else -np.inf
    here = rule.excess(glucose)
    stage = Stage.PRESENT if here > 0.0 else Stage.PREDICTED if ahead > 0.0 else Stage.SAFE
    if stage is Stage.SAFE:
        if max(here, ahead) < -rule.hysteresis_mg_dl:
            alarm = _over(alarm)
        return alarm, Stage.SAFE
    if alarm.start_s is None:
        alarm = replace(alarm, start_s=time_s)
    rested = alarm.last_alert_s is None or time_s - alarm.last_alert_s >= 60 * rule.refractory_min
    if stage <= alarm.told or not rested:
        return alarm, Stage.SAFE
    return replace(alarm, told=int(stage), last_alert_s=time_s), stage


def advance_blind(alarm: Alarm, time_s: int, blind: bool | None, refractory_min: int) -> tuple[Alarm, bool]:
    """Take in whether a patient can be forecast.

    Args:
        alarm: The state before.
        time_s: Of the reading.
        blind: True if a forecast was due and there is none, False if there is one, None if none was due yet.
        refractory_min: Least time between two alerts.

    Returns:
        The state after, and whether to alert.
    """
    if blind is None:
        return alarm, False
    if not blind:
        return _over(alarm), False
    alarm = replace(alarm, start_s=time_s) if alarm.start_s is None else alarm
    if alarm.last_alert_s is not None and time_s - alarm.last_alert_s < 60 * refractory_min:
        return alarm, False
    return replace(alarm, told=int(Stage.PRESENT), last_alert_s=time_s), True


def _over(alarm: Alarm) -> Alarm:
    """Return the state after the end of an episode."""
    return replace(alarm, told=int(Stage.SAFE), start_s=None)


def blind_id(pseudonym: bytes, reason: str, time_s: int) -> str:
    """Return the name of an alert that nothing is foreseen: a hash of who, why and when."""
    return hashlib.sha256(f"{pseudonym.hex()}/{NO_FORECAST}/{reason}/{time_s}".encode()).hexdigest()[:_ID_DIGITS]


def alert_id(pseudonym: bytes, rule: Rule, stage: Stage, start_s: int) -> str:
    """Return the name of an alert: a hash of who, what, and when the episode began."""
    text = f"{pseudonym.hex()}/{rule.kind}/{rule.threshold_mg_dl:g}/{stage.name}/{start_s}"
    return hashlib.sha256(text.encode()).hexdigest()[:_ID_DIGITS]
